"""The names of CLIP's parameters in openai/CLIP, transformers and GLIDE: published models, round trips, refusals."""

import json
import math
import pathlib

import chex
import jax
import numpy as np
import pytest

from diffax import weights
from diffax.networks import clip
from diffax.weights import clip as converter

SHAPE = (8, 8, 3)
TOWER = dict(width=12, layers=2, heads=3)
NET = dict(features=6, image=TOWER | dict(patch=4), text=TOWER | dict(width=15, vocab_size=20, length=7))


def build(shape=SHAPE, **options):
    """NET, with options of the encoders added to its own."""
    towers = {name: NET[name] | options.pop(name, {}) for name in ("image", "text")}
    return clip.build(NET | towers | options, shape)


def torch_shapes(table):
    return {key: list(shape) for entry in table for key, shape in zip(entry.keys, entry.shapes, strict=True)}


def random_state_dict(table, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in torch_shapes(table).items()}


# ---- published weights ----------------------------------------------------------------------------------------------


MANIFEST = pathlib.Path(__file__).parent.parent / "golden" / "manifest_full_size.json"


@pytest.fixture(scope="module")
def manifest():
    return json.loads(MANIFEST.read_text())["models"]


def assert_is_published(table, entry):
    assert torch_shapes(table) == entry["state_dict"]
    assert sum(math.prod(shape) for shape in torch_shapes(table).values()) == entry["num_parameters"]


def test_keys_shapes_and_count_of_the_published_noised_clip(manifest):
    image, text = manifest["glide/clip-image-enc"], manifest["glide/clip-text-enc"]
    network = converter.glide_config(image["args"]).build()
    assert_is_published(converter.table(network.image, "glide"), image)
    assert_is_published(converter.table(network.text, "glide"), text)
    assert (image["num_parameters"], text["num_parameters"]) == (86_443_776, 71_679_488)


def test_keys_shapes_and_count_of_the_published_clip(manifest):
    entry = manifest["openai/clip-vit-large-patch14"]
    network = converter.transformers_config(entry["constructor"]).build()
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
    assert converter.openai_config(state_dict).build() == network


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
