"""The layers that every network of this family is made of (floor 0).

Arrays are [B, H, W, C]. A layer computes in `Style.dtype`; statistics, softmax and parameters stay
float32.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import backend

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
    """Sinusoidal embedding of the network's clock (Vaswani et al. 2017, section 3.5).

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


def _moments(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation of each group, [B, ..1.., C] float32.

    Of float32 in two passes, as E[x^2] - mean^2 cancels where the mean is large. Of bfloat16 in one, which XLA makes
    part of whatever wrote x: what cancels in float32 is less than the rounding of x to bfloat16 has done already.
    """
    one_pass, x, pixels = x.dtype == jnp.bfloat16, x.astype(jnp.float32), math.prod(x.shape[1:-1])
    mean = _over_groups(over_pixels(x) / pixels, groups)
    about = 0 if one_pass else mean
    variance = _over_groups(over_pixels(jnp.square(x - about)) / pixels, groups)
    variance = jnp.maximum(variance - jnp.square(mean), 0) if one_pass else variance
    return mean, jax.lax.rsqrt(variance + eps)


def over_pixels(x: Array) -> Array:
    """Sum over all axes but the first and the last: [B, ..., C] to [B, ..1.., C]."""
    pixels = tuple(range(1, x.ndim - 1))
    return jax.lax.platform_dependent(x, cpu=_sum_of_halves, default=lambda x: x.sum(pixels, keepdims=True))


def _sum_of_halves(x: Array) -> Array:
    """`over_pixels`, adding halves to each other for as long as there are two.

    A CPU does that with whole vectors at the speed of its memory, where XLA's own sum goes number by number: 5 to 10
    times as fast, and the rounding errors grow with the log of the length.
    """
    each = (x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    while x.shape[1] % 2 == 0:
        first, second = jnp.split(x, 2, axis=1)
        x = first + second
    return x.sum(1).reshape(each)


def _over_groups(x: Array, groups: int) -> Array:
    """Replaces each channel by the mean of its group."""
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    mean = grouped.mean(-1, keepdims=True)
    return jnp.broadcast_to(mean, grouped.shape).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(x: Array, gain: Array, bias: Array, groups: int, eps: float, silu: bool = False) -> Array:
    """(x - mean) / std * gain + bias, mean and std over the pixels and channels of a group; SiLU if asked.

    All that is done to a pixel is one a x + b, and on the way back one a dy + b x + c. Left to
    itself, autodiff keeps and passes over several arrays of the size of x; here it is x alone. The
    price: no forward-mode derivatives (jax.jvp).

    Args:
      x: [B, ..., C].
      gain, bias: [B, ..1.., C] float32.
      groups: number of groups.
      eps: added to the variance.
      silu: whether SiLU follows.

    Returns:
      [B, ..., C] float32.
    """
    return _forward(x, gain, bias, groups, eps, silu)[0]


def _forward(x, gain, bias, groups, eps, silu):
    mean, rstd = _moments(x, groups, eps)
    y = _affine(x, gain, bias, mean, rstd)
    return nn.silu(y) if silu else y, (x, gain, bias, mean, rstd)


def _affine(x, gain, bias, mean, rstd):
    a = gain * rstd
    return x.astype(jnp.float32) * a + (bias - mean * a)


def _backward(groups, eps, silu, saved, dy):
    x, gain, bias, mean, rstd = saved
    if silu:  # y is made again from x
        y = _affine(x, gain, bias, mean, rstd)
        gate = nn.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    size = math.prod(x.shape[1:-1])
    dbias = over_pixels(dy)
    dgain = over_pixels(dy * (x - mean)) * rstd
    if x.dtype != dy.dtype:  # the sums are done: what is left is passed on, and kept until then, in x's precision
        dy = jax.lax.optimization_barrier(dy.astype(x.dtype))
    slope = _over_groups(gain * dgain, groups) / size * jnp.square(rstd)
    level = _over_groups(gain * dbias, groups) / size * rstd
    dx = dy * (gain * rstd) - x * slope + (mean * slope - level)
    return dx.astype(x.dtype), dgain, dbias


group_norm.defvjp(_forward, _backward)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018), with the scale and shift of adaptive GroupNorm folded in, and SiLU if asked."""

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


@jax.custom_vjp
def attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Softmax attention of q [B, heads, T, D] to k, v [B, heads, S, D]: [B, heads, T, D].

    `mask` is bool, [B or 1, T or 1, S]: which keys a query sees; every query must see one. The backward pass makes the
    weights [B, heads, T, S] again, rather than keep them.
    """
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    def default(mask, q, k, v):  # whose backward pass needs no norm
        return _attend(mask, q, k, v), jnp.zeros((*q.shape[:2], 1, q.shape[2]))

    out, norm = jax.lax.platform_dependent(mask, q, k, v, cpu=_attend_rows, default=default)
    return out, (mask, q, k, v, out, norm)


def _attend_backward(saved, dout):
    def default(mask, q, k, v, out, norm, dout):
        return jax.vjp(lambda *qkv: _attend(mask, *qkv), q, k, v)[1](dout)

    return *jax.lax.platform_dependent(*saved, dout, cpu=_attend_rows_backward, default=default), None


attend.defvjp(_attend_forward, _attend_backward)


FLASH_BLOCKS = (512, 384, 256, 128)  # of tokens, of which the largest that divides them is taken


def flash_attend(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """`attend` that never stores the weights [B, heads, T, S] (Dao et al. 2022), by the kernels of others.

    On a TPU JAX's Pallas kernel, for tokens in multiples of 128, at least 1024 of them: it stores its statistics 128
    times, and for 256 tokens XLA moves fewer bytes without it. Keys are filled up to a multiple of 128. On a GPU
    cuDNN's, for bfloat16 and heads of at most 128 channels, in multiples of 8. Else, on a CPU, and for masks that
    differ by query, as `attend`.

    Args:
      q, k, v, mask: see `attend`.

    Returns:
      [B, heads, T, D].
    """
    mask_by_key = mask is None or mask.shape[1] == 1
    tokens, channels = q.shape[2:]
    kernels = {}
    if mask_by_key and tokens >= 1024 and tokens % 128 == 0:
        kernels["tpu"] = _flash_on_tpu
    # JAX asks for cuDNN's version as soon as the call is traced
    if mask_by_key and q.dtype == jnp.bfloat16 and channels in range(8, 129, 8) and _is_on_cuda():
        kernels["cuda"] = _flash_on_gpu
    return jax.lax.platform_dependent(q, k, v, mask, **kernels, default=attend)


def _is_on_cuda() -> bool:
    return "cuda" in backend.get_backend().platform_version


def _flash_on_tpu(q, k, v, mask):
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    def block(length: int) -> int:
        return next(size for size in FLASH_BLOCKS if length % size == 0)

    batch, _, tokens, channels = q.shape
    if more := -k.shape[2] % 128:
        mask = jnp.ones((1, 1, k.shape[2]), bool) if mask is None else mask
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more)))  # not seen
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
    at_q, at_k = block(tokens), block(k.shape[2])
    # the kernel of dq is told sum(dout out) once for each column of its block of keys: the narrowest
    sizes = pallas.BlockSizes(at_q, at_k, at_k, 1, at_q, at_k, at_k, at_q, 128, 128, at_q)
    seen = None
    if mask is not None:  # tokens see those of their own segment
        kv = jnp.broadcast_to(mask[:, 0], (batch, k.shape[2])).astype(jnp.int32)
        seen = pallas.SegmentIds(q=jnp.ones((batch, tokens), jnp.int32), kv=kv)
    return pallas.flash_attention(q, k, v, segment_ids=seen, sm_scale=channels**-0.5, block_sizes=sizes)


def _flash_on_gpu(q, k, v, mask):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    mask = None if mask is None else jnp.broadcast_to(mask[:, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn").transpose(0, 2, 1, 3)


def _attend(mask, q, k, v):
    # the 1/sqrt(D) is shared by q and k, so that bfloat16 products stay in range
    root = q.shape[-1] ** -0.25
    logits = jnp.einsum("bhtd,bhsd->bhts", q * root, k * root, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
    return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(logits, -1).astype(v.dtype), v)


# On a CPU one picture goes after the other, as the weights of one fit into its cache, and the keys come first, [heads,
# S, T]: no large array is transposed, neither here nor on the way back, and the sums over keys run along whole vectors.


def _one_by_one(fn):
    def over(mask, *arrays):
        batch = arrays[0].shape[0]
        mask = None if mask is None else jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
        return jax.lax.map(lambda each: fn(*each), (mask, *arrays))

    return over


def _key_logits(q, k, mask):
    root = q.shape[-1] ** -0.25
    logits = jnp.matmul(k * root, (q * root).swapaxes(1, 2), preferred_element_type=jnp.float32)
    return logits if mask is None else jnp.where(mask.T, logits, -jnp.inf)


@_one_by_one
def _attend_rows(mask, q, k, v):
    """(attention, log of the sum of exp(logits): [heads, 1, T])."""
    logits = _key_logits(q, k, mask)
    most = logits.max(1, keepdims=True)
    weights = jnp.exp(logits - most)
    total = weights.sum(1, keepdims=True)
    mixed = jnp.matmul(v.swapaxes(1, 2), weights.astype(v.dtype), preferred_element_type=jnp.float32)
    return (mixed / total).swapaxes(1, 2).astype(v.dtype), most + jnp.log(total)


@_one_by_one
def _attend_rows_backward(mask, q, k, v, out, norm, dout):
    weights = jnp.exp(_key_logits(q, k, mask) - norm)
    level = (dout * out).astype(jnp.float32).sum(-1)[:, None]
    dweights = jnp.matmul(v, dout.swapaxes(1, 2), preferred_element_type=jnp.float32)
    dlogits = (weights * (dweights - level) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.matmul(k.swapaxes(1, 2), dlogits).swapaxes(1, 2)
    return dq, jnp.matmul(dlogits, q), jnp.matmul(weights.astype(v.dtype), dout)


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


def upsample(x: Array) -> Array:
    """Twice the size, nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


# [place in a pixel of twice the size, pixel of the small picture, tap of the 3x3 kernel] along one side
UPSAMPLED_TAPS = ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


class UpConv(nn.Module):
    """A 3x3 convolution of `upsample(x)`, which is never made: 2.25 times fewer products, equal up to rounding.

    Of the pixels that a tap sees several are the same one; the four places of a pixel have 2x2 kernels, which sum
    the taps. Parameters are those of the convolution.
    """

    style: Style
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C]. Returns [B, 2 H, 2 W, features]."""
        batch, height, width, channels = x.shape
        kernel = self.param("kernel", kernel_init(self.style), (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        taps = jnp.asarray(UPSAMPLED_TAPS)
        kernels = jnp.einsum("prk,qsl,klio->pqrsio", taps, taps, kernel, precision="highest").astype(self.style.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")

        def place(p: int, q: int) -> Array:
            edges = [(1 - p, p), (1 - q, q)]
            return jax.lax.conv_general_dilated(x, kernels[p, q], (1, 1), edges, dimension_numbers=numbers)

        x = x.astype(self.style.dtype)
        y = jnp.stack([jnp.stack([place(p, 0), place(p, 1)], 3) for p in (0, 1)], 2)
        return y.reshape(batch, 2 * height, 2 * width, self.features) + bias.astype(self.style.dtype)


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
    """Two convolutions with the clock in between, added to a skip path; the identity at first.

    `scale_shift` False adds the clock to the features (Ho et al. 2020); True scales and shifts the
    normalised features with it (Nichol & Dhariwal 2021, section 6). `resample` (`upsample` or
    `downsample`) changes the size of both paths, as in BigGAN (Dhariwal & Nichol 2021, section 3).
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

        clock = nn.silu(vector).astype(self.style.dtype)
        clock = dense(self.style, self.channels * (1 + self.scale_shift), name="time")(clock)
        norm = GroupNorm(self.style, silu=True, name="norm2")
        if self.scale_shift:
            h = norm(h, *jnp.split(clock, 2, axis=-1))
        else:
            h = norm(h + clock[:, None, None])
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
        edges = choose(PADS, self.pad, "downsample_pad")
        return conv(self.style, x.shape[-1], stride=2, pad=(edges, edges), name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return UpConv(self.style, x.shape[-1], name="conv")(x)
