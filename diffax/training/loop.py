"""Training (floor 4): the state, one pure step, and the loop around it. It knows no diffusion, only an `Objective`."""

import collections
import contextlib
import functools
import math
import os
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffax import config as configs
from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.models.stages import Objective
from diffax.training import checkpoint, parallel, reporting

Array = jax.Array
Params = Any

# What a resumed run may change: how long, how often, where from and with what it is shown.
MAY_DIFFER = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
    "train.keep",
    "train.max_nonfinite",
    "train.start_from",
    "text.vocab",
    "data.data_dir",
    "data.embeddings",
    "data.path",
    "data.max_bad",
    "data.workers",
    "net.remat",
    "net.flash",
    "low_res.level",
    "low_res.truncated",
    "guidance",
    "guidance_scale",
    "limit",
    "candidates",
    "codes.examples",
    "codes.percentile",
    "last",
    "classifier",
    "workdir",
    "sampler",
    "steps",
)


class Preempted(Exception):
    """The run was asked to stop, and saved. Exit status 75: the same command goes on."""


@flax.struct.dataclass
class TrainState:
    """All that a run is, on no particular device.

    Attributes:
      step: int32, batches seen.
      rng: typed key; each step folds its number into it.
      params: of the network, float32.
      opt_state: of optax.
      ema: {decay: running average of params}, float32.
      extra: of the objective: a history of losses, or nothing.
      skipped: int32, how many of the last steps in a row were not finite.
    """

    step: Array
    rng: Array
    params: Params
    opt_state: Any
    ema: dict[str, Params]
    extra: Any
    skipped: Array


def learning_rate(c: Mapping) -> optax.Schedule:
    """Linear warm-up from 0, then constant or annealed to 0 at the last step.

    Args:
      c: the `train` section: learning_rate, warmup_steps, anneal ('none', 'linear' or 'cosine'), steps.
    """

    def schedule(count):
        warm = jnp.minimum(count / c["warmup_steps"], 1.0) if c["warmup_steps"] else 1.0
        done = jnp.clip(count / c["steps"], 0, 1)
        left = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + jnp.cos(math.pi * done))}
        return c["learning_rate"] * warm * left[c["anneal"]]

    return schedule


def optimizer(c: Mapping) -> optax.GradientTransformation:
    """Adam or AdamW as the `train` section says, after clipping by the global norm (0: no clipping).

    `text_rate` slows the text transformer, all but the projection of what it read. At a rate at which a small U-Net
    learns in minutes, a transformer beside it first unlearns to tell words apart, as those that nobody reads yet are
    noise to the U-Net; and then none is left to be read.
    """
    decay = c["weight_decay"] if c["optimizer"] == "adamw" else 0.0
    kernels = (lambda params: jax.tree.map(lambda a: a.ndim > 1, params)) if c["decay"] == "kernels" else None
    adam = optax.adamw(learning_rate(c), b1=c["b1"], b2=c["b2"], eps=c["eps"], weight_decay=decay, mask=kernels)
    parts = [optax.clip_by_global_norm(c["clip"])] if c["clip"] else []
    parts += [adam] + ([optax.masked(optax.scale(c["text_rate"]), _reads_words)] if c["text_rate"] != 1 else [])
    return optax.chain(*parts) if len(parts) > 1 else adam


def _reads_words(params: Params) -> Any:
    def inside(path: tuple, _: Array) -> bool:
        names = [str(key.key) for key in path]
        return names[0] == "text" and names[1] != "proj"

    return jax.tree_util.tree_map_with_path(inside, params)


def sharpness_aware(gradient: Callable, rho: float) -> Callable:
    """The gradient where the loss nearby is the worst: at w + rho g / |g|, g the gradient at w (SAM, DALL-E 2's CLIP).

    Args:
      gradient: (params, *rest) -> (value, gradient).
      rho: how far, in the norm over all parameters.

    Returns:
      A function like `gradient`, at twice the price; the value is that at w.
    """

    def there(params: Params, *rest):
        params, cut = jax.vjp(parallel.whole, params)  # the norm is that of all of them
        value, slope = gradient(params, *rest)
        # without a slope there is no direction
        step = rho / jnp.maximum(optax.tree.norm(slope), 1e-12)
        return value, cut(gradient(jax.tree.map(lambda w, g: w + step * g, params, slope), *rest)[1])[0]

    return there


def init_state(key: Array, *, objective: Objective, tx: optax.GradientTransformation, ema) -> TrainState:
    """The state before the first step; the averages start as the parameters."""
    params = objective.init(jax.random.fold_in(key, 0))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.fold_in(key, 1),
        params=params,
        opt_state=tx.init(params),
        ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema},
        extra=objective.init_extra(),
        skipped=jnp.zeros((), jnp.int32),
    )


def mean_gradient(
    params: Params,
    batch: Mapping[str, Array],
    extra: Any,
    key: Array,
    *,
    objective: Objective,
    accumulate: int,
    sam: float,
    axis_name: str | None,
) -> tuple[Params, tuple[Array, dict[str, tuple[Array, Array]], Any]]:
    """The gradient of the mean loss over the examples of all devices; see `train_step`.

    Args:
      params: parameters; `parallel.Shard`s of those that are cut over the devices.
      batch: this device's examples, [n, ...].
      extra: what else the objective keeps.
      key: of this step.
      objective, accumulate, sam: see `train_step`.
      axis_name: the axis to average over.

    Returns:
      Gradients like params, and (loss, metrics, what the objective tells of each example [N, ...]) of the global batch.
    """
    n = jax.tree.leaves(batch)[0].shape[0]
    shards = jax.lax.axis_size(axis_name) if axis_name else 1
    first = jax.lax.axis_index(axis_name) * n if axis_name else 0
    position = first + jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(position)

    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, tiled=True) if axis_name else None

    def loss_fn(params, batch, keys, position):
        loss, metrics, feedback = objective.loss(params, extra, batch, keys, position, n * shards, gather)
        return jnp.mean(loss), (metrics, feedback)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    gradient = sharpness_aware(gradient, sam) if sam else gradient

    def microbatch(total, part):
        (loss, (metrics, feedback)), grads = gradient(parallel.tied(params, part), *part)
        return jax.tree.map(jnp.add, total, (loss, grads, metrics)), feedback

    # Every accumulate-th example goes into one microbatch: the same ones on any number of devices.
    parts = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(n // accumulate, accumulate, *a.shape[1:]), 1, 0), (batch, keys, position)
    )
    if accumulate == 1:
        (loss, (metrics, feedback)), grads = gradient(params, batch, keys, position)
    else:
        shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda a: a[0], parts))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0][0], shapes[1], shapes[0][1][0]))
        (loss, grads, metrics), feedback = jax.lax.scan(microbatch, zeros, parts)
        loss, grads = jax.tree.map(lambda a: a / accumulate, (loss, grads))
        feedback = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(n, *a.shape[2:]), feedback)
    if axis_name:
        loss = jax.lax.pmean(loss, axis_name)
        metrics = jax.lax.psum(metrics, axis_name)
        feedback = jax.lax.all_gather(feedback, axis_name, tiled=True)
    return parallel.mean(grads, axis_name), (loss, metrics, feedback)


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
    sam: float = 0.0,
    ema_warmup: bool = False,
    where: parallel.Layout | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, tuple[Array, Array]]]:
    """One update from one batch.

    Gradients are averaged over microbatches and devices before anything is clipped. Every example has its own key, made
    from its place in the global batch, so the result does not depend on how the batch is cut. A step whose loss or
    gradient is not finite changes nothing but the counters.

    Args:
      state: the state.
      batch: this device's examples under pmap, else all of them, [n, ...].
      objective: what is minimised.
      tx: the optimizer.
      schedule: its learning rate, for the report.
      accumulate: number of microbatches; divides n.
      sam: rho of `sharpness_aware`, 0: without. Each device climbs by its own part of a microbatch (DALL-E 2, appendix
        C: 64 pairs).
      ema_warmup: start the averages with a short memory, min(decay, (1 + step) / (10 + step)).
      where: the layout; None: that of pmap, or of a single device.
      axis_name: the axis to average over under pmap.

    Returns:
      The new state, and metrics {name: (sum, count)} over the global batch.
    """
    gradient = functools.partial(mean_gradient, objective=objective, accumulate=accumulate, sam=sam)
    key = jax.random.fold_in(state.rng, state.step)
    grads, (loss, metrics, feedback) = parallel.on_each_device(where, gradient)(
        state.params, batch, state.extra, key, axis_name=axis_name
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def average(decay: float, old: Params) -> Params:
        warm = (1.0 + state.step) / (10.0 + state.step)
        keep = jnp.minimum(decay, warm) if ema_warmup else decay
        return optax.incremental_update(params, old, 1 - keep)

    applied = state.replace(
        params=params,
        opt_state=opt_state,
        ema={decay: average(float(decay), old) for decay, old in state.ema.items()},
        extra=objective.update_extra(state.extra, feedback),
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), applied, state)
    state = state.replace(step=state.step + 1, skipped=jnp.where(finite, 0, state.skipped + 1))
    one = jnp.ones(())
    metrics |= {
        "objective": (loss, one),
        "grad_norm": (norm, one),
        "learning_rate": (schedule(state.step - 1), one),
        "finite": (finite.astype(jnp.float32), one),
    }
    return state, metrics


# ---- the loop -------------------------------------------------------------------------------------------------------


class Run:
    """One stage's training run, built from its config section: state, compiled step, checkpoints.

    Args:
      objective: what is minimised.
      section: the stage's section of the config, as a plain nested dict.
      seed: of initialisation, noise and data order.
      mode: 'pmap', 'jit' or 'fsdp'.
      devices: to run on, or to compile for; None: all that there are.
    """

    def __init__(self, objective: Objective, section: Mapping, *, seed: int, mode: str, devices=None):
        self.c = section["train"]
        self.section = section
        self.seed = seed
        self.where = parallel.layout(mode, devices)
        self.tx = optimizer(self.c)
        init = functools.partial(init_state, objective=objective, tx=self.tx, ema=self.c["ema"])
        self._init = lambda: init(jax.random.key(seed))
        step = functools.partial(
            train_step,
            objective=objective,
            tx=self.tx,
            schedule=learning_rate(self.c),
            accumulate=self.c["accumulate"],
            sam=self.c["sam"],
            ema_warmup=self.c["ema_warmup"],
            where=self.where,
        )
        self.abstract = parallel.abstract(self.where, self._init)
        self.step = parallel.compile_step(self.where, step, self.abstract)

    def create(self) -> TrainState:
        """The state before the first step, on the devices."""
        return parallel.create(self.where, self._init)

    def adopt(self, state: TrainState, params: Params) -> TrainState:
        """A fresh state with other parameters, and averages that start there."""
        shapes = jax.tree.map(lambda a: a.dtype, params), jax.tree.map(lambda a: a.dtype, state.params)
        if jax.tree.structure(shapes[0]) != jax.tree.structure(shapes[1]):
            raise UserError(
                "the parameters to start from are of another network; train.start_from; use its net options"
            )
        placed = parallel.place(params, state.params)
        return state.replace(params=placed, ema={k: jax.tree.map(jnp.copy, placed) for k in state.ema})

    def save(self, checkpoints: checkpoint.Checkpoints, state: TrainState, step: int) -> None:
        """Saves in the background; averages are an item of their own, so that samplers read only those."""
        meta = {"stage": self.section, "seed": self.seed}
        checkpoints.save(step, state.replace(ema={}), ema=state.ema, meta=meta)

    def check(self, checkpoints: checkpoint.Checkpoints) -> None:
        """Raises UserError if the newest checkpoint belongs to another config."""
        if checkpoints.latest() is None:
            return
        meta = checkpoints.read_meta()
        lines = checkpoint.config_difference(
            {**configs.complete_section(meta["stage"]), "seed": meta["seed"]},
            {**self.section, "seed": self.seed},
            ignore=MAY_DIFFER,
        )
        if lines:
            raise UserError(f"{lines[0]}; {checkpoints.directory}; use the same config or another --workdir")

    def restore(self, checkpoints: checkpoint.Checkpoints) -> TrainState | None:
        """The newest intact state, on this run's devices; None if there never was one.

        Raises:
          UserError: the checkpoint belongs to another config, or none is intact.
        """
        self.check(checkpoints)
        target = {"state": self.abstract.replace(ema={}), "ema": self.abstract.ema}
        restored = checkpoints.restore(target)
        return None if restored is None else restored.state.replace(ema=restored.ema)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM and SIGINT only set a flag; a second one ends the process at once."""
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
        for name, (total, count) in metrics.items():
            self._sums[name][0] += float(total)
            self._sums[name][1] += float(count)

    def take(self) -> dict[str, float]:
        """Means since the last call; a quartile that no example fell into is left out."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return means


def fit(
    run: Run,
    workdir: pathlib.Path,
    *,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    draw: Callable[[Params, int], None] | None = None,
    start_from: Callable[[], Params] | None = None,
    tensorboard: bool = False,
    curve: tuple[str, ...] = ("loss",),
) -> Params:
    """Trains to the configured number of steps, from the newest checkpoint in `workdir` if there is one.

    Args:
      run: the run.
      workdir: the stage's own folder: checkpoints/, metrics.jsonl, loss.png.
      batches: first step -> this process's batches from there on.
      draw: (averaged parameters on the host, step) -> None, called every `sample_every` steps and at the end.
      start_from: () -> the parameters that a new run starts from; by default the objective's own.
      tensorboard: also write TensorBoard events.
      curve: metrics to draw into loss.png.

    Returns:
      The averaged parameters, of the first decay (the parameters themselves if none is configured).

    Raises:
      UserError: what is in `workdir` belongs to another run.
      RunError: the disk is full, or too many steps in a row were not finite.
      Preempted: SIGTERM or SIGINT; the state is saved.
    """
    c, primary = run.c, parallel.process_index() == 0
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(stop_signals())
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir / "checkpoints", keep=c["keep"]))
        state = run.restore(checkpoints)
        start = 0 if state is None else int(parallel.fetch(state.step))
        report = stack.enter_context(
            reporting.Reporter(
                workdir, total_steps=c["steps"], start_step=start, primary=primary, tensorboard=tensorboard
            )
        )
        for unfinished in checkpoints.removed_unfinished:
            report.note(f"{workdir.name}: removed the unfinished save of step {unfinished}")
        if state is None:
            state = run.create() if start_from is None else run.adopt(run.create(), start_from())
            report.note(f"{workdir.name}: {count_parameters(state.params):,} parameters, {describe(run)}")
        elif start < c["steps"]:
            report.note(f"{workdir.name}: resuming from step {start:,}")

        averages, saved, bad = Averages(), start, 0
        pending: collections.deque = collections.deque()

        def settle(left: int) -> None:
            """Reads finished metrics until `left` steps are still in flight."""
            nonlocal bad
            while len(pending) > left:
                step, records, metrics = pending.popleft()
                metrics = parallel.fetch(metrics)
                if metrics["finite"][0]:
                    bad = 0
                    averages.add(metrics)
                else:
                    bad += 1
                    note_bad_step(report, step, records, metrics, bad, c["max_nonfinite"])
                report.progress(step, loss=float(metrics["objective"][0]))
                if step % c["log_every"] == 0 or step == c["steps"]:
                    report.log(step, averages.take())

        def save(step: int) -> None:
            nonlocal saved
            settle(0)
            if step > saved:
                run.save(checkpoints, state, step)
                saved = step

        def show(step: int) -> None:
            params = next(iter(state.ema.values()), state.params)
            # Parameters that are cut over several processes are nowhere whole.
            if draw is not None and (parallel.process_count() == 1 or run.where.mode != "fsdp"):
                draw(jax.device_get(params), step)
            if primary and (rows := reporting.read_metrics(workdir / "metrics.jsonl")):
                images.loss_curve(workdir / "loss.png", rows, curve)

        stream = parallel.prefetch(run.where, batches(start)) if start < c["steps"] else iter(())
        for step in range(start + 1, c["steps"] + 1):
            host, batch = next(stream)
            state, metrics = run.step(state, batch)
            if step == start + 1:  # it has compiled
                parallel.trim_memory()
            # One step stays in flight: its numbers are read while the next one runs.
            pending.append((step, host.get("index"), metrics))
            settle(1)
            checkpoints.check()
            if step % c["save_every"] == 0 or step == c["steps"]:
                save(step)
            if (c["sample_every"] and step % c["sample_every"] == 0) or step == c["steps"]:
                settle(0)
                show(step)
            # Asking the other processes costs a little, so not at every step.
            if parallel.process_count() == 1 or step % 10 == 0:
                if step < c["steps"] and parallel.agree(stopped()):
                    save(step)
                    checkpoints.wait()
                    raise Preempted(f"preempted at step {step:,}: saved; rerun the same command to continue")
        return next(iter(state.ema.values()), state.params)


def note_bad_step(report, step: int, records, metrics, bad: int, limit: int) -> None:
    """Names a step that was not applied, and ends the run at the limit.

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
            "raise train.warmup_steps or set train.clip, and rerun: it goes on from the last checkpoint"
        )
    report.note(f"diffax: warning: {line} ({bad} in a row, limit {limit})")


def count_parameters(params: Params) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def describe(run: Run) -> str:
    """One phrase on where and how a run trains."""
    devices = parallel.device_count()
    return (
        f"batch {run.c['batch_size']} on {devices} {jax.default_backend()} device{'s' * (devices > 1)} "
        f"({run.where.mode}); the first step compiles"
    )
