"""Which noise levels to train on: distributions over the steps of a chain, or over u in [0, 1].

Each is a component of kind 'timesteps': a group of pure functions with a state, as in optax; only `loss_second_moment`
has one. Draws depend on each example's key and its position in the global batch, never on how the batch is sharded.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from diffax.components import WIRED, In, component
from diffax.diffusion.schedules import struct

Array = jax.Array
NumTimesteps = Annotated[int, WIRED]


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


def _to_u(uniform: Array, num_timesteps: int) -> Array:
    """A number in [0, 1) to one of u = 1/T, ..., 1; or to itself for a continuous schedule (num_timesteps 0)."""
    if not num_timesteps:
        return uniform
    return (jnp.minimum(jnp.floor(uniform * num_timesteps), num_timesteps - 1) + 1) / num_timesteps


def _uniforms(keys: Array) -> Array:
    return jax.vmap(jax.random.uniform)(keys)


@component("timesteps", "uniform")
def uniform(num_timesteps: NumTimesteps) -> TimestepSampler:
    """Every step equally likely, independently per example (DDPM, algorithm 1).

    >>> sampler = uniform(4)
    >>> u, weight = sampler.draw(sampler.init(), jax.random.split(jax.random.key(0), 3), jnp.arange(3), 3)
    >>> bool(jnp.all((u * 4) % 1 == 0)), weight.tolist()
    (True, [1.0, 1.0, 1.0])

    Args:
      num_timesteps: T of the schedule; 0 draws a continuous u.
    """

    def draw(state, keys, position, total):
        u = _to_u(_uniforms(keys), num_timesteps)
        return u, jnp.ones_like(u)

    return TimestepSampler(lambda: (), draw, lambda state, u, loss: state)


@component("timesteps", "stratified")
def stratified(num_timesteps: NumTimesteps) -> TimestepSampler:
    """One draw from each of N equal parts of [0, 1] for a global batch of N (Kingma et al. 2021, appendix I.1).

    The mean is that of `uniform`, with less variance.

    Args:
      num_timesteps: T of the schedule; 0 draws a continuous u.
    """

    def draw(state, keys, position, total):
        u = _to_u((position + _uniforms(keys)) / total, num_timesteps)
        return u, jnp.ones_like(u)

    return TimestepSampler(lambda: (), draw, lambda state, u, loss: state)


@struct
class LossHistory:
    """The last losses of every step: values [T, H] float32, oldest first; counts [T] int32, at most H."""

    values: Array
    counts: Array


@component("timesteps", "loss_second_moment")
def loss_second_moment(
    num_timesteps: NumTimesteps,
    *,
    history: Annotated[int, In(1, 10_000)] = 10,
    uniform_prob: Annotated[float, In(0, 1)] = 0.001,
) -> TimestepSampler:
    """Steps drawn in proportion to sqrt(E[L_t^2]), the loss weighted by 1 / (T p_t) (Improved DDPM, equation 18).

    The expectation is taken over the last `history` losses of each step; until every step has that many, the draw is
    uniform. The history is part of the training state.

    Args:
      num_timesteps: T of the schedule.
      history: how many losses of each step the expectation is taken over.
      uniform_prob: share of the draws that stay uniform, so that no step starves.

    Raises:
      ValueError: the schedule is continuous and has no steps to keep a history of.
    """
    if not num_timesteps:
        raise ValueError("loss_second_moment needs a schedule of discrete steps; got a continuous one")

    def init() -> LossHistory:
        return LossHistory(jnp.zeros((num_timesteps, history)), jnp.zeros(num_timesteps, jnp.int32))

    def draw(state, keys, position, total):
        p = probabilities(state, uniform_prob)
        edges = jnp.cumsum(p)
        index = jnp.searchsorted(edges, _uniforms(keys) * edges[-1], side="right")
        index = jnp.minimum(index, num_timesteps - 1)
        return (index + 1) / num_timesteps, 1 / (num_timesteps * p[index])

    def update(state, u, loss):
        index = jnp.rint(u * num_timesteps).astype(jnp.int32) - 1

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
    num_timesteps, history = state.values.shape
    weights = jnp.sqrt(jnp.mean(state.values**2, axis=1))
    total = jnp.sum(weights)
    learned = weights / jnp.where(total > 0, total, 1.0) * (1 - uniform_prob) + uniform_prob / num_timesteps
    warm = jnp.all(state.counts == history) & (total > 0)
    return jnp.where(warm, learned, 1 / num_timesteps)
