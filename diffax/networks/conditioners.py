"""Conditioners: modules that turn one raw condition into a `Context` (floor 0).

A conditioner is called with the condition and z, and returns a `Context`. `example` is a condition
of the right shape, to initialise a network with; `null` is the number that stands, at each of its
places, for a condition that is withheld.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.layers import Style, choose, dense, sinusoid
from diffax.networks.unet import Context

Array = jax.Array
# ways to enlarge the smaller picture, and the arguments of `jax.image.resize`
RESIZES = {
    "bilinear": dict(method="bilinear", antialias=False),
    "bicubic": dict(method="cubic", antialias=True),
}


class Label(nn.Module):
    """A class label, embedded and added to the clock (Improved DDPM, ADM).

    Attributes:
      num_classes: labels are 0 .. num_classes - 1.
      features: 4 * channels of the U-Net.
      null_label: whether there is one more label, num_classes, that stands for no label.
    """

    num_classes: int
    features: int
    null_label: bool = False

    @nn.compact
    def __call__(self, label: Array, z: Array) -> Context:
        """label: [B] integers. A label out of range gives NaN."""
        del z
        # torch.nn.Embedding starts as N(0, 1)
        table = nn.Embed(
            self.num_classes + self.null_label, self.features, embedding_init=nn.initializers.normal(1.0), name="embed"
        )
        return Context(vector=table(label))

    def example(self, z: Array) -> Array:
        return jnp.zeros(z.shape[:1], jnp.int32)

    @property
    def null(self) -> int | None:
        """The label that stands for none; None if there is no such label."""
        return self.num_classes if self.null_label else None


class LowRes(nn.Module):
    """A smaller picture, resized to the size of z and concatenated to it (Improved DDPM, ADM).

    Attributes:
      resize: 'bilinear', or 'bicubic' (karlo's upsampler; Keys' kernel with a = -1/2). Pixels have half-pixel centres.
    """

    resize: str = "bilinear"

    null = None  # never withheld

    def __call__(self, low_res: Array, z: Array) -> Context:
        """low_res: [B, h, w, K] of any size, in [-1, 1]."""
        shape = (*z.shape[:3], low_res.shape[-1])
        options = choose(RESIZES, self.resize, "resize")
        return Context(planes=jax.image.resize(low_res.astype(jnp.float32), shape, **options))

    def example(self, z: Array) -> Array:
        batch, height, width, channels = z.shape
        return jnp.zeros((batch, max(height // 4, 1), max(width // 4, 1), channels))


class Clock(nn.Module):
    """A second clock, embedded like the first and added to it: how noisy the smaller picture is (CDM, section 3).

    Attributes:
      style: of the layers.
      channels: base width of the U-Net.
      sinusoid: see `layers.sinusoid`.
    """

    style: Style
    channels: int
    sinusoid: str = "openai"

    null = None  # never withheld

    @nn.compact
    def __call__(self, time: Array, z: Array) -> Context:
        """time: [B] float32, as the schedule numbers it."""
        del z
        h = sinusoid(time, self.channels, self.sinusoid)
        h = dense(self.style, 4 * self.channels, name="time_0")(h)
        return Context(vector=dense(self.style, 4 * self.channels, name="time_1")(nn.silu(h)))

    def example(self, z: Array) -> Array:
        return jnp.zeros(z.shape[:1])


class Inpaint(nn.Module):
    """A picture and which of its pixels are known, concatenated to z (GLIDE, section 3.3)."""

    null = None  # never withheld: guidance shows it to both of its halves

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

    def example(self, z: Array) -> Array:
        return jnp.zeros((*z.shape[:3], z.shape[3] + 1))
