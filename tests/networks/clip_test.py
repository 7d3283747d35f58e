"""CLIP's two encoders: laws, initial values, precision, refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import weights
from diffax.networks import clip, layers
from diffax.weights import clip as converter

SHAPE = (8, 8, 3)
TOWER = dict(width=12, layers=2, heads=3)
NET = dict(features=6, image=TOWER | dict(patch=4), text=TOWER | dict(width=15, vocab_size=20, length=7))


def build(shape=SHAPE, **options):
    """NET, with options of the encoders added to its own."""
    towers = {name: NET[name] | options.pop(name, {}) for name in ("image", "text")}
    return clip.build(NET | towers | options, shape)


def drawn(network, seed=0):
    """Parameters that are nowhere zero, as after training: kernels of unit gain, scales near 1."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        fan_in = np.prod(leaf.shape) / leaf.shape[-1] if len(leaf.shape) > 1 else 10.0
        return noise / np.float32(np.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(batch=2, seed=0, shape=SHAPE):
    return jax.random.uniform(jax.random.key(seed), (batch, *shape), minval=-1.0)


CAPTIONS = jnp.array([[3, 5, 7, 9, 11, 13, 15], [4, 6, 8, -1, -1, -1, -1]])


def torch_shapes(table):
    return {key: list(shape) for entry in table for key, shape in zip(entry.keys, entry.shapes, strict=True)}


def random_state_dict(table, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in torch_shapes(table).items()}


def vit(size, patch, features, image, text):
    (width, layers), (text_width, text_layers) = image, text
    return clip.build(
        dict(
            features=features,
            image=dict(width=width, layers=layers, heads=width // 64, patch=patch),
            text=dict(width=text_width, layers=text_layers, heads=text_width // 64),
        ),
        (size, size, 3),
    )


def test_each_encoder_has_its_own_activation_mlp_and_heads():
    text = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, vocab_size=20)
    image = text | dict(head_dim=6, hidden_act="gelu", intermediate_size=40, image_size=8, patch_size=4)
    text |= dict(max_position_embeddings=7)
    config = dict(text_config=text, vision_config=image, projection_dim=6)
    network = converter.transformers_config(config).build()
    assert (network.image.activation, network.text.activation) == ("gelu", "quick_gelu")
    shapes = torch_shapes(converter.table(network, "transformers"))
    block = "vision_model.encoder.layers.0."
    assert shapes[block + "self_attn.q_proj.weight"] == [12, 16]
    assert shapes[block + "self_attn.out_proj.weight"] == [16, 12]
    assert shapes[block + "mlp.fc1.weight"] == [40, 16]
    assert shapes["text_model.encoder.layers.0.mlp.fc1.weight"] == [24, 16]
    assert shapes["text_model.encoder.layers.0.self_attn.q_proj.weight"] == [16, 16]
    # attention of one layer by hand, with heads of six channels
    state = random_state_dict(converter.table(network, "transformers"))
    params = weights.to_flax(state, converter.table(network, "transformers"))
    x = np.random.default_rng(1).standard_normal((1, 5, 16)).astype(np.float32)
    attention = layers.SelfAttention(network.image.style, 2, 16, head_channels=6)
    got = attention.apply({"params": params["image"]["block_0"]["attention"]}, x)
    q, k, v = (
        (x @ state[f"{block}self_attn.{p}_proj.weight"].T + state[f"{block}self_attn.{p}_proj.bias"])
        .reshape(1, 5, 2, 6).transpose(0, 2, 1, 3)
        for p in "qkv"
    )  # fmt: skip
    mixed = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(6), -1) @ v
    out = mixed.transpose(0, 2, 1, 3).reshape(1, 5, 12) @ state[f"{block}self_attn.out_proj.weight"].T
    np.testing.assert_allclose(got, out + state[f"{block}self_attn.out_proj.bias"], rtol=1e-4, atol=1e-4)


@functools.cache
def noised():
    """(noised CLIP, its parameters, compiled `apply` of the image encoder, of the text encoder)."""
    network = build(image=dict(times=5))
    image = jax.jit(functools.partial(network.apply, method="encode_image"))
    text = jax.jit(functools.partial(network.apply, method="encode_text"))
    return network, {"params": drawn(network)}, image, text


def assert_normal(values, deviation):
    """Four standard errors of the deviation and, so that no uniform one passes, of the fourth moment (3 and 1.8)."""
    np.testing.assert_allclose(np.std(values), deviation, rtol=4 / np.sqrt(2 * values.size))
    np.testing.assert_allclose(np.mean(values**4) / np.mean(values**2) ** 2, 3, atol=4 * np.sqrt(24 / values.size))


def test_a_new_clip_has_the_papers_initial_values():
    network = vit(32, 4, 128, (256, 1), (128, 2))
    params = jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-6)
    for tower, name, deviation in (
        ("image", "position", 256**-0.5),
        ("image", "proj", 256**-0.5),
        ("image", "class", 256**-0.5),
        ("text", "proj", 128**-0.5),
        ("text", "token", 0.02),
        ("text", "position", 0.01),
    ):
        (values,) = jax.tree.leaves(params[tower][name])
        assert_normal(values, deviation)
    block = params["text"]["block_1"]
    assert_normal(block["attention"]["qkv_kernel"], 128**-0.5)
    assert_normal(block["attention"]["proj"]["kernel"], 128**-0.5 * 4**-0.5)
    assert_normal(block["mlp_0"]["kernel"], 256**-0.5)
    assert_normal(block["mlp_1"]["kernel"], 128**-0.5 * 4**-0.5)


def test_padding_is_hidden_and_the_last_token_is_read():
    _, params, _, encode = noised()
    embedding, sequence = encode(params, CAPTIONS)
    chex.assert_shape((embedding, sequence), ((2, 6), (2, 7, 15)))
    # the caption's own padding, or anything else behind its end, or the same caption in another batch
    other = encode(params, jnp.where(CAPTIONS < 0, 19, CAPTIONS))[1]
    np.testing.assert_allclose(other[1, :3], sequence[1, :3], atol=1e-6)
    assert np.abs(other[1, 3:] - sequence[1, 3:]).max() > 1e-2
    kernel = params["params"]["text"]["proj"]["kernel"]
    np.testing.assert_allclose(embedding, np.stack([sequence[0, 6], sequence[1, 2]]) @ kernel, atol=1e-5)
    # padding is token 0, and a caption of nothing else is read at its start
    zeros, padding = encode(params, CAPTIONS * 0), encode(params, CAPTIONS * 0 - 1)
    np.testing.assert_array_equal(zeros[1], padding[1])
    np.testing.assert_allclose(padding[0][0], padding[1][0, 0] @ kernel, atol=1e-5)
    assert np.isnan(encode(params, CAPTIONS.at[1, 0].set(20))[0][1]).all()


def test_the_text_encoder_looks_back_only():
    _, params, _, encode = noised()
    _, sequence = encode(params, CAPTIONS[:1])
    for i in range(1, 7):
        changed = encode(params, CAPTIONS[:1].at[0, i].set(17))[1]
        np.testing.assert_allclose(changed[0, :i], sequence[0, :i], atol=1e-6)
        assert np.abs(changed[0, i] - sequence[0, i]).max() > 1e-2


def test_a_noised_clip_reads_the_row_of_its_step():
    _, params, encode, _ = noised()
    x = jnp.broadcast_to(images(1), (5, *SHAPE))
    rows = encode(params, x, jnp.arange(5.0))
    assert min(np.abs(rows[i] - rows[j]).max() for i in range(5) for j in range(i)) > 1e-2
    np.testing.assert_array_equal(encode(params, x, jnp.array([0.2, 1.3, 1.6, 2.9, 4.4])), rows)
    outside = encode(params, x, jnp.array([-1.0, 5.0, 3.0, 999.0, 4.0]))
    np.testing.assert_array_equal(np.isnan(outside).all(1), [True, True, False, True, False])


def test_a_bias_of_the_keys_changes_nothing():
    """So the noised CLIP's layers, which have none, are those of any CLIP with zeros there."""
    network, params, encode, _ = noised()
    x, time = images(), jnp.array([1.0, 4.0])
    want = encode(params, x, time)
    for part, changes in (("q", True), ("k", False), ("v", True)):
        other = jax.tree.map(np.copy, params)
        other["params"]["image"]["block_0"]["attention"]["qkv_bias"]["qkv".index(part)] += 3.0
        assert bool(np.abs(encode(other, x, time) - want).max() > 1e-3) == changes, part


def test_images_are_normalised_as_bytes_are():
    """(x + 1) * 127.5, less the mean, over the deviation: the constants of GLIDE's code, of bytes."""
    mean, std = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)
    np.testing.assert_allclose(np.array(clip.MEAN) * 255, mean, rtol=1e-7)
    np.testing.assert_allclose(np.array(clip.STD) * 255, std, rtol=1e-7)


def test_bfloat16_keeps_parameters_and_embeddings_in_float32_and_is_close():
    network, params, image, text = noised()
    half = build(image=dict(times=5), dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0), *half.example())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    x, time = images(), jnp.array([0.0, 3.0])
    got = jax.jit(half.apply)(params, x, CAPTIONS, time)
    for ours, want in zip(got[:2], (image(params, x, time), text(params, CAPTIONS)[0]), strict=True):
        assert ours.dtype == jnp.float32
        assert 1e-5 < np.abs(ours - want).max() / np.abs(want).max() < 0.05  # it is bfloat16, and it is close


def test_remat_changes_neither_values_nor_gradients_nor_names():
    plain, remat = (build(text=dict(layers=1), remat=kind).text for kind in ("none", "blocks"))
    params = drawn(plain)

    def gradient(encoder):
        return jax.value_and_grad(lambda params: jnp.sum(encoder.apply({"params": params}, CAPTIONS)[0] ** 2))

    chex.assert_trees_all_close(
        jax.jit(gradient(remat))(params), jax.jit(gradient(plain))(params), rtol=1e-4, atol=1e-5
    )
    programs = [str(jax.make_jaxpr(gradient(encoder))(params)) for encoder in (plain, remat)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(spam=1), "net option 'spam' is unknown"),
        (dict(image=dict(spam=1)), "image option 'spam' is unknown"),
        (dict(text=dict(patch=4)), "text option 'patch' is unknown"),
        (dict(image=dict(shape=(1, 1, 1))), "image option 'shape' is unknown"),
        (dict(activation="relu"), "activation 'relu' is unknown"),
        (dict(dtype="float16"), "dtype 'float16' is unknown"),
        (dict(remat="all"), "remat 'all' is unknown"),
        (dict(image=dict(heads=5)), "image.heads 5 does not divide image.width 12"),
        (dict(text=dict(hidden=-8)), "text.hidden is -8"),
        (dict(text=dict(heads=0)), "text.heads is 0; it must be at least 1"),
        (dict(image=dict(patch=3)), "patch 3 does not divide images of .8, 8, 3."),
        (dict(image=dict(times=-1)), "times is -1"),
        (dict(image=dict(mean=[0.5])), "image.mean has 1 numbers; use 3"),
        (dict(image=dict(std=[0.5, 0, 1])), "all must be positive"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_inputs_that_are_refused():
    noisy, clean, key = build(image=dict(times=5)), build(), jax.random.key(0)
    with pytest.raises(ValueError, match="made for noisy images; pass their time"):
        jax.eval_shape(noisy.init, key, images(), CAPTIONS)
    with pytest.raises(ValueError, match="reads no time"):
        jax.eval_shape(clean.init, key, images(), CAPTIONS, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"images are \(4, 4, 3\), not \(8, 8, 3\)"):
        jax.eval_shape(clean.init, key, images(shape=(4, 4, 3)), CAPTIONS)
    with pytest.raises(ValueError, match=r"not \(B, 7\)"):
        jax.eval_shape(clean.init, key, images(), CAPTIONS[:, :5])
