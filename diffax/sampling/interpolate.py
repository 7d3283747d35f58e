"""Pictures between two pictures, by any diffusion model (DDPM, section 4.4)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffax.diffusion import schedules
from diffax.diffusion.process import diffuse, expand
from diffax.models.base import Start
from diffax.models.diffusion import DiffusionModel

Array = jax.Array


def interpolate(
    model: DiffusionModel,
    params: Mapping[str, Any],
    first: Array,
    second: Array,
    key: Array,
    given: Mapping[str, Any] | None = None,
    *,
    weights: Array,
    depth: float,
) -> Array:
    """Pictures between two pictures (DDPM, figure 8).

    Both are noised up to `depth`, mixed there, and denoised. The noise of both ends and of the way back is the same for
    all weights, as in the paper.

    Args:
      model: the diffusion model.
      params: {section: parameters}.
      first: [H, W, C] in [-1, 1].
      second: the same.
      key: typed PRNG key.
      given: {condition: values of the N results, [N, ...]}.
      weights: [N] in [0, 1], share of the second picture.
      depth: how much of the chain is walked, in (0, 1]: 0.5 is the paper's t = 500; small keeps detail, 1 forgets all.

    Returns:
      [N, H, W, C].

    Raises:
      ValueError: depth is outside (0, 1], or the pictures are not of the model's shape.
    """
    steps = jax.tree.map(jnp.asarray, schedules.final_part(model.steps, depth))
    for picture in (first, second):
        if tuple(picture.shape) != tuple(model.shape):
            raise ValueError(f"pictures must be of the model's shape {model.shape}, got {tuple(picture.shape)}")
    noise_key, way_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, (2, *model.shape))
    level = jax.tree.map(lambda a: jnp.broadcast_to(a[0], 2), steps.t)
    ends = diffuse(jnp.stack([first, second]), level, eps)
    share = expand(jnp.asarray(weights, jnp.float32), ends)
    z = (1 - share) * ends[0] + share * ends[1]
    keys = jnp.broadcast_to(way_key, len(z))
    return dataclasses.replace(model, steps=steps).sample(params, keys, given or {}, start=Start(noise=z))
