"""Functions that exist for speed. The plain form of a function `f`, its definition, is `_f`.

The plain forms have forward-mode derivatives, too. Arrays are [B, H, W, C], of attention
[B, heads, T, D]. Statistics and softmax are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend import backend

Array = jax.Array


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
    return jax.lax.platform_dependent(x, cpu=_sum_of_halves, default=_over_pixels)


def _over_pixels(x: Array) -> Array:
    return x.sum(tuple(range(1, x.ndim - 1)), keepdims=True)


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
    """(x - mean) / std * gain + bias, mean and std over the pixels and channels of a group; then SiLU, or not.

    Each pixel needs one a x + b, and on the way back one a dy + b x + c. Left to itself, autodiff keeps and passes over
    several arrays of the size of x; this keeps x alone. The price: no forward-mode derivatives (jax.jvp).

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


def _group_norm(x: Array, gain: Array, bias: Array, groups: int, eps: float, silu: bool = False) -> Array:
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = (f(grouped, (1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    y = ((grouped - mean) / jnp.sqrt(variance + eps)).reshape(x.shape) * gain + bias
    return jax.nn.silu(y) if silu else y


def _forward(x, gain, bias, groups, eps, silu):
    mean, rstd = _moments(x, groups, eps)
    y = _affine(x, gain, bias, mean, rstd)
    return jax.nn.silu(y) if silu else y, (x, gain, bias, mean, rstd)


def _affine(x, gain, bias, mean, rstd):
    a = gain * rstd
    return x.astype(jnp.float32) * a + (bias - mean * a)


def _backward(groups, eps, silu, saved, dy):
    x, gain, bias, mean, rstd = saved
    if silu:  # y is made again from x
        y = _affine(x, gain, bias, mean, rstd)
        gate = jax.nn.sigmoid(y)
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
    # JAX reads cuDNN's version as soon as the call is traced
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
    # the kernel of dq reads sum(dout out) once for each column of its block of keys: the narrowest
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


# [place in a pixel of twice the size, pixel of the small picture, tap of the 3x3 kernel] along one side
UPSAMPLED_TAPS = ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
NUMBERS = ("NHWC", "HWIO", "NHWC")


def upsampled_conv(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution of `upsample(x)`, which is never made: 2.25 times fewer products, equal up to rounding.

    Of the pixels that a tap sees several are the same one; the four places of a pixel have 2x2 kernels, which sum
    the taps.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, K] float32.

    Returns:
      [B, 2 H, 2 W, K] of the dtype of x.
    """
    batch, height, width, _ = x.shape
    taps = jnp.asarray(UPSAMPLED_TAPS)
    kernels = jnp.einsum("prk,qsl,klio->pqrsio", taps, taps, kernel, precision="highest").astype(x.dtype)

    def place(p: int, q: int) -> Array:
        edges = [(1 - p, p), (1 - q, q)]
        return jax.lax.conv_general_dilated(x, kernels[p, q], (1, 1), edges, dimension_numbers=NUMBERS)

    y = jnp.stack([jnp.stack([place(p, 0), place(p, 1)], 3) for p in (0, 1)], 2)
    return y.reshape(batch, 2 * height, 2 * width, kernel.shape[-1])


def _upsampled_conv(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(upsample(x), kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=NUMBERS)


def upsample(x: Array) -> Array:
    """Twice the size, nearest neighbour."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
