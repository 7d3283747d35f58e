"""Optimizers as components, the learning rate, and what surrounds the update rule.

A component of kind "optimizer" is a factory: its fields are the constants of the rule, and it returns a function
(learning rate as a schedule) -> `optax.GradientTransformation`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from diffax.components import TRAINING, In, component

Params = Any
Rule = Callable[[optax.Schedule], optax.GradientTransformation]

# What annealing leaves of the learning rate when a part of the training, in [0, 1], is done.
_ANNEALED = {
    "none": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + jnp.cos(math.pi * done)),
}


@component("optimizer", "adam")
def adam(
    *,
    b1: Annotated[float, In(0, 1, below=True), TRAINING] = 0.9,
    b2: Annotated[float, In(0, 1, below=True), TRAINING] = 0.999,
    eps: Annotated[float, In(0, 1, above=True), TRAINING] = 1e-8,
) -> Rule:
    """Adam (Kingma and Ba 2015).

    Args:
      b1: decay of the mean of the gradient.
      b2: decay of the mean of its square.
      eps: added to the root of that mean.
    """
    return lambda learning_rate: optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)


@component("optimizer", "adamw")
def adamw(
    *,
    b1: Annotated[float, In(0, 1, below=True), TRAINING] = 0.9,
    b2: Annotated[float, In(0, 1, below=True), TRAINING] = 0.999,
    eps: Annotated[float, In(0, 1, above=True), TRAINING] = 1e-8,
    weight_decay: Annotated[float, In(0, 10), TRAINING] = 0.0,
    decay: Annotated[Literal["all", "kernels"], TRAINING] = "all",
) -> Rule:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Args:
      b1: decay of the mean of the gradient.
      b2: decay of the mean of its square.
      eps: added to the root of that mean.
      weight_decay: part of a parameter that an update subtracts, times the learning rate.
      decay: which parameters decay: all, or those of more than one dimension.
    """
    mask = _kernels if decay == "kernels" else None
    return lambda learning_rate: optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def _kernels(params: Params) -> Any:
    return jax.tree.map(lambda a: a.ndim > 1, params)


def learning_rate(peak: float, *, warmup_steps: int, anneal: str, num_train_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant or annealed to 0 at the last step.

    Args:
      peak: the highest rate.
      warmup_steps: length of the warm-up.
      anneal: 'none', 'linear' or 'cosine'.
      num_train_steps: when annealing ends.
    """
    left = _ANNEALED[anneal]

    def schedule(count):
        warm = jnp.minimum(count / warmup_steps, 1.0) if warmup_steps else 1.0
        return peak * warm * left(jnp.clip(count / num_train_steps, 0, 1))

    return schedule


def transformation(
    rule: Rule, schedule: optax.Schedule, *, grad_clip: float = 0.0, rates: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """An update rule after clipping by the global norm, with slower or faster parts.

    Args:
      rule: made by an optimizer component.
      schedule: the learning rate.
      grad_clip: largest global norm of the gradient; 0: not clipped.
      rates: {regular expression at the start of a parameter's path, such as 'text/': factor of its learning rate}; the.
        first that matches counts.
    """
    parts = [optax.clip_by_global_norm(grad_clip)] if grad_clip else []
    parts += [rule(schedule)] + ([_scale_by_path(rates)] if rates else [])
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def _scale_by_path(rates: Mapping[str, float]) -> optax.GradientTransformation:
    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        matching = (rate for pattern, rate in rates.items() if re.match(pattern, path_name(path)))
        return update * next(matching, 1.0)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates))


def path_name(path: tuple) -> str:
    """A path of a tree as text, 'text/block_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unmatched(rates: Mapping[str, float], params: Params) -> list[str]:
    """The patterns of `rates` that no parameter matches."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [pattern for pattern in rates if not any(re.match(pattern, name) for name in names)]
