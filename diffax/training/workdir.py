"""What a workdir holds: configs, parameters, what was measured on the data, and the names of classes.

Every section has a folder of its own, so that jobs which train different sections of one workdir never write the same
file: WORKDIR/SECTION/{config.json, classes.json, checkpoints/, statistics.npz, metrics.jsonl, ...}.
"""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffax import config as configs
from diffax.data import images
from diffax.errors import UserError
from diffax.training import processes
from diffax.training.checkpoints import Checkpoints, config_difference

Params = Any
Path = str | os.PathLike[str]
CONFIG, CLASSES = "config.json", "classes.json"
STATISTICS = "statistics.npz"  # what is measured on the data of a section, and not trained


def folder_of(config: Mapping[str, Any], name: str, workdir: Path) -> pathlib.Path:
    """The folder of a section, in its own `workdir` if it names one."""
    return pathlib.Path(config[name]["workdir"] or workdir) / name


# ---- configs --------------------------------------------------------------------------------------------------------


def write_config(config: Mapping[str, Any], name: str, workdir: Path, class_names: Any = ()) -> None:
    """Writes what a section is trained with into its folder."""
    folder = pathlib.Path(workdir) / name
    text = json.dumps(configs.to_dict(config), indent=2) + "\n"
    images.write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
    names = json.dumps(list(class_names))
    images.write_atomically(folder / CLASSES, lambda file: file.write(names.encode()))


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config ({error}); {path}; restore it or train again") from error


def has_config(workdir: Path) -> bool:
    """Whether anything was trained here."""
    return any(pathlib.Path(workdir).glob(f"*/{CONFIG}"))


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a workdir, of the configs in its sections' folders: each section as it was trained itself.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    paths = sorted(pathlib.Path(workdir).glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(
            f"there is no trained model; {workdir} has no folder with a {CONFIG}; train first, or pass another workdir"
        )
    found: dict[str, Any] = {}
    own = {}
    for path in paths:
        whole = _read_json(path)
        if not isinstance(whole, Mapping) or path.parent.name not in whole:
            raise UserError(f"cannot read the config (it has no {path.parent.name}); {path}; restore it or train again")
        found |= whole
        own[path.parent.name] = whole[path.parent.name]
    return configs.to_dict(configs.from_dict(found | own))


def class_names(config: Mapping[str, Any], workdir: Path, names: Any) -> list[str]:
    """Names of the labels, from the folder of the first section that was trained on any; empty if none was."""
    for name in names:
        path = folder_of(config, name, workdir) / CLASSES
        if path.exists() and (found := _read_json(path)):
            return found
    return []


# ---- parameters -----------------------------------------------------------------------------------------------------


def _saved_section(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A one-section config of what a checkpoint was trained with, complete."""
    section = meta["section"]
    fields = configs.section_fields({name: section}, name)
    return {name: configs.components.complete(fields, section, f"config.{name}")}


def load_params(
    config: Mapping[str, Any],
    name: str,
    workdir: Path,
    *,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> tuple[Params, int]:
    """The trained parameters of one section, with what was measured on its data, and their training step.

    They lie in the section's own `workdir` if it names one, else in `workdir`.

    Args:
      config: the whole config.
      name: the section.
      workdir: where it was trained.
      step: a training step; None: the newest intact one.
      decay: which average of the parameters; None: the first configured one.
      raw: the parameters in training instead of an average.

    Raises:
      UserError: there are none, or they belong to another network than the config's.
    """
    average = decay or next((str(d) for d in config[name]["train"]["ema"]), None)
    folder = folder_of(config, name, workdir)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        saved = _saved_section(checkpoints.read_meta(step), name)
        lines = config_difference(configs.identity(saved, name), configs.identity(config, name))
        if lines:
            raise UserError(f"{lines[0]}; {checkpoints.directory}; use the config it was trained with")
        found, params, _ = checkpoints.restore_ema(step=step, decay=average, raw=raw or average is None)
    statistics = read_statistics(folder)
    return (params | {"statistics": statistics} if statistics else params), found


def starting_params(config: Mapping[str, Any], name: str, model: Any) -> Params:
    """The parameters that a new run of a section starts from: those of its namesake in `train.start_from`, averaged.

    Conditions that the other did not have may be new if they are planes beside z: their channels of the first
    convolution are zero at first, so that training starts from the same function (GLIDE, section 2.3).

    Raises:
      UserError: there are none, or they are of a network that differs in more.
    """
    folder = pathlib.Path(config[name]["train"]["start_from"]) / name
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        saved = _saved_section(checkpoints.read_meta(), name)
        missing = [c for c in model.conditions if c not in saved[name].get("conditions", {})]
        passed_over = (f"config.{name}.condition_dropout", *(f"config.{name}.conditions.{c}" for c in missing))
        before, after = (configs.identity(c, name) for c in (saved, config))
        after[f"config.{name}.conditions"] = [c for c in model.conditions if c not in missing]  # in the same order
        lines = config_difference(before, after, ignore=passed_over)
        if lines:
            raise UserError(f"{lines[0]}; {checkpoints.directory}; start from a model of the same network")
        average = next((str(d) for d in saved[name]["train"]["ema"]), None)
        _, params, _ = checkpoints.restore_ema(decay=average, raw=average is None)
    at = model.shape[-1]
    for condition, its in model.conditions.items():
        if condition not in missing:
            at += its.planes
            continue
        if not its.planes:
            raise UserError(
                f"{name} has the condition {condition!r}, which what it starts from does not; "
                f"config.{name}.train.start_from; only conditions that are planes beside z can be new"
            )
        params = widen_input(params, at=at, by=its.planes)
        at += its.planes
    return params


def widen_input(params: Mapping, *, at: int, by: int) -> dict:
    """A network's parameters with room for more input channels, whose weights are zero: the same function as before.

    Args:
      params: of a `networks.conditioned.Conditioned`.
      at: the first new channel.
      by: how many are new.
    """
    kernel = params["net"]["conv_in"]["kernel"]
    blank = jnp.zeros((*kernel.shape[:2], by, kernel.shape[3]), kernel.dtype)
    wide = jnp.concatenate([kernel[:, :, :at], blank, kernel[:, :, at:]], 2)
    return {**params, "net": {**params["net"], "conv_in": {**params["net"]["conv_in"], "kernel": wide}}}


# ---- what is measured on the data -----------------------------------------------------------------------------------


def read_statistics(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays that were measured on the data of a section with this folder, by name; {} where there are none.

    Raises:
      UserError: they cannot be read.
    """
    path = folder / STATISTICS
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: array for name, array in file.items() if name != "step"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read the statistics of the data ({error}); {path}; restore it or train again"
        ) from None


def statistics_step(folder: pathlib.Path) -> int | None:
    """The training step whose parameters the statistics go with; None if there are none."""
    path = folder / STATISTICS
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return int(file["step"]) if "step" in file else 0


def write_statistics(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], step: int = 0) -> None:
    """Writes arrays that were measured on the data; of several processes the first one does."""
    if processes.process_index() == 0:
        images.write_atomically(folder / STATISTICS, lambda file: np.savez(file, **arrays, step=np.int64(step)))
