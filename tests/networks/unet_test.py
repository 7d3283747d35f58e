"""Laws of the U-Net: shapes, precision, independence of the images, bad options."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import components
from diffax.errors import UserError
from diffax.networks.unet import UNet
from tests.networks.common import (
    NET,
    SHAPE,
    TIME,
    VARIANTS,
    build,
    example_inputs,
    images,
    initial,
    network_and_weights,
    trained,
)


@pytest.mark.parametrize("variant", ["ddpm", "adm"])
def test_a_new_network_answers_zero(variant):
    run, params = network_and_weights(variant)
    new = run(initial(build(**VARIANTS[variant])), images(), TIME)
    np.testing.assert_array_equal(new, np.zeros_like(new))
    assert np.abs(run(params, images(), TIME)).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_at_other_sizes(variant):
    network = build(**VARIANTS[variant])
    out = jax.eval_shape(network.apply, trained(network), jnp.zeros((2, 12, 20, 3)), TIME, {})
    assert (out.shape, out.dtype) == ((2, 12, 20, 3), jnp.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_keeps_parameters_and_output_in_float32(variant):
    half = build(**VARIANTS[variant], dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0), *example_inputs(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.apply, shapes, images(), TIME, {}).dtype == jnp.float32


@pytest.mark.parametrize("variant", ["ddpm", "adm"])
def test_bfloat16_is_close_to_float32(variant):
    run, params = network_and_weights(variant)
    half = build(**VARIANTS[variant], dtype="bfloat16")
    want, got = run(params, images(), TIME), jax.jit(half.apply)(params, images(), TIME, {})
    deviation = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert 1e-5 < deviation < 0.05  # it is bfloat16, and it is close


def test_remat_changes_neither_values_nor_gradients_nor_names():
    net = dict(channel_mult=(1,), attention=(1,), scale_shift=True, dropout=0.5)
    plain, remat = (build(**net, remat=kind) for kind in ("none", "blocks"))
    params, keys = trained(plain), jax.random.split(jax.random.key(4), 2)

    def loss(params, network):
        return jnp.sum(network.apply(params, images(), TIME, {}, dropout_keys=keys) ** 2)

    want = jax.jit(jax.value_and_grad(functools.partial(loss, network=plain)))(params)
    got = jax.jit(jax.value_and_grad(functools.partial(loss, network=remat)))(params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_does_not_depend_on_its_batch(variant):
    run, params = network_and_weights(variant)
    z, other = images(), images(seed=1)
    want = run(params, z, TIME)
    got = run(params, jnp.stack([z[0], other[1]]), TIME.at[1].set(7.0))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], want[1], atol=1e-2)
    assert not np.allclose(run(params, z, TIME.at[1].set(7.0))[1], want[1], atol=1e-3)  # it reads the timestep


def test_dropout_acts_where_keys_are_given_and_each_image_has_its_own():
    network = build(**VARIANTS["improved"], dropout=0.5)
    still, params = network_and_weights("improved")
    z, keys = images(), jax.random.split(jax.random.key(0), 3)
    run = jax.jit(lambda z, keys: network.apply(params, z, TIME, {}, dropout_keys=keys))
    np.testing.assert_allclose(run(z, None), still(params, z, TIME), rtol=1e-4, atol=1e-5)
    first, second = run(z, keys[:2]), run(z, keys[jnp.array([0, 2])])
    assert not np.allclose(first, still(params, z, TIME), atol=1e-2)
    np.testing.assert_allclose(second[0], first[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(second[1], first[1], atol=1e-2)


@pytest.mark.parametrize(
    "net, match",
    [
        (
            dict(resample="bigan"),
            "config.base.net.resample must be one of 'conv', 'pool', 'biggan', got 'bigan'; did you mean biggan",
        ),
        (dict(dtype="float16"), "config.base.net.dtype must be one of"),
        (dict(sinusoid="x"), "config.base.net.sinusoid must be"),
        (dict(kernel_init="he"), "config.base.net.kernel_init must be"),
        (dict(downsample_pad="none"), "config.base.net.downsample_pad must be"),
        (dict(remat="all"), "config.base.net.remat must be"),
        (dict(name="dit"), "config.base.net must be one of"),
        (dict(attention=(16,)), r"net.attention 16 .* \[1, 2\]"),
        (dict(attention_up=(3,)), "net.attention 3"),
        (dict(channel_mult=(1, 1.2)), "19 channels.*multiple of net.groups 8"),
        (dict(heads=3), "3 heads do not divide the 32 channels at factor 2"),
        (dict(heads_up=5), "5 heads do not divide"),
        (dict(head_channels=12), "net.head_channels 12"),
        (dict(channel_mult=(1, 1, 1, 1, 1)), "cannot be halved 4 times"),
    ],
)
def test_bad_options(net, match):
    with pytest.raises((ValueError, UserError), match=match):
        build(**net)


def test_a_size_that_cannot_be_halved_is_refused_when_called():
    with pytest.raises(ValueError, match="7 x 8 cannot be halved 1 times"):
        build().apply(network_and_weights("ddpm")[1], jnp.zeros((1, 7, 8, 3)), jnp.zeros(1), {})


def test_half_width_levels():
    network = build(channel_mult=(0.5, 1), channels=32)
    params = jax.eval_shape(network.init, jax.random.key(0), *example_inputs(network))["params"]
    assert params["net"]["conv_in"]["kernel"].shape == (3, 3, 3, 16)
    assert params["net"]["time_0"]["kernel"].shape == (32, 128)


def test_networks_are_flax_modules():
    assert isinstance(build(), nn.Module)


def test_heads_of_a_network_made_by_hand():
    """Without a config, whose ranges exclude it."""
    with pytest.raises(ValueError, match="0 heads do not divide the 32 channels at factor 2"):
        UNet(**{key: value for key, value in NET.items() if key != "name"}, heads=0).check(SHAPE)


def test_fields_of_the_networks_are_those_of_their_schema():
    """Annotations do not change what Flax sees: all fields but those that are wired or Flax's own are in a config."""
    for name, wired in (("unet", "out_channels"), ("classifier", "num_classes")):
        factory = components.find("network", name)
        assert {*components.schema(factory)} == {*factory.__dataclass_fields__} - {"parent", "name", wired}
