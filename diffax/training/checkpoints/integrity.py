"""Digests, and reading what agrees with them."""

import concurrent.futures
import contextlib
import gc
import hashlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffax.errors import UserError
from diffax.training.checkpoints import disk
from diffax.training.checkpoints.lazy import is_lazy
from diffax.training.checkpoints.leaves import Record, is_key, named, nest, shown

ITEMS = ("state", "ema")


class Damaged(Exception):
    """The bytes of a step are not those that were saved; the text says which."""


def verify(directory: str | os.PathLike[str]) -> list[tuple[int, str | None]]:
    """Reads every step in full.

    A leaf that was sharded over several hosts when it was saved has no digest: that it can be read is all that is
    verified.

    Args:
      directory: of checkpoints.

    Returns:
      (step, None) for each intact step, else (step, what is damaged).

    Raises:
      UserError: `directory` holds no checkpoint.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    if not (steps := disk.steps(directory)):
        raise UserError(f"there is no checkpoint; {directory}; pass another --workdir")
    return [(step, _problem(directory / str(step))) for step in steps]


def _problem(path: pathlib.Path) -> str | None:
    try:
        digests, _ = read_index(path)
        for item in ITEMS:
            read_item(path, item, digests[item])
    except Damaged as error:
        return str(error)
    return None


# ---- digests --------------------------------------------------------------------------------------------------------


def records(leaves: Mapping[str, Any], hosts: Mapping[str, Any]) -> dict[str, Record]:
    """sha256, dtype and shape of each leaf; without a host copy sha256 is None: not verified."""
    lazy = any(map(is_lazy, hosts.values()))
    # hashlib releases the GIL; but of lazy arrays only one may exist at a time
    with concurrent.futures.ThreadPoolExecutor(1 if lazy else None) as pool:
        digests = pool.map(_digest, hosts.values())
    found = {}
    for (name, leaf), host, digest in zip(leaves.items(), hosts.values(), digests, strict=True):
        leaf = leaf if hasattr(leaf, "dtype") else host
        found[name] = dict(sha256=digest, dtype=str(leaf.dtype), shape=list(leaf.shape))
        if is_key(leaf):
            found[name]["key_impl"] = str(jax.random.key_impl(leaf))
    return found


def index(step: int, items: Mapping[str, Mapping[str, Record]], meta: Any) -> dict[str, Any]:
    """The `digests` of a step: records of its items, and digests of `meta` and of itself."""
    digests = {**items, "step": step, "meta": _json_digest(meta)}
    return digests | {"sha256": _json_digest(digests)}


def _digest(array: Any) -> str | None:
    if isinstance(array, jax.Array):
        return None
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_index(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(digests, meta) of a step, each verified.

    Raises:
      Damaged: one of them is not what was saved.
    """
    digests, meta = (_read_json(path, item) for item in ("digests", "meta"))
    own = digests.pop("sha256", None) if isinstance(digests, dict) else None
    if own != _json_digest(digests):
        raise Damaged("digests: digest mismatch")
    if digests["meta"] != _json_digest(meta):
        raise Damaged("meta: digest mismatch")
    if str(digests["step"]) != path.name:
        raise Damaged(f"it holds step {digests['step']}")
    return digests, meta


def _read_json(path: pathlib.Path, item: str) -> Any:
    try:
        return ocp.JsonCheckpointHandler().restore(path / item)
    except Exception as error:
        raise Damaged(f"{item}: {_reason(error)}") from error


def read_item(path: pathlib.Path, item: str, wanted: Mapping[str, Record]) -> dict[str, np.ndarray]:
    """The arrays that `wanted` names, each verified.

    Raises:
      Damaged: one cannot be read, or differs from its digest; the text names it.
    """
    if not wanted:
        return {}
    with _quiet_asyncio():
        try:
            arrays = _read_arrays(path / item, wanted)
            problem = None
        except Exception as error:
            problem = f"{item}: {_reason(error)}"
        if problem:
            problem = _unreadable_leaf(path, item, wanted) or problem
            gc.collect()  # asyncio reports a lost task when it is collected: now, while it is quiet
            raise Damaged(problem)
    _check_digests(item, arrays, wanted)
    return arrays


def _check_digests(item: str, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Record]) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = dict(zip(arrays, pool.map(_digest, arrays.values()), strict=True))
    wrong = [name for name, record in wanted.items() if record["sha256"] not in (None, digests[name])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"{shown(item, wrong[0])}{more}: digest mismatch")


def _unreadable_leaf(path: pathlib.Path, item: str, names: Iterable[str]) -> str | None:
    for name in names:
        try:
            _read_arrays(path / item, [name])
        except Exception as error:
            return f"{shown(item, name)}: {_reason(error)}"
    return None


def _read_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    # The handler, and not a manager: this works without the devices of the run that saved, and waits for no other
    # process.
    names = list(names)
    args = nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
    item = nest({name: 0 for name in names})
    tree = ocp.PyTreeCheckpointHandler().restore(
        path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
    arrays = named(tree)
    return {name: np.asarray(arrays[name]) for name in names}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "file missing"
    text = next(iter(str(error).splitlines()), "")
    return f"unreadable ({text[:120] or type(error).__name__})"


@contextlib.contextmanager
def _quiet_asyncio() -> Iterator[None]:
    """Hides the tracebacks of sibling reads when one has failed, which is reported as one line."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = logger.disabled

    def hide(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    logger.disabled, sys.unraisablehook = True, hide
    try:
        yield
    finally:
        logger.disabled, sys.unraisablehook = disabled, hook
