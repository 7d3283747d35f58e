"""Where a checkpoint differs from what a run expects."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from diffax.errors import UserError
from diffax.training.checkpoints.leaves import Record, shown


def config_difference(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """One line for each field in which two configs differ, as JSON sees them.

    Args:
      saved: config from a checkpoint's `meta`, flat or nested.
      current: config of this run.
      ignore: names of fields or sections that may differ, like 'base.train.keep' or 'sample'.

    Returns:
      Lines like 'checkpoint was trained with base.net.channels=64, config says 128'.
    """
    before, after, ignore = _fields(saved), _fields(current), tuple(ignore)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in ignore):
            continue
        if name not in after:
            lines.append(f"checkpoint was trained with {name}={before[name]!r}, config has no such field")
        elif name not in before:
            lines.append(f"checkpoint was trained without {name}, config says {after[name]!r}")
        elif before[name] != after[name]:
            lines.append(f"checkpoint was trained with {name}={before[name]!r}, config says {after[name]!r}")
    return lines


def _fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            fields |= _fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = _tuples(value)
    return fields


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def check_target(
    wanted: Mapping[str, Mapping[str, Any]], digests: Mapping[str, Mapping[str, Record]], path: pathlib.Path
) -> None:
    """Compares names, shapes and dtypes: Orbax would cast a dtype silently.

    Args:
      wanted: {item: leaves by name} of shapes.
      digests: {item: {name: record}} of the checkpoint.
      path: of the step.

    Raises:
      UserError: something differs.
    """
    problems = []
    if wanted["ema"] and not digests["ema"]:
        problems.append("checkpoint has no EMA, config builds one")
        wanted = {"state": wanted["state"]}
    for item, leaves in wanted.items():
        saved = digests[item] if leaves else {}
        for name in saved.keys() | leaves.keys():
            problems += _differences(shown(item, name), saved.get(name), leaves.get(name))
    if problems:
        problems.sort()
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{', '.join(problems[:3])}{more}; {path}; use the config that it was trained with")


def _differences(name: str, record: Record | None, leaf: Any) -> list[str]:
    if record is None:
        return [f"checkpoint has no {name}, config builds one"]
    if leaf is None:
        return [f"checkpoint has {name}, config builds none"]
    pairs = {"shape": (tuple(record["shape"]), leaf.shape), "dtype": (record["dtype"], str(leaf.dtype))}
    return [
        f"checkpoint has {name} of {what} {_compact(saved)}, config says {_compact(wanted)}"
        for what, (saved, wanted) in pairs.items()
        if saved != wanted
    ]


def _compact(value: Any) -> str:
    return str(value).replace(" ", "")
