"""Edits of the conditions on their way to a network. Pure; each example has its own key.

Conditions are dropped for classifier-free guidance; low-resolution pictures are made worse so that a stage forgives
what the one before it gets wrong.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffax.diffusion.process import diffuse, expand
from diffax.diffusion.schedules import NoiseLevel

Array = jax.Array


def drop(
    cond: Mapping[str, Array],
    keys: Array,
    *,
    rate: float | Mapping[tuple[str, ...], float],
    null: Mapping[str, Array],
) -> dict[str, Array]:
    """Drops the conditions of a share of the examples (classifier-free guidance, algorithm 1, line 3).

    All conditions that `null` names are dropped together, the others stay. Or groups of them each on their own
    (DALL-E 2, section 2.1: the image embedding of a tenth of the examples, the caption of half of them).

    Args:
      cond: conditions, [B, ...] each.
      keys: [B] typed PRNG keys.
      rate: probability that an example is trained without them (the paper's p_uncond); or {names of a group: its own}.
      null: what stands for a dropped condition, of one example.

    Returns:
      The conditions, with the null value in place of those dropped.
    """
    groups, kept = rate if isinstance(rate, Mapping) else {tuple(null): rate}, dict(cond)
    for number, (names, share) in enumerate(groups.items()):
        own = jax.vmap(lambda key, i=number: jax.random.fold_in(key, i))(keys) if number else keys
        dropped = jax.vmap(lambda key, share=share: jax.random.bernoulli(key, share))(own)
        for name in (name for name in names if name in null and name in cond):
            value = cond[name]
            kept[name] = jnp.where(expand(dropped, value), jnp.asarray(null[name], value.dtype), value)
    return kept


# ---- low-resolution pictures ----------------------------------------------------------------------------------------


def area_downsample(x: Array, factor: int) -> Array:
    """[B, H, W, C] -> [B, H / factor, W / factor, C], the mean of each square (ADM, super-resolution training).

    >>> area_downsample(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).tolist()
    [[[[1.5]]]]
    """
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return squares.mean((2, 4))


def random_known(keys: Array, shape: tuple[int, ...], *, empty: float) -> Array:
    """Which pixels an inpainting model gets in training: all but a random box, or a random box alone.

    GLIDE erases random regions (section 3.3) and publishes no distribution. Here the sides of the box are uniform
    between a quarter of the picture and all of it, and it is what is erased in three of four pictures.

    Args:
      keys: [B] typed PRNG keys.
      shape: (H, W, ...) of a picture.
      empty: share of the pictures of which nothing is known, so that the model still generates from text alone.

    Returns:
      [B, H, W, 1] float32, 1 where a pixel is known.
    """

    def one(key):
        kind, side, place, none = jax.random.split(key, 4)
        sides = jax.random.uniform(side, (2,), minval=0.25, maxval=1.0)
        starts = jax.random.uniform(place, (2,)) * (1 - sides)
        inside = [
            (jnp.arange(n) >= jnp.floor(n * a)) & (jnp.arange(n) < jnp.ceil(n * (a + b)))
            for n, a, b in zip(shape, starts, sides, strict=False)
        ]
        box = inside[0][:, None] & inside[1][None]
        known = jnp.where(jax.random.bernoulli(kind, 0.75), ~box, box)
        return jnp.where(jax.random.bernoulli(none, empty), False, known)[..., None].astype(jnp.float32)

    return jax.vmap(one)(keys)


def masked(x: Array, known: Array) -> Array:
    """The condition 'inpaint': [B, H, W, C] and [B, H, W, 1] -> [B, H, W, C + 1], unknown pixels hidden."""
    return jnp.concatenate([x * known, known], -1)


def shrink_known(x: Array, known: Array, factor: int) -> tuple[Array, Array]:
    """A picture and its mask for a stage `factor` times smaller: known is what is known of every pixel below."""
    squares = 1 - area_downsample(1 - known, factor)
    return area_downsample(x, factor), jnp.floor(squares + 1e-4)


def round_to_bytes(x: Array) -> Array:
    """Pictures in [-1, 1] as they come back from 8-bit files: clipped, on 256 values.

    >>> print(round_to_bytes(jnp.array([-2.0, 0.001])).round(4))
    [-1.      0.0039]
    """
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5) / 127.5 - 1


def gaussian_blur(x: Array, sigma: Array) -> Array:
    """3x3 Gaussian blur, reflected at the edges (CDM, section 3).

    Args:
      x: [B, H, W, C].
      sigma: [B] standard deviation in pixels; 0 leaves the picture as it is.

    Returns:
      [B, H, W, C].
    """
    side = jnp.where(sigma > 0, jnp.exp(-0.5 / jnp.maximum(sigma, 1e-6) ** 2), 0.0)
    taps = jnp.stack([side, jnp.ones_like(side), side], axis=-1) / (1 + 2 * side)[:, None]
    for axis in (1, 2):
        edges = [(0, 0)] * 4
        edges[axis] = (1, 1)
        wide, size = jnp.pad(x, edges, mode="reflect"), x.shape[axis]
        shifted = [jax.lax.slice_in_dim(wide, i, i + size, axis=axis) for i in range(3)]
        x = sum(expand(taps[:, i], x) * part for i, part in enumerate(shifted))
    return x


def random_blur(x: Array, keys: Array, *, share: float, low: float, high: float) -> Array:
    """Blurs a share of the pictures, each with its own sigma ~ U(low, high) (CDM, section 3: half, 0.4 to 0.6)."""

    def draw(key):
        chosen, sigma = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chosen, share), jax.random.uniform(sigma, minval=low, maxval=high), 0.0)

    return gaussian_blur(x, jax.vmap(draw)(keys))


def noise_to(x: Array, level: NoiseLevel, keys: Array) -> Array:
    """q(z_s | x) with each picture's own noise: Gaussian conditioning augmentation (CDM, section 3).

    Args:
      x: [B, H, W, C] clean pictures.
      level: [B]; clean data is let through.
      keys: [B] typed PRNG keys.
    """
    eps = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return diffuse(x, level, eps)


def crop_together(x: Array, low_res: Array, keys: Array, *, side: int) -> tuple[Array, Array]:
    """The same random window of a picture and of its smaller version.

    Args:
      x: [B, H, W, C].
      low_res: [B, H / f, W / f, K].
      keys: [B] typed PRNG keys.
      side: of the window in x, a multiple of f, at most H and W.

    Returns:
      [B, side, side, C] and [B, side / f, side / f, K].
    """
    factor = x.shape[1] // low_res.shape[1]
    small = side // factor
    choices = jnp.array([low_res.shape[1] - small + 1, low_res.shape[2] - small + 1])

    def crop(x, low_res, key):
        top, left = jax.random.randint(key, (2,), 0, choices)
        window = jax.lax.dynamic_slice(x, (top * factor, left * factor, 0), (side, side, x.shape[-1]))
        return window, jax.lax.dynamic_slice(low_res, (top, left, 0), (small, small, low_res.shape[-1]))

    return jax.vmap(crop)(x, low_res, keys)
