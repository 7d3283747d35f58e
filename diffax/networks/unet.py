"""The U-Net of DDPM, Improved DDPM, ADM and GLIDE, and its first half, the encoder.

Ho et al. 2020 (appendix B), Nichol & Dhariwal 2021 (section 2, appendix A), Dhariwal & Nichol 2021
(section 3), Nichol et al. 2021 (section 3). One network: the papers differ in its fields, and in what `Context` holds.
"""

from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.components import RUNTIME, TRAINING, WIRED, In, Length, component
from diffax.networks.context import Context
from diffax.networks.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    Style,
    Upsample,
    conv,
    dense,
    downsample,
    rematerialized,
    sinusoid,
    upsample,
)

Array = jax.Array


class Encoder(nn.Module):
    """The first half of the U-Net: the timestep embedding, the way down and the middle.

    Attributes:
      channels: base width C; the timestep embedding has 4 C.
      channel_mult: width of each level, as a multiple of C; each level halves the size.
      num_res_blocks: residual blocks per level.
      attention: downsampling factors (1, 2, 4, ...) at which blocks are followed by attention.
      heads: attention heads, unless `head_channels` gives their width.
      head_channels: width of a head; 0: use `heads`.
      dropout: rate, in the residual blocks; active when keys for it are given.
      scale_shift: how the timestep embedding enters a block: False adds, True scales and shifts.
      resample: 'conv' (3x3, stride 2; nearest + 3x3), 'pool' (2x2 mean; nearest) or 'biggan'
        (residual blocks that change the size).
      downsample_pad: 'both' edges or the 'end' only; of 'conv'.
      sinusoid: 'openai' or 'ho', see `layers.sinusoid`.
      norm_eps, groups, kernel_init, dtype, flash: see `layers.Style`.
      mid_attention: whether the two middle blocks have attention between them.
      remat: what is computed again for the backward pass, see `layers.rematerialized`.
    """

    channels: Annotated[int, In(4, 2**16)] = 128
    channel_mult: Annotated[tuple[float, ...], In(0, 64, above=True), Length(1, 12)] = (1, 2, 2, 2)
    num_res_blocks: Annotated[int, In(1, 64)] = 2
    attention: Annotated[tuple[int, ...], In(1, 2**12), Length(0, 12)] = (2,)
    heads: Annotated[int, In(1, 1024)] = 1
    head_channels: Annotated[int, In(0, 2**16)] = 0
    dropout: Annotated[float, In(0, 1, below=True), TRAINING] = 0.0
    scale_shift: bool = False
    resample: Literal["conv", "pool", "biggan"] = "conv"
    downsample_pad: Literal["both", "end"] = "both"
    sinusoid: Literal["openai", "ho"] = "openai"
    norm_eps: Annotated[float, In(0, 1, above=True)] = 1e-5
    groups: Annotated[int, In(1, 2**16)] = 32
    kernel_init: Annotated[Literal["torch", "ho"], TRAINING] = "torch"
    dtype: Annotated[Literal["float32", "bfloat16"], RUNTIME] = "float32"
    mid_attention: bool = True
    remat: Annotated[Literal["none", "blocks"], RUNTIME] = "none"
    flash: Annotated[bool, RUNTIME] = False

    @property
    def vector_width(self) -> int:
        """Size of the embedded timestep, to which vectors of conditions are added."""
        return 4 * self.channels

    @property
    def attends_at(self) -> set[int]:
        """The downsampling factors with attention."""
        return {*self.attention}

    @property
    def head_counts(self) -> set[int]:
        """Numbers of attention heads, where `head_channels` does not give their width."""
        return {self.heads}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the network cannot run on images of shape (H, W, C)."""
        if len(shape) != 3:
            raise ValueError(f"net runs on images (height, width, channels), but shape is {tuple(shape)}")
        if self.channels % 2:
            raise ValueError(f"net.channels must be even, got {self.channels}")
        factors = [2**level for level in range(len(self.widths))]
        for factor in self.attends_at - {*factors}:
            raise ValueError(f"net.attention {factor} is no downsampling factor of this network; they are {factors}")
        for factor, width in zip(factors, self.widths, strict=True):
            if width < 1 or width % self.groups:
                raise ValueError(
                    f"net.channels {self.channels} and net.channel_mult {self.channel_mult} make a level of {width} "
                    f"channels; it must be a multiple of net.groups {self.groups}"
                )
            if factor in self.attends_at or (self.mid_attention and factor == factors[-1]):
                self._check_heads(factor, width)

    def _check_heads(self, factor: int, width: int) -> None:
        if self.head_channels and width % self.head_channels:
            raise ValueError(
                f"net.head_channels {self.head_channels} does not divide the {width} channels at factor {factor}; "
                "change it or net.channels"
            )
        for heads in self.head_counts:
            if not self.head_channels and (heads < 1 or width % heads):
                raise ValueError(
                    f"{heads} heads do not divide the {width} channels at factor {factor}; change net.heads, "
                    "net.heads_up or net.channels"
                )

    @property
    def style(self) -> Style:
        """What the layers share."""
        return Style(self.groups, self.norm_eps, self.kernel_init, self.dtype, self.flash)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the full size down."""
        return tuple(int(mult * self.channels) for mult in self.channel_mult)

    def res_block(self, width: int, name: str, resample=None):
        """A function (x, vector, dropout keys) -> x."""
        block = rematerialized(ResBlock, self.remat)
        return block(self.style, width, self.dropout, self.scale_shift, resample, name=name)

    def attention_block(self, width: int, heads: int, name: str):
        """A function (x, sequence, mask) -> x."""
        block = rematerialized(AttentionBlock, self.remat)
        return block(self.style, self.num_heads(width, heads), name=name)

    def num_heads(self, width: int, heads: int) -> int:
        """Heads of an attention layer of that width."""
        return width // self.head_channels if self.head_channels else heads

    def embed_time(self, time: Array) -> Array:
        """[B] -> [B, 4 * channels], float32 whatever the compute dtype."""
        style = self.style._replace(dtype="float32")
        h = sinusoid(time, self.channels, self.sinusoid)
        h = dense(style, 4 * self.channels, name="time_0")(h)
        return dense(style, 4 * self.channels, name="time_1")(nn.silu(h))

    def encode(
        self,
        x: Array,
        vector: Array,
        keys: Array | None,
        sequence: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, list[Array]]:
        """Returns the middle's output and the activations on the way down, first to last."""
        h = conv(self.style, self.widths[0], name="conv_in")(x.astype(self.dtype))
        skips = [h]
        for level, width in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = self.res_block(width, f"down_{level}_block_{i}")(h, vector, keys)
                if 2**level in self.attention:
                    h = self.attention_block(width, self.heads, f"down_{level}_attention_{i}")(h, sequence, mask)
                skips.append(h)
            if level < len(self.widths) - 1:
                name = f"down_{level}_downsample"
                if self.resample == "biggan":
                    h = self.res_block(width, name, downsample)(h, vector, keys)
                elif self.resample == "conv":
                    h = Downsample(self.style, self.downsample_pad, name=name)(h)
                else:
                    h = downsample(h)
                skips.append(h)
        h = self.res_block(width, "mid_block_0")(h, vector, keys)
        if self.mid_attention:
            h = self.attention_block(width, self.heads, "mid_attention")(h, sequence, mask)
        return self.res_block(width, "mid_block_1")(h, vector, keys), skips


@component("network", "unet")
class UNet(Encoder):
    """The whole U-Net; fully convolutional, so it runs at other sizes than it was trained at.

    Attributes:
      out_channels: channels of the result: those of z, twice that with a learned variance.
      heads_up: number of heads on the way up; 0: as on the way down.
      attention_up: factors with attention on the way up; None: as on the way down.
    """

    out_channels: Annotated[int, WIRED] = 3
    heads_up: Annotated[int, In(0, 1024)] = 0
    attention_up: Annotated[tuple[int, ...] | None, In(1, 2**12), Length(0, 12)] = None

    @property
    def attends_at(self) -> set[int]:
        """The downsampling factors with attention."""
        return {*self.attention, *(self.attention_up or ())}

    @property
    def head_counts(self) -> set[int]:
        """Numbers of attention heads."""
        return {self.heads, self.heads_up or self.heads}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the network cannot run on images of shape (H, W, C)."""
        super().check(shape)
        factor = 2 ** (len(self.widths) - 1)
        if any(size % factor for size in shape[:2]):
            raise ValueError(
                f"shape {tuple(shape)} cannot be halved {len(self.widths) - 1} times; use multiples of {factor} or "
                "fewer entries in net.channel_mult"
            )

    @nn.compact
    def __call__(self, z: Array, time: Array, context: Context, *, dropout_keys: Array | None = None) -> Array:
        """Reads z at noise level `time`.

        Args:
          z: [B, H, W, C].
          time: [B] float32, the timestep as the schedule numbers it.
          context: of the conditions.
          dropout_keys: [B] typed PRNG keys; None: no dropout.

        Returns:
          [B, H, W, out_channels] float32.

        Raises:
          ValueError: H or W cannot be halved often enough.
        """
        factor = 2 ** (len(self.widths) - 1)
        if z.shape[1] % factor or z.shape[2] % factor:
            raise ValueError(
                f"images of {z.shape[1]} x {z.shape[2]} cannot be halved "
                f"{len(self.widths) - 1} times; use multiples of {factor} or fewer "
                "entries in channel_mult"
            )
        vector = self.embed_time(time)
        if context.vector is not None:
            vector = vector + context.vector
        if context.planes is not None:
            z = jnp.concatenate([z, context.planes.astype(z.dtype)], -1)

        h, skips = self.encode(z, vector, dropout_keys, context.sequence, context.mask)
        attention = self.attention if self.attention_up is None else self.attention_up
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self.res_block(width, f"up_{level}_block_{i}")(h, vector, dropout_keys)
                if 2**level in attention:
                    name = f"up_{level}_attention_{i}"
                    block = self.attention_block(width, self.heads_up or self.heads, name)
                    h = block(h, context.sequence, context.mask)
            if level:
                name = f"up_{level}_upsample"
                if self.resample == "biggan":
                    h = self.res_block(width, name, upsample)(h, vector, dropout_keys)
                elif self.resample == "conv":
                    h = Upsample(self.style, name=name)(h)
                else:
                    h = upsample(h)
        head = self.style._replace(dtype="float32")
        h = nn.silu(GroupNorm(head, name="norm_out")(h))
        return conv(head, self.out_channels, zero=True, name="conv_out")(h)
