"""The layers that every network of this family is made of.

Arrays are [B, H, W, C]. A layer computes in `Style.dtype`; statistics, softmax and parameters stay float32.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.kernels import attend, flash_attend, group_norm, upsample, upsampled_conv

Array = jax.Array

KERNEL_INITS = {
    # torch.nn.Conv2d / Linear: uniform in +-1/sqrt(fan_in)
    "torch": ("fan_in", 1 / 3, "uniform"),
    # Ho et al. 2020, released code: Glorot uniform
    "ho": ("fan_avg", 1.0, "uniform"),
    # CLIP's text encoder (Radford et al. 2021, released code)
    "clip": ("fan_in", 1.0, "normal"),
}
# the waves in their order, and how many fewer steps than waves from period 2 pi to the longest
SINUSOIDS = {"openai": ((jnp.cos, jnp.sin), 0), "ho": ((jnp.sin, jnp.cos), 1)}
PADS = {"both": (1, 1), "end": (0, 1)}


REMATS: dict[str, Callable[[type[nn.Module]], type[nn.Module]]] = {"none": lambda block: block, "blocks": nn.remat}


def rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A kind of block whose backward pass computes the forward pass again (Chen et al. 2016).

    Args:
      block: a kind of module.
      remat: 'none': autodiff and XLA decide what is kept; 'blocks': the block's input alone.
    """
    return choose(REMATS, remat, "remat")(block)


class Style(NamedTuple):
    """What all layers of one network share.

    Attributes:
      groups: number of groups of every GroupNorm.
      norm_eps: added to the variance (1e-6 in Ho's code, 1e-5 in OpenAI's).
      kernel_init: 'torch' or 'ho'; biases start at zero in both.
      dtype: compute dtype, 'float32' or 'bfloat16'.
      flash: whether attention is a GPU's or TPU's own kernel, where it has one for such arrays: see `flash_attend`.
    """

    groups: int = 32
    norm_eps: float = 1e-5
    kernel_init: str = "torch"
    dtype: str = "float32"
    flash: bool = False


def choose(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`, or a ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; use one of {', '.join(map(repr, table))}")
    return table[name]


def kernel_init(style: Style, *, zero: bool = False, gain: float = 1.0, **axes) -> Callable:
    """The initialiser of a kernel; `gain` multiplies its variance, `axes` are those of `variance_scaling`."""
    mode, scale, distribution = choose(KERNEL_INITS, style.kernel_init, "kernel_init")
    if zero:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(gain * scale, mode, distribution, **axes)


def conv(
    style: Style, features: int, size: int = 3, *, stride: int = 1, pad="SAME", zero: bool = False, name: str
) -> nn.Conv:
    """A square convolution. `zero` starts it at zero, so that its branch is first the identity."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=pad,
        dtype=style.dtype,
        kernel_init=kernel_init(style, zero=zero),
        name=name,
    )


def dense(style: Style, features: int, *, zero: bool = False, gain: float = 1.0, name: str) -> nn.Dense:
    """A linear layer on the last axis."""
    return nn.Dense(features, dtype=style.dtype, kernel_init=kernel_init(style, zero=zero, gain=gain), name=name)


def sinusoid(time: Array, width: int, kind: str = "openai", max_period: float = 10_000.0) -> Array:
    """Sinusoidal timestep embedding (Vaswani et al. 2017, section 3.5).

    Args:
      time: [B], any real numbers.
      width: size of the result; an odd one ends in a zero column.
      kind: 'openai': [cos, sin], frequencies max_period^(-i/n) for i < n = width // 2;
        'ho': [sin, cos], frequencies max_period^(-i/(n-1)).
      max_period: the longest period, divided by 2 pi.

    Returns:
      [B, width] float32.
    """
    half = width // 2
    waves, fewer = choose(SINUSOIDS, kind, "sinusoid")
    frequency = [max_period ** (-i / max(half - fewer, 1)) for i in range(half)]
    phase = time.astype(jnp.float32)[:, None] * jnp.asarray(frequency, jnp.float32)
    columns = [wave(phase) for wave in waves]
    return jnp.pad(jnp.concatenate(columns, -1), ((0, 0), (0, width % 2)))


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018), with the scale and shift of adaptive GroupNorm folded in, then SiLU, or not."""

    style: Style
    silu: bool = False

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        """x: [B, ..., C]; scale, shift: [B, C]. Returns norm(x) * (1 + scale) + shift."""
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.style.groups:
            raise ValueError(
                f"{channels} channels cannot be normalised in {self.style.groups} "
                "groups; change channels, channel_mult or groups"
            )
        gain = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if scale is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        each = (batch, *(1 for _ in x.shape[1:-1]), channels)
        gain, bias = (jnp.broadcast_to(v, (batch, channels)).reshape(each) for v in (gain, bias))
        y = group_norm(x, gain, bias, self.style.groups, self.style.norm_eps, self.silu)
        return y.astype(self.style.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens, with an output layer to `features`.

    The tokens may attend to a second sequence too, whose keys and values come first and have a kernel of their own,
    `encoder_kv` (GLIDE, section 3.1). A kernel is stored as [C, (q, k, v), heads, D]; the orders of the published
    checkpoints are the business of `diffax.weights`.

    Where the collection 'cache' is mutable, all keys and values are kept there, and a later call may bring one token
    more: so a sequence is made token by token without reading it again from the start.
    """

    style: Style
    heads: int
    features: int
    zero: bool = False
    gain: float = 1.0  # of the variance of the last layer's kernel
    head_channels: int = 0  # of each head; 0: C / heads

    @nn.compact
    def __call__(
        self, x: Array, sequence: Array | None = None, mask: Array | None = None, at: Array | None = None
    ) -> Array:
        """Mixes the tokens.

        Args:
          x: [B, T, C].
          sequence: [B, S, E], or None.
          mask: see `attend`, over S + T keys; None: all are seen.
          at: the place of the first of x among the keys that are cached; None: x is all there is.

        Returns:
          [B, T, features].

        Raises:
          ValueError: the heads do not divide C.
        """
        batch, tokens, channels = x.shape
        if not self.head_channels and channels % self.heads:
            raise ValueError(
                f"{channels} channels cannot be split into {self.heads} heads; change heads, heads_up or head_channels"
            )

        def project(x: Array, parts: int, name: str) -> Array:
            shape = (parts, self.heads, self.head_channels or channels // self.heads)
            init = kernel_init(self.style, in_axis=0, out_axis=(2, 3), batch_axis=1)
            kernel = self.param(f"{name}_kernel", init, (x.shape[-1], *shape)).astype(self.style.dtype)
            bias = self.param(f"{name}_bias", nn.initializers.zeros, shape).astype(self.style.dtype)
            return jnp.einsum("btc,cnhd->nbhtd", x.astype(self.style.dtype), kernel) + bias[:, None, :, None]

        q, k, v = project(x, 3, "qkv")
        if sequence is not None:
            first_k, first_v = project(sequence, 2, "encoder_kv")
            k, v = jnp.concatenate([first_k, k], 2), jnp.concatenate([first_v, v], 2)
        if self.is_mutable_collection("cache") and not self.is_initializing():
            k, v = self._remember("k", k, at), self._remember("v", v, at)
        mix = flash_attend if self.style.flash else attend
        mixed = mix(q, k, v, mask).transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
        return dense(self.style, self.features, zero=self.zero, gain=self.gain, name="proj")(mixed)

    def _remember(self, name: str, value: Array, at: Array | None) -> Array:
        """All keys (or values) so far, [B, heads, S, D], with `value` put in at place `at`."""
        cache = self.variable("cache", name, lambda: value)
        cache.value = value if at is None else jax.lax.dynamic_update_slice_in_dim(cache.value, value, at, axis=2)
        return cache.value


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) over all pixels, and a sequence if there is one; the identity at first."""

    style: Style
    heads: int

    @nn.compact
    def __call__(self, x: Array, sequence: Array | None = None, mask: Array | None = None) -> Array:
        """Mixes the pixels.

        Args:
          x: [B, H, W, C].
          sequence: [B, S, E], or None.
          mask: [B, S] bool, which places of the sequence are seen; None: all.

        Returns:
          [B, H, W, C].
        """
        batch, height, width, channels = x.shape
        h = GroupNorm(self.style, name="norm")(x).reshape(batch, height * width, channels)
        if mask is not None:
            pixels = jnp.ones((batch, height * width), bool)
            mask = jnp.concatenate([mask, pixels], 1)[:, None]
        h = SelfAttention(self.style, self.heads, channels, zero=True, name="attention")(h, sequence, mask)
        return x + h.reshape(x.shape)


def layer_norm(style: Style, *, name: str) -> nn.LayerNorm:
    """LayerNorm (Ba et al. 2016) over the last axis, its statistics in float32."""
    return nn.LayerNorm(epsilon=style.norm_eps, dtype=style.dtype, use_fast_variance=False, name=name)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # the released CLIP models
}


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm layer (Radford et al. 2019, section 2.3).

    Attributes:
      style: see `Style`.
      heads: attention heads.
      activation: key of `ACTIVATIONS`.
      hidden: width of the MLP's hidden layer; 0: four times that of the tokens.
      gains: factors of the kernels' first variance: attention's last layer, and the MLP's two.
      head_channels: channels of each head; 0: those of the tokens over the heads.
    """

    style: Style
    heads: int
    activation: str = "gelu"
    hidden: int = 0
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    head_channels: int = 0

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None = None, sequence: Array | None = None, at: Array | None = None
    ) -> Array:
        """x: [B, T, C], the rest as in `SelfAttention`. Returns [B, T, C]."""
        channels, (mixing, hidden, out) = x.shape[-1], self.gains
        h = layer_norm(self.style, name="norm1")(x)
        attention = SelfAttention(
            self.style, self.heads, channels, gain=mixing, head_channels=self.head_channels, name="attention"
        )
        x = x + attention(h, sequence, mask, at)
        h = layer_norm(self.style, name="norm2")(x)
        h = dense(self.style, self.hidden or 4 * channels, gain=hidden, name="mlp_0")(h)
        h = choose(ACTIVATIONS, self.activation, "activation")(h)
        return x + dense(self.style, channels, gain=out, name="mlp_1")(h)


def causal(length: int) -> Array:
    """[1, length, length] bool: each position sees itself and those before."""
    return jnp.tril(jnp.ones((1, length, length), bool))


class UpConv(nn.Module):
    """A 3x3 convolution of `upsample(x)`; its parameters are those of the convolution."""

    style: Style
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C]. Returns [B, 2 H, 2 W, features]."""
        kernel = self.param("kernel", kernel_init(self.style), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return upsampled_conv(x.astype(self.style.dtype), kernel) + bias.astype(self.style.dtype)


def downsample(x: Array) -> Array:
    """Half the size, mean of 2x2 pixels; an odd last row or column is dropped."""
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
    return x.mean((2, 4))


class Dropout(nn.Module):
    """Dropout with one key per example: a mask is the same however the batch is divided."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> Array:
        """x: [B, ...], keys: [B] typed PRNG keys, or None for no dropout."""
        if keys is None or not self.rate:
            return x
        place = zlib.crc32("/".join(self.path).encode())

        def mask(key):
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / (1 - self.rate), 0).astype(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding in between, added to a skip path; the identity at first.

    `scale_shift` False adds the embedding to the features (Ho et al. 2020); True scales and shifts the normalised
    features with it (Nichol & Dhariwal 2021, section 6). `resample` (`upsample` or `downsample`) changes the size of
    both paths, as in BigGAN (Dhariwal & Nichol 2021, section 3).
    """

    style: Style
    channels: int
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, vector: Array, keys: Array | None) -> Array:
        """x: [B, H, W, C], vector: [B, E], keys: see `Dropout`. Returns [B, H', W', channels]."""
        h = GroupNorm(self.style, silu=True, name="norm1")(x)
        if self.resample is upsample:
            h, x = UpConv(self.style, self.channels, name="conv1")(h), upsample(x)
        else:
            if self.resample is not None:
                h, x = self.resample(h), self.resample(x)
            h = conv(self.style, self.channels, name="conv1")(h)

        embedded = nn.silu(vector).astype(self.style.dtype)
        embedded = dense(self.style, self.channels * (1 + self.scale_shift), name="time")(embedded)
        norm = GroupNorm(self.style, silu=True, name="norm2")
        if self.scale_shift:
            h = norm(h, *jnp.split(embedded, 2, axis=-1))
        else:
            h = norm(h + embedded[:, None, None])
        h = Dropout(self.dropout, name="dropout")(h, keys)
        h = conv(self.style, self.channels, zero=True, name="conv2")(h)

        if x.shape[-1] != self.channels:
            x = dense(self.style, self.channels, name="skip")(x)
        return x + h


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2; `pad` 'end' pads the bottom and right edge only (Ho's TF)."""

    style: Style
    pad: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C]. Returns [B, H / 2, W / 2, C]."""
        edges = choose(PADS, self.pad, "downsample_pad")
        return conv(self.style, x.shape[-1], stride=2, pad=(edges, edges), name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C]. Returns [B, 2 H, 2 W, C]."""
        return UpConv(self.style, x.shape[-1], name="conv")(x)
