"""The functions that exist for speed are their plain forms, on every device."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu

from diffax.networks import kernels


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (2, 4, 6, 12), (2, 12)])
def test_group_norm_gradient_against_autodiff(shape, silu):
    def plain(x, gain, bias):
        groups = x.reshape(2, -1, 3, 4)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        y = ((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * gain + bias
        return nn.silu(y) if silu else y

    keys = jax.random.split(jax.random.key(0), 4)
    each = (2, *(1 for _ in shape[1:-1]), 12)
    x, gain, bias, dy = (jax.random.normal(k, s) for k, s in zip(keys, (shape, each, each, shape), strict=True))
    got, got_vjp = jax.vjp(lambda *a: kernels.group_norm(*a, 3, 1e-5, silu), 3 + x, gain, bias)
    want, want_vjp = jax.vjp(plain, 3 + x, gain, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
    chex.assert_trees_all_close(got_vjp(dy), want_vjp(dy), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("offset, atol", [(0.0, 1e-2), (100.0, 3e-2)])
def test_group_norm_in_bfloat16_against_float64(offset, atol):
    """Of the same bfloat16 numbers, whose mean is up to 100 times their standard deviation."""
    x, dy = (jax.random.normal(jax.random.key(i), (2, 16, 16, 12)) for i in range(2))
    x, gain, bias = (20 * x + 20 * offset).astype(jnp.bfloat16), jnp.full((2, 1, 1, 12), 1.5), jnp.zeros((2, 1, 1, 12))
    groups = np.asarray(x, np.float64).reshape(2, -1, 3, 4)
    mean, std = groups.mean((1, 3), keepdims=True), groups.std((1, 3), keepdims=True)
    normal = ((groups - mean) / std).reshape(x.shape)
    got, vjp = jax.vjp(lambda *a: kernels.group_norm(*a, 3, 1e-5), x, gain, bias)
    np.testing.assert_allclose(got, 1.5 * normal, atol=atol)

    def over_group(a):
        return np.broadcast_to(a.reshape(2, -1, 3, 4).mean((1, 3), keepdims=True), groups.shape).reshape(x.shape)

    dx, dgain, dbias = vjp(dy)
    dy = 1.5 * np.asarray(dy, np.float64)
    want = (dy - over_group(dy) - normal * over_group(dy * normal)) / np.broadcast_to(std, groups.shape).reshape(
        x.shape
    )
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(dx, np.float64), want, atol=2e-2 * np.abs(want).max())
    np.testing.assert_allclose(dbias, dy.sum((1, 2), keepdims=True) / 1.5, atol=1e-3)
    np.testing.assert_allclose(dgain, (dy * normal).sum((1, 2), keepdims=True) / 1.5, rtol=2e-2, atol=0.1)


def test_attend_against_float64():
    q, k, v = (np.random.default_rng(i).standard_normal((2, 3, n, 8)) for i, n in enumerate((5, 7, 7)))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    weight = np.exp(logits)
    want = weight / weight.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(kernels.attend(*map(jnp.float32, (q, k, v))), want, atol=1e-5)


@pytest.mark.parametrize("mask", [None, (1, 1), (2, 1), (1, 5), (2, 5)])
def test_attend_on_a_cpu_is_that_of_other_devices(mask):
    """Values and gradients of the form with the keys first, which a CPU runs, and of the usual one."""
    q, k, v, dout = (jax.random.normal(jax.random.key(i), (2, 3, n, 8)) for i, n in enumerate((5, 8, 8, 5)))
    seen = None if mask is None else jax.random.bernoulli(jax.random.key(9), 0.6, (*mask, 8)).at[..., 0].set(True)
    got, got_vjp = jax.vjp(lambda *a: kernels.attend(*a, seen), q, k, v)
    want, want_vjp = jax.vjp(lambda *a: kernels._attend(seen, *a), q, k, v)
    chex.assert_trees_all_close((got, got_vjp(dout)), (want, want_vjp(dout)), atol=2e-6)


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_attends_picture_by_picture(platform, loops):
    x = jax.ShapeDtypeStruct((2, 3, 4, 8), jnp.float32)
    program = jax.jit(kernels.attend).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in program) is loops


@pytest.mark.parametrize("mask, keys", [(None, 384), (1, 384), (2, 384), (None, 300), (2, 300)])
def test_a_tpus_flash_attention_is_attention(mask, keys):
    """The kernel, interpreted: values and gradients, with keys that are not seen or not in blocks of 128."""
    q, k, v, dout = (jax.random.normal(jax.random.key(i), (2, 2, n, 16)) for i, n in enumerate((256, keys, keys, 256)))
    seen = None if mask is None else jax.random.bernoulli(jax.random.key(9), 0.6, (mask, 1, keys))
    want, want_vjp = jax.vjp(lambda *a: kernels._attend(seen, *a), q, k, v)
    with pltpu.force_tpu_interpret_mode():
        got, got_vjp = jax.vjp(lambda *a: kernels._flash_on_tpu(*a, seen), q, k, v)
        chex.assert_trees_all_close((got, got_vjp(dout)), (want, want_vjp(dout)), atol=2e-5)


@pytest.mark.parametrize(
    "platform, tokens, dtype, mask, kernel",
    [
        ("tpu", 1024, "float32", None, "tpu_custom_call"),
        ("tpu", 1024, "bfloat16", (2, 1), "tpu_custom_call"),
        ("tpu", 1024, "bfloat16", (2, 1024), None),  # a mask for each query
        ("tpu", 256, "bfloat16", None, None),  # too few to be worth it
        ("tpu", 1056, "bfloat16", None, None),  # not in blocks of 128
        ("cuda", 64, "bfloat16", None, "__cudnn$fmhaSoftmax"),
        ("cuda", 64, "bfloat16", (1, 1), "__cudnn$fmhaScaleBiasSoftmax"),
        ("cuda", 64, "float32", None, None),
        ("cpu", 1024, "bfloat16", None, None),
    ],
)
def test_flash_attention_is_the_devices_own_where_it_has_one(monkeypatch, platform, tokens, dtype, mask, kernel):
    monkeypatch.setattr(kernels, "_is_on_cuda", lambda: platform == "cuda")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # there is none to ask
    x = jax.ShapeDtypeStruct((2, 2, tokens, 32), dtype)
    mask = None if mask is None else jax.ShapeDtypeStruct((*mask, tokens), bool)
    grad = jax.jit(jax.grad(lambda q, k, v, mask: kernels.flash_attend(q, k, v, mask).astype(jnp.float32).sum()))
    program = grad.trace(x, x, x, mask).lower(lowering_platforms=(platform,)).as_text()
    found = {name for name in re.findall(r"custom_call @([\w$]+)", program) if "cudnn" in name or "tpu" in name}
    assert any(name.startswith(kernel) for name in found) if kernel else not found


def test_a_sum_over_pixels_against_float64():
    for shape in ((2, 32, 32, 5), (2, 6, 7, 5), (2, 5)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        want = x.astype(np.float64).reshape(2, -1, 5).sum(1)
        np.testing.assert_allclose(kernels.over_pixels(x).reshape(2, 5), want, atol=1e-5)
        assert kernels.over_pixels(x).ndim == len(shape)


def test_a_hidden_key_is_as_good_as_none():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 6, 4))
    seen = jnp.arange(6) < 4
    got = kernels.attend(q, k, v, seen[None, None])
    chex.assert_trees_all_close(got, kernels.attend(q, k[:, :, :4], v[:, :, :4]), atol=1e-6)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_is_its_plain_form(silu, dtype, atol):
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 4, 6, 12))
    gain, bias = jax.random.normal(jax.random.key(1), (2, 2, 1, 1, 12))
    got, got_vjp = jax.vjp(lambda *a: kernels.group_norm(*a, 3, 1e-5, silu), x.astype(dtype), gain, bias)
    want, want_vjp = jax.vjp(lambda *a: kernels._group_norm(*a, 3, 1e-5, silu), x.astype(dtype), gain, bias)
    chex.assert_trees_all_equal_shapes_and_dtypes((got, got_vjp(dy)), (want, want_vjp(dy)))
    np.testing.assert_allclose(got, want, atol=atol)
    for ours, plain in zip(got_vjp(dy), want_vjp(dy), strict=True):
        ours, plain = (np.asarray(a, np.float32) for a in (ours, plain))
        np.testing.assert_allclose(ours, plain, atol=2 * atol * np.abs(plain).max())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_an_upsampled_convolution_is_its_plain_form(dtype, tolerance):
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 5, 4, 3), (3, 3, 3, 6)]))
    got, want = (f(x.astype(dtype), kernel) for f in (kernels.upsampled_conv, kernels._upsampled_conv))
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_plain_forms_have_forward_mode_derivatives():
    """Against finite differences; the fast forms of the first two refuse."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    q, kernel, one = x.reshape(2, 2, 8, 6), jnp.ones((3, 3, 6, 2)), jnp.ones((2, 1, 1, 6))
    plain = {
        "group_norm": (lambda x: kernels._group_norm(x, one, one, 3, 1e-5, True), x),
        "attend": (lambda q: kernels._attend(None, q, q, q), q),
        "upsampled_conv": (lambda x: kernels._upsampled_conv(x, kernel), x),
        "over_pixels": (kernels._over_pixels, x),
    }
    for name, (f, at) in plain.items():
        along = jnp.cos(3 * at)
        _, got = jax.jvp(f, (at,), (along,))
        want = (f(at + 1e-2 * along) - f(at - 1e-2 * along)) / 2e-2
        np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max(), err_msg=name)
    for fast, at in ((lambda x: kernels.group_norm(x, one, one, 3, 1e-5), x), (lambda q: kernels.attend(q, q, q), q)):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(fast, (at,), (at,))
