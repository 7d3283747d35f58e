"""One training step as a pure function of a state and a batch. It knows no diffusion, only a `Trainable` model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp
import optax

from diffax.networks import sharding
from diffax.training import parallel

Array = jax.Array
Params = Any
Metrics = dict[str, tuple[Array, Array]]


class Trainable(Protocol):
    """What training needs of a model.

    Attributes:
      rates: {regular expression at the start of a parameter's path, such as 'text/': factor of its learning rate}.
    """

    rates: Mapping[str, float]

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""

    def init_extra(self) -> Any:
        """Whatever else belongs to the training state: a history of losses, or nothing."""

    def loss(
        self,
        params: Params,
        extra: Any,
        batch: Mapping[str, Array],
        keys: Array,
        position: Array,
        total: int,
        gather: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Metrics, Any]:
        """The loss of each of n examples.

        Args:
          params: parameters, to be read through Flax, which gathers those that are sharded over the devices.
          extra: what else belongs to the training state.
          batch: [n, ...].
          keys: [n], one for each example.
          position: [n], places of the examples among the `total` of the global batch.
          total: see position.
          gather: brings the examples of all devices together, [n, ...] -> [N, ...]; without it those at hand are all.

        Returns:
          The loss [n], metrics {name: (sum, count)}, and feedback for `update_extra`, a tree of arrays [n].
        """

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The next `extra`, from the feedback of the whole global batch."""


@flax.struct.dataclass
class TrainState:
    """The state of a run, on no particular device.

    Attributes:
      step: int32, batches seen.
      rng: typed key; each step folds its number into it.
      params: of the network, float32.
      opt_state: of optax.
      ema: {decay: running average of params}, float32.
      extra: of the model: a history of losses, or nothing.
      skipped: int32, how many of the last steps in a row were not finite.
    """

    step: Array
    rng: Array
    params: Params
    opt_state: Any
    ema: dict[str, Params]
    extra: Any
    skipped: Array


def sharpness_aware(gradient: Callable, rho: float) -> Callable:
    """The gradient where the loss nearby is highest: at w + rho g / |g|, g the gradient at w (SAM, DALL-E 2's CLIP).

    Args:
      gradient: (params, *rest) -> (value, gradient).
      rho: how far, in the norm over all parameters.

    Returns:
      A function like `gradient`, at twice the price; the value is that at w.
    """

    def at_the_worst(params: Params, *rest):
        params, sharded = jax.vjp(sharding.whole, params)  # the norm is that of all of them
        value, slope = gradient(params, *rest)
        # without a slope there is no direction
        step = rho / jnp.maximum(optax.tree.norm(slope), 1e-12)
        return value, sharded(gradient(jax.tree.map(lambda w, g: w + step * g, params, slope), *rest)[1])[0]

    return at_the_worst


def init_state(key: Array, *, model: Trainable, tx: optax.GradientTransformation, ema: tuple[float, ...]) -> TrainState:
    """The state before the first step; the averages start as the parameters."""
    params = model.init(jax.random.fold_in(key, 0))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.fold_in(key, 1),
        params=params,
        opt_state=tx.init(params),
        ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema},
        extra=model.init_extra(),
        skipped=jnp.zeros((), jnp.int32),
    )


class _Examples(NamedTuple):
    """A part of the global batch: its arrays, and of each example the key and the place in the global batch, [n]."""

    batch: Mapping[str, Array]
    keys: Array
    position: Array


def _examples(batch: Mapping[str, Array], key: Array, axis_name: str | None) -> _Examples:
    n = jax.tree.leaves(batch)[0].shape[0]
    first = jax.lax.axis_index(axis_name) * n if axis_name else 0
    position = first + jnp.arange(n)
    return _Examples(batch, jax.vmap(lambda i: jax.random.fold_in(key, i))(position), position)


def _accumulated(gradient: Callable, params: Params, examples: _Examples, accumulate: int):
    """`gradient` as the mean over microbatches, one after the other."""
    n = len(examples.position)
    # Every accumulate-th example goes into one microbatch: the same ones on any number of devices.
    parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(n // accumulate, accumulate, *a.shape[1:]), 1, 0), examples)

    def add(total, part):
        (loss, (metrics, feedback)), grads = gradient(sharding.tied(params, part), *part)
        return jax.tree.map(jnp.add, total, (loss, grads, metrics)), feedback

    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0][0], shapes[1], shapes[0][1][0]))
    (loss, grads, metrics), feedback = jax.lax.scan(add, zeros, parts)
    loss, grads = jax.tree.map(lambda a: a / accumulate, (loss, grads))
    feedback = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(n, *a.shape[2:]), feedback)
    return (loss, (metrics, feedback)), grads


def mean_gradient(
    params: Params,
    batch: Mapping[str, Array],
    extra: Any,
    key: Array,
    *,
    model: Trainable,
    accumulate: int,
    sam: float,
    axis_name: str | None,
) -> tuple[Params, tuple[Array, Metrics, Any]]:
    """The gradient of the mean loss over the examples of all devices; see `train_step`.

    Args:
      params: parameters; `Shard`s of those that are sharded over the devices.
      batch: this device's examples, [n, ...].
      extra: what else the model keeps.
      key: of this step.
      model: see `train_step`.
      accumulate: see `train_step`.
      sam: see `train_step`.
      axis_name: the axis to average over.

    Returns:
      Gradients like params, and (loss, metrics, feedback of each example [N, ...]) of the global batch.
    """
    examples = _examples(batch, key, axis_name)
    total = len(examples.position) * (jax.lax.axis_size(axis_name) if axis_name else 1)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, tiled=True) if axis_name else None

    def loss_fn(params, batch, keys, position):
        loss, metrics, feedback = model.loss(params, extra, batch, keys, position, total, gather)
        return jnp.mean(loss), (metrics, feedback)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    gradient = sharpness_aware(gradient, sam) if sam else gradient
    if accumulate == 1:
        (loss, (metrics, feedback)), grads = gradient(params, *examples)
    else:
        (loss, (metrics, feedback)), grads = _accumulated(gradient, params, examples, accumulate)
    if axis_name:
        loss = jax.lax.pmean(loss, axis_name)
        metrics = jax.lax.psum(metrics, axis_name)
        feedback = jax.lax.all_gather(feedback, axis_name, tiled=True)
    return parallel.mean(grads, axis_name), (loss, metrics, feedback)


def averaged(ema: Mapping[str, Params], params: Params, step: Array, *, warmup: bool) -> dict[str, Params]:
    """The averages {decay: parameters} after a step; with a warm-up the decay is at most (1 + step) / (10 + step)."""

    def average(decay: float, old: Params) -> Params:
        keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
        return optax.incremental_update(params, old, 1 - keep)

    return {decay: average(float(decay), old) for decay, old in ema.items()}


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    *,
    model: Trainable,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int = 1,
    sam: float = 0.0,
    ema_warmup: bool = False,
    where: parallel.Layout | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update from one batch.

    Gradients are averaged over microbatches and devices before anything is clipped. Every example has its own key, made
    from its place in the global batch, so the result does not depend on how the batch is divided. A step whose loss or
    gradient is not finite changes nothing but the counters.

    Args:
      state: the state.
      batch: this device's examples under pmap, else all of them, [n, ...].
      model: whose loss is minimised.
      tx: the optimizer.
      schedule: its learning rate, for the report.
      accumulate: number of microbatches; divides n.
      sam: rho of `sharpness_aware`, 0: without. Each device climbs by its own part of a microbatch (DALL-E 2, appendix
        C: 64 pairs).
      ema_warmup: start the averages with a short memory, see `averaged`.
      where: the layout; None: that of pmap, or of a single device.
      axis_name: the axis to average over under pmap.

    Returns:
      The new state, and metrics {name: (sum, count)} over the global batch.
    """
    gradient = functools.partial(mean_gradient, model=model, accumulate=accumulate, sam=sam)
    key = jax.random.fold_in(state.rng, state.step)
    grads, (loss, metrics, feedback) = parallel.on_each_device(where, gradient)(
        state.params, batch, state.extra, key, axis_name=axis_name
    )
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    applied = state.replace(
        params=params,
        opt_state=opt_state,
        ema=averaged(state.ema, params, state.step, warmup=ema_warmup),
        extra=model.update_extra(state.extra, feedback),
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    own = {"objective": loss, "grad_norm": norm, "learning_rate": schedule(state.step)}
    own |= {"finite": finite.astype(jnp.float32)}
    return _counted(state, applied, finite), metrics | {name: (value, jnp.ones(())) for name, value in own.items()}


def _counted(before: TrainState, applied: TrainState, finite: Array) -> TrainState:
    """The state after a step, which is not applied unless it is finite."""
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), applied, before)
    return state.replace(step=before.step + 1, skipped=jnp.where(finite, 0, before.skipped + 1))
