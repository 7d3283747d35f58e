"""The U-Net of DDPM, Improved DDPM, ADM and GLIDE, and the noised classifier that is its first half.

Ho et al. 2020 (appendix B), Nichol & Dhariwal 2021 (section 2, appendix A), Dhariwal & Nichol 2021
(section 3), Nichol et al. 2021 (section 3). One network: the papers differ in its fields, and in what `Context` holds.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.context import Context
from diffax.networks.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention,
    Style,
    Upsample,
    choose,
    conv,
    dense,
    downsample,
    rematerialized,
    sinusoid,
    upsample,
)

Array = jax.Array
RESAMPLES = ("conv", "pool", "biggan")
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


class Encoder(nn.Module):
    """The first half of the U-Net: the clock, the way down and the middle.

    Attributes:
      channels: base width C; the clock has 4 C.
      channel_mult: width of each level, as a multiple of C; each level halves the size.
      num_res_blocks: residual blocks per level.
      attention: downsampling factors (1, 2, 4, ...) at which blocks are followed by attention.
      heads: attention heads, unless `head_channels` gives their width.
      head_channels: width of a head; 0: use `heads`.
      dropout: rate, in the residual blocks; active when keys for it are given.
      scale_shift: how the clock enters a block: False adds, True scales and shifts.
      resample: 'conv' (3x3, stride 2; nearest + 3x3), 'pool' (2x2 mean; nearest) or 'biggan'
        (residual blocks that change the size).
      downsample_pad: 'both' edges or the 'end' only; of 'conv'.
      sinusoid: 'openai' or 'ho', see `layers.sinusoid`.
      norm_eps, groups, kernel_init, dtype, flash: see `layers.Style`.
      mid_attention: whether the two middle blocks have attention between them.
      remat: what is computed again for the backward pass, see `layers.rematerialized`.
    """

    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention: tuple[int, ...] = (2,)
    heads: int = 1
    head_channels: int = 0
    dropout: float = 0.0
    scale_shift: bool = False
    resample: str = "conv"
    downsample_pad: str = "both"
    sinusoid: str = "openai"
    norm_eps: float = 1e-5
    groups: int = 32
    kernel_init: str = "torch"
    dtype: str = "float32"
    mid_attention: bool = True
    remat: str = "none"
    flash: bool = False

    @property
    def style(self) -> Style:
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


class UNet(Encoder):
    """The whole U-Net; fully convolutional, so it runs at other sizes than it was trained at.

    Attributes:
      out_channels: channels of the result: those of z, twice that with a learned variance.
      heads_up: number of heads on the way up; 0: as on the way down.
      attention_up: factors with attention on the way up; None: as on the way down.
    """

    out_channels: int = 3
    heads_up: int = 0
    attention_up: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, z: Array, time: Array, context: Context, *, dropout_keys: Array | None = None) -> Array:
        """Reads z at noise level `time`.

        Args:
          z: [B, H, W, C].
          time: [B] float32, the clock as the schedule numbers it.
          context: what else it is told.
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


class Classifier(Encoder):
    """p(y | z): the first half of the U-Net under a pooling head (Dhariwal & Nichol 2021, sec. 4).

    Attributes:
      num_classes: number of logits.
      pool: 'attention' (a token of the mean attends to all pixels, as in CLIP; binds the image
        size), 'adaptive' (mean over the pixels), 'spatial' or 'spatial_v2' (the means of all
        activations on the way down, into a hidden layer with ReLU or GroupNorm and SiLU, whose
        output is sown as 'features' into 'intermediates').
    """

    num_classes: int = 1000
    pool: str = "attention"

    @nn.compact
    def __call__(self, z: Array, time: Array, *, dropout_keys: Array | None = None) -> Array:
        """z: [B, H, W, C], time: [B]. Returns logits [B, num_classes] float32."""
        h, skips = self.encode(z, self.embed_time(time), dropout_keys)
        head = self.style._replace(dtype="float32")
        pooled = choose(
            {
                "attention": self._attention,
                "adaptive": self._adaptive,
                "spatial": self._spatial,
                "spatial_v2": self._spatial,
            },
            self.pool,
            "pool",
        )
        return pooled(head, h, skips)

    def _attention(self, head: Style, h: Array, skips: list[Array]) -> Array:
        h = nn.silu(GroupNorm(head, name="norm_out")(h))
        tokens = h.reshape(h.shape[0], -1, h.shape[-1])
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], 1)
        width = tokens.shape[-1]
        position = self.param("position", nn.initializers.normal(width**-0.5), tokens.shape[1:])
        pool = SelfAttention(head, self.num_heads(width, self.heads), self.num_classes, name="attention")
        return pool(tokens + position)[:, 0]

    def _adaptive(self, head: Style, h: Array, skips: list[Array]) -> Array:
        h = nn.silu(GroupNorm(head, name="norm_out")(h)).mean((1, 2))
        return dense(head, self.num_classes, zero=True, name="logits")(h)

    def _spatial(self, head: Style, h: Array, skips: list[Array]) -> Array:
        means = [x.astype(jnp.float32).mean((1, 2)) for x in (*skips, h)]
        h = dense(head, 2048, name="hidden")(jnp.concatenate(means, -1))
        if self.pool == "spatial":
            h = nn.relu(h)
        else:
            h = nn.silu(GroupNorm(head, name="norm_hidden")(h))
        self.sow("intermediates", "features", h)
        return dense(head, self.num_classes, name="logits")(h)
