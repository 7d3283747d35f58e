"""Non-leaking augmentation: the network knows how a training picture was changed (Karras et al. 2022, appendix F.2)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import TRAINING, In, component
from diffax.conditions.base import Condition
from diffax.networks.context import Context
from diffax.networks.layers import Style

Array = jax.Array
CHANGES = 5  # flipped; cosine - 1 and sine of the quarter turns; moved down and to the right


class AugmentationEncoder(nn.Module):
    """How a picture was changed, as a vector; without a bias, so that no change adds nothing.

    Attributes:
      style: of the layers.
      features: size of the vector.
    """

    style: Style
    features: int

    @nn.compact
    def __call__(self, changes: Array, z: Array) -> Context:
        """changes: [B, 5], zeros for none."""
        del z
        return Context(vector=nn.Dense(self.features, use_bias=False, name="proj")(changes.astype(jnp.float32)))


@component("condition", "augmentation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation(Condition):
    """Flips, quarter turns and shifts of training pictures, which sampling never asks for: it gives zeros.

    It changes the picture itself, so list it before conditions that are made of the picture, such as low_res.

    Attributes:
      probability: of each of the changes.
      flip: whether pictures are mirrored.
      rotate: whether square pictures are turned by multiples of 90 degrees.
      shift: largest shift, as a share of the side; edges are reflected.
    """

    probability: Annotated[float, In(0, 1), TRAINING] = 0.12
    flip: Annotated[bool, TRAINING] = True
    rotate: Annotated[bool, TRAINING] = False
    shift: Annotated[float, In(0, 0.5), TRAINING] = 0.125

    def check(self, model: Any) -> None:
        if self.rotate and self.shape[0] != self.shape[1]:
            raise ValueError(f"{self.name}.rotate needs square pictures, got {self.shape}; leave it out")

    def encoder(self, net: nn.Module) -> nn.Module:
        return AugmentationEncoder(getattr(net, "style", Style()), net.vector_width, name=self.name)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((CHANGES,), jnp.float32)

    def batch_example(self) -> dict[str, Any]:
        return {}

    def columns(self) -> dict[str, tuple[str, Callable | None]]:
        return {}

    def absent(self, n: int) -> np.ndarray:
        return np.zeros((n, CHANGES), np.float32)

    def from_batch(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.absent(len(batch["image"]))

    def in_training(self, batch: Mapping[str, Array], x: Array, keys: Array) -> tuple[Array, Array]:
        del batch
        return jax.vmap(self._change)(x, keys)

    def _change(self, x: Array, key: Array) -> tuple[Array, Array]:
        """One picture [H, W, C], changed, and how [5]."""
        flip, turn, shift, *chosen = jax.random.split(key, 6)
        happens = [jax.random.bernoulli(k, self.probability) for k in chosen]
        flipped = happens[0] & jax.random.bernoulli(flip) & self.flip
        x = jnp.where(flipped, x[:, ::-1], x)
        turns = jnp.where(happens[1], jax.random.randint(turn, (), 0, 4), 0) if self.rotate else jnp.int32(0)
        if self.rotate:
            x = jax.lax.switch(turns, [lambda x, k=k: jnp.rot90(x, k) for k in range(4)], x)
        most = jnp.array([round(self.shift * side) for side in x.shape[:2]])
        moved = jnp.where(happens[2], jax.random.randint(shift, (2,), -most, most + 1), 0)
        x = _moved(x, moved, [round(self.shift * side) for side in x.shape[:2]])
        angle = turns * (jnp.pi / 2)
        share = moved / jnp.maximum(most, 1)
        return x, jnp.stack([flipped.astype(jnp.float32), jnp.cos(angle) - 1, jnp.sin(angle), *share])


def _moved(x: Array, by: Array, most: list[int]) -> Array:
    """A picture moved down and to the right by [2] pixels, at most `most`; edges are reflected."""
    wide = jnp.pad(x, [(most[0],) * 2, (most[1],) * 2, (0, 0)], mode="reflect")
    return jax.lax.dynamic_slice(wide, (most[0] - by[0], most[1] - by[1], 0), x.shape)
