"""Laws of the networks: shapes, sizes, precision, independence of the images, bad options."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import models
from diffax.models import layers
from diffax.models.layers import Style

SHAPE = (8, 8, 3)
NET = dict(name="unet", channels=16, groups=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
VARIANTS = {
    "ddpm": dict(downsample_pad="end", sinusoid="ho", norm_eps=1e-6, kernel_init="ho"),
    "improved": dict(heads=4, scale_shift=True),
    "adm": dict(head_channels=8, scale_shift=True, resample="biggan"),
    "pool": dict(resample="pool", heads=2, heads_up=4, mid_attention=False, attention_up=(1,)),
}


def build(**net):
    return models.build(NET | net, shape=SHAPE, out_channels=3)


def initial(network):
    return jax.jit(network.init)(jax.random.key(0), *models.example_inputs(network, SHAPE))


def trained(network, seed=0):
    """Parameters that are nowhere zero, as after training: kernels of unit gain, scales near 1."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *models.example_inputs(network, SHAPE))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        fan_in = np.prod(leaf.shape) / leaf.shape[-1] if len(leaf.shape) > 1 else 100.0
        return noise / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network_and_weights(variant):
    """(function (params, z, time, dropout_keys) -> out, params) of a variant, compiled once per shape."""
    network = build(**VARIANTS[variant])

    @jax.jit
    def run(params, z, time, dropout_keys=None):
        return network.apply(params, z, time, {}, dropout_keys=dropout_keys)

    return run, trained(network)


def images(batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *SHAPE))


CLOCK = jnp.array([3.0, 500.5])


@pytest.mark.parametrize("variant", ["ddpm", "adm"])
def test_a_new_network_answers_zero(variant):
    run, params = network_and_weights(variant)
    new = run(initial(build(**VARIANTS[variant])), images(), CLOCK)
    np.testing.assert_array_equal(new, np.zeros_like(new))
    assert np.abs(run(params, images(), CLOCK)).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_at_other_sizes(variant):
    network = build(**VARIANTS[variant])
    out = jax.eval_shape(network.apply, trained(network), jnp.zeros((2, 12, 20, 3)), CLOCK, {})
    assert (out.shape, out.dtype) == ((2, 12, 20, 3), jnp.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_keeps_parameters_and_output_in_float32(variant):
    half = build(**VARIANTS[variant], dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0), *models.example_inputs(half, SHAPE))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.apply, shapes, images(), CLOCK, {}).dtype == jnp.float32


@pytest.mark.parametrize("variant", ["ddpm", "adm"])
def test_bfloat16_is_close_to_float32(variant):
    run, params = network_and_weights(variant)
    half = build(**VARIANTS[variant], dtype="bfloat16")
    want, got = run(params, images(), CLOCK), jax.jit(half.apply)(params, images(), CLOCK, {})
    deviation = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert 1e-5 < deviation < 0.05  # it is bfloat16, and it is close


def test_remat_changes_neither_values_nor_gradients_nor_names():
    net = dict(channel_mult=(1,), attention=(1,), scale_shift=True, dropout=0.5)
    plain, remat = (build(**net, remat=kind) for kind in ("none", "blocks"))
    params, keys = trained(plain), jax.random.split(jax.random.key(4), 2)

    def loss(params, network):
        return jnp.sum(network.apply(params, images(), CLOCK, {}, dropout_keys=keys) ** 2)

    want = jax.jit(jax.value_and_grad(functools.partial(loss, network=plain)))(params)
    got = jax.jit(jax.value_and_grad(functools.partial(loss, network=remat)))(params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_does_not_depend_on_its_batch(variant):
    run, params = network_and_weights(variant)
    z, other = images(), images(seed=1)
    want = run(params, z, CLOCK)
    got = run(params, jnp.stack([z[0], other[1]]), CLOCK.at[1].set(7.0))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], want[1], atol=1e-2)
    assert not np.allclose(run(params, z, CLOCK.at[1].set(7.0))[1], want[1], atol=1e-3)  # it reads its clock


def test_dropout_acts_where_keys_are_given_and_each_image_has_its_own():
    network = build(**VARIANTS["improved"], dropout=0.5)
    still, params = network_and_weights("improved")
    z, keys = images(), jax.random.split(jax.random.key(0), 3)
    run = jax.jit(lambda z, keys: network.apply(params, z, CLOCK, {}, dropout_keys=keys))
    np.testing.assert_allclose(run(z, None), still(params, z, CLOCK), rtol=1e-4, atol=1e-5)
    first, second = run(z, keys[:2]), run(z, keys[jnp.array([0, 2])])
    assert not np.allclose(first, still(params, z, CLOCK), atol=1e-2)
    np.testing.assert_allclose(second[0], first[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(second[1], first[1], atol=1e-2)


class Conditions:
    """A network with a label and a low-resolution image."""

    network = models.build(NET, shape=SHAPE, takes=("label", "low_res"), num_classes=4, out_channels=3)

    @functools.cached_property
    def params(self):
        return trained(self.network)

    @functools.cached_property
    def apply(self):
        return jax.jit(self.network.apply)

    def __call__(self, cond):
        return self.apply(self.params, images(), CLOCK, cond)


conditions = Conditions()
LOW_RES = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)


def test_conditions_reach_the_output():
    want = conditions({"label": jnp.array([1, 2]), "low_res": LOW_RES})
    other_label = conditions({"label": jnp.array([1, 3]), "low_res": LOW_RES})
    np.testing.assert_array_equal(other_label[0], want[0])
    assert not np.allclose(other_label[1], want[1], atol=1e-4)
    other_image = conditions({"label": jnp.array([1, 2]), "low_res": LOW_RES.at[1].add(0.5)})
    np.testing.assert_array_equal(other_image[0], want[0])
    assert not np.allclose(other_image[1], want[1], atol=1e-4)


def test_parameters_bear_the_names_of_the_conditions():
    assert set(conditions.params["params"]) == {"unet", "label"}  # low_res has none
    chex.assert_shape(conditions.params["params"]["label"]["embed"]["embedding"], (4, 64))


@pytest.mark.parametrize(
    "cond, match",
    [
        ({"label": jnp.zeros(2, int)}, "'low_res' is missing"),
        ({"label": jnp.zeros(2, int), "low_res": LOW_RES, "text": 1}, "'text' is unknown"),
    ],
)
def test_conditions_must_be_complete_and_known(cond, match):
    with pytest.raises(ValueError, match=match):
        conditions(cond)


def test_a_label_out_of_range_is_loud():
    assert np.isnan(conditions({"label": jnp.array([0, 4]), "low_res": LOW_RES})[1]).all()


def test_null_label_is_one_more_row():
    build = functools.partial(models.build, NET, shape=SHAPE, takes=("label",), num_classes=4, out_channels=3)
    for null_label, rows in ((False, 4), (True, 5)):
        network = build(null_label=null_label)
        shapes = jax.eval_shape(network.init, jax.random.key(0), *models.example_inputs(network, SHAPE))
        assert shapes["params"]["label"]["embed"]["embedding"].shape == (rows, 64)


def test_low_res_is_resized_with_half_pixel_centres():
    low = np.array([0.0, 1.0, 4.0, 9.0])
    planes = models.LowRes().apply({}, jnp.array(low).reshape(1, 1, 4, 1), jnp.zeros((1, 1, 8, 3))).planes
    centres = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(planes[0, 0, :, 0], np.interp(centres, np.arange(4), low), rtol=1e-6)


@pytest.mark.parametrize(
    "net, match",
    [
        (dict(resample="bigan"), "net.resample 'bigan' is unknown; use one of 'conv', 'pool', 'biggan'"),
        (dict(dtype="float16"), "net.dtype 'float16'"),
        (dict(sinusoid="x"), "net.sinusoid"),
        (dict(kernel_init="he"), "net.kernel_init"),
        (dict(downsample_pad="none"), "net.downsample_pad"),
        (dict(remat="all"), "net.remat"),
        (dict(name="dit"), "net.name 'dit'"),
        (dict(chanels=8), "'chanels' is unknown"),
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
    with pytest.raises(ValueError, match=match):
        build(**net)


def test_bad_conditions_at_build():
    with pytest.raises(ValueError, match="num_classes is 0"):
        models.build(NET, shape=SHAPE, takes=("label",), out_channels=3)
    with pytest.raises(ValueError, match="condition 'text' is unknown; use one of 'label', 'low_res'"):
        models.build(NET, shape=SHAPE, takes=("text",), out_channels=3)


def test_a_size_that_cannot_be_halved_is_refused_when_called():
    with pytest.raises(ValueError, match="7 x 8 cannot be halved 1 times"):
        build().apply(network_and_weights("ddpm")[1], jnp.zeros((1, 7, 8, 3)), jnp.zeros(1), {})


def test_half_width_levels():
    network = build(channel_mult=(0.5, 1), channels=32)
    params = jax.eval_shape(network.init, jax.random.key(0), *models.example_inputs(network, SHAPE))["params"]
    assert params["unet"]["conv_in"]["kernel"].shape == (3, 3, 3, 16)
    assert params["unet"]["time_0"]["kernel"].shape == (32, 128)


def test_sinusoid_of_improved_ddpm():
    want = [0.54030, 0.99500, 0.99995, 1.0, 0.84147, 0.09983, 0.0099998, 0.001]
    np.testing.assert_allclose(models.sinusoid(jnp.ones(1), 8)[0], want, atol=1e-5)


def test_sinusoid_of_ddpm():
    time = np.array([1.0, 7.0, 250.25])
    phase = time[:, None] * np.exp(-np.log(10_000) * np.arange(4) / 3)
    want = np.concatenate([np.sin(phase), np.cos(phase), np.zeros((3, 1))], -1)
    np.testing.assert_allclose(models.sinusoid(jnp.array(time), 9, "ho"), want, atol=1e-4)


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


@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (2, 12)])
def test_group_norm_gradient_against_autodiff(shape):
    def plain(x, gain, bias):
        groups = x.reshape(2, -1, 3, 4)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        return ((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * gain + bias

    keys = jax.random.split(jax.random.key(0), 4)
    each = (2, *(1 for _ in shape[1:-1]), 12)
    x, gain, bias, dy = (jax.random.normal(k, s) for k, s in zip(keys, (shape, each, each, shape), strict=True))
    got, got_vjp = jax.vjp(lambda *a: layers.group_norm(*a, 3, 1e-5), 3 + x, gain, bias)
    want, want_vjp = jax.vjp(plain, 3 + x, gain, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
    chex.assert_trees_all_close(got_vjp(dy), want_vjp(dy), rtol=1e-4, atol=2e-5)


def test_attend_against_float64():
    q, k, v = (np.random.default_rng(i).standard_normal((2, 3, n, 8)) for i, n in enumerate((5, 7, 7)))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    weight = np.exp(logits)
    want = weight / weight.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(layers.attend(*map(jnp.float32, (q, k, v))), want, atol=1e-5)


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


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier(pool):
    net = NET | dict(name="classifier", pool=pool, head_channels=8, groups=8)
    network = models.build(net, shape=SHAPE, out_channels=10)
    apply, params = jax.jit(network.apply), trained(network)
    logits = apply(params, images(), CLOCK)
    chex.assert_shape(logits, (2, 10))
    got = apply(params, jnp.stack([images()[0], images(seed=1)[1]]), CLOCK)
    np.testing.assert_allclose(got[0], logits[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], logits[1], atol=1e-3)


def test_classifier_options():
    with pytest.raises(ValueError, match="net.pool 'max' is unknown"):
        models.build(NET | dict(name="classifier", pool="max"), shape=SHAPE, out_channels=10)
    with pytest.raises(ValueError, match="takes no conditions"):
        models.build(NET | dict(name="classifier"), shape=SHAPE, takes=("low_res",), out_channels=10)


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


def test_networks_are_flax_modules():
    assert isinstance(build(), nn.Module)
