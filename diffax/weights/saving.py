"""Files of weights into a workdir, or straight into memory."""

import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from diffax import config as configs
from diffax.errors import UserError
from diffax.training import checkpoints
from diffax.training import workdir as workdirs
from diffax.weights import catalogue
from diffax.weights.families import named_config, system_of
from diffax.weights.matching import Match, match_all
from diffax.weights.systems import needed, only, settings_of, together, with_settings
from diffax.weights.table import Table, parameter


def load(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], config: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The parameters in files of weights.

    Args:
      files: one file, or several that make one system, such as a model and the classifier that guides it.
      config: the name of the config that the first one is of, and others that are not recognised by themselves; by
        default it is recognised.

    Returns:
      (config, {section: parameters}, {section: training step}). Stages whose file is not given are left out of the
      config, and so is guidance by a classifier whose file is not given.

    Raises:
      UserError: a file cannot be read, is not recognised or fits nothing; two files are of one section; a stage reads
        captions or pictures by a CLIP whose file is not given.
    """
    files = files if isinstance(files, list | tuple) else [files]
    found = match_all(files, model=os.fspath(config) if config else None)
    names = [name for m in found for name in m.sections]
    whole = together(found, [], {}, [m.config for m in found])
    if whole is None:
        raise UserError(f"no config has all of {', '.join(names)}; {files[0]}; load the files one by one")
    frozen = {section for name in names for section in system_of(whole).model(name).frozen}
    for section, name in needed(whole, names).items():
        if section not in names:
            what = "reads captions or pictures by a CLIP" if section in frozen else "leaves its last step to a network"
            raise UserError(f"{name} {what}, {section}; {files[0]}; pass its file too")
    params = {
        name: traverse_util.unflatten_dict({entry.path: parameter(m.tensors, entry) for entry in table})
        for m in found
        for name, table in m.sections.items()
    }
    return whole, params, {name: training_step(m, name) for m in found for name in m.sections}


def training_step(m: Match, section: str) -> int:
    """How long a section was trained: as the file's name says ('ema_0.9999_540000.pt'), else as its config does."""
    said = re.search(r"(?:model|ema_[\d.]+_)(\d{6,})$", m.path.stem)
    return int(said[1]) if said else int(m.config[section]["train"]["num_train_steps"])


def save(found: Match | Sequence[Match], workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the parameters in files to a workdir, as training would have left them, and returns the workdir's config.

    What a published file holds counts as the average of the parameters, where the config has one: none of them says
    whether it does. More files may follow into the same workdir, such as that of the classifier.

    Args:
      found: what `match` or `match_all` found.
      workdir: a new folder, or one that this function wrote.

    Raises:
      UserError: the workdir has such a section already, or another system.
      RunError: it cannot be written.
    """
    workdir = pathlib.Path(workdir)
    found = [found] if isinstance(found, Match) else list(found)
    config = configs.from_dict(system_with(found, workdir))
    configs.check(config)
    with checkpoints.lock(workdir):
        for m in found:
            for name, table in m.sections.items():
                _save_section(m, name, table, config, workdir)
        # of the sections that were there too, as what guides them may have come
        for name in present_sections(configs.to_dict(config), workdir):
            workdirs.write_config(config, name, workdir)
    return configs.to_dict(config)


def _save_section(m: Match, name: str, table: Table, config: Any, workdir: pathlib.Path) -> None:
    plain = configs.to_dict(config)
    params = _unread(m.tensors, table)
    decay = next((str(d) for d in plain[name]["train"]["ema"]), None)
    state, ema = ({}, {decay: params}) if decay else ({"params": params}, {})
    identity = configs.identity(config, name, training=True)
    with checkpoints.Checkpoints(workdir / name / "checkpoints", keep=1) as store:
        meta = {"section": plain[name], "identity": identity, "seed": plain["seed"]}
        store.save(training_step(m, name), state, ema=ema, meta=meta)
        store.wait()


def _unread(tensors: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The tree of a file's parameters, each read and converted when it is written: never all of them at once."""
    return traverse_util.unflatten_dict(
        {
            entry.path: checkpoints.LazyArray(
                entry.shape, np.dtype(np.float32), functools.partial(parameter, tensors, entry)
            )
            for entry in table
        }
    )


def present_sections(config: Mapping[str, Any], workdir: pathlib.Path) -> list[str]:
    """The sections of a config that have parameters in a workdir."""
    return [name for name in configs.sections(config) if (workdir / name / "checkpoints").exists()]


def system_with(found: Sequence[Match], workdir: pathlib.Path) -> dict[str, Any]:
    """The config of a workdir once these files are in it.

    Raises:
      UserError: it has such a section already, or another system, or what a user has set.
    """
    wanted = [name for m in found for name in m.sections]
    for name in wanted:
        if (workdir / name / "checkpoints").exists():
            raise UserError(f"there are parameters of {name} already; {workdir}; choose another workdir")
    if not workdirs.has_config(workdir):
        config = together(found, [], {}, [m.config for m in found])
        if config is None:
            raise UserError(f"no config has all of {', '.join(wanted)}; {workdir}; convert them into several workdirs")
        return config
    there = workdirs.read_config(workdir)
    config = _extended(found, there, present_sections(there, workdir))
    if config is not None:
        return config
    raise UserError(
        f"the workdir holds {there['name']}, which has no {' or '.join(wanted)} like this one, or was edited; "
        f"{workdir}; choose another workdir"
    )


def _extended(found: Sequence[Match], there: Mapping[str, Any], present: Sequence[str]) -> dict[str, Any] | None:
    """The config of a workdir with more files; None where it is none that this module wrote, or has no place for them.

    Nothing that a user has set gets lost: only what this module wrote is written again.
    """
    names = dict.fromkeys([*(r.config for r in catalogue.PUBLISHED if r.config), *catalogue.SYSTEMS])
    # a variant may have a name of its own
    systems = [named_config(n) for n in names if there["name"] in (n.replace(":", "_"), n.partition(":")[0])]
    systems += [m.config for m in found if m.config["name"] == there["name"]]
    whole = [system for system in systems if {*present} <= {*system_of(system).trained}]
    settings = settings_of(there)
    mine = [system for system in whole if with_settings(only(system, present), settings) == there]
    return together(found, present, settings, [*mine, *(m.config for m in found)]) if mine else None
