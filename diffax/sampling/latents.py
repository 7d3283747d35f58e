"""Edits by the latents of unCLIP (DALL-E 2, section 3): variations, interpolations, text diffs.

The latents of a picture, for a system whose decoder is conditioned on image embeddings (configs/dalle2.py,
configs/karlo.py), are the embedding, which says what it shows, and the noise from which DDIM makes the very picture:

    sample_fn = diffax.load("runs/dalle2")
    others = latents.variations(sample_fn, picture, 8)
    between = latents.interpolations(sample_fn, picture, another, weights=np.linspace(0, 1, 8))
    changed = latents.text_diffs(sample_fn, picture, to="a small blue ring", source="a small red ring")
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffax.data import images
from diffax.errors import UserError
from diffax.models import codes
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn


class Latents(NamedTuple):
    """A picture in the latents of unCLIP.

    Attributes:
      embedding: [n, E] CLIP's image embeddings, z_i.
      noise: [n, h, w, C] what DDIM starts from to make the very pictures, x_T.
    """

    embedding: np.ndarray
    noise: np.ndarray


def decoder_of(sample_fn: SampleFn) -> SampleFn:
    """The system from the stage on that is conditioned on image embeddings.

    Raises:
      UserError: there is none.
    """
    name = next((m.name for m in sample_fn.models if "image_embedding" in m.conditions), None)
    if name is None:
        raise UserError(
            "no stage is conditioned on image embeddings; sampling.latents; use a system with a decoder, such as "
            "configs/dalle2.py"
        )
    return sample_fn.starting_at(name)


def encode(
    sample_fn: SampleFn,
    image: np.ndarray,
    *,
    prompt: str = "",
    steps: str | int | None = None,
    batch_size: int = 64,
) -> Latents:
    """The latents of pictures: their embeddings, and their noise by DDIM inversion (DALL-E 2, section 3).

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1]; of the decoder's size, or a whole number of times
        larger.
      prompt: the decoder's caption; none by default.
      steps: of DDIM, by default those of the decoder's config. The more, the nearer does `decode` come.
      batch_size: pictures at once.

    Raises:
      UserError: there is no such decoder, or the pictures are of another size.
    """
    decoder = decoder_of(sample_fn)
    image = images.as_floats(image)
    image = image[None] if image.ndim == 3 else image
    height, width, channels = decoder.first.shape
    factor = max(image.shape[1] // height, 1) if image.ndim == 4 else 1
    if image.shape[1:] != (factor * height, factor * width, channels):
        raise UserError(
            f"image is {image.shape}; latents.encode; pass pictures of {decoder.first.shape}, or a whole number of "
            "times larger"
        )
    embedding = decoder.embed(image, batch_size=batch_size)
    how = {"image_embedding": embedding, "steps": steps, "batch_size": batch_size, **_caption(decoder, prompt)}
    noise = decoder.invert(grids.smaller(image, factor), **how)
    return Latents(embedding, noise)


def decode(
    sample_fn: SampleFn,
    latents: Latents,
    *,
    seed: int = 0,
    prompt: str = "",
    steps: str | int | None = None,
    eta: float = 0.0,
    guidance: float | None = 1.0,
    same_noise: bool = True,
    batch_size: int = 64,
) -> np.ndarray:
    """The pictures of latents, by DDIM (DALL-E 2, section 3).

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      latents: from `encode`, or made of such.
      seed: of what is drawn: the noise of the stages that enlarge and, with eta, of the decoder's steps.
      prompt: the decoder's caption, as in `encode`.
      steps: of DDIM, as in `encode`.
      eta: 0 gives back the picture whose latents these are; the larger, up to 1, the more is left to chance.
      guidance: scale of the decoder's; 1 gives back pictures, None is the config's.
      same_noise: whether all that is drawn is the same for all pictures.
      batch_size: pictures at once.

    Returns:
      [n, H, W, C] in [-1, 1].
    """
    decoder, n = decoder_of(sample_fn), len(latents.noise)
    name, key = decoder.first.name, jax.random.key(seed)
    return decoder(
        jax.random.fold_in(key, 0)[None][np.zeros(n, int)] if same_noise else key,
        n,
        image_embedding=latents.embedding,
        noise=latents.noise,
        steps=None if steps is None else {name: steps},
        sampler={name: "ddim"},
        eta=eta,
        guidance=None if guidance is None or decoder.first.scale is None else {name: guidance},
        batch_size=batch_size,
        **_caption(decoder, prompt),
    )


def _caption(decoder: SampleFn, prompt: str | Sequence[str]) -> dict[str, str | Sequence[str]]:
    """The argument that gives a decoder its caption, if it reads any."""
    return {"prompt": prompt} if decoder.reads_text else {}


def slerp(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spherical interpolation (DALL-E 2, section 3): sin((1 - w) O) / sin O first + sin(w O) / sin O second.

    O is the angle between the two. Arrays that are nearly parallel are mixed linearly.

    Args:
      first: [...], taken as one vector.
      second: of the same shape.
      weights: [N], 0 for the first and 1 for the second.

    Returns:
      [N, ...] float32.
    """
    a, b = np.asarray(first, np.float64).ravel(), np.asarray(second, np.float64).ravel()
    weights = np.asarray(weights, np.float64)[:, None]
    cos = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-24)
    if abs(cos) > 0.9995:
        mixed = (1 - weights) * a + weights * b
    else:
        angle = np.arccos(cos)
        mixed = (np.sin((1 - weights) * angle) * a + np.sin(weights * angle) * b) / np.sin(angle)
    return mixed.reshape(-1, *np.shape(first)).astype(np.float32)


def slerp_embeddings(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Embeddings on the way from one to another, [E] each: slerp of their directions; lengths are mixed linearly.

    Args:
      first: [E].
      second: [E].
      weights: [N], 0 for the first and 1 for the second.

    Returns:
      [N, E] float32.
    """
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    mixed = slerp(first / max(lengths[0], 1e-12), second / max(lengths[1], 1e-12), weights)
    length = (1 - np.asarray(weights)) * lengths[0] + np.asarray(weights) * lengths[1]
    return (mixed * length[:, None]).astype(np.float32)


def variations(
    sample_fn: SampleFn,
    image: np.ndarray,
    n: int,
    *,
    seed: int = 0,
    eta: float = 1.0,
    prompt: str = "",
    guidance: float | None = None,
    steps: str | int | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Pictures that share what CLIP sees in one, and differ in the rest (DALL-E 2, section 3).

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      image: [h, w, C], see `encode`.
      n: how many.
      seed: of what differs.
      eta: of DDIM: 0 gives the picture back, larger ones go further.
      prompt: see `decode`.
      guidance: see `decode`.
      steps: see `decode`.
      batch_size: see `decode`.

    Returns:
      [n, H, W, C].
    """
    found = encode(sample_fn, image, prompt=prompt, steps=steps)
    many = Latents(*(np.repeat(part, n, axis=0) for part in found))
    how = {"prompt": prompt, "steps": steps, "guidance": guidance, "batch_size": batch_size}
    return decode(sample_fn, many, seed=seed, eta=eta, same_noise=False, **how)


def interpolations(
    sample_fn: SampleFn,
    first: np.ndarray,
    second: np.ndarray,
    *,
    weights: Sequence[float],
    between_noise: bool = True,
    seed: int = 0,
    steps: str | int | None = None,
    **call: Any,
) -> np.ndarray:
    """Pictures between two, their embeddings rotated one into the other (DALL-E 2, figure 4).

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      first: [h, w, C], see `encode`.
      second: the same.
      weights: N shares of the second picture, such as np.linspace(0, 1, 8).
      between_noise: whether the noise goes from that of the one to that of the other, so that both ends are the two
        pictures; otherwise one drawn from `seed` serves all.
      seed: see `decode`.
      steps: of DDIM, up and down.
      **call: for `decode`: prompt, guidance, batch_size.

    Returns:
      [N, H, W, C].
    """
    prompt = call.get("prompt", "")
    ends = [encode(sample_fn, image, prompt=prompt, steps=steps) for image in (first, second)]
    embedding = slerp_embeddings(ends[0].embedding[0], ends[1].embedding[0], weights)
    if between_noise:
        noise = slerp(ends[0].noise[0], ends[1].noise[0], weights)
    else:
        noise = _one_noise(sample_fn, len(embedding), seed)
    return decode(sample_fn, Latents(embedding, noise), seed=seed, steps=steps, **call)


def text_difference(sample_fn: SampleFn, to: str, source: str | None = None) -> np.ndarray:
    """norm(z_to - z_source), the direction in which two captions differ for CLIP (DALL-E 2, section 3).

    Args:
      sample_fn: a system with a CLIP.
      to: a caption.
      source: another; None: the direction is that of the text embedding of `to`.

    Returns:
      [E] float32, of length 1.

    Raises:
      UserError: CLIP embeds them alike.
    """
    texts = sample_fn.embed_text([to] if source is None else [to, source])
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    difference = texts[0] if source is None else texts[0] - texts[1]
    if not (length := np.linalg.norm(difference)):
        raise UserError(f"CLIP embeds {to!r} and {source!r} alike; latents.text_diffs; give two that differ")
    return difference / length


def text_diffs(
    sample_fn: SampleFn,
    image: np.ndarray,
    to: str,
    *,
    source: str | None = None,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    steps: str | int | None = None,
    **call: Any,
) -> np.ndarray:
    """A picture changed as two captions differ (DALL-E 2, section 3).

    Its embedding is rotated towards the normalised difference of the captions' text embeddings; its noise stays.

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      image: [h, w, C], see `encode`.
      to: a caption of what it shall become.
      source: a caption of what it is; None: the text embedding of `to` alone takes the place of the difference.
      weights: N shares of the rotation, from 0, the picture, up to 0.25 to 0.5 in the paper.
      steps: of DDIM, up and down.
      **call: for `decode`: prompt, guidance, seed, batch_size.

    Returns:
      [N, H, W, C].

    Raises:
      UserError: the captions are the same to CLIP, or the picture does not fit.
    """
    towards = text_difference(sample_fn, to, source)
    found = encode(sample_fn, image, prompt=call.get("prompt", ""), steps=steps)
    own = found.embedding[0]
    embedding = slerp_embeddings(own, np.linalg.norm(own) * towards, weights)
    noise = np.repeat(found.noise, len(embedding), axis=0)
    return decode(sample_fn, Latents(embedding, noise), steps=steps, **call)


def pca_reconstructions(
    sample_fn: SampleFn,
    image: np.ndarray,
    embeddings: np.ndarray,
    counts: Sequence[int],
    *,
    seed: int = 0,
    guidance: float | None = None,
    **call: Any,
) -> np.ndarray:
    """A picture from the first principal components of its embedding (DALL-E 2, figure 7).

    Args:
      sample_fn: a system whose decoder is conditioned on image embeddings.
      image: [h, w, C], see `encode`.
      embeddings: [M, E] of many pictures, whose components these are: `sample_fn.embed(pictures)`.
      counts: N numbers of components that are kept.
      seed: of the noise, which is the same for all.
      guidance: scale of the decoder's; None is the config's.
      **call: for `decode`: prompt, steps, batch_size.

    Returns:
      [N, H, W, C].

    Raises:
      UserError: there are not as many components.
    """
    own = decoder_of(sample_fn).embed(image)
    if own.ndim != 1:
        raise UserError(f"image is {np.shape(image)}; latents.pca_reconstructions; pass one picture [h, w, C]")
    try:
        components = codes.fit_components(embeddings, max(counts))
    except ValueError as error:
        raise UserError(f"{error}; latents.pca_reconstructions(counts={list(counts)}); use fewer") from error
    coordinates = codes.project(own, components)
    kept = np.stack([codes.reconstruct(coordinates[:count], components) for count in counts])
    # as long as what the decoder was trained on
    kept *= np.linalg.norm(own) / np.linalg.norm(kept, axis=1, keepdims=True)
    latents = Latents(kept.astype(np.float32), _one_noise(sample_fn, len(kept), seed))
    return decode(sample_fn, latents, seed=seed, guidance=guidance, **call)


def _one_noise(sample_fn: SampleFn, n: int, seed: int) -> np.ndarray:
    """The same noise for n pictures of the decoder."""
    shape = decoder_of(sample_fn).first.shape
    return np.broadcast_to(jax.random.normal(jax.random.key(seed), shape), (n, *shape))


WAYS = ("caption alone", "text embedding", "prior")


def with_and_without_prior(
    sample_fn: SampleFn,
    prompt: str | Sequence[str],
    n: int | None = None,
    *,
    seed: int = 0,
    guidance: float | Mapping[str, float] | None = None,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """The same captions by three ways (DALL-E 2, figure 8).

    Args:
      sample_fn: a system with a prior and a decoder.
      prompt: one for all pictures, or one each.
      n: how many pictures; by default as many as there are prompts.
      seed: of the noise; the decoder's is the same in all three.
      guidance: scale of all stages, or {stage: scale}; None is the config's.
      batch_size: pictures at once.

    Returns:
      {one of `WAYS`: [n, H, W, C]}: the decoder with the caption and no embedding; the caption's text embedding in
      place of an image embedding; the embedding that the prior makes.

    Raises:
      UserError: there is no prior before the decoder.
    """
    if sample_fn.models[0].output != "image_embedding":
        raise UserError(
            f"{sample_fn.models[0].name} is no prior; latents.with_and_without_prior; use the whole system, such as "
            "configs/dalle2.py"
        )
    decoder = decoder_of(sample_fn)
    n = n or (1 if isinstance(prompt, str) else len(prompt))
    own, names = guidance, [s.name for s in decoder.models]
    if isinstance(guidance, Mapping):
        own = {name: scale for name, scale in guidance.items() if name in names}
    call = {"guidance": own, "batch_size": batch_size, **_caption(decoder, prompt)}
    given = {"caption alone": None, "text embedding": sample_fn.embed_text(prompt)}
    made = {name: decoder(seed, n, image_embedding=embedding, **call) for name, embedding in given.items()}
    return made | {"prior": sample_fn(seed, n, prompt=prompt, guidance=guidance, batch_size=batch_size)}
