"""Which system files make together: a config with the sections that they hold, and no others."""

import copy
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffax import config as configs
from diffax.errors import UserError
from diffax.weights.catalogue import SYSTEMS
from diffax.weights.families import named_config, system_of
from diffax.weights.matching import Match

Settings = Mapping[tuple[str, ...], Any]


def together(
    found: Sequence[Match], present: Sequence[str], settings: Settings, whole: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The config of what some files hold, and of sections that are there already; None if there is no such system.

    Args:
      found: the files.
      present: the other sections.
      settings: see `Match`; those that are there already.
      whole: configs to take if they have all sections, before those of `SYSTEMS`.

    Raises:
      UserError: the network of a section differs in that system; statistics alone.
    """
    names = [*present, *(name for m in found for name in m.sections)]
    config = _holding(names, whole)
    if config is None:
        return None
    for m in found:
        _check_same_networks(m, config)
        settings = {**settings, **m.settings}
    if not names:
        raise UserError(f"these are statistics of embeddings alone; {found[0].path}; give the files of the models too")
    return with_settings(only(config, names), settings)


def with_settings(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The config with these values of `Match.settings`; those of sections that it has not are left out."""
    config = copy.deepcopy(dict(config))
    for (section, *path, leaf), value in settings.items():
        if section in config:
            functools.reduce(dict.__getitem__, path, config[section])[leaf] = value
    return config


def settings_of(config: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """What conversion may have set in a config."""
    sections = {name: config[name] for name in configs.sections(config) if "embedding" in config[name]}
    return {(name, "embedding", key): c["embedding"][key] for name, c in sections.items() for key in ("mean", "std")}


def _holding(names: Sequence[str], whole: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of some configs, or of `SYSTEMS`, that has all these sections."""
    for config in itertools.chain(whole, map(named_config, SYSTEMS)):
        if {*names} <= {*system_of(config).trained}:
            return config
    return None


def _check_same_networks(m: Match, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the sections of a config have the networks of those of the match."""
    for section in m.sections:
        mine, its = (configs.identity(configs.from_dict(c), section) for c in (m.config, config))
        field = next((field for field in [*mine, *its] if mine.get(field) != its.get(field)), None)
        if field:
            raise UserError(
                f"this is the {section} of {m.config['name']}, which differs from that of {config['name']} in "
                f"{field}; {m.path}; keep the two apart"
            )


def needed(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What models cannot do without: {section of a frozen model, or of one that takes a part of the steps: whose}."""
    system, found = system_of(config), {}
    for name in names:
        model = system.model(name)
        parts = getattr(model, "guidance", {}).values()
        of_guidance = [section for part in parts if part.scale is None for section in part.sections]
        for section in (*model.frozen, *of_guidance):
            found.setdefault(section, name)
    return found


def only(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A config without the sections that are not named, and without the guidance that needs one of them.

    A CLIP whose embeddings a named one reads stays, because its model cannot be built without it; and so does the
    network of its last step.
    """
    system = system_of(config)
    left_out = {*system.trained} - {*names} - {*needed(config, names)}
    config = {key: value for key, value in config.items() if key not in left_out}
    config["stages"] = [name for name in config["stages"] if name in names]
    for name in names:
        if "guidance" not in config[name]:
            continue
        parts = system.model(name).guidance
        kept = {key: g for key, g in config[name]["guidance"].items() if not left_out & {*parts[key].sections}}
        config[name] = {**config[name], "guidance": kept}
    # A classifier alone is trained as a stage of its own; among stages it is one where the config says so.
    config["stages"] = config["stages"] or list(names)
    generators = system_of(config).generators
    if all(model.scale is None for model in generators):
        config["eval"] = {**config["eval"], "guidance": []}
    if not any(getattr(c, "noise", 0) for model in generators for c in model.conditions.values()):
        config["eval"] = {**config["eval"], "levels": []}
    return config
