"""Training losses and the variational bound. All are per example, [B], averaged over pixels and channels.

A component of kind 'loss' makes a function (out, batch: Noised, *, predicts, variance) -> (loss [B], terms {name: [B]})
of the network's output for one noised batch. It may carry what it requires of the model, see `requiring`. Bounds are in
bits per dimension.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, component
from diffax.diffusion.guidance import Denoiser, unit
from diffax.diffusion.process import Gaussian, Prediction, diffuse, eps_from_x, posterior, predict, reverse, target
from diffax.diffusion.samplers import Noise
from diffax.diffusion.schedules import NoiseLevel, Transition

Array = jax.Array
Loss = Callable[..., tuple[Array, dict[str, Array]]]


class Noised(NamedTuple):
    """A batch as the network meets it: z [B, ...] made of x and eps at level step.t; step [B]."""

    x: Array
    eps: Array
    z: Array
    step: Transition


def noised(x: Array, eps: Array, step: Transition) -> Noised:
    """Draws z from q(z_t | x) with the given noise."""
    return Noised(x, eps, diffuse(x, step.t, eps), step)


def mean_flat(a: Array) -> Array:
    """[B, ...] -> [B], the mean over all but the first axis."""
    return jnp.mean(a.reshape(a.shape[0], -1), axis=1)


def normal_kl(p: Gaussian, q: Gaussian) -> Array:
    """KL(p || q) of diagonal normals, element-wise, in nats.

    >>> float(normal_kl(Gaussian(jnp.array(1.0), jnp.array(0.0)), Gaussian(jnp.array(0.0), jnp.array(0.0))))
    0.5
    """
    return 0.5 * (jnp.expm1(p.logvar - q.logvar) + (q.logvar - p.logvar) + (p.mean - q.mean) ** 2 * jnp.exp(-q.logvar))


def approx_standard_normal_cdf(z: Array) -> Array:
    """Phi(z) ~ (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2, the approximation that the published bounds use."""
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))


def discretized_gaussian_log_likelihood(x: Array, p: Gaussian) -> Array:
    """log P(x) of 8-bit data under a normal, element-wise, in nats (DDPM, equation 13).

    The normal is integrated over the width 2/255 of a pixel value; the outermost values take the whole tails.

    Args:
      x: data in [-1, 1], on the 256 pixel values.
      p: the normal.

    Returns:
      Same shape as x, at least log 1e-12.
    """
    centered, inverse_std = x - p.mean, jnp.exp(-0.5 * p.logvar)
    upper = approx_standard_normal_cdf(inverse_std * (centered + 1 / 255))
    lower = approx_standard_normal_cdf(inverse_std * (centered - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def vlb_term(p: Prediction, batch: Noised) -> Array:
    """The step's term of the variational bound, [B] bits per dimension (DDPM, equation 5).

    KL(q(z_s | z_t, x) || p(z_s | z_t)), or -log p(x | z_t) where the step ends clean.
    """
    model = reverse(p, batch.z, batch.step)
    model = Gaussian(model.mean, jnp.broadcast_to(model.logvar, model.mean.shape))
    kl = mean_flat(normal_kl(posterior(batch.x, batch.z, batch.step), model))
    nll = -mean_flat(discretized_gaussian_log_likelihood(batch.x, model))
    return jnp.where(batch.step.s.is_clean, nll, kl) / np.log(2.0)


def prior_bpd(x: Array, t: NoiseLevel) -> Array:
    """KL(q(z_t | x) || N(0, I)), [B] bits per dimension: what the noisiest level still knows (DDPM, L_T)."""
    end = Gaussian(diffuse(x, t, jnp.zeros_like(x)), 2 * jnp.log(t.sigma))
    end = Gaussian(end.mean, jnp.broadcast_to(end.logvar.reshape((-1,) + (1,) * (x.ndim - 1)), x.shape))
    unit = Gaussian(jnp.zeros_like(x), jnp.zeros_like(x))
    return mean_flat(normal_kl(end, unit)) / np.log(2.0)


def cross_entropy(logits: Array, label: Array) -> Array:
    """-log p(label) of a classifier.

    >>> print(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [1.3863]

    Args:
      logits: [B, K].
      label: [B] integers; one out of range gives NaN.

    Returns:
      [B] nats.
    """
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1, mode="fill")[:, 0]


def contrastive(
    image: Array,
    text: Array,
    logit_scale: Array,
    position: Array,
    *,
    gather: Callable[[Array], Array] = lambda a: a,
) -> tuple[Array, dict[str, Array]]:
    """CLIP's loss: each image finds its caption among all of the batch, and each caption its image.

    The loss of example i is the mean of -log softmax_i(S[i, :]) and -log softmax_i(S[:, i]), where S = exp(logit_scale)
    times the cosines of all pairs (Radford et al. 2021; released code). Under pmap a device computes the rows of its
    own examples against the embeddings of all devices; gradients flow back through `gather`, so that their mean over
    devices is that of the whole batch.

    Args:
      image, text: [n, E] embeddings of this device's pairs; they need not be normalised.
      logit_scale: log of the scale, a scalar.
      position: [n] integers, places of the pairs in the global batch; no two are alike.
      gather: [n, ...] -> [N, ...] of all devices, in any order: `lax.all_gather(a, axis_name, tiled=True)` under pmap.
        The examples that are contrasted are those that it returns.

    Returns:
      The loss [n] in nats, whose mean over the global batch is CLIP's, and {'image_top1', 'text_top1'}: [n], 1 where
      the caption is the nearest of all to its image, and the image to its caption.
    """
    image, text = unit(image), unit(text)
    pair = position[:, None] == gather(position)[None]

    def classify(query: Array, keys: Array) -> tuple[Array, Array]:
        # the TPU's default product is bfloat16, and the scale multiplies its error by up to 100
        logits = jnp.exp(logit_scale) * jnp.einsum("ne,me->nm", query, gather(keys), precision="highest")
        loss = jax.nn.logsumexp(logits, axis=1) - jnp.sum(jnp.where(pair, logits, 0), axis=1)
        hit = jnp.take_along_axis(pair, jnp.argmax(logits, axis=1)[:, None], axis=1)[:, 0]
        return loss, hit.astype(jnp.float32)

    (image_loss, image_top1), (text_loss, text_top1) = classify(image, text), classify(text, image)
    return (image_loss + text_loss) / 2, {"image_top1": image_top1, "text_top1": text_top1}


# ---- losses: (out, batch, predicts=, variance=) -> (loss [B], terms {name: [B]}) ------------------------------------


def requiring(
    loss: Loss, *, discrete: bool = False, trains_variance: bool = False, needs_variance: bool = False
) -> Loss:
    """Attaches to a loss what it requires, as attributes, so that a model can check whether it fits.

    A loss without these attributes requires nothing and trains no variance.

    Args:
      loss: the function; changed in place.
      discrete: it needs a schedule of T discrete steps.
      trains_variance: a learned variance gets gradients from it.
      needs_variance: it makes sense with a learned variance alone.

    Returns:
      The loss, with the attributes `discrete`, `trains_variance` and `needs_variance`.
    """
    loss.discrete, loss.trains_variance, loss.needs_variance = discrete, trains_variance, needs_variance
    return loss


@component("loss", "simple")
def simple() -> Loss:
    """L_simple: the mean squared error of the network's mean output (DDPM, equation 14)."""

    def loss(out: Array, batch: Noised, *, predicts: str, variance: str | float):
        wanted = target(predicts, x=batch.x, z=batch.z, eps=batch.eps, step=batch.step)
        mse = mean_flat((wanted - out[..., : wanted.shape[-1]]) ** 2)
        return mse, {"mse": mse}

    return loss


@component("loss", "vlb")
def vlb(weight: Annotated[float, In(0)] = 1.0) -> Loss:
    """weight * L_vlb: the variational bound's term itself (Improved DDPM, equation 4).

    Args:
      weight: factor of the term; the published runs use T, the length of the chain.
    """

    def loss(out: Array, batch: Noised, *, predicts: str, variance: str | float):
        term = vlb_term(predict(out, batch.z, batch.step, predicts=predicts, variance=variance), batch)
        return weight * term, {"vb": term}

    return requiring(loss, discrete=True, trains_variance=True)


@component("loss", "hybrid")
def hybrid(weight: Annotated[float, In(0)] = 1.0) -> Loss:
    """L_hybrid = L_simple + weight * L_vlb, where the bound trains the variance only (Improved DDPM, equation 16).

    The mean is held fixed inside the bound. The paper's factor 0.001 on the sum of T terms is weight = T / 1000 here,
    where t is drawn at random.

    Args:
      weight: factor of the bound's term.
    """
    mse_loss, vlb_loss = simple(), vlb()

    def loss(out: Array, batch: Noised, *, predicts: str, variance: str | float):
        mse, terms = mse_loss(out, batch, predicts=predicts, variance=variance)
        channels = batch.x.shape[-1]
        held = jnp.concatenate([jax.lax.stop_gradient(out[..., :channels]), out[..., channels:]], axis=-1)
        vb, vb_terms = vlb_loss(held, batch, predicts=predicts, variance=variance)
        return mse + weight * vb, terms | vb_terms

    return requiring(loss, discrete=True, trains_variance=True, needs_variance=True)


# ---- the whole bound ------------------------------------------------------------------------------------------------


class BitsPerDim(NamedTuple):
    """The bound and its terms, per example.

    Attributes:
      total: [B] bits per dimension, the sum of all terms and the prior.
      prior: [B] KL of the noisiest level against the unit normal.
      terms: [B, N] bits per dimension of each step, noisiest first.
      x_mse: [B, N] squared error of the estimate of x before each step.
      eps_mse: [B, N] squared error of the estimate of eps.
    """

    total: Array
    prior: Array
    terms: Array
    x_mse: Array
    eps_mse: Array


def bits_per_dim(denoise: Denoiser, x: Array, noise: Noise, steps: Transition, **cond: Array) -> BitsPerDim:
    """The variational bound on -log2 p(x) per dimension, every term with one draw of noise (DDPM, equation 5).

    Args:
      denoise: the denoiser, with clipping as in the published evaluation.
      x: [B, ...] data in [-1, 1] on the 256 pixel values.
      noise: the step's number -> [B, ...].
      steps: table of N transitions, the whole chain or a respaced one.
      **cond: conditions.

    Returns:
      The bound and its terms.
    """
    steps = jax.tree.map(jnp.asarray, steps)

    def body(_, inputs):
        i, transition = inputs
        step = jax.tree.map(lambda a: jnp.broadcast_to(a, x.shape[:1]), transition)
        batch = noised(x, noise(i), step)
        p = denoise(batch.z, step, **cond)
        eps = eps_from_x(p.x, batch.z, step.t)
        return None, (vlb_term(p, batch), mean_flat((p.x - x) ** 2), mean_flat((eps - batch.eps) ** 2))

    count = steps.t.logsnr.shape[0]
    _, (terms, x_mse, eps_mse) = jax.lax.scan(body, None, (jnp.arange(count), steps))
    prior = prior_bpd(x, jax.tree.map(lambda a: a[0], steps.t))
    return BitsPerDim(jnp.sum(terms, axis=0) + prior, prior, terms.T, x_mse.T, eps_mse.T)
