"""Components: the schema of a signature, building, overrides, identity, JSON, and errors that name the field."""

import copy
import dataclasses
import json
import math
import pickle
from typing import Annotated, Any, Literal

import flax.linen as nn
import pytest
from ml_collections import ConfigDict

from diffax import components
from diffax.components import (
    RUNTIME,
    TRAINING,
    WIRED,
    Each,
    Fields,
    Group,
    In,
    Length,
    Of,
    Section,
    build,
    component,
    describe,
    each,
    find,
    names,
    schema,
    spec,
    table,
)
from diffax.errors import UserError

HERE = __name__  # this module is imported by path, as a user's would be


# ---- components of the test ------------------------------------------------------------------------------------------


@component("filter", "blur")
def blur(*, sigma: Annotated[float, In(0, 10, above=True)] = 1.0, sides: Annotated[tuple[int, ...], In(1)] = (3, 5)):
    """Makes it soft.

    Args:
      sigma: width of the kernel,
        in pixels.
      sides: of the window.
    """
    return "blur", sigma, sides


@component("filter", "sharpen")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharpen:
    """Makes it crisp.

    Attributes:
      amount: how much.
      size: of the pictures.
    """

    amount: Annotated[float, In(0), RUNTIME] = 0.5
    size: Annotated[int, WIRED] = 0

    def __post_init__(self):
        if self.amount == 13:
            raise ValueError("amount must not be 13, got 13")


def outside(*, gamma: float = 5.0, mode: Literal["a", "b"] = "a"):
    """A component that no decorator names."""
    return "outside", gamma, mode


@component("engine", "steam")
class Steam(nn.Module):
    """A Flax module, whose name and parent are no fields."""

    width: Annotated[int, In(1, 64)] = 8
    dtype: Annotated[Literal["float32", "bfloat16"], RUNTIME] = "float32"
    count: Annotated[int, WIRED] = 1


def paint(*, colour: str = "red", coats: Annotated[int, In(1, 9), TRAINING] = 1):
    """A group of fields."""


@component("car", "van")
def van(
    *,
    doors: Annotated[int, In(2, 5)] = 4,
    speed: Annotated[float | Literal["auto"], In(0, 1)] = "auto",
    names: Annotated[tuple[str, ...], Length(0, 2)] = (),
    turbo: bool = False,
    limit: int | None = None,
    engine: Annotated[Any, Of("engine", "steam", late=True)],
    filters: Annotated[dict, Each("filter", ("blur",))],
    finish: Annotated[Any, Group(paint)],
    other: Annotated[Any, Section(needs="honk", what="a car with a horn")] = "",
    plate: Annotated[str, WIRED] = "none",
):
    """Carries things."""
    return {
        "doors": doors, "speed": speed, "names": names, "turbo": turbo, "limit": limit, "engine": engine(count=3),
        "filters": filters, "finish": finish, "other": other, "plate": plate,
    }  # fmt: skip


def car(**fields) -> ConfigDict:
    return spec("car", "van", **fields)


def set_by(*overrides: str) -> ConfigDict:
    """A car after overrides such as 'doors=3'."""
    section = car()
    for text in overrides:
        path, _, value = text.partition("=")
        components.override(schema(van), section, path.split("."), value, "config.car")
    return section


def one_line(call, *args, **kwargs) -> str:
    """The message of the UserError that the call raises; one line, short enough to read."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


# ---- schemas ---------------------------------------------------------------------------------------------------------


def test_a_signature_is_a_schema():
    fields = schema(van)
    assert [*fields] == ["doors", "speed", "names", "turbo", "limit", "engine", "filters", "finish", "other"]
    assert fields["doors"].default == 4 and fields["doors"].hint is int
    assert schema(blur)["sigma"].doc == "width of the kernel, in pixels."
    assert schema(Sharpen)["amount"].doc == "how much."


def test_wired_arguments_and_those_of_flax_are_no_fields():
    assert [*schema(Sharpen)] == ["amount"] and [*schema(Steam)] == ["width", "dtype"]
    assert [*schema(lambda *, given, known=3: None)] == ["known"]  # nothing says what a config would hold


def test_a_function_may_have_a_field_called_name():
    def group(*, name: str = "x", seed: int = 0):
        """A group."""

    assert [*schema(group)] == ["name", "seed"]


def test_spec_holds_every_field_in_the_order_of_the_signature():
    section = car()
    assert [*section] == ["name", *schema(van)] and section.name == "van"
    assert section.engine.to_dict() == {"name": "steam", "width": 8, "dtype": "float32"}
    assert section.filters.to_dict() == {"blur": {"name": "blur", "sigma": 1.0, "sides": (3, 5)}}
    assert section.finish.to_dict() == {"colour": "red", "coats": 1}
    assert spec("filter", "blur", sigma=2.0).sigma == 2


def test_spec_of_an_unknown_field_or_component():
    assert "unknown field filter blur.sigmar; did you mean filter blur.sigma?" in one_line(
        spec, "filter", "blur", sigmar=3
    )
    assert "did you mean sharpen?" in one_line(spec, "filter", "sharpn")
    assert "must name a filter or an import path, got 3" in one_line(spec, "filter", 3)


def test_sections_do_not_share_what_they_hold():
    one, two = car(), car()
    one.engine.width, one.filters.blur.sigma = 9, 3.0
    assert two.engine.width == 8 and two.filters.blur.sigma == 1


@pytest.mark.parametrize(
    "field, words",
    [
        ("doors", "a whole number in [2, 5]"),
        ("speed", "a number in [0, 1] or one of 'auto'"),
        ("names", "a tuple of 0 to 2 items, each text"),
        ("turbo", "true or false"),
        ("limit", "a whole number or none"),
    ],
)
def test_what_a_field_holds_in_words(field, words):
    assert schema(van)[field].allowed == words
    assert str(In(0, above=True)) == "above 0" and str(In(1)) == "at least 1" and str(Length(2, 2)) == "2"


@pytest.mark.parametrize(
    "field, good, bad",
    [
        ("doors", (2, 5), (1, 6, 2.0, True, "2", None, (2,), [2], 2**70)),
        ("speed", (0, 1, 0.5, "auto"), (1.5, -0.1, "Auto", "", None, math.nan, math.inf, True, ())),
        ("names", ((), ("a",), ("a", "b")), (("a", "b", "c"), ["a"], "a", ("a", 1), None)),
        ("turbo", (True, False), (0, 1, "true", None)),
        ("limit", (3, None), (3.5, "none", True)),
    ],
)
def test_values_that_a_field_accepts(field, good, bad):
    assert all(schema(van)[field].accepts(value) for value in good)
    for value in bad:
        assert not schema(van)[field].accepts(value), value
        message = one_line(components.check, schema(van), Fields({**car(), field: value}), "config.car")
        assert message.startswith(f"config.car.{field} must be {schema(van)[field].allowed}, got "), message


def test_bounds_that_a_field_excludes():
    sigma = schema(blur)["sigma"]
    assert sigma.accepts(1e-9) and sigma.accepts(10) and not sigma.accepts(0)
    below = schema(components.registry.by_path("x", f"{HERE}:below", ""))["share"]
    assert below.accepts(0) and not below.accepts(1)


def below(*, share: Annotated[float, In(0, 1, below=True)] = 0.0):
    """A share."""


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_names_of_a_kind():
    assert names("filter") == ["blur", "sharpen"] and names("nothing") == []
    assert {"simple", "vlb", "hybrid"} <= {*names("loss")} and "unet" in names("network")


def test_an_import_path_names_a_component():
    section = spec("filter", f"{HERE}:outside", gamma=2.0)
    assert section.to_dict() == {"name": f"{HERE}:outside", "gamma": 2.0, "mode": "a"}
    assert build(section, "filter") == ("outside", 2.0, "a")
    assert find("filter", f"{HERE}:Sharpen") is Sharpen


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_lab:loss", ["cannot import 'no_such_lab'", "ModuleNotFoundError", "correct the path"]),
        (f"{HERE}:outsid", ["has no 'outsid'", "did you mean outside?"]),
        (f"{HERE}:HERE", ["is no factory of a filter"]),
        (f"{HERE}:", ["has no ''"]),
        (":x", ["cannot import ''"]),
        (f"{HERE}:outside.deep", ["has no 'outside.deep'"]),
        ("x" * 5000, ["must be one of 'blur', 'sharpen'"]),
        ("", ["must name a filter or an import path"]),
        ("../x:y", ["cannot import"]),
    ],
)
def test_a_component_that_is_not_there(name, words):
    message = one_line(find, "filter", name, "config.car.filters.x")
    assert message.startswith("config.car.filters.x ") and all(word in message for word in words), message


def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_lab.py").write_text("raise RuntimeError('one\\ntwo')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "RuntimeError: one two" in one_line(find, "filter", "broken_lab:x")


# ---- building --------------------------------------------------------------------------------------------------------


def test_build_walks_the_tree():
    made = build(car(doors=3, names=("a",)), "car", plate="X 1")
    assert made["doors"] == 3 and made["plate"] == "X 1" and made["names"] == ("a",)
    assert isinstance(made["engine"], Steam) and made["engine"].count == 3
    assert made["filters"] == {"blur": ("blur", 1.0, (3, 5))}
    assert made["finish"].colour == "red" and made["other"] is None


def test_build_takes_plain_data_and_fills_in_what_it_lacks():
    assert build({"name": "blur", "sides": [7]}, "filter") == ("blur", 1.0, (7,))
    assert build({"name": "van"}, "car")["doors"] == 4


def test_several_are_built_in_their_order():
    section = car(filters=each("filter", "sharpen", "blur", mine=spec("filter", f"{HERE}:outside")))
    assert [*build(section, "car")["filters"]] == ["sharpen", "blur", "mine"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"doors": 9}, "config.car.doors must be a whole number in [2, 5], got 9"),
        (
            {"engine": spec("engine", "steam", width=0)},
            "config.car.engine.width must be a whole number in [1, 64], got 0",
        ),
        ({"finish": {"colour": "red", "coats": 0}}, "config.car.finish.coats must be"),
        ({"filters": {"x": {"name": "blur", "sigma": 0}}}, "config.car.filters.x.sigma must be"),
        ({"filters": {"x": {"name": "sharpen", "amount": 13}}}, "config.car.filters.x: amount must not be 13, got 13"),
        ({"filters": {"x": {"name": "blurr"}}}, "config.car.filters.x must be one of"),
        ({"filters": 3}, "config.car.filters must be filters by name, got 3"),
        ({"other": "truck"}, "config.car.other names the section 'truck', but there is no config around"),
    ],
)
def test_errors_of_building_carry_the_path(changes, words):
    section = {**car(), **changes}
    assert one_line(build, section, "car", path="config.car").startswith(words)


def test_a_section_is_looked_up_and_must_have_what_is_needed():
    class Horn:
        honk = True

    models = {"truck": Horn(), "bike": object()}
    refer = lambda name, path: models[name]  # noqa: E731
    assert build(car(other="truck"), "car", refer=refer)["other"] is models["truck"]
    message = one_line(build, car(other="bike"), "car", path="config.car", refer=refer)
    assert message == "config.car.other must name the section of a car with a horn, got 'bike', which is none"


def test_a_bug_inside_a_factory_is_not_hidden():
    with pytest.raises(TypeError, match="NoneType"):
        build({"name": f"{HERE}:buggy"}, "filter")


def buggy():
    """Fails."""
    return None + 1


# ---- checking --------------------------------------------------------------------------------------------------------


def test_a_section_of_defaults_is_valid():
    components.check(schema(van), car(), "config.car")


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("door", 3, "unknown field config.car.door; did you mean config.car.doors?"),
        ("engine.widht", 3, "unknown field config.car.engine.widht; did you mean config.car.engine.width?"),
        ("width", 3, "unknown field config.car.width; did you mean config.car.engine.width?"),
        ("colour", "red", "unknown field config.car.colour; did you mean config.car.finish.colour?"),
        ("finish.zzz", 3, "unknown field config.car.finish.zzz; config.car.finish has colour, coats"),
        ("engine.name", "stem", "config.car.engine must be one of 'steam'"),
        ("engine", 3, "config.car.engine must be a section of fields, got 3"),
        ("finish", (), "config.car.finish must be a section of fields, got ()"),
        ("filters.blur.sigma", -1.0, "config.car.filters.blur.sigma must be"),
        ("filters.blur", 3, "config.car.filters.blur must be a section of fields, got 3"),
    ],
)
def test_a_field_that_is_wrong(path, value, words):
    section, target = car(), None
    target, *rest = [section, *path.split(".")]
    for name in rest[:-1]:
        target = target[name]
    target[rest[-1]] = value
    assert one_line(components.check, schema(van), section, "config.car").startswith(words)


def test_a_missing_field_and_its_default():
    section = car()
    del section.doors
    assert (
        one_line(components.check, schema(van), section, "config.car")
        == "config.car.doors is missing; its default is 4"
    )


def test_words_of_other_code_find_the_field():
    message = one_line(components.check, schema(van), Fields({**car(), "takes": 1}), "config.car")
    assert message.startswith("unknown field config.car.takes;")
    net = schema(find("network", "unet"))
    for word, field in {
        "model_channels": "channels",
        "num_heads": "heads",
        "attention_resolutions": "attention",
    }.items():
        section = spec("network", "unet")
        section[word] = 3
        assert f"did you mean config.net.{field}?" in one_line(components.check, net, section, "config.net")


def test_long_values_are_cut():
    message = one_line(components.check, schema(van), Fields({**car(), "names": ("x" * 10_000,) * 3}), "config.car")
    assert len(message) < 250
    assert len(components.shown("x" * 10_000)) == 80 and components.shown("a\nb") == r"'a\nb'"


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("doors=3", 3),
        ("doors=3e0", 3),
        ("doors=+3", 3),
        ("speed=0.25", 0.25),
        ("speed=1", 1.0),
        ("speed=AUTO", "auto"),
        ("speed='auto'", "auto"),
        ("names=a,b", ("a", "b")),
        ("names=(a, b)", ("a", "b")),
        ("names=('a,b','c')", ("a,b", "c")),
        ("names=[a]", ("a",)),
        ("names=a,", ("a",)),
        ("names=none", ()),
        ("names=()", ()),
        ("names=", ()),
        ("turbo=True", True),
        ("turbo=false", False),
        ("limit=7", 7),
        ("limit=none", None),
        ("other=truck", "truck"),
        ("other=", ""),
        ("engine.width=16", 16),
        ("engine.dtype=bfloat16", "bfloat16"),
        ("finish.colour='dark red'", "dark red"),
        ("filters.blur.sigma=3", 3.0),
        ("filters.blur.sides=7,9", (7, 9)),
    ],
)
def test_override(text, value):
    found = set_by(text)
    for name in text.partition("=")[0].split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("doors=3.5", "config.car.doors must be a whole number in [2, 5], got '3.5'"),
        ("doors=x", "config.car.doors must be"),
        ("doors=", "config.car.doors must be"),
        ("doors=nan", "config.car.doors must be"),
        ("doors=1e999", "config.car.doors must be"),
        ("doors=" + "9" * 5000, "config.car.doors must be"),
        ("turbo=1", "config.car.turbo must be true or false, got '1'"),
        ("speed=fast", "config.car.speed must be a number in [0, 1] or one of 'auto', got 'fast'"),
        ("filters.blur.sides=3,x", "config.car.filters.blur.sides must be"),
        ("filters.blur.sides=" + "-" * 3000, "config.car.filters.blur.sides must be"),
        ("filters.blur.sides=" + "(" * 3000, "config.car.filters.blur.sides must be"),
        ("doors.x=3", "unknown field config.car.doors.x; config.car.doors holds a value"),
        ("dors=3", "unknown field config.car.dors; did you mean config.car.doors?"),
        ("engine.widht=3", "unknown field config.car.engine.widht; did you mean config.car.engine.width?"),
        ("engine=stem", "config.car.engine must be one of 'steam'"),
        ("finish=3", "config.car.finish is a section; set one of its fields, such as config.car.finish.colour"),
        ("filters=blur,shapren", "config.car.filters must be one of 'blur', 'sharpen'"),
        ("filters.blurr.sigma=3", "unknown filter config.car.filters.blurr; did you mean blur?"),
        ("filters.Blur=blur", "config.car.filters.Blur is no name of small letters"),
        ("x" * 5000 + "=3", "unknown field config.car.xxx"),
    ],
)
def test_override_that_is_wrong(text, words):
    assert one_line(set_by, text).startswith(words)


def test_another_component_brings_its_own_fields():
    section = set_by(f"filters.blur={HERE}:outside", "filters.blur.gamma=2")
    assert section.filters.blur.to_dict() == {"name": f"{HERE}:outside", "gamma": 2.0, "mode": "a"}


def test_the_same_component_keeps_its_fields():
    section = car(engine=spec("engine", "steam", width=32))
    components.override(schema(van), section, ["engine"], "steam", "config.car")
    assert section.engine.width == 32


def test_several_are_named_in_order_and_keep_what_is_there():
    section = set_by("filters.blur.sigma=3", "filters=sharpen,blur")
    assert [*section.filters] == ["sharpen", "blur"] and section.filters.blur.sigma == 3
    assert [*set_by("filters=none").filters] == []
    assert [*set_by("filters.mine=sharpen").filters] == ["blur", "mine"]
    assert [*set_by("filters.blur=none").filters] == []


def test_several_are_named_by_import_paths():
    section = set_by(f"filters={HERE}:outside,blur", "filters.outside.gamma=2")
    assert [*section.filters] == ["outside", "blur"] and section.filters.outside.gamma == 2
    build(section, "car")


# ---- several by name -------------------------------------------------------------------------------------------------


def test_each_keeps_the_order_and_the_names():
    found = each("filter", "sharpen", "blur", soft="blur", mine=spec("filter", f"{HERE}:outside", gamma=1.0))
    assert [(key, its.name) for key, its in found.items()] == [
        ("sharpen", "sharpen"), ("blur", "blur"), ("soft", "blur"), ("mine", f"{HERE}:outside"),
    ]  # fmt: skip
    assert [*each("filter", f"{HERE}:outside")] == ["outside"] and [*each("filter")] == []
    assert "did you mean blur?" in one_line(each, "filter", "blurr")


def orders(section: ConfigDict) -> list:
    """The names of all fields, in order, of a section and those below it."""
    return [(name, orders(its) if isinstance(its, ConfigDict) else None) for name, its in section.items()]


@pytest.mark.parametrize(
    "again",
    [
        ConfigDict.copy_and_resolve_references,
        copy.deepcopy,
        lambda section: pickle.loads(pickle.dumps(section)),
        lambda section: components.complete(schema(van), json.loads(json.dumps(section.to_dict())), "config.car"),
    ],
    ids=["copy", "deepcopy", "pickle", "json"],
)
def test_order_and_values_survive(again):
    section = car(filters=each("filter", "sharpen", "blur", a="blur"), names=("x",))
    found = again(section)
    assert found == section and orders(found) == orders(section) and type(found) is Fields
    found.filters.b = spec("filter", "blur")
    found.doors = "text is left to the schema"
    assert [*found.filters] == ["sharpen", "blur", "a", "b"] and [*section.filters] == ["sharpen", "blur", "a"]


def test_update_replaces_components_and_fills_groups():
    section = car()
    section.update(engine=spec("engine", "steam", width=2), finish={"coats": 3}, doors=2)
    assert (section.engine.width, section.finish.coats, section.finish.colour, section.doors) == (2, 3, "red", 2)
    section.filters.update(blur=spec("filter", f"{HERE}:outside"))
    assert "sigma" not in section.filters.blur


# ---- as data ---------------------------------------------------------------------------------------------------------


def test_complete_fills_in_defaults_and_makes_tuples():
    found = components.complete(schema(van), {"name": "van", "names": ["a"], "filters": {"x": {"name": "blur"}}}, "c")
    assert found.names == ("a",) and found.doors == 4 and found.filters.x.sides == (3, 5)


@pytest.mark.parametrize(
    "data, words",
    [
        ({"doors": 1}, "config.car.doors must be"),
        ({"dors": 1}, "unknown field config.car.dors; did you mean config.car.doors?"),
        ({"engine": {"name": "coal"}}, "config.car.engine must be one of"),
        ({"engine": 3}, "config.car.engine must be a section of fields, got 3"),
        ({"filters": [1]}, "config.car.filters must be filters by name"),
        (3, "config.car must be a section of fields, got 3"),
    ],
)
def test_data_that_are_no_section(data, words):
    assert one_line(components.complete, schema(van), data, "config.car").startswith(words)


def test_identity_leaves_out_what_changes_no_parameter():
    found = components.identity(schema(van), car())
    assert found["engine.width"] == 8 and found["filters.blur.sides"] == [3, 5] and found["name"] == "van"
    assert "engine.dtype" not in found and "finish.coats" not in found
    assert components.identity(schema(van), car(), training=True)["finish.coats"] == 1
    assert "engine.dtype" not in components.identity(schema(van), car(), training=True)


def test_identity_knows_the_order_of_several():
    one, two = (car(filters=each("filter", *order)) for order in (("blur", "sharpen"), ("sharpen", "blur")))
    one, two = (components.identity(schema(van), section) for section in (one, two))
    assert {name for name in one if one[name] != two[name]} == {"filters"}


# ---- in words --------------------------------------------------------------------------------------------------------


def test_describe_names_every_field():
    text = describe("filter")
    assert "filter blur: Makes it soft." in text
    assert "sigma = 1.0  (a number in (0, 10]) width of the kernel, in pixels." in text
    assert describe("filter", "sharpen").startswith("filter sharpen: Makes it crisp.") and "blur" not in describe(
        "filter", "sharpen"
    )
    assert (
        "a car with a horn" in describe("car")
        and "an engine" in describe("car")
        and "filters by name" in describe("car")
    )


def test_table_is_markdown():
    rows = table("filter").split("\n")
    assert rows[0] == "| component | field | default | holds | meaning |"
    assert len({row.count("|") for row in rows}) == 1 and "`sigma`" in table("filter")


@pytest.mark.parametrize("kind", components.HOMES)
def test_every_component_of_diffax_says_what_it_is(kind):
    for name in names(kind):
        factory = find(kind, name)
        assert (factory.__doc__ or "").strip(), (kind, name)
        spec(kind, name)
        for field in schema(factory).values():
            assert field.nested or field.accepts(field.default), (kind, name, field.name, field.default)
            assert field.doc, (kind, name, field.name)
