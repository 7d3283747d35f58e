"""What conditions do to a network: vectors, sequences and planes reach it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from diffax.conditions.inpaint import Inpaint
from diffax.conditions.label import Label
from diffax.conditions.low_res import LowRes, LowResEncoder
from diffax.conditions.text import Text
from diffax.conditions.tokenizers import LazyTokenizer
from tests.networks.common import SHAPE, TIME, build, example_inputs, images, trained


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
