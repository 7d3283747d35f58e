"""Samplers: one step is a pure function, a sample is one `lax.scan` over steps (floor 2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffax.guidance import Denoiser, apply_score
from diffax.process import Prediction, expand, reverse
from diffax.schedules import Transition

Array = jax.Array
Memory = Any
Noise = Callable[[Array], Array]


class Sampler(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes:
      init: z [B, ...] -> what the sampler remembers between steps (nothing, but for multistep solvers).
      step: (denoise, z, step, noise [B, ...], memory, **conditions) -> (z at step.s, prediction, memory).
    """

    init: Callable[[Array], Memory]
    step: Callable[..., tuple[Array, Prediction, Memory]]


def ddpm() -> Sampler:
    """Ancestral sampling: z_s ~ N(mean, variance), the mean alone at the last step (DDPM, algorithm 2).

    A pending score moves the mean by variance * score (ADM, algorithm 1).
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory, **cond):
        p = denoise(z, step, **cond)
        mean = reverse(p, z, step).mean
        if p.score is not None:
            mean = mean + p.variance * p.score
        std = jnp.where(expand(step.s.is_clean, z), 0.0, jnp.sqrt(p.variance))
        return mean + std * noise, p, memory

    return Sampler(lambda z: (), step)


def ddim(eta: float | Array = 0.0) -> Sampler:
    """z_s = alpha_s x + sqrt(sigma_s^2 - r^2) eps + r noise (Song et al. 2021, equation 12).

    r = eta * sqrt(variance of q(z_s | z_t, x)): eta 0 is deterministic, eta 1 is ancestral sampling with the small
    variance. A learned variance is not used.
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory, **cond):
        p = apply_score(denoise(z, step, **cond), z, step.t)
        s_sigma = expand(step.s.sigma, z)
        random = eta * s_sigma / expand(step.t.sigma, z) * jnp.exp(0.5 * expand(step.max_logvar, z))
        direction = jnp.sqrt(jnp.maximum(s_sigma**2 - random**2, 0.0))
        return expand(step.s.alpha, z) * p.x + direction * p.eps + random * noise, p, memory

    return Sampler(lambda z: (), step)


SAMPLERS: dict[str, Callable[..., Sampler]] = {"ddpm": lambda eta: ddpm(), "ddim": ddim}


def picture_noise(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Noise that depends, for each picture, on its own key and the step's number only.

    Args:
      keys: [B] typed PRNG keys, one per picture.
      shape: of one picture.

    Returns:
      A function from the step's number (traced int) to [B, *shape] float32.
    """

    def noise(i: Array) -> Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)

    return noise


def sample(
    denoise: Denoiser,
    z: Array,
    noise: Noise,
    steps: Transition,
    sampler: Sampler,
    *,
    keep: int = 0,
    **cond: Array,
) -> Array | tuple[Array, Array]:
    """Walks from the noisy end of `steps` to the clean one, as one `lax.scan`.

    Args:
      denoise: the guided denoiser.
      z: [B, ...] float32 data at level steps.t[0]; unit normal noise for a whole chain.
      noise: the step's number -> [B, ...]; see `picture_noise`.
      steps: table of N transitions.
      sampler: `ddpm()`, `ddim(eta)`, ...
      keep: how many of the estimates of x to return, evenly spaced, last one included (DDPM's progressive generation).
      **cond: conditions, passed to the denoiser.

    Returns:
      [B, ...]; with `keep`, also [keep, B, ...].
    """
    count = steps.t.logsnr.shape[0]
    kept_at = jnp.round(jnp.linspace(0, count - 1, keep + 1)[1:]).astype(jnp.int32)

    def body(carry, inputs):
        z, memory, kept = carry
        i, transition = inputs
        batched = jax.tree.map(lambda a: jnp.broadcast_to(a, z.shape[:1]), transition)
        z, p, memory = sampler.step(denoise, z, batched, noise(i), memory, **cond)
        kept = jnp.where(expand(kept_at == i, kept), p.x, kept)
        return (z, memory, kept), None

    kept = jnp.zeros((keep, *z.shape), z.dtype)
    steps = jax.tree.map(jnp.asarray, steps)
    (z, _, kept), _ = jax.lax.scan(body, (z, sampler.init(z), kept), (jnp.arange(count), steps))
    return (z, kept) if keep else z


def invert(denoise: Denoiser, x: Array, steps: Transition, **cond: Array) -> Array:
    """Encodes data into noise by running DDIM (eta 0) backwards (ADM, appendix F; DALL-E 2, section 3).

    Each step asks the denoiser at the level it starts from and goes on to the next noisier one; the data enter at the
    first noisy level. The last step of a whole chain has nowhere to go but pure noise and is left out, which
    reconstructs better.

    Args:
      denoise: the denoiser; without clipping for a faithful reconstruction.
      x: [B, ...] float32 clean data.
      steps: the table of N transitions that `sample` would walk.
      **cond: conditions.

    Returns:
      [B, ...] data at level steps.t[0].
    """
    climb = jax.tree.map(lambda a: jnp.asarray(a)[::-1], steps)
    here = jax.tree.map(lambda a: a[:-1], climb)
    above = jax.tree.map(lambda a: a[1:], climb.t)

    def body(z, inputs):
        step, up = jax.tree.map(lambda a: jnp.broadcast_to(a, z.shape[:1]), inputs)
        return climb_step(denoise, z, step, up, **cond), None

    return jax.lax.scan(body, x, (here, above))[0]


def climb_step(denoise: Denoiser, z: Array, step: Transition, up, **cond: Array) -> Array:
    """One step of DDIM inversion: alpha' x + sigma' eps at the noisier level `up`, with x and eps seen at step.t."""
    p = apply_score(denoise(z, step, **cond), z, step.t)
    return expand(up.alpha, z) * p.x + expand(up.sigma, z) * p.eps
