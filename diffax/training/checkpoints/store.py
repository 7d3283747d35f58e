"""The checkpoints of one training run: saving in the background, retention, restoring the newest that is intact."""

import contextlib
import errno
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from diffax.errors import RunError, UserError
from diffax.training import processes
from diffax.training.checkpoints import disk, integrity, lazy, leaves
from diffax.training.checkpoints.compare import check_target
from diffax.training.checkpoints.integrity import ITEMS, Damaged

# Orbax adds manifests and metadata to the arrays; measured 30 to 200 kB.
_OVERHEAD_BYTES = 2**18

ByName = dict[str, Any]


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: trees of the target's structure, and the saved `meta`."""

    step: int
    state: Any
    ema: Any
    meta: dict[str, Any]


def print_warning(line: str) -> None:
    """Writes `diffax: warning: line` to stderr."""
    print(f"diffax: warning: {line}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one section: saved in the background, verified when read.

    With several processes every process makes the same calls in the same order; the first one alone writes shared
    files, moves and deletes.

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
        if not read_only and processes.is_primary():
            self.removed_unfinished = self._prepare_directory()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except RunError as failure:
            if kind is None:
                raise
            self._warn(str(failure))

    def _prepare_directory(self) -> list[int]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints ({error.strerror}); {self.directory}; choose another --workdir"
            ) from error
        return disk.clean(self.directory)

    def steps(self) -> list[int]:
        """The committed steps on disk, ascending; damaged ones are among them."""
        return disk.steps(self.directory)

    def latest(self) -> int | None:
        """The newest step on disk, not yet verified; None without any."""
        return max(self.steps(), default=None)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: Any, *, ema: Mapping[str, Any], meta: Mapping[str, Any], force: bool = False
    ) -> None:
        """Saves one step in the background; the arrays may be donated once this returns.

        Blocks for an earlier save, the copy to the host and its digests. Call `check` each step and `close` at the end,
        so that a failure in the background ends the run.

        Args:
          step: number of the step, above all saved ones.
          state: tree of arrays: jax Arrays on any devices, numpy arrays, typed PRNG keys, `LazyArray`s.
          ema: decay, as text, -> averaged parameters; may be empty.
          meta: JSON data without NaN; tuples come back as lists.
          force: a step that is saved already is left as it is, and one below the newest is allowed; both raise
            without it.

        Raises:
          RunError: this save, or the one before it, failed; older steps are intact.
          ValueError: `meta` is no JSON, a leaf has a name with '/', or is 64 bits wide while jax is not.
        """
        if self._read_only:
            raise ValueError(f"{self.directory} was opened read_only: cannot save step {step}")
        self.wait()
        meta = json.loads(json.dumps(meta, allow_nan=False))
        trees = {"state": leaves.named(state), "ema": leaves.named(ema)}
        arrays = {(item, name): leaves.plain(leaf) for item, tree in trees.items() for name, leaf in tree.items()}
        for (item, name), array in arrays.items():
            leaves.check_width(item, name, array)
        need = _OVERHEAD_BYTES + sum(array.nbytes for array in arrays.values())
        if not self._may_save(step, need, force):
            return
        hosts: dict[str, ByName] = {item: {} for item in trees}
        for (item, name), array in leaves.to_host(arrays).items():
            hosts[item][name] = array
        digests = integrity.index(step, {item: integrity.records(trees[item], hosts[item]) for item in trees}, meta)
        self._write(step, need, hosts, meta, digests)

    def _may_save(self, step: int, need: int, force: bool) -> bool:
        """Whether a step is to be saved, which it is not if it is there; raises RunError if it cannot be."""
        if processes.is_primary():
            disk.remove(self.directory / disk.TRASH)
        steps, free = processes.from_primary([self.steps(), disk.free_bytes(self.directory)])
        if step in steps and force:
            return False
        if steps and step <= steps[-1] and not force:
            raise RunError(
                f"cannot save step {step}: step {steps[-1]} is there; {self.directory}; "
                "choose another --workdir or remove newer steps"
            )
        if free is not None and free < need:
            raise self._failure(step, need, OSError(errno.ENOSPC, "disk full"))
        return True

    def _write(self, step: int, need: int, hosts: Mapping[str, ByName], meta: Any, digests: Any) -> None:
        # Where a host copy exists Orbax gets just the bytes that were digested; it also refuses arrays of a mesh that
        # spans this host alone while others run, which is what pmap makes.
        items = {item: ocp.args.PyTreeSave(leaves.nest(arrays)) for item, arrays in hosts.items() if arrays}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), digests=ocp.args.JsonSave(digests), **items)
        has_lazy = any(map(lazy.is_lazy, (array for arrays in hosts.values() for array in arrays.values())))
        try:
            if has_lazy:
                self._release()
            saved = self._open(lazy.item_handlers() if has_lazy else None).save(step, force=True, args=args)
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
        if processes.is_primary() and step not in self.steps():
            raise self._failure(step, need, RuntimeError("it was not committed"))

    def close(self) -> None:
        """Waits for the running save and releases the threads; raises RunError if it failed."""
        self.wait()
        self._release()
        if not self._read_only and processes.is_primary():
            disk.remove(self.directory / disk.TRASH)

    # ---- restoring --------------------------------------------------------------------------------------------------

    def restore(self, target: Mapping[str, Any], *, step: int | None = None) -> Restored | None:
        """The newest intact step, or `step`, placed as the target says.

        A damaged step is moved to `_corrupt/` and named in a warning, and the one before it is taken. The run that
        saved may have had other devices and processes.

        Args:
          target: dict(state=..., ema=...) of trees of jax.ShapeDtypeStruct; one without a sharding goes to the default
            device.
          step: only this one: damage is then an error and nothing moves.

        Returns:
          None if the directory never held a checkpoint.

        Raises:
          UserError: names, shapes or dtypes differ from the target; no intact step is left; `step` is missing or
            damaged.
        """
        wanted = {item: leaves.named(target.get(item, {})) for item in ITEMS}

        def read(path: pathlib.Path):
            digests, meta = integrity.read_index(path)
            check_target(wanted, digests, path)
            items = {item: integrity.read_item(path, item, digests[item]) for item in ITEMS if wanted[item]}
            return digests, meta, items

        found = self._newest(step, read)
        if found is None:
            return None
        number, (digests, meta, items) = found
        trees = {}
        for item in ITEMS:
            placed = [
                leaves.place(items[item][name], getattr(leaf, "sharding", None), digests[item][name])
                for name, leaf in wanted[item].items()
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
            digests, meta = integrity.read_index(path)
            item = "state" if raw else "ema"
            name = _average(digests[item], "params" if raw else decay, raw, path)
            records = {k: r for k, r in digests[item].items() if k.split("/")[0] == name}
            return leaves.nest(integrity.read_item(path, item, records))[name], meta

        number, (params, meta) = self._required(step, read)
        return number, params, meta

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of `step`, or of the newest step whose index is intact.

        Raises:
          UserError: there is no checkpoint, or none with an intact index.
        """
        return self._required(step, lambda path: integrity.read_index(path)[1])[1]

    def _required(self, step: int | None, read: Callable[[pathlib.Path], Any]) -> tuple[int, Any]:
        found = self._newest(step, read)
        if found is None:
            raise UserError(f"there is no checkpoint; {self.directory}; train first, or pass another --workdir")
        return found

    def _newest(self, step: int | None, read: Callable[[pathlib.Path], Any]) -> tuple[int, Any] | None:
        """(step, read(its directory)) for the newest intact step; None where never was one."""
        self.wait()
        found = [self.steps(), disk.entries(self.directory / disk.CORRUPT)]
        steps, quarantined = processes.from_primary(found)
        if step is not None and step not in steps:
            has = ", ".join(map(str, steps)) or "none"
            raise UserError(f"there is no step {step}; {self.directory}; it has {has}")
        damaged = []
        for number in reversed(steps) if step is None else [step]:
            value, problem = self._try(number, read)
            if problem is None:
                self._warn_damaged(damaged, f"; using step {number}")
                return number, value
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

    def _try(self, step: int, read: Callable[[pathlib.Path], Any]) -> tuple[Any, str | None]:
        """(what was read, None), or (anything, the problem) if it is damaged for any process."""
        value, problem = None, None
        try:
            value = read(self.directory / str(step))
        except Damaged as error:
            problem = str(error)
        if processes.agree(problem is not None):
            return value, problem or "another process could not read it"
        return value, None

    def _warn_damaged(self, lines: list[str], ending: str) -> None:
        if processes.is_primary():
            for line in lines:
                self._warn(line + ending)

    def _quarantine(self, step: int) -> str:
        """Moves a step out of the way: Orbax would refuse to save at or below it, silently."""
        self._release()
        name = disk.quarantine(self.directory, step) if processes.is_primary() else ""
        return processes.from_primary(name)

    # ---- Orbax's manager --------------------------------------------------------------------------------------------

    def _open(self, handlers: Mapping[str, Any] | None) -> ocp.CheckpointManager:
        if self._manager is None:
            policies = [preservation_policy.LatestN(self._keep)]
            if self._keep_every:
                policies.append(preservation_policy.EveryNSteps(self._keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # A kill inside a plain recursive delete leaves half a step that is still listed.
                todelete_subdir=disk.TRASH,
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
        free = disk.free_bytes(self.directory)
        if processes.is_primary():
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                disk.remove(path, quiet=5)
        if getattr(error, "errno", None) == errno.ENOSPC or re.search("RESOURCE_EXHAUSTED|No space left", str(error)):
            reason = f"disk full (need {disk.megabytes(need)}, {disk.megabytes(free or 0)} free)"
        else:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        older = [s for s in self.steps() if s != step]
        intact = f"step {older[-1]} is intact" if older else "no step is saved yet"
        return RunError(f"cannot save step {step}: {reason}; {intact}")


def _average(records: Mapping[str, Any], name: str | None, raw: bool, path: pathlib.Path) -> str:
    """The name of the average to read, the longest if none is named; raises UserError if it is not there."""
    kept = {top.split("/")[0] for top in records}
    if name is None and kept:
        name = max(kept, key=float)
    if name not in kept:
        missing = "params" if raw else f"EMA {name}" if name else "EMA"
        has = f"; it has {', '.join(sorted(kept))}" if kept else ""
        raise UserError(f"checkpoint has no {missing}{has}; {path}; choose another decay, or the raw parameters")
    return name
