"""Laws of the networks: shapes, sizes, precision, independence of the images, bad options."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu

from diffax import components
from diffax.conditions.inpaint import Inpaint
from diffax.conditions.label import Label
from diffax.conditions.low_res import LowRes, LowResEncoder
from diffax.conditions.text import Text
from diffax.conditions.tokenizers import LazyTokenizer
from diffax.errors import UserError
from diffax.networks import kernels, layers
from diffax.networks.conditioned import Conditioned
from diffax.networks.layers import Style, sinusoid

SHAPE = (8, 8, 3)
NET = dict(name="unet", channels=16, groups=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
VARIANTS = {
    "ddpm": dict(downsample_pad="end", sinusoid="ho", norm_eps=1e-6, kernel_init="ho"),
    "improved": dict(heads=4, scale_shift=True),
    "adm": dict(head_channels=8, scale_shift=True, resample="biggan"),
    "pool": dict(resample="pool", heads=2, heads_up=4, mid_attention=False, attention_up=(1,)),
}


def build(*conditions, **net):
    """A network with conditions, built as a config builds it."""
    network = components.build(NET | net, "network", path="config.base.net", out_channels=3, **{"name": "net"})
    network.check(SHAPE)
    return Conditioned(network, tuple((c.name, c.encoder(network)) for c in conditions))


EXAMPLES = {
    "label": jnp.zeros(1, jnp.int32),
    "text": jnp.full((1, 6), -1),
    "inpaint": jnp.zeros((1, 8, 8, 4)),
    "low_res": {"image": jnp.zeros((1, 4, 4, 3))},
}


def example_inputs(network):
    return jnp.zeros((1, *SHAPE)), jnp.zeros(1), {name: EXAMPLES[name] for name, _ in network.encoders}


def initial(network):
    return jax.jit(network.init)(jax.random.key(0), *example_inputs(network))


def trained(network, seed=0):
    """Parameters that are nowhere zero, as after training: kernels of unit gain, scales near 1."""
    return drawn(network, *example_inputs(network), seed=seed)


def drawn(module, *inputs, seed=0):
    """`trained`, of any module."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
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


TIME = jnp.array([3.0, 500.5])


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


class Conditions:
    """A network with a label and a low-resolution image."""

    network = build(Label(name="label", num_classes=4), LowRes(name="low_res", factor=2, shape=SHAPE))

    @functools.cached_property
    def params(self):
        return trained(self.network)

    @functools.cached_property
    def apply(self):
        return jax.jit(self.network.apply)

    def __call__(self, cond):
        return self.apply(self.params, images(), TIME, cond)


conditions = Conditions()
LOW_RES = {"image": jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)}


def test_conditions_reach_the_output():
    want = conditions({"label": jnp.array([1, 2]), "low_res": LOW_RES})
    other_label = conditions({"label": jnp.array([1, 3]), "low_res": LOW_RES})
    np.testing.assert_array_equal(other_label[0], want[0])
    assert not np.allclose(other_label[1], want[1], atol=1e-4)
    other_image = conditions({"label": jnp.array([1, 2]), "low_res": {"image": LOW_RES["image"].at[1].add(0.5)}})
    np.testing.assert_array_equal(other_image[0], want[0])
    assert not np.allclose(other_image[1], want[1], atol=1e-4)


def test_parameters_bear_the_names_of_the_conditions():
    assert set(conditions.params["params"]) == {"net", "label"}  # low_res has none
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
    for droppable, rows in ((False, 4), (True, 5)):
        label = Label(name="label", num_classes=4, droppable=droppable)
        shapes = jax.eval_shape(build(label).init, jax.random.key(0), *example_inputs(build(label)))
        assert shapes["params"]["label"]["embed"]["embedding"].shape == (rows, 64)
        assert label.null({}) == 4


def test_low_res_is_resized_with_half_pixel_centres():
    low = np.array([0.0, 1.0, 4.0, 9.0])
    small = {"image": jnp.array(low).reshape(1, 1, 4, 1)}
    planes = LowResEncoder().apply({}, small, jnp.zeros((1, 1, 8, 3))).planes
    centres = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(planes[0, 0, :, 0], np.interp(centres, np.arange(4), low), rtol=1e-6)


TOKENS = jnp.array([[3, 1, 4, 1, 10, -1], [9, 2, 6, -1, -1, -1]])
INPAINT = jnp.concatenate([images(seed=5), jnp.ones((2, 8, 8, 1)).at[:, :, 4:].set(0)], -1)


class SixIds(LazyTokenizer):
    """A tokenizer of eleven ids."""

    vocab_size = 11


def text_network(takes=("text",), *, text=None, **net):
    options = {"width": 24, "layers": 2, "heads": 3} | (text or {})
    found = {
        "text": Text(name="text", tokenizer=SixIds("demo", "", 6), **options),
        "inpaint": Inpaint(name="inpaint", shape=SHAPE),
        "low_res": LowRes(name="low_res", factor=2, shape=SHAPE),
        "label": Label(name="label", num_classes=4),
    }
    return build(*(found[name] for name in takes), **net)


def encode(network, params, cond):
    return network.apply(params, cond, images(), method="encode")


@functools.cache
def text_case(**text):
    """(network, parameters, apply) with a text transformer, and attention on the way and in the middle."""
    network = text_network(text=text)
    return network, trained(network), jax.jit(network.apply)


def test_text_makes_a_vector_and_a_sequence():
    network, params, _ = text_case()
    (context,) = encode(network, params, {"text": TOKENS}).values()
    chex.assert_shape([context.vector, context.sequence], [(2, 64), (2, 6, 24)])
    last = params["params"]["text"]["proj"]
    np.testing.assert_allclose(
        context.vector, context.sequence[:, -1] @ last["kernel"] + last["bias"], rtol=1e-4, atol=1e-5
    )
    norm = params["params"]["text"]["norm_out"]
    normal = (context.sequence - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose([normal.mean(-1), normal.std(-1)], [np.zeros((2, 6)), np.ones((2, 6))], atol=1e-3)


def test_every_attention_layer_reads_the_text():
    _, params, apply = text_case()
    flat = {"/".join(p[:-2]) for p in traverse_util.flatten_dict(params["params"]["net"]) if "kv" in p[-1]}
    assert flat == {"down_1_attention_0", "mid_attention", "up_1_attention_0", "up_1_attention_1"}
    want = apply(params, images(), TIME, {"text": TOKENS})
    other = apply(params, images(), TIME, {"text": TOKENS.at[1, 0].set(8)})
    np.testing.assert_allclose(other[0], want[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(other[1], want[1], atol=1e-3)


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


def test_padding_is_an_embedding_of_its_position_alone():
    network, params, _ = text_case()
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 3 if path[-1].key == "position" or "token" in str(path) else leaf, params
    )
    empty = {"text": jnp.full((1, 6), -1)}
    chex.assert_trees_all_equal(encode(network, params, empty), encode(network, changed, empty))
    want, got = (encode(network, p, {"text": TOKENS})["text"].sequence for p in (params, changed))
    assert not np.allclose(want, got, atol=1e-2)


def test_padding_without_an_embedding_of_its_own_is_the_last_token():
    network, params, _ = text_case(padding_embedding=False)
    assert "padding" not in params["params"]["text"]
    want = encode(network, params, {"text": jnp.where(TOKENS < 0, 10, TOKENS)})
    chex.assert_trees_all_equal(encode(network, params, {"text": TOKENS}), want)


def test_padding_has_its_own_gradient_and_gives_tokens_none():
    network, params, _ = text_case()

    def loss(params):
        return jnp.sum(encode(network, params, {"text": TOKENS})["text"].vector ** 2)

    grads = jax.jit(jax.grad(loss))(params)["params"]["text"]
    used = np.isin(np.arange(11), TOKENS)
    np.testing.assert_array_equal(np.abs(grads["token"]["embedding"]).max(-1) > 0, used)
    np.testing.assert_array_equal(np.abs(grads["padding"]).max(-1) > 0, (np.asarray(TOKENS) < 0).any(0))


def test_the_final_norm_can_be_left_out():
    network, params, _ = text_case(final_norm=False)
    assert "norm_out" not in params["params"]["text"]
    assert encode(network, params, {"text": TOKENS})["text"].sequence.shape == (2, 6, 24)


@pytest.mark.parametrize("takes", [("text",), ("text", "inpaint", "low_res", "label")])
def test_conditions_encoded_once_serve_at_every_level(takes):
    network = text_network(takes)
    params, apply = trained(network), jax.jit(network.apply)
    cond = {"text": TOKENS, "inpaint": INPAINT, "low_res": LOW_RES, "label": jnp.array([1, 2])}
    cond = {name: cond[name] for name in takes}
    encoded, text = encode(network, params, cond), encode(network, params, {"text": TOKENS})
    assert set(encoded) == set(takes) and set(text) == {"text"}
    for time in (TIME, TIME + 200):
        want = apply(params, images(), time, cond)
        np.testing.assert_allclose(apply(params, images(), time, encoded), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(apply(params, images(), time, cond | text), want, rtol=1e-4, atol=1e-5)
    assert encode(network, params, encoded) == encoded  # what is encoded stays as it is


def test_dropped_text_does_not_reach_the_output():
    _, params, apply = text_case()
    dropped = jnp.where(jnp.array([[False], [True]]), -1, TOKENS)
    want, got = (apply(params, images(), TIME, {"text": text}) for text in (TOKENS, dropped))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
    same = apply(params, images(), TIME, {"text": jnp.full((2, 6), -1)})
    np.testing.assert_allclose(got[1], same[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], want[1], atol=1e-3)


@pytest.mark.parametrize(
    "cond, match",
    [
        ({}, "condition 'text' is missing; this network has .'text'"),
        ({"text": TOKENS, "label": jnp.zeros(2, int)}, "condition 'label' is unknown; this network has .'text'"),
        ({"text": TOKENS[:, :4]}, r"'text' is \(2, 4\), not \(B, 6\); cut captions or pad them with -1"),
    ],
)
def test_bad_text_conditions(cond, match):
    network, params, apply = text_case()
    with pytest.raises(ValueError, match=match):
        apply(params, images(), TIME, cond)
    if cond:
        with pytest.raises(ValueError, match=match):
            encode(network, params, cond)


def test_a_token_out_of_range_is_loud():
    _, params, apply = text_case()
    got = apply(params, images(), TIME, {"text": TOKENS.at[1, 0].set(11)})
    assert np.isnan(got[1]).all() and np.isfinite(got[0]).all()


def test_inpaint_hides_unknown_pixels_and_comes_first():
    network = text_network(("text", "inpaint", "low_res"))
    params, apply = trained(network), jax.jit(network.apply)
    planes = encode(network, params, {"inpaint": INPAINT})["inpaint"].planes
    np.testing.assert_array_equal(planes[..., 3], INPAINT[..., 3])
    np.testing.assert_array_equal(planes[:, :, :4, :3], INPAINT[:, :, :4, :3])
    np.testing.assert_array_equal(planes[:, :, 4:, :3], 0)

    # of the first convolution, the channels 3 to 7 see the known picture and its mask, 7 to 10 the small picture
    unet = params["params"]["net"]
    cond = {"text": TOKENS, "inpaint": INPAINT, "low_res": LOW_RES}
    want = apply(params, images(), TIME, cond)
    for zeroed, name in ((slice(3, 7), "inpaint"), (slice(7, 10), "low_res")):
        kernel = jnp.asarray(unet["conv_in"]["kernel"]).at[:, :, zeroed].set(0)
        first = unet["conv_in"] | {"kernel": kernel}
        blind = {"params": params["params"] | {"net": unet | {"conv_in": first}}}
        got = apply(blind, images(), TIME, cond | {name: jax.tree.map(jnp.zeros_like, cond[name])})
        np.testing.assert_allclose(apply(blind, images(), TIME, cond), got, rtol=1e-4, atol=1e-5)
        assert not np.allclose(got, want, atol=1e-3)


def test_inpaint_of_another_shape():
    network = text_network(("inpaint",))
    for bad in (INPAINT[..., :3], INPAINT[:, :4]):
        with pytest.raises(ValueError, match=r"'inpaint' is .*, not \(2, 8, 8, 4\); give the picture, then its mask"):
            encode(network, {}, {"inpaint": bad})


def test_text_in_bfloat16():
    network, params, apply = text_case()
    half = text_network(dtype="bfloat16", remat="blocks")
    chex.assert_trees_all_equal_shapes_and_dtypes(trained(half), params)
    context = jax.eval_shape(functools.partial(encode, half), params, {"text": TOKENS})["text"]
    assert (context.vector.dtype, context.sequence.dtype) == (jnp.float32, jnp.bfloat16)
    want, got = (f(params, images(), TIME, {"text": TOKENS}) for f in (apply, jax.jit(half.apply)))
    assert got.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 0.05


def test_bad_text_options():
    with pytest.raises(ValueError, match="heads must divide width, 24, got 5"):
        text_network(text={"heads": 5})


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


def test_sinusoid_of_improved_ddpm():
    want = [0.54030, 0.99500, 0.99995, 1.0, 0.84147, 0.09983, 0.0099998, 0.001]
    np.testing.assert_allclose(sinusoid(jnp.ones(1), 8)[0], want, atol=1e-5)


def test_sinusoid_of_ddpm():
    time = np.array([1.0, 7.0, 250.25])
    phase = time[:, None] * np.exp(-np.log(10_000) * np.arange(4) / 3)
    want = np.concatenate([np.sin(phase), np.cos(phase), np.zeros((3, 1))], -1)
    np.testing.assert_allclose(sinusoid(jnp.array(time), 9, "ho"), want, atol=1e-4)


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


def test_flash_attention_on_a_cpu_is_that_of_attend():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 32))
    nets = [layers.AttentionBlock(Style(groups=8, flash=flash), heads=2) for flash in (False, True)]
    params = jax.tree.map(lambda a: a + 0.1, nets[0].init(jax.random.key(1), x))
    chex.assert_trees_all_equal(*(net.apply(params, x) for net in nets))


def test_a_sum_over_pixels_against_float64():
    for shape in ((2, 32, 32, 5), (2, 6, 7, 5), (2, 5)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        want = x.astype(np.float64).reshape(2, -1, 5).sum(1)
        np.testing.assert_allclose(kernels.over_pixels(x).reshape(2, 5), want, atol=1e-5)
        assert kernels.over_pixels(x).ndim == len(shape)


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


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier(pool):
    net = NET | dict(name="classifier", pool=pool, head_channels=8, groups=8)
    network = components.build(net, "network", num_classes=10)
    apply, params = jax.jit(network.apply), drawn(network, jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    logits = apply(params, images(), TIME)
    chex.assert_shape(logits, (2, 10))
    got = apply(params, jnp.stack([images()[0], images(seed=1)[1]]), TIME)
    np.testing.assert_allclose(got[0], logits[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], logits[1], atol=1e-3)


def test_classifier_options():
    with pytest.raises(UserError, match="network.pool must be one of .* got 'max'"):
        components.build(NET | {"name": "classifier", "pool": "max"}, "network", num_classes=10)


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


def test_a_causal_block_sees_what_came_before():
    block = layers.TransformerBlock(layers.Style(), heads=2, activation="quick_gelu")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = block.init(jax.random.key(1), x, layers.causal(5))
    before = block.apply(params, x, layers.causal(5))
    after = block.apply(params, x.at[:, 3, 0].add(1.0), layers.causal(5))
    chex.assert_trees_all_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:] > 1e-4).any(-1).all()


def test_a_hidden_key_is_as_good_as_none():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 6, 4))
    seen = jnp.arange(6) < 4
    got = kernels.attend(q, k, v, seen[None, None])
    chex.assert_trees_all_close(got, kernels.attend(q, k[:, :, :4], v[:, :, :4]), atol=1e-6)
