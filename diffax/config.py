"""Configs: reading one by name with variants and overrides, checking it, and keeping it as JSON.

The fields are those of the components that a config names (`diffax.components`). A section is a model and what trains
it; its fields are those of the model's component, and the ones of `trained`.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from diffax import components
from diffax.components import RUNTIME, TRAINING, Field, Fields, Group, In, Length, Of, closest, each, shown, spec
from diffax.errors import UserError

__all__ = [
    "add_section",
    "check",
    "each",
    "from_dict",
    "identity",
    "load",
    "new",
    "override",
    "spec",
    "split_variant",
    "to_dict",
]


def top(
    *,
    name: str = "",
    seed: Annotated[int, In(0, 2**31 - 1)] = 0,
    parallel: Literal["pmap", "jit", "fsdp"] = "pmap",
    stages: Annotated[tuple[str, ...], Length(1, 16)] = ("base",),
    sample: Annotated[Any, Group("diffax.sampling.settings:sample")],
    eval: Annotated[Any, Group("diffax.evaluation.settings:evaluate")],
) -> None:
    """The fields of a config besides its sections.

    Args:
      name: of the config, and of its folder below runs/.
      seed: of initialisation, noise and the order of the data.
      parallel: how devices share the work.
      stages: the sections that are trained and sampled, in order.
      sample: what --mode=sample draws.
      eval: what --mode=evaluate scores.
    """
    del name, seed, parallel, stages, sample, eval


def trained(
    *,
    data: Annotated[Any, Of("data", "digits"), TRAINING],
    loader: Annotated[Any, Group("diffax.data.pipeline:Loader")],
    train: Annotated[Any, Group("diffax.training.settings:train")],
    workdir: Annotated[str, RUNTIME] = "",
) -> None:
    """The fields of a section besides its model's.

    Args:
      data: what it is trained on.
      loader: how batches are read from that.
      train: how it is trained.
      workdir: where it was trained, if not in the workdir of the others.
    """
    del data, loader, train, workdir


# ---- making configs -------------------------------------------------------------------------------------------------


def section(model: str, **fields: Any) -> ConfigDict:
    """A section: the model's fields and those of `trained`, at their defaults or as given."""
    made = spec("model", model, **fields)
    for name, value in components.defaults(trained).items():
        made[name] = value
    return made


def add_section(config: ConfigDict, name: str, made: ConfigDict | str = "diffusion") -> ConfigDict:
    """Adds a section, given or of a model by name, and returns it."""
    config[name] = section(made) if isinstance(made, str) else made
    return config[name]


def new(name: str, stages: Sequence[str] = ("base",), model: str = "diffusion") -> ConfigDict:
    """A config whose stages are models of one component, with every field at its default.

    More sections are added by `add_section(config, 'up')`, and named in `config.stages` if they are stages.
    """
    config = Fields()
    for field, value in components.defaults(top).items():
        config[field] = value
    config.name, config.stages = name, tuple(stages)
    for stage in stages:
        add_section(config, stage, model)
    return config


# ---- reading --------------------------------------------------------------------------------------------------------


def load(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config and applies overrides; the result is not yet checked.

    Args:
      path_or_name: `configs/NAME.py[:variant]`, `NAME[:variant]` or any path to a .py file. What is not there as a file
        is looked up by name among the configs that come with diffax. Variants are joined by `,` or `+`.
      overrides: such as `config.base.train.num_train_steps=1e3`, with or without `--` in front. Tuples are written
        `1,2,2` or `(1,2,2)`, booleans true or false, the empty tuple none or `()`, components by name or import path.

    Returns:
      The config.

    Raises:
      UserError: no such config, variant or field, or a value of the wrong type.
    """
    text, _, variant = os.fspath(path_or_name).partition(":")
    module = _import(find(text))
    if not hasattr(module, "get_config"):
        raise UserError(f"{text} has no function get_config(variant); it is not a config file")
    split_variant(variant, getattr(module, "VARIANTS", {}))
    try:
        config = module.get_config(variant)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the config fails with {type(error).__name__}: {reason}; {os.fspath(path_or_name)[:300]}; correct the "
            "file (--help=KIND lists the fields of components)"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config returned {type(config).__name__}; {text}; return a ConfigDict")
    override(config, overrides)
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields of a config in place, as `load` does.

    Fields higher in the tree come first, so that a component is named before its own fields are set.

    Raises:
      UserError: an unknown field, or a value that it cannot hold.
    """
    found = overridden(overrides)
    for path in sorted(found, key=lambda path: path.count(".")):
        first, *rest = path.split(".")[1:]
        fields = components.schema(top)
        if first in fields:
            components.override(fields, config, [first, *rest], found[path], "config")
            continue
        if first not in sections(config):
            raise _unknown_section(config, first)
        if not rest:
            raise UserError(f"config.{first} is a section; set one of its fields, such as config.{first}.train.ema")
        _override_section(config, first, rest, found[path])


def _override_section(config: ConfigDict, name: str, path: list[str], text: str) -> None:
    if path == ["name"]:
        raise UserError(
            f"config.{name}.name is the kind of model, which the config file chooses; choose another config"
        )
    components.override(section_fields(config, name), config[name], path, text, f"config.{name}")


def _unknown_section(config: Mapping[str, Any], name: str) -> UserError:
    there = [*components.schema(top), *sections(config)]
    where = [f"config.{part}.{name}" for part in sections(config) if name in section_fields(config, part)]
    if where and not closest(name, there):
        return UserError(f"unknown field config.{shown(name)[1:-1]}; did you mean {' or '.join(where[:3])}?")
    return UserError(f"unknown field config.{shown(name)[1:-1]}{closest(name, there)}; config has {', '.join(there)}")


def overridden(overrides: Sequence[str]) -> dict[str, str]:
    """The fields that a user sets, {dotted path: text}; the last of two for one field wins.

    Raises:
      UserError: an override is not of the form `config.field=value`.
    """
    found = {}
    for text in overrides:
        path, equals, value = text.removeprefix("--").partition("=")
        if not equals or not path.startswith("config."):
            raise UserError(f"override {shown(text)} is not of the form --config.section.field=value")
        found[path] = value
    return found


def split_variant(variant: str, known: Mapping[str, str], exclusive: Sequence[str] = ()) -> tuple[str, ...]:
    """Splits `vlb,tiny` or `vlb+tiny` into its parts.

    Args:
      variant: what follows the colon; may be empty.
      known: {variant: what it is}.
      exclusive: variants of which one at most can be chosen.

    Raises:
      UserError: a part is unknown or twice there, or excludes another.
    """
    parts = tuple(part for part in re.split("[,+]", variant) if part)
    for i, part in enumerate(parts):
        if part not in known:
            there = "; ".join(f"{name} ({what})" for name, what in known.items()) or "none"
            raise UserError(f"unknown variant {shown(part)}{closest(part, known)}; variants: {there}")
        if part in parts[:i]:
            raise UserError(f"variant {part!r} is given twice; give it once")
    chosen = [part for part in parts if part in exclusive]
    if len(chosen) > 1:
        raise UserError(f"variants {' and '.join(chosen)} exclude each other; choose one")
    return parts


def available() -> dict[str, tuple[str, dict[str, str]]]:
    """The configs that come with diffax: {name: (first line of the docstring, its variants)}."""
    modules = {name: _import(_folder() / f"{name}.py") for name in _names()}
    return {
        name: ((module.__doc__ or "").strip().split("\n")[0], dict(module.VARIANTS)) for name, module in modules.items()
    }


def _folder() -> Path:
    """configs/ beside the package in a checkout, or where diffax.configs is installed."""
    beside = Path(__file__).parent.parent / "configs"
    if (beside / "quickstart.py").is_file():
        return beside
    found = importlib.util.find_spec("diffax.configs")
    return Path(list(found.submodule_search_locations)[0]) if found else beside


def _names() -> list[str]:
    """The configs; files without VARIANTS are parts of others."""
    return sorted(
        p.stem for p in _folder().glob("*.py") if not p.stem.startswith("_") and "VARIANTS = " in p.read_text()
    )


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """The file of a config, given as for `load`; nothing is read.

    Raises:
      UserError: there is no such file and no config of that name.
    """
    text = os.fspath(path_or_name).partition(":")[0]
    try:
        path = Path(text).expanduser()
        is_file = path.suffix == ".py" and path.is_file()
    except (OSError, RuntimeError, ValueError):
        path, is_file = Path("unreadable"), False
    if is_file:
        return path
    name, names = path.name.removesuffix(".py"), _names()
    if path.parent.as_posix() in (".", "configs") and name in names:
        return _folder() / f"{name}.py"
    raise UserError(
        f"there is no config {shown(text)}{closest(name, names)}; start with quickstart, see --help for all "
        f"{len(names)}, or give the path of a .py file"
    )


def _import(path: Path) -> ModuleType:
    if "diffax.configs" not in sys.modules:  # a checkout need not be installed
        package = importlib.util.spec_from_file_location(
            "diffax.configs", _folder() / "__init__.py", submodule_search_locations=[str(_folder())]
        )
        sys.modules["diffax.configs"] = importlib.util.module_from_spec(package)
    found = importlib.util.spec_from_file_location(f"diffax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read the config: {type(error).__name__}: {reason}; {path}; correct the file"
        ) from error
    return module


# ---- checking -------------------------------------------------------------------------------------------------------


def sections(config: Mapping[str, Any]) -> list[str]:
    """The names of the sections, in the order of the config."""
    return [name for name, value in config.items() if name not in components.schema(top) and hasattr(value, "keys")]


def section_fields(config: Mapping[str, Any], name: str) -> dict[str, Field]:
    """The schema of a section.

    Raises:
      UserError: it names no model.
    """
    model = components.find("model", config[name].get("name", ""), f"config.{name}.name")
    return {**components.schema(model), **components.schema(trained)}


def check(config: Mapping[str, Any], *, device_count: int = 1, process_count: int = 1) -> None:
    """Checks every field and how the models go together; nothing has been written or compiled yet.

    Args:
      config: from `load` or `from_dict`.
      device_count: devices of all processes.
      process_count: processes.

    Raises:
      UserError: the first problem: the field, what is allowed, what was found.
    """
    from diffax.models.system import System

    fields, there = components.schema(top), sections(config)
    for name in config:
        if name not in fields and name not in there:
            raise _unknown_section(config, name)
    components.check(fields, {name: config[name] for name in config if name in fields}, "config")
    _check_names(config, there)
    for name in there:
        components.check(section_fields(config, name), config[name], f"config.{name}")
    system = System(config)
    system.check()
    for name in system.trained:
        components.build(config[name]["data"], "data", path=f"config.{name}.data")
        _check_train(config[name]["train"], f"config.{name}.train", device_count, process_count)
        embeddings = config[name]["loader"]["embeddings"]
        if embeddings and not system.model(name).frozen:
            raise UserError(
                f"config.{name}.loader.embeddings is {shown(embeddings)}, but config.{name} reads no embedding; leave "
                "it empty"
            )
    _check_scores(config, system)


def _check_names(config: Mapping[str, Any], there: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,199}", config["name"]):
        raise UserError(f"config.name must be a word of letters, digits, '_', '-' and '.', got {shown(config['name'])}")
    stages = config["stages"]
    for i, name in enumerate(stages):
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in stages[:i]:
            raise UserError(
                f"config.stages must be different names of small letters, digits and '_', got {shown(stages)}"
            )
        if name not in there:
            hint = closest(name, there) or f"; the sections are {', '.join(there)}" * bool(there)
            raise UserError(f"config.stages names {name!r}, but there is no section config.{name}{hint}")


def _check_train(train: Mapping[str, Any], where: str, device_count: int, process_count: int) -> None:
    if len(set(train["ema"])) < len(train["ema"]):
        raise UserError(f"{where}.ema must be different rates, got {shown(train['ema'])}")
    accumulate, size = train["accumulate"], train["batch_size"]
    for count, what in ((device_count, "devices"), (process_count, "processes")):
        parts = count * accumulate
        if size % parts:
            times = f" x {accumulate} accumulated parts" if accumulate > 1 else ""
            low = size // parts * parts
            use = f"{low} or {low + parts}" if low else f"{parts}"
            raise UserError(
                f"global batch {size} is not divisible by {count} {what}{times} (use {use}); {where}.batch_size"
            )


def _check_scores(config: Mapping[str, Any], system: Any) -> None:
    """Whether what is to be sampled and scored fits the models."""
    score, generators = config["eval"], system.generators
    if score["guidance"] and not any(model.scale is not None for model in generators):
        raise UserError(
            f"config.eval.guidance is {score['guidance']}, but no stage has guidance with a scale; leave it empty, or "
            "add 'classifier_free', 'classifier' or 'clip' to a stage's guidance"
        )
    if score["template"].count("{}") != 1:
        raise UserError(
            "config.eval.template must be a text with one {} for the name of the class, got "
            f"{shown(score['template'])}"
        )
    levels = [c for model in generators for c in model.conditions.values() if getattr(c, "noise", 0)]
    if score["levels"] and not levels:
        raise UserError(
            f"config.eval.levels is {score['levels']}, but no stage has a noised smaller picture; leave it empty, or "
            "set conditions.low_res.noise of a stage"
        )
    if score["bpd_num"] and generators and generators[-1].frozen:
        raise UserError(
            f"config.eval.bpd_num must be 0, as config.{generators[-1].name} has a CLIP's embeddings for a condition, "
            f"got {score['bpd_num']}"
        )
    if config["sample"]["save"] and any(c.stops_before for model in generators for c in model.conditions.values()):
        raise UserError(
            "config.sample.save keeps clean pictures, but conditions.low_res.truncated of a stage leaves noise on "
            "those of the stage before; set one of them to false"
        )
    if config["sample"]["prompts"] and not any(
        c.argument == "prompt" for model in generators for c in model.given.values()
    ):
        raise UserError("config.sample.prompts is set, but no stage reads a caption; leave it empty")
    for name in score["samplers"]:
        components.find("sampler", name, "config.eval.samplers")
    for choice in score["steps"]:
        _check_grid(generators, choice)


def _check_grid(generators: Sequence[Any], choice: str) -> None:
    from diffax.models.base import Sampling

    for model in generators:
        try:
            model.resampled(Sampling(steps=choice))
        except ValueError as error:
            raise UserError(f"config.eval.steps: {error}; config.{model.name} cannot be sampled so") from None


# ---- as data --------------------------------------------------------------------------------------------------------


def to_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain data, the inverse of `from_dict`: tuples become lists, as in JSON."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ConfigDict) else config))


def from_dict(data: Mapping[str, Any]) -> ConfigDict:
    """A config from what `to_dict` gave; fields that an older file lacks take their defaults.

    Raises:
      UserError: a field is unknown or of the wrong type.
    """
    fields = components.schema(top)
    config = Fields()
    for name, value in components.complete(fields, {k: v for k, v in data.items() if k in fields}, "config").items():
        config[name] = value
    for name in sections(data):
        config[name] = components.complete(section_fields(data, name), data[name], f"config.{name}")
    for name in data:
        if name not in config:
            raise _unknown_section(data, name)
    return config


def identity(config: Mapping[str, Any], name: str, *, training: bool = False) -> dict[str, Any]:
    """What parameters of a section must agree in with it, see `components.identity`; {'config.base.shape': ...}.

    Args:
      config: a whole config.
      name: the section.
      training: whether a run is to go on from there.
    """
    found = components.identity(section_fields(config, name), config[name], training=training)
    return {f"config.{name}.{field}": value for field, value in found.items()}


# ---- from Python ----------------------------------------------------------------------------------------------------


class _Callable(ModuleType):
    """A module that can be called: `diffax.config(...)` is `load`, and `diffax.config.load` stays where it is."""

    def __call__(self, path_or_name: str | os.PathLike[str], *overrides: str) -> ConfigDict:
        """Reads a config: `diffax.config("cascade_64:tiny", "base.train.num_train_steps=20")`.

        Args:
          path_or_name: see `load`.
          *overrides: fields, with or without `config.` in front.

        Returns:
          The config; `diffax.train` checks it.

        Raises:
          UserError: see `load`.
        """
        whole = [text.removeprefix("--") for text in overrides]
        return load(path_or_name, [text if text.startswith("config.") else f"config.{text}" for text in whole])


sys.modules[__name__].__class__ = _Callable
