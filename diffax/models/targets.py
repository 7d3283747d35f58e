"""What a diffusion model makes: pictures, or the image embeddings of a CLIP."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffax.conditions.base import Condition
from diffax.diffusion import augment
from diffax.diffusion.guidance import unit
from diffax.models import codes

Array = jax.Array
Params = Any


class Pictures(NamedTuple):
    """Pictures of a shape (H, W, C).

    Attributes:
      shape: of a picture.
      smallest: height and width of the smallest picture that training has to read, for the conditions' sake.
    """

    shape: tuple[int, int, int]
    smallest: tuple[int, int] = (1, 1)

    output = "low_res"
    key = "image"
    sections = ()

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """A whole multiple of the shape, no smaller than `smallest`."""
        times = max(1, -(-self.smallest[0] // self.shape[0]))
        return (times * self.shape[0], times * self.shape[1], self.shape[2])

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The pictures of a batch in this size."""
        image = batch["image"]
        times = image.shape[1] // self.shape[0]
        return {"image": image if times == 1 else augment.area_downsample(image, times)}

    def to_x(self, value: Array) -> Array:
        """What diffusion works on."""
        return value.astype(jnp.float32)

    def from_x(self, x: Array) -> Array:
        """The inverse of `to_x`."""
        return x

    def metrics(self, found: Array, wanted: Array) -> dict[str, Array]:
        """Numbers beside the loss, [B] each, of estimates of x."""
        del found, wanted
        return {}


class Embeddings(NamedTuple):
    """Image embeddings of a CLIP, scaled by its statistics (DALL-E 2, section 2.2).

    Attributes:
      clip: the CLIP.
    """

    clip: Any

    output = "image_embedding"
    key = "image_embedding"

    @property
    def shape(self) -> tuple[int]:
        """(D,)."""
        return (self.clip.features,)

    @property
    def sections(self) -> tuple[str, ...]:
        """The CLIP's."""
        return (self.clip.name,)

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """That of the CLIP's pictures."""
        return self.clip.shape

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The embeddings of a batch's pictures, or those that it has."""
        return {"image_embedding": self.clip.image_embedding(params, batch)}

    def to_x(self, value: Array) -> Array:
        """Embeddings as diffusion works on them."""
        return codes.scaled(value.astype(jnp.float32), self.clip.scale)

    def from_x(self, x: Array) -> Array:
        """The inverse of `to_x`."""
        return codes.unscaled(x, self.clip.scale)

    def metrics(self, found: Array, wanted: Array) -> dict[str, Array]:
        """The cosine of the embedding and its estimate."""
        found, wanted = (unit(self.from_x(v)) for v in (found, wanted))
        return {"cosine": jnp.sum(found * wanted, axis=-1)}


Target = Pictures | Embeddings


def check_clean(clip: Any) -> None:
    """Raises ValueError if a CLIP whose image embeddings are read is one of noisy pictures."""
    if clip.noised:
        raise ValueError(f"the CLIP {clip.name} must be one of clean pictures; set config.{clip.name}.noised to false")


def target_of(clip: Any, shape: tuple[int, ...], conditions: Mapping[str, Condition]) -> Target:
    """What a model with this shape makes; embeddings if it has a CLIP.

    Raises:
      ValueError: the shape is none of that target.
    """
    if clip is not None:
        if tuple(shape) != (clip.features,):
            raise ValueError(f"shape must be ({clip.features},), the features of the CLIP {clip.name}, got {shape}")
        check_clean(clip)
        return Embeddings(clip)
    if len(shape) != 3:
        raise ValueError(f"shape must be (height, width, channels), got {shape}")
    smallest = [c.smallest for c in conditions.values()]
    return Pictures(tuple(shape), max(smallest, default=(1, 1)))
