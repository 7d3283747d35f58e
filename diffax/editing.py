"""What one does with a trained model besides sampling (floor 4): compression and interpolation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax import losses, samplers, schedules, stages
from diffax.process import diffuse, expand

Array = jax.Array
Params = Any


class RateDistortion(NamedTuple):
    """Progressive lossy compression (DDPM, section 4.3), averaged over pictures, noisiest step first.

    Attributes:
      rate: [N] bits per dimension received before each step.
      distortion: [N] root mean squared error of the estimate of x at that moment, on the scale of 0 to 255.
    """

    rate: np.ndarray
    distortion: np.ndarray


def rate_distortion(bound: losses.BitsPerDim) -> RateDistortion:
    """The rate-distortion curve of the progressive code that the bound describes (DDPM, algorithms 3 and 4).

    The receiver knows z_t after the prior and the KL terms of all earlier steps, and estimates x from it.

    Args:
      bound: of B pictures, along N steps.

    Returns:
      The curve.
    """
    terms, prior = np.asarray(bound.terms, np.float64), np.asarray(bound.prior, np.float64)
    received = prior[:, None] + np.cumsum(terms, axis=1) - terms
    rmse = np.sqrt(np.asarray(bound.x_mse, np.float64))
    return RateDistortion(received.mean(0), 127.5 * rmse.mean(0))


def interpolate(
    stage: stages.Stage,
    params: Params,
    first: Array,
    second: Array,
    key: Array,
    *,
    weights: Array,
    depth: float,
    **cond,
) -> Array:
    """Pictures between two pictures (DDPM, section 4.4 and figure 8).

    Both are noised up to `depth`, mixed there, and denoised. The noise of both ends and of the way back is the same for
    all weights, as in the paper.

    Args:
      stage: the stage.
      params: its parameters.
      first: [H, W, C] in [-1, 1]; second: the same.
      key: typed PRNG key.
      weights: [N] in [0, 1], share of the second picture.
      depth: how much of the chain is walked, in (0, 1]: 0.5 is the paper's t = 500; small keeps detail, 1 forgets all.
      **cond: conditions of the N results, [N, ...].

    Returns:
      [N, H, W, C].

    Raises:
      ValueError: depth is outside (0, 1], or the pictures have another shape than the stage.
    """
    steps = jax.tree.map(jnp.asarray, schedules.last(stage.sampling, depth))
    for picture in (first, second):
        if tuple(picture.shape) != stage.shape:
            raise ValueError(f"pictures must have the stage's shape {stage.shape}; got {tuple(picture.shape)}")
    start = jax.tree.map(lambda a: a[0], steps.t)
    noise_key, way_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, (2, *stage.shape))
    ends = diffuse(jnp.stack([first, second]), jax.tree.map(lambda a: jnp.broadcast_to(a, 2), start), eps)
    share = expand(jnp.asarray(weights, jnp.float32), jnp.zeros((1, *stage.shape)))
    z = (1 - share) * ends[0] + share * ends[1]
    shared = samplers.picture_noise(way_key[None], stage.shape)
    denoise = stages.guided_denoiser(stage, {stage.name: params})
    return samplers.sample(denoise, z, shared, steps, stage.sampler, **cond)
