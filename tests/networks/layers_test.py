"""Laws of the layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.networks import layers
from diffax.networks.layers import Style, sinusoid
from tests.networks.common import drawn


def test_attention_reads_the_sequence_and_then_itself():
    """Against one attention over both, whose keys and values are projected by one kernel."""
    layer = layers.SelfAttention(Style(), 2, 8)
    x, sequence = (jax.random.normal(jax.random.key(i), (1, n, 8)) for i, n in enumerate((5, 3)))
    params = drawn(layer, x, sequence)
    shared = params["params"] | {
        f"encoder_kv_{leaf}": params["params"][f"qkv_{leaf}"][..., 1:, :, :] for leaf in ("kernel", "bias")
    }
    want = layer.apply(params, jnp.concatenate([sequence, x], 1))[:, 3:]
    np.testing.assert_allclose(layer.apply({"params": shared}, x, sequence), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (2, 12)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_group_norm_against_float64(shape, offset):
    rng = np.random.default_rng(0)
    x = (offset + rng.standard_normal(shape)).astype(np.float32)
    gain, bias, scale, shift = rng.standard_normal((4, 12)).astype(np.float32)
    params = {"params": {"scale": gain, "bias": bias}}
    norm = layers.GroupNorm(Style(groups=3, norm_eps=1e-5))
    got = norm.apply(params, x, jnp.tile(scale, (2, 1)), jnp.tile(shift, (2, 1)))

    groups = x.astype(np.float64).reshape(2, -1, 3, 4)
    normal = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    want = (normal.reshape(shape) * gain + bias) * (1 + scale) + shift
    np.testing.assert_allclose(got, want, atol=1e-5 if not offset else 3e-3)


def test_sinusoid_of_improved_ddpm():
    want = [0.54030, 0.99500, 0.99995, 1.0, 0.84147, 0.09983, 0.0099998, 0.001]
    np.testing.assert_allclose(sinusoid(jnp.ones(1), 8)[0], want, atol=1e-5)


def test_sinusoid_of_ddpm():
    time = np.array([1.0, 7.0, 250.25])
    phase = time[:, None] * np.exp(-np.log(10_000) * np.arange(4) / 3)
    want = np.concatenate([np.sin(phase), np.cos(phase), np.zeros((3, 1))], -1)
    np.testing.assert_allclose(sinusoid(jnp.array(time), 9, "ho"), want, atol=1e-4)


def test_flash_attention_on_a_cpu_is_that_of_attend():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 32))
    nets = [layers.AttentionBlock(Style(groups=8, flash=flash), heads=2) for flash in (False, True)]
    params = jax.tree.map(lambda a: a + 0.1, nets[0].init(jax.random.key(1), x))
    chex.assert_trees_all_equal(*(net.apply(params, x) for net in nets))


def test_an_upsampled_convolution_is_one_of_the_larger_picture():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    params = drawn(layers.UpConv(Style(), 6), x)
    large = layers.conv(Style(), 6, name=None)
    got, got_vjp = jax.vjp(layers.UpConv(Style(), 6).apply, params, x)
    want, want_vjp = jax.vjp(lambda p, x: large.apply(p, layers.upsample(x)), params, x)
    chex.assert_trees_all_close((got, got_vjp(got)), (want, want_vjp(got)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("init, fan, scale", [("torch", 9 * 64, 1 / 3), ("ho", 9 * (64 + 256) / 2, 1.0)])
def test_kernel_inits(init, fan, scale):
    kernel = layers.kernel_init(Style(kernel_init=init))(jax.random.key(0), (3, 3, 64, 256))
    bound = np.sqrt(3 * scale / fan)
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.var(kernel), scale / fan, rtol=0.02)


def test_projections_are_initialised_one_by_one():
    """The fan of q, k and v is that of three layers (Ho et al.), not of their stack."""
    params = layers.SelfAttention(Style(kernel_init="ho"), 4, 64).init(jax.random.key(0), jnp.zeros((1, 2, 64)))
    np.testing.assert_allclose(np.var(params["params"]["qkv_kernel"]), 1 / 64, rtol=0.05)


def test_resampling_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(layers.downsample(layers.upsample(x)), x)
    odd = layers.downsample(jnp.ones((1, 5, 3, 2)))
    chex.assert_shape(odd, (1, 2, 1, 2))


def test_padding_at_the_end_sees_other_pixels():
    """Of a picture of ones, 3x3 sums miss the padded edge: the first pixel, or the last."""
    ones = {"params": {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}}
    for pad, want in (("both", [[4, 6], [6, 9]]), ("end", [[9, 6], [6, 4]])):
        got = layers.Downsample(Style(), pad).apply(ones, jnp.ones((1, 4, 4, 1)))
        np.testing.assert_array_equal(got[0, :, :, 0], want)


def test_a_causal_block_sees_what_came_before():
    block = layers.TransformerBlock(layers.Style(), heads=2, activation="quick_gelu")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = block.init(jax.random.key(1), x, layers.causal(5))
    before = block.apply(params, x, layers.causal(5))
    after = block.apply(params, x.at[:, 3, 0].add(1.0), layers.causal(5))
    chex.assert_trees_all_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:] > 1e-4).any(-1).all()
