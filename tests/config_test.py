"""Configs: each builds, validates and survives JSON; every mistake is one line naming the field."""

import json
import math
import textwrap

import jax
import pytest
from ml_collections import ConfigDict

from diffax import config as configs
from diffax.config import STAGE, TOP, Field
from diffax.errors import UserError

PUBLISHED = {
    "ddpm_cifar10": 35_746_307,
    "ddpm_lsun_256:bedroom": 113_673_219,
    "ddpm_lsun_256:cat": 113_673_219,
    "ddpm_lsun_256:church": 113_673_219,
    "ddpm_celebahq_256": 113_673_219,
    "iddpm_cifar10:hybrid": 52_546_438,
    "iddpm_cifar10:vlb": 52_546_438,
    "iddpm_imagenet_64": 121_063_942,
    "iddpm_imagenet_64:vlb": 121_063_942,
    "iddpm_imagenet_64:cond": 273_049_350,
}
SPECS = [
    f"{name}:{variant}" if variant else name
    for name, (_, variants) in configs.available().items()
    for variant in ("", *variants, *(f"{v},tiny" for v in variants if v != "tiny"))
]
FIELDS = {f"config.{p}": f for p, f in TOP.items()} | {f"config.base.{p}": f for p, f in STAGE.items()}


def one_line(call, *args, **kwargs) -> str:
    """The message of the UserError that the call raises; one line, short enough to read."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


def put(config: ConfigDict, path: str, value) -> ConfigDict:
    """Sets a field past the type checks and casts of ConfigDict, as an edited file could."""
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    with config.unlocked():
        if leaf in section:
            del section[leaf]
        section[leaf] = value
    return config


def get(config: ConfigDict, path: str):
    for name in path.split(".")[1:]:
        config = config[name]
    return config


def defaults() -> ConfigDict:
    return configs.config_defaults("test")


# ---- the configs that come with diffax -----------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_config_is_valid_and_survives_json(spec):
    config = configs.load(spec)
    assert config.is_locked
    configs.validate(config)
    configs.validate(config, device_count=8, process_count=2)
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    configs.validate(again)
    assert again == config
    assert jax.tree.map(type, again.to_dict()) == jax.tree.map(type, config.to_dict())


def test_every_config_describes_itself():
    found = configs.available()
    assert {"quickstart", *(name.split(":")[0] for name in PUBLISHED)} == set(found)
    for name, (summary, variants) in found.items():
        assert summary and "tiny" in variants, name
        assert configs.load(name).name.startswith(name)


@pytest.mark.parametrize("spec", [s for s in SPECS if "tiny" in s])
def test_tiny_keeps_the_method(spec):
    tiny, full = configs.load(spec), configs.load(spec.replace("tiny", "").strip(",").rstrip(":,"))
    for path in ("predicts", "variance", "timesteps", "sampler"):
        assert tiny.base[path] == full.base[path]
    for path in ("loss", "schedule"):
        assert tiny.base[path].name == full.base[path].name
    assert tiny.base.data.name in configs.EMBEDDED
    assert math.prod(tiny.base.shape) <= 16 * 16 * 3 and tiny.base.net.channels <= 32


@pytest.mark.parametrize("spec, count", PUBLISHED.items())
def test_parameters_are_as_many_as_published(spec, count):
    from diffax import models

    stage = configs.load(spec).base
    learned = str(stage.variance).startswith("learned")
    network = models.build(
        stage.net.to_dict(),
        shape=stage.shape,
        takes=stage.takes,
        num_classes=stage.num_classes,
        out_channels=stage.shape[-1] * (1 + learned),
    )
    inputs = models.example_inputs(network, stage.shape)
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_hyper_parameters_of_the_papers():
    ddpm = configs.load("ddpm_cifar10").base
    assert ddpm.variance == "fixed_large" and ddpm.loss.name == "simple" and ddpm.net.dropout == 0.1
    assert configs.load("ddpm_lsun_256:church").base.variance == "fixed_small"
    assert [configs.load(f"ddpm_lsun_256:{s}").base.data.flip for s in ("bedroom", "cat")] == [0, 1]
    hybrid, vlb = (configs.load(f"iddpm_cifar10:{v}").base for v in ("hybrid", "vlb"))
    assert (hybrid.loss.name, hybrid.loss.weight, hybrid.timesteps.name) == ("hybrid", 4, "uniform")
    assert (vlb.loss.name, vlb.loss.weight) == ("vlb", 4000)
    assert vlb.timesteps.name == "loss_second_moment"
    cond = configs.load("iddpm_imagenet_64:cond").base
    assert cond.loss.weight == 1 and not cond.schedule.rescale_time and hybrid.schedule.rescale_time
    for stage in (hybrid, vlb, cond):
        assert stage.train.clip == 0 and stage.train.warmup_steps == 0 and not stage.data.flip


def test_choices_are_those_of_the_modules():
    from diffax import data, losses, models, parallel, samplers, schedules, stages, timesteps

    for path, there in {
        "guidance": stages.GUIDANCE,
        "sampler.name": samplers.SAMPLERS,
        "loss.name": losses.LOSSES,
        "timesteps.name": timesteps.TIMESTEPS,
        "schedule.name": {*schedules.BETAS, *configs.CONTINUOUS},
        "data.name": data.names(),
        "parallel": parallel.MODES,
    }.items():
        assert set((STAGE | TOP)[path].choices) == set(there), path
    for path, field in STAGE.items():
        if path.startswith("net."):
            for choice in field.choices:
                net = defaults().base.net.to_dict() | {path.removeprefix("net."): choice}
                assert models.build(net, shape=(32, 32, 3), out_channels=3)


# ---- finding a config ----------------------------------------------------------------------------


def test_a_config_is_found_by_name_and_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = configs.load("ddpm_cifar10:tiny")
    assert configs.load("configs/ddpm_cifar10.py:tiny") == wanted
    assert configs.load("ddpm_cifar10.py:tiny") == wanted
    assert configs.load("iddpm_cifar10:vlb+tiny") == configs.load("iddpm_cifar10:tiny,vlb")


def test_a_file_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "quickstart.py"
    file.write_text(
        "from diffax.config import config_defaults\n"
        "VARIANTS = {'b': 'another'}\n"
        "get_config = lambda variant='': config_defaults('mine' + variant)\n"
    )
    assert configs.load("configs/quickstart.py").name == "mine"
    assert configs.load(f"{file}:b").name == "mineb"
    assert configs.load("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("ddpm_cifar", "did you mean ddpm_cifar10"),
        ("configs/quikstart.py", "did you mean quickstart"),
        ("/nowhere/quickstart.py", "/nowhere/quickstart.py"),
        ("", "quickstart"),
        ("configs", "quickstart"),
        ("quickstart:tinny", "did you mean tiny"),
        ("iddpm_cifar10:hybrid,vlb", "exclude each other"),
        ("iddpm_cifar10:vlb,vlb", "twice"),
        ("iddpm_cifar10:small", "hybrid"),
        ("quickstart\nquickstart", "no config"),
    ],
)
def test_unknown_config_or_variant(spec, words):
    assert words in one_line(configs.load, spec)


@pytest.mark.parametrize(
    "source, words",
    [
        ("def get_config(", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("x = 1", "get_config"),
        ("def get_config(variant=''): return {}", "ConfigDict"),
        ("def get_config(variant=''): return 1 / 0", "ZeroDivisionError"),
        (
            """
            from diffax.config import config_defaults
            def get_config(variant=''):
                config = config_defaults('x')
                config.base.train.lerning_rate = 1.0
                return config
            """,
            "lerning_rate",
        ),
    ],
)
def test_broken_file(tmp_path, source, words):
    file = tmp_path / "broken.py"
    file.write_text(textwrap.dedent(source))
    message = one_line(configs.load, str(file))
    assert words in message and "broken.py" in message


# ---- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, value",
    [
        ("config.base.train.steps=1e3", 1000),
        ("--config.base.train.steps=2_000", 2000),
        ("config.base.train.learning_rate=1", 1.0),
        ("config.base.train.learning_rate=3e-5", 3e-5),
        ("config.base.net.channel_mult=1,2,2", (1, 2, 2)),
        ("config.base.net.channel_mult=(1, 2.5)", (1, 2.5)),
        ("config.base.net.channel_mult=[1,2]", (1, 2)),
        ("config.base.net.channel_mult=3", (3,)),
        ("config.base.net.attention=2,", (2,)),
        ("config.base.net.attention=none", ()),
        ("config.base.net.attention=()", ()),
        ("config.base.shape=16,16,1e0", (16, 16, 1)),
        ("config.base.takes=label", ("label",)),
        ("config.base.takes=('label','low_res')", ("label", "low_res")),
        ("config.base.takes=(label,low_res)", ("label", "low_res")),
        ("config.eval.steps=('90,60,60','ddim25')", ("90,60,60", "ddim25")),
        ("config.eval.steps=250,50", ("250", "50")),
        ("config.base.steps=250", "250"),
        ("config.base.steps='90,60'", "90,60"),
        ("config.base.steps=", ""),
        ("config.base.data.path=/a b=c/d", "/a b=c/d"),
        ("config.base.data.flip=True", True),
        ("config.base.data.flip=false", False),
        ("config.base.train.anneal=none", "none"),
        ("config.base.variance=learned_range", "learned_range"),
        ("config.base.variance=0.3", 0.3),
        ("config.base.train.ema=0.999,0.9999", (0.999, 0.9999)),
    ],
)
def test_override(override, value):
    config = configs.load("ddpm_cifar10", [override])
    found = get(config, override.removeprefix("--").split("=")[0])
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    "override",
    [
        "config.base.train.steps=1.5",
        "config.base.train.steps=abc",
        "config.base.train.steps=true",
        "config.base.train.steps=none",
        "config.base.train.steps=",
        "config.base.train.steps=1e400",
        "config.base.train.steps=nan",
        "config.base.train.steps=1,2",
        "config.base.train.learning_rate=fast",
        "config.base.train.learning_rate=",
        "config.base.data.flip=1",
        "config.base.data.flip=",
        "config.base.shape=32,x,3",
        "config.base.shape=32,32.5,3",
        "config.base.shape=32,,3",
        "config.base.variance=huge",
        "config.base.net=3",
        "config.base=3",
    ],
)
def test_override_of_the_wrong_type(override):
    path, _, text = override.partition("=")
    message = one_line(configs.load, "ddpm_cifar10", [override])
    assert message.startswith(path) and (text in message or "section" in message)


@pytest.mark.parametrize("override", ["", "--", "config", "config.seed", "base.train.steps=1", "="])
def test_override_of_no_form(override):
    assert "--config.section.field=value" in one_line(configs.load, "ddpm_cifar10", [override])


def test_overrides_are_recorded_and_the_last_wins():
    overrides = ["--config.seed=1", "config.base.data.path=a=b", "config.seed=2"]
    assert configs.overridden(overrides) == {"config.seed": "2", "config.base.data.path": "a=b"}
    assert configs.load("quickstart", overrides).seed == 2


def typos(path: str):
    """A letter lost, doubled, swapped, and one appended, in the last part of a path."""
    head, _, leaf = path.rpartition(".")
    middle = len(leaf) // 2
    yield f"{head}.{leaf[:middle]}{leaf[middle + 1 :]}"
    yield f"{head}.{leaf[:middle]}{leaf[middle]}{leaf[middle:]}"
    yield f"{head}.{leaf[: middle - 1]}{leaf[middle]}{leaf[middle - 1]}{leaf[middle + 1 :]}"
    yield f"{path}x"


@pytest.mark.parametrize("path", FIELDS)
def test_typo_of_a_field_gets_a_hint(path):
    for typo in typos(path):
        if typo not in FIELDS:
            message = one_line(configs.load, "ddpm_cifar10", [f"{typo}=1"])
            assert message.startswith(f"unknown field {typo};")
            # One or two letters leave nothing to go by.
            if len(path.rpartition(".")[2]) > 3:
                assert "did you mean config." in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("config.base.net.widht", "config.base.net.channels"),
        ("config.base.net.width", "config.base.net.channels"),
        ("config.base.net.chanels", "config.base.net.channels"),
        ("config.base.train.lr", "config.base.train.learning_rate"),
        ("config.lr", "config.base.train.learning_rate"),
        ("config.learning_rate", "config.base.train.learning_rate"),
        ("config.base.lerning_rate", "config.base.train.learning_rate"),
        ("config.bsae.net.heads", "config.base.net.heads"),
        ("config.base.nett.heads", "config.base.net.heads"),
        ("config.base.train.batchsize", "config.base.train.batch_size"),
    ],
)
def test_what_is_meant_is_found(typo, meant):
    message = one_line(configs.load, "ddpm_cifar10", [f"{typo}=1"])
    assert message.startswith(f"unknown field {typo}; did you mean") and meant in message


def test_a_field_like_nothing_lists_what_is_there():
    message = one_line(configs.load, "ddpm_cifar10", ["config.base.sampler.zzz=1"])
    assert message == "unknown field config.base.sampler.zzz; config.base.sampler has name, eta"


# ---- validation: one field at a time -------------------------------------------------------------


def wrong_values(field: Field):
    """Values that no field of this kind holds."""
    yield None
    yield {}
    if field.many:
        yield from (3, "label", [1], 1.5)
        items = [item for item in wrong_values(Field(field.kind(), **kept(field)))]
        length = max(field.lengths[0], 1)
        yield from ((item,) * length for item in items)
        if field.lengths[0]:
            yield ()
        yield (field.default or ("x",)) * (field.lengths[1] + 1)
        return
    if field.kind in (int, float):
        yield from (True, float("nan"), float("inf"), -float("inf"), 2**40, 1e300, "x", "", (1,))
        yield field.low - 1
        if field.above:
            yield field.low
        if field.below:
            yield field.high
        if field.kind is int:
            yield 1.5
    elif field.kind is bool:
        yield from (0, 1, "true", 0.0)
    else:
        yield from (3, 1.5, True, ("a",))
        if field.choices:
            yield from ("", "nothing", field.choices[0] + "x", field.choices[0].upper())


def kept(field: Field) -> dict:
    names = ("kind", "low", "high", "above", "below", "choices")
    return {name: getattr(field, name) for name in names}


@pytest.mark.parametrize("path", FIELDS)
def test_bad_value_is_named(path):
    for value in wrong_values(FIELDS[path]):
        if isinstance(value, dict):
            value = ConfigDict(value)
        message = one_line(configs.validate, put(defaults(), path, value))
        assert path in message, (value, message)
        if not isinstance(value, ConfigDict | tuple | None) and path != "config.stages":
            assert f"{path} must be" in message and repr(value) in message, (value, message)


@pytest.mark.parametrize("path", FIELDS)
def test_missing_field_is_named(path):
    config = defaults()
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    with config.unlocked():
        del section[leaf]
    assert path in one_line(configs.validate, config)


@pytest.mark.parametrize("path", FIELDS)
def test_unknown_field_in_a_file_is_named(path):
    config = defaults()
    typo = f"{path}_"
    message = one_line(configs.validate, put(config, typo, 1))
    assert message.startswith(f"unknown field {typo};")
    if typo.count(".") > 1 or path == "config.parallel":
        assert path in message


@pytest.mark.parametrize("path", ["config.base", "config.base.net", "config.sample"])
def test_section_that_is_none(path):
    assert path in one_line(configs.validate, put(defaults(), path, 3))


@pytest.mark.parametrize("path", ["config.bose", "config.base.nett"])
def test_unknown_section(path):
    config = put(defaults(), path, ConfigDict({"a": 1}))
    assert one_line(configs.validate, config).startswith(f"unknown field {path}.a;")


# ---- validation: fields that must go together ----------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base.shape": (32, 36, 3)}, ["config.base.shape", "divisible by 8"]),
        ({"base.shape": (32, 32, 4)}, ["config.base.shape", "(height, width, 3)"]),
        ({"base.net.channels": 100}, ["config.base.net.groups", "100 channels of level 0"]),
        ({"base.net.channel_mult": (1, 0.3)}, ["config.base.net.groups", "38.4"]),
        ({"base.net.channels": 129, "base.net.groups": 1}, ["config.base.net.channels", "even"]),
        ({"base.net.groups": 48}, ["config.base.net.groups", "48"]),
        ({"base.net.heads": 3}, ["config.base.net.heads", "256", "3"]),
        ({"base.net.head_channels": 96}, ["config.base.net.head_channels", "96"]),
        ({"base.net.heads_up": 3}, ["config.base.net.heads_up", "3"]),
        ({"base.net.attention": (16,)}, ["config.base.net.attention", "1, 2, 4, 8", "not resol"]),
        ({"base.net.attention": (3,)}, ["config.base.net.attention"]),
        ({"base.net.attention": (2, 2)}, ["config.base.net.attention", "different"]),
        ({"base.takes": ("label",)}, ["config.base.num_classes", "got 0"]),
        ({"base.num_classes": 10}, ["config.base.num_classes", "config.base.takes"]),
        ({"base.takes": ("low_res", "low_res")}, ["config.base.takes", "different"]),
        ({"base.data.name": "folder"}, ["config.base.data.path", "folder"]),
        ({"base.data.name": "tfds"}, ["config.base.data.path", "tfds"]),
        ({"base.data.split": ""}, ["config.base.data.split"]),
        ({"base.data.holdout": ("red circle",)}, ["config.base.data.holdout", "shapes"]),
        ({"base.variance": "learned"}, ["config.base.variance", "'hybrid' or 'vlb'"]),
        ({"base.variance": "learned_range"}, ["config.base.variance", "'hybrid' or 'vlb'"]),
        ({"base.loss.name": "hybrid"}, ["config.base.loss.name", "config.base.variance"]),
        ({"base.variance": 0.5, "base.loss.name": "hybrid"}, ["config.base.variance"]),
        ({"base.schedule.beta_start": 0.1}, ["config.base.schedule.beta_start", "beta_end"]),
        ({"base.schedule.steps": 5}, ["config.base.schedule.steps", "(0, 1]"]),
        ({"base.steps": "1001"}, ["config.base.steps", "1001"]),
        ({"base.steps": "0"}, ["config.base.steps", "'0'"]),
        ({"base.steps": "-5"}, ["config.base.steps", "-5"]),
        ({"base.steps": "ddim300"}, ["config.base.steps", "ddim300"]),
        ({"base.steps": "ddim"}, ["config.base.steps", "ddim"]),
        ({"base.steps": "10,,5"}, ["config.base.steps"]),
        ({"base.steps": "2.5"}, ["config.base.steps"]),
        ({"base.steps": "fast"}, ["config.base.steps", "'ddimN'"]),
        ({"eval.steps": ("50", "dim50")}, ["config.eval.steps", "dim50"]),
        ({"base.train.weight_decay": 0.1}, ["config.base.train.weight_decay", "adamw"]),
        ({"base.train.ema": (0.9, 0.9)}, ["config.base.train.ema", "different"]),
        ({"name": ""}, ["config.name"]),
        ({"name": "../x"}, ["config.name"]),
        ({"stages": ("base", "up")}, ["config.stages", "config.up"]),
        ({"stages": ("base", "base")}, ["config.stages", "different"]),
        ({"stages": ("sample",)}, ["config.stages"]),
        ({"stages": ("../base",)}, ["config.stages", "../base"]),
        ({"stages": ("bose",)}, ["config.stages", "config.bose"]),
    ],
)
def test_fields_that_do_not_go_together(changes, words):
    config = defaults()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    message = one_line(configs.validate, config)
    assert all(word in message for word in words), message


CONTINUOUS = {"base.schedule.name": "cosine_logsnr", "base.steps": "100"}


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"base.loss.name": "vlb"}, "loss.name"),
        ({"base.loss.name": "hybrid", "base.variance": "learned_range"}, "loss.name"),
        ({"base.timesteps.name": "loss_second_moment"}, "timesteps.name"),
        ({"base.predicts": "previous_x"}, "predicts"),
        ({"base.steps": ""}, "steps"),
        ({"base.steps": "0"}, "steps"),
        ({"base.steps": "10,20"}, "steps"),
        ({"base.steps": "ddim50"}, "steps"),
        ({"base.schedule.logsnr_max": -20.0}, "schedule.logsnr_min"),
    ],
)
def test_what_needs_a_discrete_schedule(changes, field):
    config = defaults()
    for path, value in (CONTINUOUS | changes).items():
        put(config, f"config.{path}", value)
    assert f"config.base.{field}" in one_line(configs.validate, config)


@pytest.mark.parametrize(
    "changes",
    [
        CONTINUOUS,
        CONTINUOUS | {"base.variance": 0.3, "base.predicts": "v", "base.steps": "4096"},
        {"base.variance": "learned_range", "base.loss.name": "hybrid"},
        {"base.variance": "learned", "base.loss.name": "vlb"},
        {"base.variance": "learned", "base.loss.name": "hybrid", "base.predicts": "previous_x"},
        {"base.loss.name": "vlb", "base.timesteps.name": "loss_second_moment"},
        {"base.steps": "90,60,60,20,20"},
        {"base.steps": "ddim50", "base.sampler.name": "ddim", "base.sampler.eta": 1.0},
        {"base.steps": "fast27"},
        {"base.net.channel_mult": (0.5, 1, 1, 2), "base.net.channels": 64},
        {"base.net.head_channels": 64, "base.net.attention": (1, 2, 4, 8)},
        {"base.net.attention": ()},
        {"base.takes": ("label",), "base.num_classes": 1},
        {"base.data.name": "shapes", "base.data.holdout": ("red circle",)},
        {"base.shape": (8, 24, 1)},
        {"eval.steps": ("50", "ddim25")},
        {"base.train.optimizer": "adamw", "base.train.weight_decay": 0.01},
    ],
)
def test_fields_that_go_together(changes):
    config = defaults()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    configs.validate(config)


@pytest.mark.parametrize(
    "batch, accumulate, devices, processes, words",
    [
        (12, 1, 8, 1, "global batch 12 is not divisible by 8 devices (use 8 or 16)"),
        (3, 1, 8, 1, "(use 8)"),
        (24, 2, 8, 1, "8 devices x 2 accumulated parts (use 16 or 32)"),
        (15, 1, 1, 4, "4 processes (use 12 or 16)"),
    ],
)
def test_batch_that_cannot_be_divided(batch, accumulate, devices, processes, words):
    config = defaults()
    config.base.train.update(batch_size=batch, accumulate=accumulate)
    message = one_line(configs.validate, config, device_count=devices, process_count=processes)
    assert words in message and "config.base.train.batch_size" in message


def test_batch_of_a_device_each():
    config = defaults()
    config.base.train.update(batch_size=16, accumulate=2)
    configs.validate(config, device_count=8, process_count=2)


def cascade() -> ConfigDict:
    config = defaults()
    with config.unlocked():
        config.up = configs.stage_defaults()
    config.stages = ("base", "up")
    config.up.update(shape=(64, 64, 3), takes=("low_res",))
    return config


def test_every_stage_is_checked():
    configs.validate(cascade())
    config = cascade()
    config.up.net.heads = 3
    assert "config.up.net.heads" in one_line(configs.validate, config)
    config = put(cascade(), "config.up.net.depht", 3)
    assert "unknown field config.up.net.depht" in one_line(configs.validate, config)
    config = cascade()
    configs.override(config, ["config.up.train.steps=5"])
    assert config.up.train.steps == 5 and config.base.train.steps != 5


def test_a_stage_can_be_left_out():
    config = cascade()
    config.stages = ("base",)
    configs.validate(config)


# ---- as data -------------------------------------------------------------------------------------


def test_from_dict_fills_in_what_an_older_file_lacks():
    data = configs.to_dict(defaults())
    del data["base"]["net"]["remat"], data["eval"]
    assert configs.from_dict(data) == defaults()


def test_from_dict_keeps_all_stages():
    assert configs.from_dict(configs.to_dict(cascade())) == cascade()


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("base", "net", "widht"), 3, "did you mean config.base.net.channels"),
        (("base", "net", "channels"), "3", "config.base.net.channels must be a whole number"),
        (("base", "net", "channels"), None, "config.base.net.channels must be a whole number"),
        (("base", "net"), 3, "config.base.net must be a section"),
        (("base", "shape"), 3, "config.base.shape must be a tuple"),
        (("base", "shape"), [1, "a"], "config.base.shape must be a tuple"),
        (("extra",), 3, "unknown field config.extra"),
        (("stages",), "base", "config.stages must be a tuple"),
        (("base",), 3, "config.base"),
    ],
)
def test_from_dict_refuses_what_is_no_config(path, value, words):
    data = configs.to_dict(defaults())
    section = data
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    assert words in one_line(configs.from_dict, data)
