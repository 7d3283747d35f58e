"""The analytic variance of reverse steps, from what a trained model leaves open of the data (Bao et al. 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffax.diffusion.process import expand, posterior
from diffax.diffusion.schedules import Transition
from diffax.models import base

Array = jax.Array
# How many are enough for a function of the noise level as smooth as that; whichever comes first of the last two.
LEVELS, EXAMPLES, BATCHES = 25, 2000, 16


def analytic_variance(z: Array, step: Transition, residual: Array) -> Array:
    """The best constant variance of a reverse step: the posterior's + c_x^2 Var[x | z_t] (Bao et al. 2022, theorem 1).

    Args:
      z: [B, ...], whose shape alone matters.
      step: [B]; c_x is the weight of x in the posterior's mean.
      residual: [B] Var[x | z_t], the mean over dimensions and data.

    Returns:
      [B, 1, ...]; 0 at the last step.
    """
    one = jnp.ones((len(z),) + (1,) * (z.ndim - 1))
    on_x = posterior(one, 0 * one, step).mean
    variance = jnp.exp(expand(step.min_logvar, one)) + on_x**2 * expand(residual, one)
    return jnp.where(expand(step.s.is_clean, one), 0.0, variance)


def measure(model: Any, run: Callable, batches: base.Batches) -> dict[str, np.ndarray]:
    """Var[x | z_t] of the data by log-SNR, as far as a trained model estimates x.

    Args:
      model: with `residual`, see `DiffusionModel`.
      run: (function of (params, batch, keys)) -> the same over all devices, with the trained parameters bound.
      batches: as the model's loss reads them.

    Returns:
      'logsnr', rising, and 'residual', [G] each.
    """
    levels = min(LEVELS, model.schedule.num_timesteps or LEVELS)
    u = np.arange(levels, 0, -1) / levels
    compute, found = run(lambda params, batch, keys: model.residual(params, batch, keys, u)), []
    for number, batch in zip(range(BATCHES), batches, strict=False):
        keys = jax.random.split(jax.random.key(number), len(jax.tree.leaves(batch)[0]))
        found.append(np.asarray(compute({k: batch[k] for k in model.batch_example()}, keys), np.float64))
        if sum(map(len, found)) >= EXAMPLES:
            break
    residual = np.maximum(np.concatenate(found).mean(0), 0)
    return {"logsnr": np.float32(model.schedule(u).logsnr), "residual": residual.astype(np.float32)}
