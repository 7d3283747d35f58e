"""Samplers: one step is a pure function, a sample is one `lax.scan` over steps.

Each is a component of kind 'sampler'.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, component
from diffax.diffusion.guidance import Denoiser, apply_score
from diffax.diffusion.process import Prediction, diffuse, expand, reverse
from diffax.diffusion.schedules import Transition, struct, to_clean

Array = jax.Array
Memory = Any
Noise = Callable[[Array], Array]


class Sampler(NamedTuple):
    """A pair of pure functions, as in optax.

    >>> ddim().init(jnp.zeros((2, 8, 8, 3)), 50)  # DDIM remembers nothing between steps
    ()

    Attributes:
      init: (z [B, ...], number of steps) -> what the sampler remembers between steps; () but for multistep solvers.
      step: (denoise, z, step, noise [B, ...], memory, **conditions) -> (z at step.s, prediction, memory).
    """

    init: Callable[[Array, int], Memory]
    step: Callable[..., tuple[Array, Prediction, Memory]]


@component("sampler", "ddpm")
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

    return Sampler(lambda z, count: (), step)


@component("sampler", "ddim")
def ddim(eta: Annotated[float, In(0, 1)] = 0.0) -> Sampler:
    """z_s = alpha_s x + sqrt(sigma_s^2 - r^2) eps + r noise (Song et al. 2021, equation 12).

    r = eta * sqrt(variance of q(z_s | z_t, x)): eta 0 is deterministic, eta 1 is ancestral sampling with the small
    variance. A learned variance is not used.

    Args:
      eta: scale of the noise; may be traced.
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory, **cond):
        p = apply_score(denoise(z, step, **cond), z, step.t)
        s_sigma = expand(step.s.sigma, z)
        random = eta * s_sigma / expand(step.t.sigma, z) * jnp.exp(0.5 * expand(step.max_logvar, z))
        direction = jnp.sqrt(jnp.maximum(s_sigma**2 - random**2, 0.0))
        return expand(step.s.alpha, z) * p.x + direction * p.eps + random * noise, p, memory

    return Sampler(lambda z, count: (), step)


# ---- few-step solvers of the probability flow ODE -------------------------------------------------------------------
#
# In lambda = log(alpha / sigma) = logsnr / 2 the flow is semi-linear: over a step of length h the linear part is exact,
# z_s = (sigma_s / sigma_t) z_t + alpha_s * integral of e^(lambda - lambda_s) x(lambda), and a solver only has to
# extrapolate the prediction x (or eps) from what earlier steps saw.


# Where sigma is a tenth of a pixel value. A step to there may be many times longer than those before it in lambda (the
# continuous schedule ends at logsnr 20), and extrapolating over it would magnify every difference between them.
NEARLY_CLEAN = 14.0


def half_logsnr(logsnr: Array) -> Array:
    """lambda = log(alpha / sigma)."""
    return logsnr / 2


@component("sampler", "heun")
def heun() -> Sampler:
    """Heun's method of second order (Karras et al. 2022, algorithm 1 without churn).

    It solves dz'/dsigma' = eps, with z' = z / alpha, sigma' = sigma / alpha, by two evaluations a step, of which the
    last step, to clean data, uses one. It needs steps of like length in log-SNR ('logsnrN'): sigma' falls from 22,000
    if a schedule starts at log-SNR -20.
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory, **cond):
        t, s = step.t, step.s
        p = apply_score(denoise(z, step, **cond), z, t)
        ratio = [expand(level.sigma / level.alpha, z) for level in (t, s)]
        scaled = z / expand(t.alpha, z)
        euler = scaled + (ratio[1] - ratio[0]) * p.eps
        there = apply_score(denoise(expand(s.alpha, z) * euler, to_clean(s), **cond), expand(s.alpha, z) * euler, s)
        better = scaled + (ratio[1] - ratio[0]) * (p.eps + there.eps) / 2
        return expand(s.alpha, z) * jnp.where(expand(s.is_clean, z), euler, better), p, memory

    return Sampler(lambda z, count: (), step)


@struct
class History:
    """What a multistep solver remembers, newest first.

    Attributes:
      i: number of the step.
      orders: [N] order of each step.
      seen: [K, B, ...] earlier predictions.
      at: [K, B] their lambda.
      before: [B, ...] z before the last step, for a corrector.
    """

    i: Array
    orders: Array
    seen: Array
    at: Array
    before: Array


def _start(order: int, *, always_lower: bool) -> Callable[[Array, int], History]:
    """Orders rise from 1, and fall to 1 at the end of a short run: extrapolating to clean data is unstable."""

    def init(z: Array, count: int) -> History:
        i = np.arange(count)
        orders = np.minimum(order, i + 1)
        if always_lower or count < 15:
            orders = np.minimum(orders, count - i)
        blank = jnp.zeros((order, *z.shape))
        return History(jnp.int32(0), jnp.asarray(orders), blank, jnp.zeros((order, len(z))), z)

    return init


def _push(memory: History, value: Array, at: Array, z: Array) -> History:
    seen = jnp.concatenate([value[None], memory.seen[:-1]])
    at = jnp.concatenate([at[None], memory.at[:-1]])
    return dataclasses.replace(memory, i=memory.i + 1, seen=seen, at=at, before=z)


SolverType = Literal["midpoint", "heun"]


def dpm_solver(order: int = 2, *, predicts: str = "x", solver_type: SolverType = "midpoint") -> Sampler:
    """DPM-Solver++ (predicts 'x'; Lu et al. 2022b, algorithm 2) and DPM-Solver (predicts 'eps'; 2022a), multistep.

    Args:
      order: 1 (which is DDIM), 2 ("2M") or 3 ("3M", for x alone).
      predicts: which prediction is extrapolated.
      solver_type: how a step of second order integrates the slope of the prediction: 'midpoint' (the papers'
        algorithms) or 'heun' (the other choice in their code), the exact integral of a straight line.

    Returns:
      The sampler; a step that ends clean, or nearly so, is of order 1.

    Raises:
      ValueError: unknown order, prediction or solver type.
    """
    if solver_type not in typing.get_args(SolverType):
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    if (order, predicts) not in [(1, "x"), (2, "x"), (3, "x"), (1, "eps"), (2, "eps")]:
        raise ValueError(f"DPM-Solver has orders 1 to 3 for x and 1 to 2 for eps; got {order} for {predicts!r}")

    def step(denoise: Denoiser, z, step: Transition, noise, memory: History, **cond):
        p = apply_score(denoise(z, step, **cond), z, step.t)
        m0 = p.x if predicts == "x" else p.eps
        lam_t, lam_s = half_logsnr(step.t.logsnr), half_logsnr(step.s.logsnr)
        h = expand(lam_s - lam_t, z)
        level = jnp.where(step.s.logsnr > NEARLY_CLEAN, 1, memory.orders[memory.i])
        level = expand(level, z)
        # the differences of earlier predictions, over their distance in units of h
        r0 = expand(lam_t - memory.at[0], z) / h
        first = (m0 - memory.seen[0]) / r0
        second = jnp.zeros_like(z)
        if order == 3:
            r1 = expand(memory.at[0] - memory.at[1], z) / h
            earlier = (memory.seen[0] - memory.seen[1]) / r1
            second = (first - earlier) / (r0 + r1)
            first_of_3 = first + r0 * second
            first = jnp.where(level >= 3, first_of_3, first)
        if predicts == "x":
            keep, scale, a = step.s.sigma / step.t.sigma, expand(step.s.alpha, z), jnp.expm1(-h)
            of_3 = (a / h + 1) * first - ((a + h) / h**2 - 0.5) * second
        else:
            keep, scale, a = step.s.alpha / step.t.alpha, expand(step.s.sigma, z), jnp.expm1(h)
            of_3 = jnp.zeros_like(z)
        if solver_type == "midpoint":
            of_2 = -0.5 * a * first
        else:
            of_2 = (1 + a / h if predicts == "x" else 1 - a / h) * first
        slope = jnp.where(level >= 3, of_3, of_2)
        out = expand(keep, z) * z - scale * a * m0 + jnp.where(level >= 2, scale * slope, 0.0)
        return out, p, _push(memory, m0, lam_t, z)

    return Sampler(_start(order, always_lower=False), step)


@component("sampler", "dpm_solver_2m")
def dpm_solver_2m(solver_type: SolverType = "midpoint") -> Sampler:
    """DPM-Solver of second order on eps, multistep (Lu et al. 2022a).

    Args:
      solver_type: how a step integrates the slope of the prediction, see `dpm_solver`.
    """
    return dpm_solver(2, predicts="eps", solver_type=solver_type)


@component("sampler", "dpm_solver_pp_2m")
def dpm_solver_pp_2m(solver_type: SolverType = "midpoint") -> Sampler:
    """DPM-Solver++ of second order on x, multistep ("2M"; Lu et al. 2022b, algorithm 2).

    Args:
      solver_type: how a step integrates the slope of the prediction, see `dpm_solver`.
    """
    return dpm_solver(2, solver_type=solver_type)


@component("sampler", "dpm_solver_pp_3m")
def dpm_solver_pp_3m() -> Sampler:
    """DPM-Solver++ of third order on x, multistep ("3M"; Lu et al. 2022b)."""
    return dpm_solver(3)


@component("sampler", "unipc")
def unipc() -> Sampler:
    """UniPC of order 2 with B(h) = e^h - 1, on x (Zhao et al. 2023, algorithms 5 and 6).

    Each prediction first corrects the step that led to it, at no further evaluation, and then predicts the next one.
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory: History, **cond):
        p = apply_score(denoise(z, step, **cond), z, step.t)
        lam_t, lam_s = half_logsnr(step.t.logsnr), half_logsnr(step.s.logsnr)

        def solve(start, level_alpha, from_sigma, to_sigma, h, x0, extra):
            a = jnp.expm1(-h)
            return expand(to_sigma / from_sigma, z) * start - expand(level_alpha, z) * a * (x0 + extra)

        # Corrector: the last step again, now that x is known where it ended.
        previous, order = memory.i - 1, jnp.where(step.t.logsnr > NEARLY_CLEAN, 1, memory.orders[memory.i - 1])
        order = expand(order, z)
        h = expand(lam_t - memory.at[0], z)
        from_sigma = jnp.sqrt(jax.nn.sigmoid(-2 * memory.at[0]))
        r = expand(memory.at[1] - memory.at[0], z) / h
        ahead, behind = p.x - memory.seen[0], (memory.seen[1] - memory.seen[0]) / r
        hh = -h
        g1 = jnp.expm1(hh)
        b1 = (g1 / hh - 1) / g1
        b2 = ((g1 / hh - 1) / hh - 0.5) * 2 / g1
        # [[1, 1], [r, 1]] (w0, w1) = (b1, b2)
        w0 = (b1 - b2) / (1 - r)
        w1 = b1 - w0
        extra = jnp.where(order >= 2, w0 * behind + w1 * ahead, 0.5 * ahead)
        corrected = solve(memory.before, step.t.alpha, from_sigma, step.t.sigma, h, memory.seen[0], extra)
        z = jnp.where(previous >= 0, corrected, z)

        # Predictor
        h = expand(lam_s - lam_t, z)
        r = expand(memory.at[0] - lam_t, z) / h
        slope = 0.5 * (memory.seen[0] - p.x) / r
        second_order = (memory.orders[memory.i] >= 2) & (step.s.logsnr <= NEARLY_CLEAN)
        extra = jnp.where(expand(second_order, z), slope, 0.0)
        out = solve(z, step.s.alpha, step.t.sigma, step.s.sigma, h, p.x, extra)
        return out, p, _push(memory, p.x, lam_t, z)

    return Sampler(_start(2, always_lower=True), step)


def replace_known(sampler: Sampler, x: Array, known: Array) -> Sampler:
    """Inpainting with an ordinary model: after every step the known pixels are replaced by noised true ones.

    z_s <- known * q(z_s | x) + (1 - known) * z_s (what GLIDE compares its inpainting model with). The model sees them
    through noise only, so edges fit less well than those of a model that was trained to fill in.

    Args:
      sampler: any.
      x: [B, ...] the picture.
      known: [B, ..., 1], 1 where a pixel is known.

    Returns:
      The sampler; at clean data the known pixels are x itself.
    """

    def step(denoise: Denoiser, z, step: Transition, noise, memory, **cond):
        z, p, memory = sampler.step(denoise, z, step, noise, memory, **cond)
        # What the noise of this step put at the known pixels is thrown away, so it can serve once more.
        return known * diffuse(x, step.s, noise) + (1 - known) * z, p, memory

    return Sampler(sampler.init, step)


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
    """Walks from the noisy end of `steps` to the clean one, as one `lax.scan`; `guidance.denoiser_from` has an example.

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
    (z, _, kept), _ = jax.lax.scan(body, (z, sampler.init(z, count), kept), (jnp.arange(count), steps))
    return (z, kept) if keep else z


def invert(denoise: Denoiser, x: Array, steps: Transition, **cond: Array) -> Array:
    """Encodes data into noise by running DDIM (eta 0) backwards (ADM, appendix F; DALL-E 2, section 3).

    Each step evaluates the denoiser at the level it starts from and goes on to the next noisier one; the data enter at
    the first noisy level. The last step of a whole chain has nowhere to go but pure noise and is left out, which
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
