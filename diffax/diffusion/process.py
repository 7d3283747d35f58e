"""The forward process, its posterior, and what a network's output says about them.

x is clean, z noisy, eps the noise: z = alpha x + sigma eps. A step goes from the noisier level t to the cleaner s.
Arrays are [B, ...] float32; a level's numbers are scalars or [B].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffax.diffusion.schedules import NoiseLevel, Transition

Array = jax.Array


class Gaussian(NamedTuple):
    """A diagonal normal distribution: mean [B, ...] and log variance (broadcastable to it)."""

    mean: Array
    logvar: Array


class Prediction(NamedTuple):
    """What a denoiser says about z at the start of a step.

    Attributes:
      x: [B, ...] estimate of the clean data.
      eps: [B, ...] estimate of the noise, consistent with x unless a guidance says otherwise.
      variance: of the reverse step, [B, ...] or broadcastable; 0 at the last step of 'fixed_small'.
      logvar: its logarithm, except there, where the bound needs a number and takes the clipped one.
      mean: [B, ...] mean of the reverse step where the network gives it directly (previous-x); else None.
      score: [B, ...] a pending gradient of log p(y | z_t), which each sampler applies in its own way; else None.
    """

    x: Array
    eps: Array
    variance: Array
    logvar: Array
    mean: Array | None = None
    score: Array | None = None


def expand(a: Array, like: Array) -> Array:
    """Gives a per-example number [B] (or a scalar) trailing axes so that it broadcasts against [B, ...]."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim)) if a.ndim else a


def diffuse(x: Array, t: NoiseLevel, eps: Array) -> Array:
    """q(z_t | x) = N(alpha x, sigma^2 I): z = alpha x + sigma eps (DDPM, equation 4).

    >>> level = NoiseLevel(time=jnp.zeros(1), logsnr=jnp.zeros(1))  # alpha^2 = sigma^2 = 1/2
    >>> print(diffuse(jnp.ones((1, 1)), level, jnp.ones((1, 1))).round(3))
    [[1.414]]
    """
    return expand(t.alpha, x) * x + expand(t.sigma, x) * eps


def eps_from_x(x: Array, z: Array, t: NoiseLevel) -> Array:
    """eps = (z - alpha x) / sigma."""
    return (z - expand(t.alpha, z) * x) / expand(t.sigma, z)


def x_from_eps(eps: Array, z: Array, t: NoiseLevel) -> Array:
    """x = (z - sigma eps) / alpha (DDPM, equation 15)."""
    return (z - expand(t.sigma, z) * eps) / expand(t.alpha, z)


def _posterior_weights(step: Transition, like: Array) -> tuple[Array, Array]:
    """c_x, c_z of E[z_s | z_t, x] = c_x x + c_z z (DDPM, equation 7).

    c_x = alpha_s beta / sigma_t^2 and c_z = alpha_t sigma_s^2 / (alpha_s sigma_t^2), with beta = 1 - alpha_t^2 /
    alpha_s^2 read from the table: in float32 the difference of two log-SNRs would lose it.
    """
    variance_ratio = jax.nn.sigmoid(-step.s.logsnr) / jax.nn.sigmoid(-step.t.logsnr)
    on_x = step.s.alpha * jnp.exp(step.max_logvar) / jax.nn.sigmoid(-step.t.logsnr)
    on_z = step.t.alpha / step.s.alpha * variance_ratio
    return expand(on_x, like), expand(on_z, like)


def posterior(x: Array, z: Array, step: Transition) -> Gaussian:
    """q(z_s | z_t, x), with the clipped log variance (DDPM, equations 6 and 7).

    Args:
      x: [B, ...] clean data.
      z: [B, ...] data at level step.t.
      step: the transition.

    Returns:
      Mean [B, ...] and log variance [B, 1, ...] or scalar.
    """
    on_x, on_z = _posterior_weights(step, z)
    return Gaussian(on_x * x + on_z * z, expand(step.min_logvar, z))


def reverse(prediction: Prediction, z: Array, step: Transition) -> Gaussian:
    """p(z_s | z_t): the posterior at the predicted x, or the mean that the network gave, with the model's variance."""
    mean = prediction.mean if prediction.mean is not None else posterior(prediction.x, z, step).mean
    return Gaussian(mean, prediction.logvar)


def target(predicts: str, *, x: Array, z: Array, eps: Array, step: Transition) -> Array:
    """What the network's output is regressed on: eps, x, v = alpha eps - sigma x, or the posterior mean.

    Args:
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      x: [B, ...] clean data; z: noisy data; eps: the noise in it.
      step: the transition that starts at z's level.

    Returns:
      [B, ...]
    """
    return {
        "eps": lambda: eps,
        "x": lambda: x,
        "v": lambda: expand(step.t.alpha, x) * eps - expand(step.t.sigma, x) * x,
        "previous_x": lambda: posterior(x, z, step).mean,
    }[predicts]()


PREDICTS = ("eps", "x", "v", "previous_x")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def predict(out: Array, z: Array, step: Transition, *, predicts: str, variance: str | float) -> Prediction:
    """Turns a network's output into a prediction.

    The variance of the reverse step lies between the posterior's (fraction 0) and the forward step's (fraction 1) on a
    log scale: 'fixed_small' is 0, 'fixed_large' 1, a number is itself (0.3 in classifier-free guidance), and
    'learned_range' reads the fraction (v + 1) / 2 per pixel from the second half of the channels, unbounded (Improved
    DDPM, equation 15). 'learned' reads the log variance itself. At the last step, which ends clean, a constant fraction
    takes the clipped posterior variance (DDPM's `fixedlarge`).

    Args:
      out: [B, ..., C] network output, or [B, ..., 2C] if the variance is learned; float32.
      z: [B, ..., C] the network's input.
      step: the transition that starts at z's level.
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      variance: 'fixed_small', 'fixed_large', 'learned', 'learned_range' or a fraction in [0, 1].

    Returns:
      The prediction; x is not clipped.

    Raises:
      ValueError: out does not have the channels that `variance` requires.
    """
    learned = variance in ("learned", "learned_range")
    if out.shape[-1] != z.shape[-1] * (1 + learned):
        raise ValueError(
            f"network output has {out.shape[-1]} channels, z has {z.shape[-1]}; "
            f"variance={variance!r} needs {z.shape[-1] * (1 + learned)}"
        )
    low, high = expand(step.min_logvar, z), expand(step.max_logvar, z)
    if learned:
        out, values = jnp.split(out, 2, axis=-1)
        if variance == "learned":
            logvar = values
        else:
            fraction = (values + 1) / 2
            logvar = fraction * high + (1 - fraction) * low
        var = jnp.exp(logvar)
    else:
        fraction = {"fixed_small": 0.0, "fixed_large": 1.0}.get(variance, variance)
        ends_clean = expand(step.s.is_clean, z)
        logvar = jnp.where(ends_clean, low, fraction * high + (1 - fraction) * low)
        var = jnp.where(ends_clean & (fraction == 0.0), 0.0, jnp.exp(logvar))

    t, mean = step.t, None
    if predicts == "eps":
        x, eps = x_from_eps(out, z, t), out
    elif predicts == "x":
        x, eps = out, eps_from_x(out, z, t)
    elif predicts == "v":
        x = expand(t.alpha, z) * z - expand(t.sigma, z) * out
        eps = expand(t.alpha, z) * out + expand(t.sigma, z) * z
    else:
        on_x, on_z = _posterior_weights(step, z)
        x, mean = (out - on_z * z) / on_x, out
        eps = eps_from_x(x, z, t)
    return Prediction(x, eps, var, logvar, mean)
