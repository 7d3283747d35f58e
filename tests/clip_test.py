"""CLIP: the published networks' sizes, laws of both encoders, the loss over devices, guidance, refusals."""

import functools
import json
import math
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import weights
from diffax.diffusion import guidance, losses, process, schedules
from diffax.models import stages
from diffax.networks import clip, layers
from diffax.training import loop, parallel
from diffax.weights import clip as converter

SHAPE = (8, 8, 3)
TOWER = dict(width=12, layers=2, heads=3)
NET = dict(features=6, image=TOWER | dict(patch=4), text=TOWER | dict(width=15, vocab_size=20, length=7))


def build(shape=SHAPE, **options):
    """NET, with options of the encoders added to its own."""
    towers = {name: NET[name] | options.pop(name, {}) for name in ("image", "text")}
    return clip.build(NET | towers | options, shape)


def from_architecture(architecture, **image):
    net = dict(architecture.net)
    assert net.pop("name") == "clip"
    return clip.build(net | {"image": net["image"] | image}, architecture.shape)


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


# ---- published weights ----------------------------------------------------------------------------------------------


MANIFEST = pathlib.Path(__file__).parent / "golden" / "manifest_full_size.json"


@pytest.fixture(scope="module")
def manifest():
    return json.loads(MANIFEST.read_text())["models"]


def assert_is_published(table, entry):
    assert torch_shapes(table) == entry["state_dict"]
    assert sum(math.prod(shape) for shape in torch_shapes(table).values()) == entry["num_parameters"]


def test_keys_shapes_and_count_of_the_published_noised_clip(manifest):
    image, text = manifest["glide/clip-image-enc"], manifest["glide/clip-text-enc"]
    network = from_architecture(converter.glide_config(image["args"]))
    assert_is_published(converter.table(network.image, "glide"), image)
    assert_is_published(converter.table(network.text, "glide"), text)
    assert (image["num_parameters"], text["num_parameters"]) == (86_443_776, 71_679_488)


def test_keys_shapes_and_count_of_the_published_clip(manifest):
    entry = manifest["openai/clip-vit-large-patch14"]
    network = from_architecture(converter.transformers_config(entry["constructor"]))
    assert_is_published(converter.table(network, "transformers"), entry)
    assert entry["num_parameters"] == 427_616_513


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


@pytest.mark.parametrize(
    "size, patch, features, image, text, count",
    [
        (224, 32, 512, (768, 12), (512, 12), 151_277_313),
        (224, 16, 512, (768, 12), (512, 12), 149_620_737),
        (336, 14, 768, (1024, 24), (768, 12), 427_944_193),
        (256, 16, 1024, (1280, 32), (1024, 24), 986_339_841),
    ],
    ids=["B/32", "B/16", "L/14@336", "H/16"],
)
def test_count_of_other_sizes(size, patch, features, image, text, count):
    network = vit(size, patch, features, image, text)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def small_tables():
    noised = build(image=dict(times=5), activation="gelu")
    return {
        "openai": converter.table(build(), "openai"),
        "transformers": converter.table(build(), "transformers"),
        "vision alone": converter.table(build().image, "transformers"),
        "text alone": converter.table(build().text, "transformers"),
        "glide image": converter.table(noised.image, "glide"),
        "glide clean image": converter.table(build().image, "glide"),
        "glide text": converter.table(noised.text, "glide"),
    }


def test_round_trips_are_exact():
    for kind, table in small_tables().items():
        state_dict = random_state_dict(table)
        back = weights.to_torch(weights.to_flax(state_dict, table), table)
        assert set(back) == set(state_dict)
        for key, value in state_dict.items():
            np.testing.assert_array_equal(back[key], value, err_msg=f"{kind}: {key}")


def test_openai_and_transformers_hold_the_same_network():
    """By the names of openai/CLIP: q, k, v stacked, and projections that are applied from the right."""
    network, theirs = build(), {}
    table = converter.table(network, "transformers")
    hf = random_state_dict(table)
    tops = {
        "visual.class_embedding": hf["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": hf["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": hf["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": hf["visual_projection.weight"].T,
        "token_embedding.weight": hf["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": hf["text_model.embeddings.position_embedding.weight"],
        "text_projection": hf["text_projection.weight"].T,
        "logit_scale": hf["logit_scale"],
    }
    for end in ("weight", "bias"):
        theirs[f"visual.ln_pre.{end}"] = hf[f"vision_model.pre_layrnorm.{end}"]
        theirs[f"visual.ln_post.{end}"] = hf[f"vision_model.post_layernorm.{end}"]
        theirs[f"ln_final.{end}"] = hf[f"text_model.final_layer_norm.{end}"]
        for here, there in (("visual.", "vision_model."), ("", "text_model.")):
            for i in range(2):
                new, old = f"{here}transformer.resblocks.{i}.", f"{there}encoder.layers.{i}."
                stacked = [hf[f"{old}self_attn.{x}_proj.{end}"] for x in "qkv"]
                theirs[f"{new}attn.in_proj_{end}"] = np.concatenate(stacked)
                theirs[f"{new}attn.out_proj.{end}"] = hf[f"{old}self_attn.out_proj.{end}"]
                for ours, name in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                                   ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                    theirs[f"{new}{ours}.{end}"] = hf[f"{old}{name}.{end}"]
    got = weights.to_flax(tops | theirs, converter.table(network, "openai"))
    chex.assert_trees_all_equal(got, weights.to_flax(hf, table))


def test_options_of_a_state_dict():
    network = vit(32, 16, 24, (128, 3), (64, 2))
    state_dict = random_state_dict(converter.table(network, "openai"))
    assert from_architecture(converter.openai_config(state_dict)) == network


def test_buffers_are_dropped():
    weights = {"visual.proj": 1, "text_model.embeddings.position_embedding.weight": 2}
    buffers = ("input_resolution", "context_length", "vocab_size", "vision_model.embeddings.position_ids")
    assert converter.without_buffers(weights | dict.fromkeys(buffers, 0)) == weights


CONFIG = dict(text_config=dict(hidden_size=512), vision_config=dict(hidden_size=768), projection_dim=512)


@pytest.mark.parametrize(
    "action, match",
    [
        (lambda: converter.table(build(), "spam"), "names 'spam' are unknown; use one of 'openai'"),
        (lambda: converter.table(build(), "glide"), "one file each"),
        (lambda: converter.table(build(image=dict(times=3)), "openai"), "set times to 0 or use 'glide'"),
        (lambda: converter.table(build(image=dict(times=3)).image, "transformers"), "set times to 0 or use 'glide'"),
        (lambda: converter.openai_config({"visual.layer1.0.conv1.weight": 1}), "ResNets are not supported"),
        (lambda: converter.glide_config({"image_size": 64}), "needs n_embd"),
        (lambda: converter.transformers_config(CONFIG | dict(vision_config=dict(layer_norm_eps=1e-6))), "eps=1e-06"),
        (lambda: converter.transformers_config(CONFIG | dict(vision_config=dict(hidden_act="relu"))), "act='relu'"),
        (lambda: converter.transformers_config(CONFIG | dict(vision_config=dict(num_channels=4))), "channels=4"),
    ],
)
def test_conversions_that_are_refused(action, match):
    with pytest.raises(ValueError, match=match) as error:
        action()
    assert "\n" not in str(error.value)


# ---- laws of the network --------------------------------------------------------------------------------------------


def test_each_encoder_has_its_own_activation_mlp_and_heads():
    text = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, vocab_size=20)
    image = text | dict(head_dim=6, hidden_act="gelu", intermediate_size=40, image_size=8, patch_size=4)
    text |= dict(max_position_embeddings=7)
    config = dict(text_config=text, vision_config=image, projection_dim=6)
    network = from_architecture(converter.transformers_config(config))
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
        (dict(image=dict(spam=1)), "net.image option 'spam' is unknown"),
        (dict(text=dict(patch=4)), "net.text option 'patch' is unknown"),
        (dict(image=dict(shape=(1, 1, 1))), "net.image option 'shape' is unknown"),
        (dict(activation="relu"), "net.activation 'relu' is unknown"),
        (dict(dtype="float16"), "net.dtype 'float16' is unknown"),
        (dict(remat="all"), "net.remat 'all' is unknown"),
        (dict(image=dict(heads=5)), "net.image.heads 5 does not divide net.image.width 12"),
        (dict(text=dict(hidden=-8)), "net.text.hidden is -8"),
        (dict(text=dict(heads=0)), "net.text.heads is 0; it must be at least 1"),
        (dict(image=dict(patch=3)), "patch 3 does not divide images of .8, 8, 3."),
        (dict(image=dict(times=-1)), "times is -1"),
        (dict(image=dict(mean=[0.5])), "net.image.mean has 1 numbers; use 3"),
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


# ---- the loss -------------------------------------------------------------------------------------------------------


def numpy_contrastive(image, text, logit_scale):
    """Both cross entropies with the diagonal of the whole table of pairs, in float64."""
    u, v = (np.float64(a) / np.linalg.norm(np.float64(a), axis=1, keepdims=True) for a in (image, text))
    logits = np.exp(np.float64(logit_scale)) * u @ v.T

    def cross_entropy(logits):
        return np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - np.diag(logits)

    accuracy = [np.argmax(table, 1) == np.arange(len(u)) for table in (logits, logits.T)]
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2, *accuracy


def pairs(n, seed=0):
    """Embeddings of captions that are near those of their images, of any length."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((n, 5)) * rng.uniform(0.1, 10, (n, 1))
    return np.float32(image), np.float32(image + 0.7 * rng.standard_normal((n, 5)))


class ContrastiveTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_it_is_the_papers_loss(self):
        for logit_scale in (0.0, 2.65926, math.log(100)):
            image, text = pairs(16)
            want, image_top1, text_top1 = numpy_contrastive(image, text, logit_scale)
            loss, terms = self.variant(losses.contrastive)(image, text, jnp.float32(logit_scale), jnp.arange(16) + 32)
            np.testing.assert_allclose(loss, want, rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(terms["image_top1"], image_top1)
            np.testing.assert_array_equal(terms["text_top1"], text_top1)
            assert 0 < image_top1.mean() < 1 and 0 < text_top1.mean() < 1 and any(image_top1 != text_top1)


def test_pairs_that_cannot_be_told_apart_are_chance():
    loss, terms = losses.contrastive(jnp.ones((8, 5)), jnp.ones((8, 5)), jnp.float32(4.0), jnp.arange(8))
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
    assert float(jnp.sum(terms["image_top1"])) == float(jnp.sum(terms["text_top1"])) == 1


def test_bfloat16_embeddings_are_compared_in_float32():
    image, text = (jnp.asarray(a, jnp.bfloat16) for a in pairs(8))
    loss, _ = losses.contrastive(image, text, jnp.float32(4.6), jnp.arange(8))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, numpy_contrastive(image, text, 4.6)[0], rtol=1e-4, atol=1e-4)


def encoders():
    """Two linear encoders, the scale, and a batch of 16 pairs."""
    rng = np.random.default_rng(2)
    params = {name: np.float32(rng.standard_normal((6, 4))) for name in ("image", "text")}
    batch = {name: np.float32(rng.standard_normal((16, 6))) for name in ("image", "text")}
    return params | {"logit_scale": np.float32(2.0)}, batch


def step(params, batch, position, *, axis_name=None):
    """Loss, accuracies and gradients, averaged over devices after they were taken on each, as `train_step` does."""

    def gather(a):
        return jax.lax.all_gather(a, axis_name, tiled=True) if axis_name else a

    def mean_loss(params):
        image, text = (batch[name] @ params[name] for name in ("image", "text"))
        loss, terms = losses.contrastive(image, text, params["logit_scale"], position, gather=gather)
        return jnp.mean(loss), jax.tree.map(jnp.mean, terms)

    out = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return jax.lax.pmean(out, axis_name) if axis_name else out


@functools.cache
def whole_batch():
    """The same of one device, and its gradient by the loss's definition in float64."""
    params, batch = encoders()
    out = jax.jit(step)(params, batch, jnp.arange(16))

    def total(change):
        p = {name: np.float64(value) + change.get(name, 0) for name, value in params.items()}
        return numpy_contrastive(*(batch[name] @ p[name] for name in ("image", "text")), p["logit_scale"])[0].mean()

    for name in params:
        place = (1, 2)[: np.ndim(params[name])]
        change = np.zeros_like(params[name], np.float64)
        change[place] = 1e-5
        slope = (total({name: change}) - total({name: -change})) / 2e-5
        np.testing.assert_allclose(np.asarray(out[1][name])[place], slope, rtol=1e-4, atol=1e-6)
    return params, batch, out


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_gradients_do_not_depend_on_the_number_of_devices(devices):
    """By pmap over as many devices as there are, and by vmap, whose collectives are the same, over any number."""
    params, batch, want = whole_batch()
    mine = functools.partial(step, axis_name="data")
    maps = {"vmap": jax.jit(jax.vmap(mine, in_axes=(None, 0, 0), axis_name="data"))}
    if devices <= jax.device_count():
        maps["pmap"] = jax.pmap(mine, in_axes=(None, 0, 0), axis_name="data", devices=jax.devices()[:devices])
    assert devices > 4 or "pmap" in maps
    split = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), (batch, np.arange(16)))
    for mapped in maps.values():
        out = mapped(params, *split)
        for device in range(devices):
            chex.assert_trees_all_close(jax.tree.map(lambda a, i=device: a[i], out), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["jit", "fsdp"])
def test_gradients_are_the_same_in_one_program_of_all_devices(mode):
    """By `loop.mean_gradient` on each device: cut parameters are gathered, their gradients summed and divided."""
    params, batch, (_, want) = whole_batch()

    def loss(params, extra, batch, keys, position, total, gather):
        params = nn.meta.unbox(params)
        image, text = (batch[name] @ params[name] for name in ("image", "text"))
        value, _ = losses.contrastive(image, text, params["logit_scale"], position, gather=gather)
        return value, {}, ()

    objective = stages.Objective(lambda key: params, lambda: (), loss, lambda extra, feedback: extra)
    where = parallel.layout(mode)
    assert where.mesh.size == jax.device_count() > 1
    gradient = functools.partial(loop.mean_gradient, objective=objective, accumulate=1, sam=0.0)
    got, _ = jax.jit(parallel.on_each_device(where, gradient))(params, batch, (), jax.random.key(0))
    cut = [name for name, a in got.items() if not a.sharding.is_fully_replicated]
    assert cut == (["image", "text"] if mode == "fsdp" else [])
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_pair_is_found_by_its_place_whatever_the_order():
    params, batch, want = whole_batch()
    order = np.random.default_rng(3).permutation(16)
    shuffled = jax.tree.map(lambda a: a[order].reshape(4, 4, -1), batch)
    position = (100 + 7 * np.arange(16))[order].reshape(4, 4)
    mine = functools.partial(step, axis_name="data")
    out = jax.jit(jax.vmap(mine, in_axes=(None, 0, 0), axis_name="data"))(params, shuffled, position)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], out), want, rtol=1e-6, atol=1e-6)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_unit_vectors_and_their_slope():
    a = jnp.array([[3.0, -4.0], [1e-9, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(guidance.unit(a), [[0.6, -0.8], [1.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    slope = jax.grad(lambda a: jnp.sum(guidance.unit(a)[:, 0]))(a)
    np.testing.assert_allclose(slope[0], [0.2 - 0.072, 0.096], rtol=1e-5)  # (1 - u u^T) / |a|
    assert np.isfinite(slope).all()


def test_similarity_is_the_logit_of_a_pair():
    image, text = pairs(6)
    u, v = (np.float64(a) / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))
    got = guidance.clip_similarity(image, text, math.log(100))
    np.testing.assert_allclose(got, 100 * np.sum(u * v, 1), rtol=1e-5)
    np.testing.assert_allclose(guidance.clip_similarity(5 * image, text / 9, math.log(100)), got, rtol=1e-5)


def test_clip_guidance_adds_to_a_score_and_scale_0_adds_nothing():
    caption = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12)), jnp.float32)
    z = images(shape=(2, 2, 3))
    level = schedules.NoiseLevel(time=jnp.array([10.0, 20.0]), logsnr=jnp.zeros(2))
    step = schedules.Transition(level, level, jnp.zeros(2), jnp.zeros(2))

    def similarity(z, t):
        return guidance.clip_similarity(z.reshape(2, -1) * t.time[:, None], caption, math.log(3))

    def denoise(z, step):
        return process.predict(z, z, step, predicts="eps", variance="fixed_small")._replace(score=jnp.ones_like(z))

    guided = guidance.clip_guided(similarity, jnp.array([0.0, 2.0]))(denoise)
    score = jax.jit(guided)(z, step).score - 1
    np.testing.assert_array_equal(score[0], 0)
    x, y = np.float64(z[1]).ravel(), np.float64(caption[1])
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    want = 2 * 3 * (y / np.linalg.norm(y) - cosine * x / np.linalg.norm(x)) / np.linalg.norm(x)
    np.testing.assert_allclose(score[1].ravel(), want, rtol=1e-4, atol=1e-6)
