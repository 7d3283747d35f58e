"""Known pixels, which an inpainting model is shown beside z (GLIDE, section 3.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import TRAINING, In, component
from diffax.conditions.base import Condition
from diffax.diffusion import augment
from diffax.networks.context import Context

Array = jax.Array


class InpaintEncoder(nn.Module):
    """A picture and which of its pixels are known, concatenated to z."""

    def __call__(self, inpaint: Array, z: Array) -> Context:
        """Hides the unknown pixels.

        Args:
          inpaint: [B, H, W, C + 1]: the picture, in [-1, 1], and last the mask, 1 where a pixel is known and 0 where it
            is to be made. All zeros: nothing is known.
          z: [B, H, W, C].

        Returns:
          The planes [B, H, W, C + 1]: picture * mask, mask.

        Raises:
          ValueError: another shape.
        """
        want = (*z.shape[:3], z.shape[3] + 1)
        if inpaint.shape != want:
            raise ValueError(f"'inpaint' is {inpaint.shape}, not {want}; give the picture, then its mask as a channel")
        mask = inpaint[..., -1:].astype(jnp.float32)
        return Context(planes=jnp.concatenate([inpaint[..., :-1] * mask, mask], -1))


@component("condition", "inpaint")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inpaint(Condition):
    """Which pixels are known, and what they are. A call gives them by `image` and `mask`; guidance never drops them.

    Attributes:
      empty: share of the training examples of which no pixel is known.
    """

    empty: Annotated[float, In(0, 1), TRAINING] = 0.0

    @property
    def planes(self) -> int:
        return self.shape[2] + 1

    def encoder(self, net: nn.Module) -> nn.Module:
        return InpaintEncoder(name=self.name)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*self.shape[:2], self.shape[2] + 1), jnp.float32)

    def batch_example(self) -> dict[str, Any]:
        return {}

    def columns(self) -> dict[str, tuple[str, Any]]:
        return {}

    def absent(self, n: int) -> np.ndarray:
        return np.zeros((n, *self.example().shape), np.float32)

    def from_batch(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.absent(len(batch["image"]))

    def in_training(self, batch: Mapping[str, Array], x: Array, keys: Array) -> tuple[Array, Array]:
        known = augment.random_known(keys, x.shape[1:], empty=self.empty)
        return x, augment.masked(x, known)

    def of_start(self, image: Array, known: Array) -> Array:
        """The encoder's input for a picture [B, H, W, C] and what is known of it [B, H, W, 1]."""
        return augment.masked(image, known)
