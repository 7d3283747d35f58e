"""Which noise levels to train on (floor 2): distributions over the steps of a chain, or over u in [0, 1].

Each is a pair of pure functions with a state, as in optax; only `loss_second_moment` has one. Draws depend on each
example's key and its position in the global batch, never on how the batch is cut over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

Array = jax.Array


class TimestepSampler(NamedTuple):
    """How to draw u.

    Attributes:
      init: () -> state.
      draw: (state, keys [n], position [n], total) -> (u [n] float32 in (0, 1], weight [n] for the loss); `position`
        are the places of these n examples in the global batch of `total` examples.
      update: (state, u [m], loss [m]) -> state, after a step, with the unweighted losses of the whole global batch.
    """

    init: Callable[[], Any]
    draw: Callable[..., tuple[Array, Array]]
    update: Callable[..., Any]


def _to_u(uniform: Array, steps: int) -> Array:
    """A number in [0, 1) to one of u = 1/T, ..., 1; or to itself for a continuous schedule (steps 0)."""
    if not steps:
        return uniform
    return (jnp.minimum(jnp.floor(uniform * steps), steps - 1) + 1) / steps


def _uniforms(keys: Array) -> Array:
    return jax.vmap(jax.random.uniform)(keys)


def uniform(steps: int) -> TimestepSampler:
    """Every step equally likely, independently per example (DDPM, algorithm 1). steps 0: u continuous."""

    def draw(state, keys, position, total):
        u = _to_u(_uniforms(keys), steps)
        return u, jnp.ones_like(u)

    return TimestepSampler(lambda: (), draw, lambda state, u, loss: state)


def stratified(steps: int) -> TimestepSampler:
    """One draw from each of `total` equal parts of [0, 1], spread over the global batch: the same mean as `uniform`,
    less variance (Kingma et al. 2021, appendix I.1). steps 0: u continuous."""

    def draw(state, keys, position, total):
        u = _to_u((position + _uniforms(keys)) / total, steps)
        return u, jnp.ones_like(u)

    return TimestepSampler(lambda: (), draw, lambda state, u, loss: state)


@flax.struct.dataclass
class LossHistory:
    """The last losses of every step: values [T, H] float32, oldest first; counts [T] int32, at most H."""

    values: Array
    counts: Array


def loss_second_moment(steps: int, *, history: int = 10, uniform_prob: float = 0.001) -> TimestepSampler:
    """Steps drawn in proportion to sqrt(E[L_t^2]), the loss weighted by 1 / (T p_t) (Improved DDPM, equation 18).

    The expectation is taken over the last `history` losses of each step; until every step has that many, the draw is
    uniform. `uniform_prob` is mixed in so that no step starves. The history is part of the training state.
    """

    def init() -> LossHistory:
        return LossHistory(jnp.zeros((steps, history)), jnp.zeros(steps, jnp.int32))

    def draw(state, keys, position, total):
        p = probabilities(state, uniform_prob)
        edges = jnp.cumsum(p)
        index = jnp.searchsorted(edges, _uniforms(keys) * edges[-1], side="right")
        index = jnp.minimum(index, steps - 1)
        return (index + 1) / steps, 1 / (steps * p[index])

    def update(state, u, loss):
        index = jnp.rint(u * steps).astype(jnp.int32) - 1

        def push(state, example):
            i, value = example
            row, count = state.values[i], state.counts[i]
            full = count == history
            row = jnp.where(full, jnp.roll(row, -1), row).at[jnp.minimum(count, history - 1)].set(value)
            return LossHistory(
                state.values.at[i].set(row), state.counts.at[i].set(jnp.minimum(count + 1, history))
            ), None

        return jax.lax.scan(push, state, (index, loss))[0]

    return TimestepSampler(init, draw, update)


def probabilities(state: LossHistory, uniform_prob: float) -> Array:
    """p(t) of `loss_second_moment`, [T], summing to 1."""
    steps, history = state.values.shape
    weights = jnp.sqrt(jnp.mean(state.values**2, axis=1))
    total = jnp.sum(weights)
    learned = weights / jnp.where(total > 0, total, 1.0) * (1 - uniform_prob) + uniform_prob / steps
    warm = jnp.all(state.counts == history) & (total > 0)
    return jnp.where(warm, learned, 1 / steps)


TIMESTEPS: dict[str, Callable[[int], TimestepSampler]] = {
    "uniform": uniform,
    "stratified": stratified,
    "loss_second_moment": loss_second_moment,
}
