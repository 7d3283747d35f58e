"""Guidance: functions from a denoiser to a denoiser.

A denoiser estimates x and eps from z at the start of a step. Everything that steers sampling wraps one: clipping,
thresholding, a classifier, classifier-free guidance. They compose by application, innermost first.

Scales. `scale` is the number s that multiplies what guidance adds; it may be traced and may differ by picture.

| guidance              | s = 0               | s = 1                 | in the papers                           |
|-----------------------|---------------------|-----------------------|-----------------------------------------|
| classifier (ADM)      | the model alone     | p(z) p(y | z)         | ADM's s: p(z) p(y | z)^s                |
| classifier_free (CFG) | the model without y | the conditional model | GLIDE's s, Imagen's w; CFG's w is s - 1 |
| clip_guided (GLIDE)   | the model alone     | p(z) exp(similarity)  | GLIDE's s, with CLIP's own scale inside |

So the classifier-free guidance paper's best FID on ImageNet 64, w = 0.1, is scale 1.1 here, and its w = 4 is scale 5.
On an unconditional model both tilt p(z) by p(y | z)^s, one with a trained classifier and one with an implicit one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from diffax.diffusion.process import Prediction, eps_from_x, expand, predict, x_from_eps
from diffax.diffusion.schedules import NoiseLevel, Transition

Array = jax.Array


class Denoiser(Protocol):
    """(z [B, ...], step, **conditions) -> Prediction.

    It gets a transition and not only the level it starts from, because three published parameterisations depend on
    where the step goes: previous-x, the learned range, and the large fixed variance at the last step.
    """

    def __call__(self, z: Array, step: Transition, **cond: Array) -> Prediction:
        """The prediction at the start of a step."""


Guidance = Callable[[Denoiser], Denoiser]


def denoiser_from(fn: Callable[..., Array], predicts: str = "eps", variance: str | float = "fixed_small") -> Denoiser:
    """Makes a denoiser of a plain function of z and time, such as a network with its parameters bound.

    >>> from diffax.diffusion import samplers, schedules
    >>> denoise = denoiser_from(lambda z, time: z)  # predicts eps = z: all that it sees is noise
    >>> noise = samplers.picture_noise(jax.random.split(jax.random.key(0), 2), (8, 8, 3))
    >>> steps = schedules.build_steps(schedules.cosine(num_timesteps=100), "10")
    >>> samplers.sample(denoise, noise(jnp.int32(-1)), noise, steps, samplers.ddim()).shape
    (2, 8, 8, 3)

    Args:
      fn: (z [B, ..., C], time [B], **conditions) -> [B, ..., C], or [B, ..., 2C] if the variance is learned.
      predicts: 'eps', 'x', 'v' or 'previous_x'; see `process.predict`.
      variance: of the reverse step, a name or a fraction; see `process.predict`.

    Returns:
      (z, step, **conditions) -> Prediction.
    """

    def denoise(z: Array, step: Transition, **cond: Array) -> Prediction:
        return predict(fn(z, step.t.time, **cond), z, step, predicts=predicts, variance=variance)

    return denoise


def guided(denoise: Denoiser, guidance: Sequence[Guidance]) -> Denoiser:
    """Applies guidance functions in order, the first one innermost.

    >>> steered = guided(denoiser_from(lambda z, time: z), [classifier(lambda z, t: z.sum(-1), 2.0), clip_denoised()])
    """
    for wrap in guidance:
        denoise = wrap(denoise)
    return denoise


def _with_x(p: Prediction, x: Array, z: Array, step: Transition) -> Prediction:
    return p._replace(x=x, eps=eps_from_x(x, z, step.t))


def edit_x(edit: Callable[[Array], Array]) -> Guidance:
    """Changes the estimate of the clean data, and the noise with it.

    A network that gives the mean of the step itself (previous-x) keeps it, as published.
    """

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoiser(z, step, **cond):
            p = denoise(z, step, **cond)
            return _with_x(p, edit(p.x), z, step)

        return denoiser

    return wrap


def clip_denoised(clip_range: float = 1.0) -> Guidance:
    """Clips the estimate of x to [-clip_range, clip_range] before it is used (DDPM's code, not its algorithm 2)."""
    return edit_x(lambda x: jnp.clip(x, -clip_range, clip_range))


def insert_known() -> Guidance:
    """Puts the known pixels into the estimate of x, at every step (GLIDE's released code for inpainting).

    It uses the condition 'inpaint', [B, H, W, C + 1]: the picture, then 1 where a pixel is known. To be applied before
    clipping, as published.
    """

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoiser(z, step, **cond):
            p, known = denoise(z, step, **cond), cond["inpaint"][..., -1:]
            return _with_x(p, p.x * (1 - known) + cond["inpaint"][..., :-1] * known, z, step)

        return denoiser

    return wrap


def finish_with(final: Denoiser) -> Guidance:
    """Lets another denoiser take the last step, to clean data, as karlo's upsampler does."""

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoiser(z, step, **cond):
            # all examples walk the same steps
            return jax.lax.cond(
                jnp.all(step.s.is_clean), lambda: final(z, step, **cond), lambda: denoise(z, step, **cond)
            )

        return denoiser

    return wrap


def dynamic_threshold(percentile: float = 99.5) -> Guidance:
    """Clips x per picture to its `percentile` of |x|, at least 1, and scales back to [-1, 1] (Imagen, section 2.3)."""

    def edit(x):
        flat = jnp.abs(x.reshape(x.shape[0], -1))
        clip_range = jnp.maximum(jnp.percentile(flat, percentile, axis=1), 1.0)
        clip_range = expand(clip_range, x)
        return jnp.clip(x, -clip_range, clip_range) / clip_range

    return edit_x(edit)


def classifier(log_prob: Callable[..., Array], scale: Array | float) -> Guidance:
    """Adds scale * grad log p(y | z_t) as a pending score (ADM, section 4).

    Ancestral steps add variance * score to their mean (algorithm 1), DDIM subtracts sigma * score from eps
    (algorithm 2). As in the published code the gradient is taken at z_t.

    Args:
      log_prob: (z [B, ...], t: NoiseLevel, **conditions) -> [B] log p(y | z_t).
      scale: scalar or [B]; may be traced. 0 switches the guidance off.

    Returns:
      The guidance.
    """

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoiser(z, step, **cond):
            p = denoise(z, step, **cond)
            # The sum over the batch differentiates each example alone: no example enters another's log_prob.
            gradient = jax.grad(lambda z: jnp.sum(log_prob(z, step.t, **cond)))(z)
            score = expand(jnp.asarray(scale), z) * gradient
            return p._replace(score=score if p.score is None else p.score + score)

        return denoiser

    return wrap


def unit(a: Array) -> Array:
    """a / |a| over the last axis, float32; zero stays zero, and has no slope.

    >>> print(unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3))
    [[0.6 0.8]
     [0.  0. ]]
    """
    a = a.astype(jnp.float32)
    return a * jax.lax.rsqrt(jnp.maximum(jnp.sum(a * a, axis=-1, keepdims=True), 1e-24))


def clip_similarity(image: Array, text: Array, logit_scale: Array | float) -> Array:
    """exp(logit_scale) * cos(image, text), CLIP's logit of each pair. Embeddings [B, E], normalised or not: [B]."""
    return jnp.exp(logit_scale) * jnp.sum(unit(image) * unit(text), axis=-1)


def clip_guided(similarity: Callable[..., Array], scale: Array | float) -> Guidance:
    """Adds scale * grad similarity(z_t, caption) as a pending score: CLIP guidance (GLIDE; released code).

    It is `classifier` with another log p(y | z_t), up to a constant: a noised CLIP's similarity of z_t and its caption.

    Args:
      similarity: (z [B, ...], t: NoiseLevel, **conditions) -> [B], such as
        `clip_similarity(clip(z, t.time), text, logit_scale)`.
      scale: scalar or [B]; may be traced. 0 switches the guidance off.

    Returns:
      The guidance.
    """
    return classifier(similarity, scale)


def classifier_free(scale: Array | float, null: Mapping[str, Array]) -> Guidance:
    """Goes beyond the conditional prediction, away from the unconditional: null + scale (conditional - null).

    Classifier-free guidance, equation 6, with scale = 1 + w. Both predictions come from one call with a doubled batch.
    The variance of the step stays the conditional one's (GLIDE, section 2.3 and released code).

    Args:
      scale: scalar or [B]; may be traced. 1 is the conditional model, 0 the unconditional one.
      null: what stands for each condition where training dropped it, of one example (no batch axis), an array or a
        tree of them like the condition; conditions that it does not name are given to both halves.

    Returns:
      The guidance; to be applied before clipping, which does not commute with it.
    """

    def wrap(denoise: Denoiser) -> Denoiser:
        def denoiser(z, step, **cond):
            n = z.shape[0]
            twice = jax.tree.map(lambda a: jnp.concatenate([a, a]) if jnp.ndim(a) else a, (z, step, cond))

            def with_null(v, given):
                return jnp.concatenate([given, jnp.broadcast_to(jnp.asarray(v, given.dtype), given.shape)])

            both = denoise(*twice[:2], **twice[2] | {k: jax.tree.map(with_null, v, cond[k]) for k, v in null.items()})

            def first(a):
                return a[:n] if jnp.ndim(a) and a.shape[0] == 2 * n else a

            def mix(a):
                return None if a is None else a[n:] + expand(jnp.asarray(scale), a) * (a[:n] - a[n:])

            p = jax.tree.map(first, both)
            return p._replace(x=mix(both.x), eps=mix(both.eps), mean=mix(both.mean))

        return denoiser

    return wrap


def apply_score(p: Prediction, z: Array, t: NoiseLevel) -> Prediction:
    """Moves a pending score into eps and x: eps - sigma * score (ADM, algorithm 2). x is not clipped again."""
    if p.score is None:
        return p
    eps = p.eps - expand(t.sigma, z) * p.score
    return p._replace(eps=eps, x=x_from_eps(eps, z, t), mean=None, score=None)
