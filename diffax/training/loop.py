"""A run and the loop around its step: checkpoints, metrics, samples, signals."""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffax import components
from diffax.data import plots
from diffax.errors import Preempted, RunError, UserError
from diffax.training import checkpoints, optimizer, parallel, processes, reporting, settings
from diffax.training.step import Params, Trainable, TrainState, init_state, train_step

OnStep = Callable[[int, Mapping[str, float]], None]
OnSample = Callable[[Params, int], None]


class Run:
    """The training run of one model: its state, compiled step and checkpoints.

    Args:
      model: what is trained.
      train: fields of `settings.train`, as a mapping or a namespace; those that are missing are at their defaults.
      seed: of initialisation, noise and data order.
      mode: 'pmap', 'jit' or 'fsdp'.
      identity: {field: value}, all that a resumed run must agree in, as `components.identity` makes it.
      name: of the model's section, in front of fields in errors.
      section: the whole section as plain data, kept in checkpoints so that the model can be built from them.
      devices: to run on, or to compile for; None: all that there are.

    Raises:
      UserError: a field of `train` is wrong, or the model has a learning rate for parameters that it does not have.
    """

    def __init__(
        self,
        model: Trainable,
        train: Mapping[str, Any] | types.SimpleNamespace,
        *,
        seed: int,
        mode: str,
        identity: Mapping[str, Any],
        name: str = "",
        section: Mapping[str, Any] | None = None,
        devices=None,
    ):
        self.settings, plain = _settings(train, f"{name}.train" if name else "train")
        self.identity = {name: dict(identity)} if name else dict(identity)
        self.meta = {"section": section or {"train": plain}, "identity": dict(identity), "seed": seed}
        self.seed, self.name, c = seed, name, self.settings
        self.where = parallel.layout(mode, devices)
        schedule = optimizer.learning_rate(
            c.learning_rate, warmup_steps=c.warmup_steps, anneal=c.anneal, num_train_steps=c.num_train_steps
        )
        self.tx = optimizer.transformation(c.optimizer, schedule, grad_clip=c.grad_clip, rates=model.rates)
        init = functools.partial(init_state, model=model, tx=self.tx, ema=c.ema)
        self._init = lambda: init(jax.random.key(seed))
        self.abstract = parallel.abstract(self.where, self._init)
        if wrong := optimizer.unmatched(model.rates, self.abstract.params):
            raise UserError(f"no parameter's path begins with {wrong[0]!r}; learning rates of the model; correct it")
        how = {"accumulate": c.accumulate, "sam": c.sam, "ema_warmup": c.ema_warmup, "where": self.where}
        step = functools.partial(train_step, model=model, tx=self.tx, schedule=schedule, **how)
        self.step = parallel.compile_step(self.where, step, self.abstract)

    def create(self) -> TrainState:
        """The state before the first step, on the devices."""
        return parallel.create(self.where, self._init)

    def adopt(self, state: TrainState, params: Params) -> TrainState:
        """A fresh state with other parameters, and averages that start there.

        Raises:
          UserError: the parameters are of another network.
        """
        dtypes = [jax.tree.map(lambda a: a.dtype, tree) for tree in (params, state.params)]
        if jax.tree.structure(dtypes[0]) != jax.tree.structure(dtypes[1]):
            raise UserError(
                "the parameters to start from are of another network; train.start_from; use its net options"
            )
        placed = parallel.place(params, state.params)
        return state.replace(params=placed, ema={k: jax.tree.map(jnp.copy, placed) for k in state.ema})

    def save(self, store: checkpoints.Checkpoints, state: TrainState, step: int) -> None:
        """Saves in the background; averages are an item of their own, so that samplers read only those."""
        store.save(step, state.replace(ema={}), ema=state.ema, meta=self.meta)

    def check(self, store: checkpoints.Checkpoints) -> None:
        """Raises UserError if the newest checkpoint belongs to another config."""
        if store.latest() is None:
            return
        meta = store.read_meta()
        if "identity" not in meta:
            raise UserError(f"checkpoint holds no run to resume; {store.directory}; use another --workdir")
        saved = {self.name: meta["identity"]} if self.name else meta["identity"]
        lines = checkpoints.config_difference({**saved, "seed": meta["seed"]}, {**self.identity, "seed": self.seed})
        if lines:
            raise UserError(f"{lines[0]}; {store.directory}; use the same config or another --workdir")

    def restore(self, store: checkpoints.Checkpoints) -> TrainState | None:
        """The newest intact state, on this run's devices; None if there never was one.

        Raises:
          UserError: the checkpoint belongs to another config, or none is intact.
        """
        self.check(store)
        restored = store.restore({"state": self.abstract.replace(ema={}), "ema": self.abstract.ema})
        return None if restored is None else restored.state.replace(ema=restored.ema)


def _settings(train: Mapping | types.SimpleNamespace, path: str) -> tuple[types.SimpleNamespace, dict[str, Any]]:
    """(the fields of a run with its optimizer built, the same as plain data)."""
    given = vars(train) if isinstance(train, types.SimpleNamespace) else train
    section = components.complete(components.schema(settings.train), given, path)
    rule = components.build(section.optimizer, "optimizer", path=f"{path}.optimizer")
    plain = json.loads(section.to_json())
    return types.SimpleNamespace(**{**section, "optimizer": rule}), plain


# ---- the loop -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM and SIGINT only set a flag; a second one ends the process at once.

    Only the main thread can handle signals; in another one they do what they did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def handler(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)

    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


class Averages:
    """Sums metrics between two rows of the log."""

    def __init__(self):
        self._sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def add(self, metrics: Mapping[str, tuple]) -> None:
        """Adds the metrics {name: (sum, count)} of a step."""
        for name, (total, count) in metrics.items():
            self._sums[name][0] += float(total)
            self._sums[name][1] += float(count)

    def take(self) -> dict[str, float]:
        """Means since the last call; a metric without an example, such as a quartile, is left out."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return means


class _Metrics:
    """Reads the metrics of steps that have finished, and logs rows of their averages."""

    def __init__(self, report: reporting.Reporter, c: types.SimpleNamespace, on_step: OnStep | None):
        self._report, self._c, self._on_step = report, c, on_step
        self._averages, self._bad = Averages(), 0
        self._pending: collections.deque = collections.deque()

    def add(self, step: int, records: Any, metrics: Mapping) -> None:
        """Takes a step in flight. One stays so: its numbers are read while the next step runs."""
        self._pending.append((step, records, metrics))
        self.settle(1)

    def settle(self, left: int = 0) -> None:
        """Waits until at most `left` steps are in flight.

        Raises:
          RunError: too many steps in a row were not finite.
        """
        while len(self._pending) > left:
            step, records, metrics = self._pending.popleft()
            metrics = parallel.fetch(metrics)
            if metrics["finite"][0]:
                self._bad = 0
                self._averages.add(metrics)
            else:
                self._bad += 1
                note_bad_step(self._report, step, records, metrics, self._bad, self._c.max_nonfinite)
            self._report.progress(step, loss=float(metrics["objective"][0]))
            if step % self._c.log_every == 0 or step == self._c.num_train_steps:
                self._log(step)

    def _log(self, step: int) -> None:
        row = self._averages.take()
        self._report.log(step, row)
        if self._on_step is not None and processes.is_primary():
            self._on_step(step, row)


def fit(
    run: Run,
    workdir: pathlib.Path,
    *,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    on_step: OnStep | None = None,
    on_sample: OnSample | None = None,
    start_from: Callable[[], Params] | None = None,
    tensorboard: bool = False,
    curve: tuple[str, ...] = ("loss",),
) -> Params:
    """Trains to the configured number of steps, from the newest checkpoint in `workdir` if there is one.

    Args:
      run: the run.
      workdir: the model's own folder: checkpoints/, metrics.jsonl, loss.png.
      batches: first step -> this process's batches from there on.
      on_step: (step, averaged metrics) -> None, called by the primary process after every row of metrics.jsonl.
      on_sample: (averaged parameters on the host, step) -> None, called by every process each `sample_every` steps and
        at the end.
      start_from: () -> the parameters that a new run starts from; by default the model's own.
      tensorboard: also write TensorBoard events.
      curve: metrics to draw into loss.png.

    Returns:
      The averaged parameters, of the first decay (the parameters themselves if none is configured).

    Raises:
      UserError: what is in `workdir` belongs to another run.
      RunError: the disk is full, or too many steps in a row were not finite.
      Preempted: SIGTERM or SIGINT; the state is saved.
    """
    c = run.settings
    with stop_signals() as stopped, checkpoints.Checkpoints(workdir / "checkpoints", keep=c.keep) as store:
        state = run.restore(store)
        first = 0 if state is None else int(parallel.fetch(state.step))
        with _reporter(workdir, c, first, tensorboard) as report:
            state = _started(run, state, workdir.name, store, report, start_from)
            metrics, saved = _Metrics(report, c, on_step), first
            steps = _steps(run, state, first, batches, metrics)
            for step, state in steps:
                store.check()
                last = step == c.num_train_steps
                if last or step % c.save_every == 0:
                    saved = _save(run, store, state, step, metrics)
                if last or (c.sample_every and step % c.sample_every == 0):
                    metrics.settle()
                    _show(run, state, step, workdir, on_sample, curve)
                if not last and _stops(step, stopped):
                    saved = saved if saved == step else _save(run, store, state, step, metrics)
                    store.wait()
                    raise Preempted(f"preempted at step {saved:,}: saved; rerun the same command to continue")
            return _best(state)


def _reporter(workdir: pathlib.Path, c: types.SimpleNamespace, first: int, tensorboard: bool) -> reporting.Reporter:
    return reporting.Reporter(
        workdir,
        total_steps=c.num_train_steps,
        start_step=first,
        primary=processes.is_primary(),
        tensorboard=tensorboard,
    )


def _save(run: Run, store: checkpoints.Checkpoints, state: TrainState, step: int, metrics: _Metrics) -> int:
    metrics.settle()  # a run that ends by bad steps saves none of them
    run.save(store, state, step)
    return step


def _best(state: TrainState) -> Params:
    """The parameters to sample from."""
    return next(iter(state.ema.values()), state.params)


def _started(
    run: Run,
    state: TrainState | None,
    name: str,
    store: checkpoints.Checkpoints,
    report: reporting.Reporter,
    start_from: Callable[[], Params] | None,
) -> TrainState:
    """The state to go on from: the one that was restored, or a new one."""
    for unfinished in store.removed_unfinished:
        report.note(f"{name}: removed the unfinished save of step {unfinished}")
    if state is None:
        state = run.create() if start_from is None else run.adopt(run.create(), start_from())
        report.note(f"{name}: {count_parameters(state.params):,} parameters, {describe(run)}")
    elif (step := int(parallel.fetch(state.step))) < run.settings.num_train_steps:
        report.note(f"{name}: resuming from step {step:,}")
    return state


def _steps(
    run: Run, state: TrainState, first: int, batches: Callable, metrics: _Metrics
) -> Iterator[tuple[int, TrainState]]:
    """(number, state) after each step; the next step donates the state."""
    if first >= run.settings.num_train_steps:
        return
    stream = parallel.prefetch(run.where, batches(first))
    for step in range(first + 1, run.settings.num_train_steps + 1):
        host, batch = next(stream, (None, None))
        if batch is None:
            raise UserError(f"the batches end before step {step:,}; train.num_train_steps; batches must go on for ever")
        state, values = run.step(state, batch)
        if step == first + 1:  # it has compiled
            parallel.trim_memory()
        metrics.add(step, host.get("index"), values)
        yield step, state


def _stops(step: int, stopped: Callable[[], bool]) -> bool:
    """Whether any process has been stopped. Agreeing has a price, so several processes do so every tenth step."""
    return (processes.process_count() == 1 or step % 10 == 0) and processes.agree(stopped())


def _show(
    run: Run, state: TrainState, step: int, workdir: pathlib.Path, on_sample: OnSample | None, curve: tuple[str, ...]
) -> None:
    # Parameters that are sharded over several processes are nowhere whole.
    if on_sample is not None and (processes.process_count() == 1 or run.where.mode != "fsdp"):
        on_sample(jax.device_get(_best(state)), step)
    if processes.is_primary() and (rows := reporting.read_metrics(workdir / "metrics.jsonl")):
        plots.loss_curve(workdir / "loss.png", rows, curve)


def note_bad_step(report, step: int, records, metrics, bad: int, limit: int) -> None:
    """Names a step that was not applied, and ends the run at the limit.

    Args:
      report: receives the warning.
      step: its number.
      records: numbers of the records of its batch, or None.
      metrics: of the step, on the host.
      bad: how many steps in a row were not finite, this one included.
      limit: how many end the run.

    Raises:
      RunError: `limit` steps in a row were not finite.
    """
    loss, norm, rate = (float(metrics[k][0]) for k in ("objective", "grad_norm", "learning_rate"))
    what = f"loss is {loss:g}" if not math.isfinite(loss) else f"gradient norm is {norm:g}"
    some = "" if records is None else f", records {', '.join(map(str, records[:4]))}, ..."
    line = f"{what} at step {step:,} (learning rate {rate:.3g}{some}); update not applied"
    if bad >= limit:
        raise RunError(
            f"{line}; {bad} steps in a row were not finite (train.max_nonfinite); lower train.learning_rate, "
            "raise train.warmup_steps or set train.grad_clip, and rerun: it goes on from the last checkpoint"
        )
    report.note(f"diffax: warning: {line} ({bad} in a row, limit {limit})")


def count_parameters(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def describe(run: Run) -> str:
    """One phrase on where and how a run trains."""
    devices = parallel.device_count()
    return (
        f"batch {run.settings.batch_size} on {devices} {jax.default_backend()} device{'s' * (devices > 1)} "
        f"({run.where.mode}); the first step compiles"
    )
