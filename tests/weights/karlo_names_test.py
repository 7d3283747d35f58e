"""The names of karlo's parameters, and of diffusers' copy of it: published models, round trips, refusals."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import weights
from diffax.components import each
from diffax.conditions.base import zeros
from diffax.models import codes
from diffax.weights import karlo

MANIFEST = pathlib.Path(__file__).parent.parent / "golden" / "manifest_full_size.json"
PUBLISHED = {
    name: entry
    for name, entry in (json.loads(MANIFEST.read_text())["models"] if MANIFEST.exists() else {}).items()
    if "karlo" in name
}


def published_table(entry):
    if entry["class"] == "PriorTransformer":
        architecture = karlo.diffusers_net_config(entry["constructor"])
        return karlo.diffusers_table(architecture.model())
    if karlo.MODELS[entry["class"]] == "upsampler":
        architecture = karlo.net_config(entry["args"]["model"]["hparams"], model=entry["class"], image_size=256)
        return karlo.upsampler_table(architecture.model())
    architecture = karlo.net_config(entry["constructor"], model=entry["class"])
    return karlo.table(architecture.model(), prefix="model.")


@pytest.mark.skipif(not PUBLISHED, reason="no manifest_full_size.json in the golden folder")
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_count_of_a_published_model(name):
    entry = PUBLISHED[name]
    table = published_table(entry)
    shapes = {key: list(shape) for row in table for key, shape in zip(row.keys, row.shapes, strict=True)}
    assert shapes == entry["state_dict"]
    assert len(shapes) == entry["num_keys"]
    assert sum(math.prod(row.shape) for row in table) == entry["num_parameters"]


# ---- conversion -----------------------------------------------------------------------------------------------------

PRIOR = dict(text_ctx=4, xf_width=16, xf_layers=2, xf_heads=2, xf_final_ln=True, clip_dim=6)
DECODER = dict(
    text_ctx=4, xf_width=24, clip_dim=6, clip_emb_mult=4, clip_emb_type="image", clip_emb_drop=0.1, in_channels=3,
    model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2],
    num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True,
)  # fmt: skip
UPSAMPLER = dict(channels=32, depth=1, channels_multiple=[1, 2], dropout=0.0)


def small_table(kind):
    if kind == "diffusers":
        architecture = karlo.diffusers_net_config(
            dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=6, num_embeddings=4)
        )
        return karlo.diffusers_table(architecture.model())
    model, options = {
        "prior": ("PriorTransformer", PRIOR),
        "decoder": ("PLMImUNet", DECODER),
        "upsamplers": ("ImprovedSupRes64to256ProgressiveModel", UPSAMPLER),
    }[kind]
    architecture = karlo.net_config(options, model=model, image_size=8)
    make = karlo.upsampler_table if kind == "upsamplers" else karlo.table
    return make(architecture.model())


def torch_shapes(table):
    return {key: shape for row in table for key, shape in zip(row.keys, row.shapes, strict=True)}


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsamplers", "diffusers"])
def test_round_trip_is_exact(kind):
    table, rng = small_table(kind), np.random.default_rng(0)
    state_dict = {key: rng.standard_normal(shape, np.float32) for key, shape in torch_shapes(table).items()}
    params = weights.to_flax(state_dict, table)
    back = weights.to_torch(params, table)
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(v.size for v in state_dict.values())
    assert (
        set(params)
        >= {
            "upsamplers": {"first", "last"},
            "diffusers": {"net", "stats"},
            "prior": {"net", "text_features", "text_embedding"},
            "decoder": {"net", "text_features", "text_embedding", "image_embedding"},
        }[kind]
    )


def test_a_prior_without_a_last_norm():
    """It has the other's arrays but for the norm, and gives the same where the norm's work is done by hand."""
    shapes, outputs = [], []
    for final_norm in (True, False):
        architecture = karlo.net_config(PRIOR | dict(xf_final_ln=final_norm), model="PriorTransformer")
        model = architecture.model()
        table, network = karlo.table(model), model.net
        shapes.append(torch_shapes(table))
        rng = np.random.default_rng(0)
        state = {key: rng.standard_normal(shapes[0][key], np.float32) for key in shapes[0]}
        params = weights.to_flax({key: state[key] for key in shapes[-1]}, table)
        cond = {name: zeros(condition.example(), 2) for name, condition in model.conditions.items()}
        z, time = np.ones((2, *model.shape), np.float32), np.zeros(2, np.float32)
        y, inside = network.apply({"params": params}, z, time, cond, capture_intermediates=True)
        outputs.append((y, inside["intermediates"]["net"]["block_1"]["__call__"][0][:, -1], state))
    assert {*shapes[0]} - {*shapes[1]} == {"final_ln.weight", "final_ln.bias"} and {*shapes[1]} < {*shapes[0]}
    y, h, state = outputs[1]
    np.testing.assert_allclose(h, outputs[0][1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, h @ state["out_proj.weight"].T + state["out_proj.bias"], rtol=1e-4, atol=1e-4)


def test_the_tokens_of_an_image_embedding_by_hand():
    """Output c * 4 + k of karlo's layer is channel c of token k."""
    table = small_table("decoder")
    state_dict = {key: np.zeros(shape, np.float32) for key, shape in torch_shapes(table).items()}
    rows = np.arange(24 * 4, dtype=np.float32)
    state_dict["clip_tok_proj.bias"] = rows
    state_dict["clip_tok_proj.weight"] = np.tile(rows[:, None], (1, 6))
    tokens = weights.to_flax(state_dict, table)["image_embedding"]["tokens"]
    token, channel = np.indices((4, 24))
    np.testing.assert_array_equal(tokens["bias"], channel * 4 + token)
    np.testing.assert_array_equal(tokens["kernel"], np.broadcast_to(channel * 4 + token, (6, 4, 24)))


@pytest.mark.parametrize(
    "options, model, match",
    [
        (PRIOR, "UNetModel", "model 'UNetModel' is unknown; use one of .'PriorTransformer'"),
        ({}, "PriorTransformer", "PriorTransformer needs text_ctx"),
        (PRIOR | dict(spam=1), "PriorTransformer", "spam=1 cannot be converted; this option is unknown"),
        (PRIOR | dict(xf_heads=3), "PriorTransformer", "heads must divide width, 16, got 3"),
        (DECODER | dict(clip_emb_type="text"), "PLMImUNet", "clip_emb_type='text'"),
        (DECODER | dict(spam=1), "PLMImUNet", "spam=1 .*unknown"),
        (UPSAMPLER | dict(spam=1), "ImprovedSupRes64to256ProgressiveModel", "spam=1 .*unknown"),
    ],
)
def test_karlo_refusals(options, model, match):
    with pytest.raises(ValueError, match=match):
        karlo.net_config(options, model=model, image_size=8).build()


def test_more_refusals():
    with pytest.raises(ValueError, match="embedding_proj_norm_type='layer' cannot be converted; only None is supp"):
        karlo.diffusers_net_config(dict(embedding_proj_norm_type="layer"))
    with pytest.raises(ValueError, match="spam=1 cannot be converted; this option is unknown"):
        karlo.diffusers_net_config(dict(spam=1, _class_name="PriorTransformer"))
    architecture = karlo.net_config(PRIOR, model="PriorTransformer")
    architecture.section.conditions = each("condition", text="tokens")
    with pytest.raises(ValueError, match="karlo's networks have no text/token/embedding"):
        karlo.table(architecture.model())


def test_statistics():
    stats = karlo.stats(np.array([[0.5, 1.0]]), np.array([[2.0, 4.0]]))
    scale = codes.Scale(**stats)
    np.testing.assert_allclose(codes.scaled(jnp.array([2.5, 1.0]), scale), [1.0, 0.0])
    np.testing.assert_allclose(codes.unscaled(jnp.array([1.0, 0.0]), scale), [2.5, 1.0])
    for mean, std in (([0.0, 1.0], [1.0]), ([0.0], [0.0]), ([np.nan], [1.0])):
        with pytest.raises(ValueError, match="give the mean and the standard deviation"):
            karlo.stats(mean, std)
