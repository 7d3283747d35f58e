"""Checkpoints that are verified, resumable on any topology and never silently wrong (leaf).

A step is one directory that Orbax commits with a rename. It holds the training state, the averaged
weights (EMA) as an item of its own, `meta` (JSON: the config and what else the run must remember)
and `digests` (JSON: sha256, dtype and shape of every array). Orbax itself does not check the data
of arrays: one flipped bit restores as a wrong number, hence the digests. This is the only file that
imports orbax, and no file here is ever a pickle.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffax.errors import RunError, UserError

_TRASH = "_trash"
_CORRUPT = "_corrupt"
_TMP = re.compile(r"(\d+)\.orbax-checkpoint-tmp")
# Orbax adds manifests and metadata to the arrays; measured 30 to 200 kB.
_OVERHEAD_BYTES = 2**18

Record = dict[str, Any]


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: trees of the target's structure, and the saved `meta`."""

    step: int
    state: Any
    ema: Any
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that `Checkpoints.save` makes when its turn comes, twice, and then lets go.

    It is made once for its digest and once for the disk, so that a tree of them, which may be larger than the memory,
    takes that of one array.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      make: makes it; the same array each time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.make().astype(dtype or self.dtype, copy=False)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes what `NumpyHandler` would, one array after the other; it would make all of them at once."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await super()._background_serialize([np.asarray(value)], [info], [arg])


def _item_handlers() -> dict[str, Any]:
    """What writes the items of a step that has lazy arrays: Orbax's own handlers, and one that knows these."""
    known = [(kind, ocp.type_handlers.get_type_handler(kind)) for kind in ocp.type_handlers.supported_types()]
    registry = ocp.type_handlers.create_type_handler_registry(*known, (LazyArray, _LazyHandler()))
    trees = {item: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for item in ("state", "ema")}
    return {item: ocp.JsonCheckpointHandler() for item in ("meta", "digests")} | trees


class _Damaged(Exception):
    """The bytes of a step are not those that were saved; the text says which."""


def print_warning(line: str) -> None:
    """Writes `diffax: warning: line` to stderr."""
    print(f"diffax: warning: {line}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one stage: saved in the background, verified when read.

    With several processes every process makes the same calls in the same order; the first one alone
    writes shared files, moves and deletes.

    Args:
        directory: a local or mounted directory; it is made when needed.
        keep: how many of the newest steps to keep, at least 1.
        keep_every: steps divisible by this are kept for ever; 0 for none.
        read_only: nothing in `directory` is written, moved or removed.
        warn: receives one line for each damaged step that is passed over.

    Attributes:
        removed_unfinished: steps whose interrupted save was removed when this was opened.

    Raises:
        UserError: `directory` cannot be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
        warn: Callable[[str], None] = print_warning,
    ):
        if keep < 1 or keep_every < 0:
            raise ValueError(f"keep must be >= 1 and keep_every >= 0, got {keep} and {keep_every}")
        if "://" in os.fspath(directory):
            raise UserError(f"{directory} is no mounted directory; checkpoints; mount the bucket and pass its path")
        self.directory = pathlib.Path(os.path.abspath(directory))
        self.removed_unfinished: list[int] = []
        self._keep, self._keep_every, self._read_only = keep, keep_every, read_only
        self._warn = warn
        self._manager: ocp.CheckpointManager | None = None
        self._saving: tuple[int, int] | None = None
        if not read_only and _is_primary():
            self._prepare_directory()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except RunError as failure:
            if kind is None:
                raise
            self._warn(str(failure))

    def _prepare_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints ({error.strerror}); {self.directory}; choose another --workdir"
            ) from error
        for path in sorted(self.directory.iterdir()):
            if unfinished := _TMP.match(path.name):
                _remove(path)
                self.removed_unfinished.append(int(unfinished[1]))
            elif path.name.isdecimal() and not _has_files(path):
                _remove(path)
        _remove(self.directory / _TRASH)

    def steps(self) -> list[int]:
        """The committed steps on disk, ascending; damaged ones are among them."""
        if not self.directory.is_dir():
            return []
        names = (p.name for p in self.directory.iterdir() if p.name.isdecimal() and _has_files(p))
        return sorted(int(name) for name in names)

    def latest(self) -> int | None:
        """The newest step on disk, not yet verified; None without any."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        state: Any,
        *,
        ema: Mapping[str, Any],
        meta: Mapping[str, Any],
        force: bool = False,
    ) -> None:
        """Saves one step in the background; the arrays may be donated once this returns.

        Blocks for an earlier save, the copy to the host and its digests. Call `check` each step and
        `close` at the end, so that a failure in the background ends the run.

        Args:
            step: number of the step, above all saved ones.
            state: tree of arrays: jax Arrays on any devices, numpy arrays, typed PRNG keys, `LazyArray`s.
            ema: decay, as text, -> averaged parameters; may be empty.
            meta: JSON data without NaN; tuples come back as lists.
            force: a step that is saved already is left as it is, and one below the newest is
                allowed; both raise without it.

        Raises:
            RunError: this save, or the one before it, failed; older steps are intact.
            ValueError: `meta` is no JSON, a leaf has a name with '/', or is 64 bits wide while
                jax is not.
        """
        if self._read_only:
            raise ValueError(f"{self.directory} was opened read_only: cannot save step {step}")
        self.wait()
        meta = json.loads(json.dumps(meta, allow_nan=False))
        trees = {"state": _leaves(state), "ema": _leaves(ema)}
        arrays = {item: {name: _key_data(leaf) for name, leaf in leaves.items()} for item, leaves in trees.items()}
        for item, leaves in arrays.items():
            for name, array in leaves.items():
                if array.dtype != (canonical := jax.dtypes.canonicalize_dtype(array.dtype)):
                    raise ValueError(
                        f"{_shown(item, name)} is {array.dtype} and would come back as {canonical}; convert it first"
                    )
        need = _OVERHEAD_BYTES + sum(a.nbytes for item in arrays.values() for a in item.values())
        if _is_primary():
            _remove(self.directory / _TRASH)
        steps, free = _from_primary([self.steps(), _free_bytes(self.directory)])
        if step in steps and force:
            return
        if steps and step <= steps[-1] and not force:
            raise RunError(
                f"cannot save step {step}: step {steps[-1]} is there; {self.directory}; "
                "choose another --workdir or remove newer steps"
            )
        if free is not None and free < need:
            raise self._failure(step, need, OSError(errno.ENOSPC, "disk full"))

        hosts = _to_host(arrays)
        digests = {item: _records(trees[item], hosts[item]) for item in trees}
        digests |= {"step": step, "meta": _json_digest(meta)}
        digests |= {"sha256": _json_digest(digests)}
        # Where a host copy exists Orbax gets just the bytes that were digested; it also refuses
        # arrays of a mesh that spans this host alone while others run, which is what pmap makes.
        items = {item: ocp.args.PyTreeSave(_nest(hosts[item])) for item in trees if hosts[item]}
        lazy = any(isinstance(array, LazyArray) for leaves in hosts.values() for array in leaves.values())
        try:
            if lazy:
                self._release()
            saved = self._open(_item_handlers() if lazy else None).save(
                step,
                force=True,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), digests=ocp.args.JsonSave(digests), **items),
            )
        except Exception as error:
            raise self._failure(step, need, error) from error
        if not saved:
            raise self._failure(step, need, RuntimeError("refused by the checkpoint manager"))
        self._saving = (step, need)

    def check(self) -> None:
        """Raises RunError if the save in the background has failed; cheap, for every step."""
        # Not the manager's check_for_errors(): it hands an error out once, and having taken it here
        # would let the manager's own thread go on to delete older steps.
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the running save is on disk; raises RunError if it failed."""
        if not self._saving:
            return
        (step, need), self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(step, need, error) from error
        if _is_primary() and step not in self.steps():
            raise self._failure(step, need, RuntimeError("it was not committed"))

    def close(self) -> None:
        """Waits for the running save and releases the threads; raises RunError if it failed."""
        self.wait()
        self._release()
        if not self._read_only and _is_primary():
            _remove(self.directory / _TRASH)

    def restore(self, target: Mapping[str, Any], *, step: int | None = None) -> Restored | None:
        """The newest intact step, or `step`, placed as the target says.

        A damaged step is moved to `_corrupt/` and named in a warning, and the one before it is
        taken. The run that saved may have had other devices and processes.

        Args:
            target: dict(state=..., ema=...) of trees of jax.ShapeDtypeStruct; one without a
                sharding goes to the default device.
            step: only this one: damage is then an error and nothing moves.

        Returns:
            None if the directory never held a checkpoint.

        Raises:
            UserError: names, shapes or dtypes differ from the target; no intact step is left;
                `step` is missing or damaged.
        """
        wanted = {item: _leaves(target.get(item, {})) for item in ("state", "ema")}

        def read(path: pathlib.Path):
            digests, meta = _read_index(path)
            _compare(wanted, digests, path)
            items = {item: _read_item(path, item, digests[item]) for item in wanted if wanted[item]}
            return digests, meta, items

        found = self._newest(step, read)
        if found is None:
            return None
        number, (digests, meta, items) = found
        trees = {}
        for item, leaves in wanted.items():
            records = digests[item]
            placed = [
                _place(items[item][name], getattr(leaf, "sharding", None), records[name])
                for name, leaf in leaves.items()
            ]
            trees[item] = jax.tree.unflatten(jax.tree.structure(target.get(item, {})), placed)
        return Restored(number, trees["state"], trees["ema"], meta)

    def restore_ema(
        self, *, step: int | None = None, decay: str | None = None, raw: bool = False
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Averaged parameters as numpy, without model code or devices like the trainer's.

        Args:
            step: only this one; None for the newest that is intact.
            decay: which average, as in the config; None for the longest (largest decay).
            raw: the parameters in training (`params` of the state) in place of an average.

        Returns:
            (step, nested dict of numpy arrays, meta).

        Raises:
            UserError: there is no checkpoint, no such average, or no intact step.
        """

        def read(path: pathlib.Path):
            digests, meta = _read_index(path)
            item, name = ("state", "params") if raw else ("ema", decay)
            kept = {top.split("/")[0] for top in digests[item]}
            if name is None and kept:
                name = max(kept, key=float)
            if name not in kept:
                missing = "params" if raw else f"EMA {name}" if name else "EMA"
                has = f"; it has {', '.join(sorted(kept))}" if kept else ""
                raise UserError(
                    f"checkpoint has no {missing}{has}; {path}; choose another decay, or the raw parameters"
                )
            records = {k: r for k, r in digests[item].items() if k.split("/")[0] == name}
            return _nest(_read_item(path, item, records))[name], meta

        number, (params, meta) = self._required(step, read)
        return number, params, meta

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of `step`, or of the newest step whose index is intact.

        Raises:
            UserError: there is no checkpoint, or none with an intact index.
        """
        return self._required(step, lambda path: _read_index(path)[1])[1]

    def _required(self, step: int | None, read: Callable[[pathlib.Path], Any]) -> tuple[int, Any]:
        found = self._newest(step, read)
        if found is None:
            raise UserError(f"there is no checkpoint; {self.directory}; train first, or pass another --workdir")
        return found

    def _newest(self, step: int | None, read: Callable[[pathlib.Path], Any]) -> tuple[int, Any] | None:
        """(step, read(its directory)) for the newest intact step; None where never was one."""
        self.wait()
        steps, quarantined = _from_primary([self.steps(), _entries(self.directory / _CORRUPT)])
        if step is not None and step not in steps:
            has = ", ".join(map(str, steps)) or "none"
            raise UserError(f"there is no step {step}; {self.directory}; it has {has}")
        damaged = []
        for number in reversed(steps) if step is None else [step]:
            value, problem = None, None
            try:
                value = read(self.directory / str(number))
            except _Damaged as error:
                problem = str(error)
            if not _on_any_process(problem is not None):
                self._warn_damaged(damaged, f"; using step {number}")
                return number, value
            problem = problem or "another process could not read it"
            if step is not None:
                raise UserError(
                    f"step {step} is damaged ({problem}); {self.directory}; choose "
                    "another step, or none to take the newest intact one"
                )
            place = "" if self._read_only else f": moved to {self._quarantine(number)}"
            damaged.append(f"step {number} is damaged ({problem}){place}")
        self._warn_damaged(damaged, "")
        if damaged or quarantined:
            raise UserError(
                f"no intact checkpoint is left; {self.directory}; bring one back from "
                "a copy, or start in another --workdir"
            )
        return None

    def _warn_damaged(self, lines: list[str], ending: str) -> None:
        if _is_primary():
            for line in lines:
                self._warn(line + ending)

    def _quarantine(self, step: int) -> str:
        """Moves a step out of the way: Orbax would refuse to save at or below it, silently."""
        self._release()
        name = f"{_CORRUPT}/{step}"
        if _is_primary():
            again = 0
            while (self.directory / name).exists():
                again += 1
                name = f"{_CORRUPT}/{step}.{again}"
            (self.directory / _CORRUPT).mkdir(exist_ok=True)
            (self.directory / str(step)).rename(self.directory / name)
        return _from_primary(name)

    def _open(self, handlers: Mapping[str, Any] | None) -> ocp.CheckpointManager:
        if self._manager is None:
            policies = [preservation_policy.LatestN(self._keep)]
            if self._keep_every:
                policies.append(preservation_policy.EveryNSteps(self._keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # A kill inside a plain recursive delete leaves half a step that is still listed.
                todelete_subdir=_TRASH,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager

    def _release(self) -> None:
        """Closes the manager; the next save opens one that lists the directory anew."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _failure(self, step: int, need: int, error: Exception) -> RunError:
        """The error to raise for a failed save, whose remains are removed."""
        with contextlib.suppress(Exception):  # It would raise `error` once more.
            self._release()
        free = _free_bytes(self.directory)
        if _is_primary():
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                _remove(path, quiet=5)
        if getattr(error, "errno", None) == errno.ENOSPC or re.search("RESOURCE_EXHAUSTED|No space left", str(error)):
            reason = f"disk full (need {_megabytes(need)}, {_megabytes(free or 0)} free)"
        else:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        older = [s for s in self.steps() if s != step]
        intact = f"step {older[-1]} is intact" if older else "no step is saved yet"
        return RunError(f"cannot save step {step}: {reason}; {intact}")


def verify(directory: str | os.PathLike[str]) -> list[tuple[int, str | None]]:
    """Reads every step in full: (step, None) if intact, else (step, what is damaged).

    Leaves whose shards lay on several hosts when saved have no digest: they are read, no more.

    Raises:
        UserError: `directory` holds no checkpoint.
    """
    checkpoints = Checkpoints(directory, read_only=True)
    if not checkpoints.steps():
        raise UserError(f"there is no checkpoint; {checkpoints.directory}; pass another --workdir")
    report = []
    for step in checkpoints.steps():
        path = checkpoints.directory / str(step)
        problem = None
        try:
            digests, _ = _read_index(path)
            for item in ("state", "ema"):
                _read_item(path, item, digests[item])
        except _Damaged as error:
            problem = str(error)
        report.append((step, problem))
    return report


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds `workdir`, or the folder of one stage, for this run; the system releases it when the process dies.

    Of several processes of one run only the first takes the lock.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    if not _is_primary():
        yield
        return
    path = pathlib.Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write to workdir ({error.strerror}); {workdir}; choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"cannot lock workdir ({error.strerror}); {workdir}; choose a --workdir on another file system"
                ) from error
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise UserError(
                f"workdir is in use by {holder}; {workdir}; wait for it or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        yield


def config_difference(saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """One line for each field in which two configs differ, as JSON sees them.

    Args:
        saved: config from a checkpoint's `meta`.
        current: config of this run.
        ignore: names of fields or sections that may differ, like 'base.train.steps' or 'sample'.

    Returns:
        Lines like 'checkpoint was trained with base.net.channels=64, config says 128'.
    """
    before, after = _fields(saved), _fields(current)
    ignore = tuple(ignore)
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


def _is_primary() -> bool:
    return jax.process_index() == 0


def _from_primary(value: Any) -> Any:
    """The first process's JSON value, on every process."""
    if jax.process_count() == 1:
        return value
    sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(sent.size)))
    buffer = np.zeros(size, np.uint8)
    buffer[: sent.size] = sent[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def _on_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def _has_files(path: pathlib.Path) -> bool:
    return any(files for _, _, files in os.walk(path))


def _entries(path: pathlib.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else []


def _remove(path: pathlib.Path, quiet: int = 0, patience: float = 2.0) -> None:
    """Removes a tree; one into which an aborted write may still be putting files, until it was away `quiet` times."""
    end, away = time.monotonic() + patience, 0
    while (path.exists() or away < quiet) and time.monotonic() < end:
        away = 0 if path.exists() else away + 1
        shutil.rmtree(path, ignore_errors=True)
        if quiet:
            time.sleep(0.01)


def _free_bytes(path: pathlib.Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by name: 'opt_state/0/mu/conv/kernel'."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any("/" in part or not part for part in parts):
            raise ValueError(f'a name in the tree is empty or has a "/": {parts}')
        leaves["/".join(parts)] = leaf
    return leaves


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _shown(item: str, name: str) -> str:
    return (name if item == "state" else f"{item}/{name}").replace("/", ".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    """An array of plain numbers: typed PRNG keys become their uint32 words."""
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _to_host(items: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Host copies; an array of which other hosts hold a part stays what it is, and so does a lazy one."""
    here = {
        item: {
            name: not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
            for name, array in arrays.items()
        }
        for item, arrays in items.items()
    }
    for item, arrays in items.items():
        for name, array in arrays.items():
            if here[item][name] and isinstance(array, jax.Array):
                array.copy_to_host_async()
    return {
        item: {
            name: np.asarray(array) if here[item][name] and not isinstance(array, LazyArray) else array
            for name, array in arrays.items()
        }
        for item, arrays in items.items()
    }


def _records(leaves: Mapping[str, Any], hosts: Mapping[str, Any]) -> dict[str, Record]:
    """sha256, dtype and shape of each leaf; without a host copy sha256 is None: not verified."""
    lazy = any(isinstance(host, LazyArray) for host in hosts.values())
    # hashlib releases the GIL; but of lazy arrays only one is to be there at a time
    with concurrent.futures.ThreadPoolExecutor(1 if lazy else None) as pool:
        digests = pool.map(_digest, hosts.values())
    records = {}
    for (name, leaf), host, digest in zip(leaves.items(), hosts.values(), digests, strict=True):
        leaf = leaf if hasattr(leaf, "dtype") else host
        records[name] = dict(sha256=digest, dtype=str(leaf.dtype), shape=list(leaf.shape))
        if _is_key(leaf):
            records[name]["key_impl"] = str(jax.random.key_impl(leaf))
    return records


def _digest(array: Any) -> str | None:
    if isinstance(array, jax.Array):
        return None
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_index(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(digests, meta) of a step, each checked; raises _Damaged."""
    digests, meta = (_read_json(path, item) for item in ("digests", "meta"))
    own = digests.pop("sha256", None) if isinstance(digests, dict) else None
    if own != _json_digest(digests):
        raise _Damaged("digests: digest mismatch")
    if digests["meta"] != _json_digest(meta):
        raise _Damaged("meta: digest mismatch")
    if str(digests["step"]) != path.name:
        raise _Damaged(f"it holds step {digests['step']}")
    return digests, meta


def _read_json(path: pathlib.Path, item: str) -> Any:
    try:
        return ocp.JsonCheckpointHandler().restore(path / item)
    except Exception as error:
        raise _Damaged(f"{item}: {_reason(error)}") from error


def _read_item(path: pathlib.Path, item: str, records: Mapping[str, Record]) -> dict[str, np.ndarray]:
    """The arrays named by `records`, each equal to its digest; raises _Damaged naming one."""
    if not records:
        return {}
    # The handler, and not a manager: this works without the devices of the run that saved, and
    # waits for no other process.
    problem = None
    with _quiet_asyncio():
        try:
            arrays = _read_arrays(path / item, records)
        except Exception as error:
            problem = f"{item}: {_reason(error)}"
        if problem:
            problem = _unreadable_leaf(path, item, records) or problem
            gc.collect()  # asyncio reports a lost task when it is collected: now, and unheard.
            raise _Damaged(problem)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = dict(zip(arrays, pool.map(_digest, arrays.values()), strict=True))
    wrong = [name for name, record in records.items() if record["sha256"] not in (None, digests[name])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise _Damaged(f"{_shown(item, wrong[0])}{more}: digest mismatch")
    return arrays


def _unreadable_leaf(path: pathlib.Path, item: str, names: Iterable[str]) -> str | None:
    for name in names:
        try:
            _read_arrays(path / item, [name])
        except Exception as error:
            return f"{_shown(item, name)}: {_reason(error)}"
    return None


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


def _read_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    names = list(names)
    args = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
    item = _nest({name: 0 for name in names})
    tree = ocp.PyTreeCheckpointHandler().restore(
        path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
    arrays = _leaves(tree)
    return {name: np.asarray(arrays[name]) for name in names}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "file missing"
    text = next(iter(str(error).splitlines()), "")
    return f"unreadable ({text[:120] or type(error).__name__})"


def _compare(
    wanted: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, Mapping[str, Record]],
    path: pathlib.Path,
) -> None:
    """Raises UserError where the target differs: Orbax would cast a dtype without a word."""
    problems = []
    if wanted["ema"] and not digests["ema"]:
        problems.append("checkpoint has no EMA, config asks for one")
        wanted = {"state": wanted["state"]}
    for item, leaves in wanted.items():
        saved = digests[item] if leaves else {}
        for name in saved.keys() | leaves.keys():
            shown = _shown(item, name)
            if name not in saved:
                problems.append(f"checkpoint has no {shown}, config builds one")
            elif name not in leaves:
                problems.append(f"checkpoint has {shown}, config builds none")
            else:
                want, record = leaves[name], saved[name]
                have = tuple(record["shape"]), record["dtype"]
                for what, a, b in zip(("shape", "dtype"), have, (want.shape, str(want.dtype)), strict=True):
                    if a != b:
                        problems.append(f"checkpoint has {shown} of {what} {_compact(a)}, config says {_compact(b)}")
    if problems:
        problems.sort()
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{', '.join(problems[:3])}{more}; {path}; use the config that it was trained with")


def _compact(value: Any) -> str:
    return str(value).replace(" ", "")


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None, record: Record) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        placed = jax.device_put(array, sharding)
    else:
        placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    if "key_impl" in record:
        return jax.random.wrap_key_data(placed, impl=record["key_impl"])
    return placed
