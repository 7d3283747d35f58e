"""Published weights: every key and shape of the published models, round trips, and clear refusals."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from diffax import weights
from diffax.components import spec
from diffax.weights import diffusers, glide, karlo, openai
from diffax.weights import table as tables
from diffax.weights.architecture import image_model

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
MANIFEST = FOLDER / "manifest_full_size.json"
CLASSES = ("UNetModel", "SuperResModel", "EncoderUNetModel", "UNet2DModel", *glide.MODELS)
PUBLISHED = {
    name: entry
    for name, entry in (json.loads(MANIFEST.read_text())["models"] if MANIFEST.exists() else {}).items()
    if entry["class"] in CLASSES
}


def architecture_and_table(entry):
    constructor, args = entry["constructor"], entry["args"]
    if entry["class"] == "UNet2DModel":
        architecture = diffusers.net_config(constructor)
        flip = constructor["flip_sin_to_cos"]
        return architecture, diffusers.table(architecture.model(), flip_sin_to_cos=flip)
    size = args.get("large_size") or args["image_size"]
    if entry["class"] in glide.MODELS:
        architecture = glide.net_config(constructor, model=entry["class"], image_size=size)
        return architecture, glide.table(architecture.model())
    architecture = openai.net_config(constructor, model=entry["class"], image_size=size)
    order = architecture.attention_order
    return architecture, openai.table(architecture.model(), attention_order=order)


def torch_shapes(table):
    return {key: list(shape) for entry in table for key, shape in zip(entry.keys, entry.shapes, strict=True)}


@pytest.mark.skipif(not PUBLISHED, reason="no manifest_full_size.json in the golden folder")
@pytest.mark.parametrize("name", [n for n, entry in PUBLISHED.items() if "state_dict" in entry])
def test_keys_shapes_and_count_of_a_published_model(name):
    entry = PUBLISHED[name]
    _, table = architecture_and_table(entry)
    assert torch_shapes(table) == entry["state_dict"]
    assert sum(math.prod(entry.shape) for entry in table) == entry["num_parameters"]


@pytest.mark.skipif(not PUBLISHED, reason="no manifest_full_size.json in the golden folder")
def test_published_models_of_the_same_weights_are_the_same_network():
    """The others differ from one of those above in dropout only."""
    for entry in PUBLISHED.values():
        if "state_dict" not in entry:
            twin = PUBLISHED[entry["same_state_dict_as"]]
            ours, theirs = (openai.net_config(e["constructor"], model=e["class"], image_size=64) for e in (entry, twin))
            for architecture in (ours, theirs):
                architecture.net.dropout = 0.0
            assert ours == theirs


GUIDED = dict(
    image_size=16, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2],
    channel_mult=[1, 2], num_heads=2, use_scale_shift_norm=True,
)  # fmt: skip
DIFFUSERS = dict(
    sample_size=16, block_out_channels=[32, 48, 64], down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"], layers_per_block=1, norm_num_groups=16,
    num_class_embeds=5,
)  # fmt: skip
GLIDE = dict(
    text_ctx=6, xf_width=24, xf_layers=2, xf_heads=3, xf_final_ln=True, n_vocab=11, in_channels=3, model_channels=32,
    out_channels=6, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=16,
)  # fmt: skip


def small(kind):
    if kind.startswith("glide"):
        model = {"glide": "Text2ImUNet", "glide inpaint": "SuperResInpaintText2ImUnet"}[kind]
        architecture = glide.net_config(GLIDE | dict(xf_padding=kind == "glide"), model=model, image_size=8)
        return architecture, glide.table(architecture.model())
    if kind == "diffusers":
        architecture = diffusers.net_config(DIFFUSERS)
        return architecture, diffusers.table(architecture.model(), flip_sin_to_cos=False)
    model, options, order = {
        "biggan": ("UNetModel", dict(resblock_updown=True, num_classes=7), "legacy"),
        "conv": ("UNetModel", dict(attention_resolutions=[1, 2], num_head_channels=16), "new"),
        "pool": ("SuperResModel", dict(conv_resample=False, num_heads_upsample=4), "legacy"),
        "attention pool": ("EncoderUNetModel", dict(pool="attention", num_head_channels=16), "legacy"),
        "adaptive pool": ("EncoderUNetModel", dict(pool="adaptive"), "legacy"),
        "spatial_v2 pool": ("EncoderUNetModel", dict(pool="spatial_v2"), "new"),
    }[kind]
    architecture = openai.net_config(GUIDED | options, model=model)
    return architecture, openai.table(architecture.model(), attention_order=order)


def random_state_dict(table):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in torch_shapes(table).items()}


@pytest.mark.parametrize("kind", ["biggan", "conv", "pool", "attention pool", "adaptive pool", "spatial_v2 pool",
                                  "diffusers", "glide", "glide inpaint"])  # fmt: skip
def test_round_trip_is_exact(kind):
    architecture, table = small(kind)
    state_dict = random_state_dict(table)
    params = weights.to_flax(state_dict, table)
    back = weights.to_torch(params, table)
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    # every parameter of the network is there, and none is used twice
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(v.size for v in state_dict.values())


def test_attention_orders_by_hand():
    """Output channel (head, part, d) of a projection is row (head*3 + part)*D + d in the legacy order."""
    heads, width, channels = 2, 3, 6
    rows = np.arange(3 * channels, dtype=np.float32)
    for order, row in (
        ("legacy", lambda part, head, d: (head * 3 + part) * width + d),
        ("new", lambda part, head, d: (part * heads + head) * width + d),
    ):
        bias = openai.qkv_bias((3, heads, width), order).to_flax(rows)
        kernel = openai.qkv_kernel((channels, 3, heads, width), order).to_flax(
            np.tile(rows[:, None, None], (1, channels, 1))
        )
        for part, head, d in np.ndindex(3, heads, width):
            assert bias[part, head, d] == row(part, head, d)
            assert (kernel[:, part, head, d] == row(part, head, d)).all()


def test_attention_order_of_glide_by_hand():
    """Row (head*P + part)*D + d in the text transformer, P = 3, and in the layer that reads the text, P = 2."""
    _, table = small("glide")
    rows = {
        key: np.broadcast_to(np.arange(shape[0], dtype=np.float32).reshape(-1, *(1 for _ in shape[1:])), shape)
        for key, shape in torch_shapes(table).items()
    }
    params = weights.to_flax(rows, table)
    text = params["text"]["block_1"]["attention"]
    read = params["net"]["mid_attention"]["attention"]
    for tree, name, (parts, heads, width), channels in (
        (text, "qkv", (3, 3, 8), 24),
        (read, "qkv", (3, 4, 16), 64),
        (read, "encoder_kv", (2, 4, 16), 24),
    ):
        part, head, d = np.indices((parts, heads, width))
        row = (head * parts + part) * width + d
        np.testing.assert_array_equal(tree[f"{name}_bias"], row)
        np.testing.assert_array_equal(tree[f"{name}_kernel"], np.broadcast_to(row, (channels, parts, heads, width)))


def test_half_precision_becomes_float32():
    _, table = small("conv")
    half = {key: value.astype(np.float16) for key, value in random_state_dict(table).items()}
    leaves = jax.tree.leaves(weights.to_flax(half, table))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_a_state_dict_that_does_not_fit():
    _, table = small("conv")
    state_dict = random_state_dict(table)
    del state_dict["out.2.weight"]
    state_dict["time_embed.0.bias"] = np.zeros(5, np.float32)
    state_dict |= {f"label_emb.{i}": np.zeros(1) for i in range(7)}
    with pytest.raises(ValueError) as error:
        weights.to_flax(state_dict, table)
    message = str(error.value)
    assert "1 missing: out.2.weight" in message
    assert "7 unexpected: label_emb.0, label_emb.1" in message and "label_emb.6" not in message
    assert "1 of another shape: time_embed.0.bias is (5,), not (128,)" in message
    assert "\n" not in message


def test_parameters_that_do_not_fit():
    _, table = small("conv")
    params = weights.to_flax(random_state_dict(table), table)
    params["net"]["extra"] = {"bias": np.zeros(1)}
    del params["net"]["conv_out"]["bias"]
    with pytest.raises(ValueError, match=r"1 missing: net/conv_out/bias; 1 unexpected: net/extra/bias"):
        weights.to_torch(params, table)


@pytest.mark.parametrize(
    "model, options, match",
    [
        ("UNetModel", dict(dims=3), "dims=3"),
        ("UNetModel", dict(spam=1), "spam=1 .*unknown"),
        ("UNetModel", dict(channel_mult=[0.5, 1], image_size=None), None),
        ("Text2ImUNet", {}, "model 'Text2ImUNet' is unknown"),
    ],
)
def test_openai_refusals(model, options, match):
    with pytest.raises(ValueError, match=match):
        openai.net_config(GUIDED | options, model=model)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(xf_width=0), "Text2ImUNet with xf_width=0 cannot be converted"),
        (dict(xf_ar=0.1), "xf_ar=0.1"),
        (dict(num_classes=5), "num_classes=5"),
        (dict(xf_heads=5), "conditions.text: heads must divide width, 24, got 5"),
        (dict(spam=1), "spam=1 .*unknown"),
    ],
)
def test_glide_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        glide.net_config(GLIDE | options, image_size=8).build()
    with pytest.raises(ValueError, match="model 'UNetModel' is unknown; use one of .'Text2ImUNet'"):
        glide.net_config(GLIDE, model="UNetModel", image_size=8)
    with pytest.raises(ValueError, match="Text2ImUNet needs n_vocab"):
        glide.net_config({key: value for key, value in GLIDE.items() if key != "n_vocab"}, image_size=8)


def test_glide_options():
    architecture = glide.net_config(GLIDE, model="SuperResInpaintText2ImUnet", image_size=8)
    assert ([*architecture.conditions], architecture.shape) == (["text", "inpaint", "low_res"], (8, 8, 3))
    text = architecture.model().net.encoders[0][1]
    assert (text.width, text.layers, text.heads, text.vocab_size, text.length) == (24, 2, 3, 11, 6)
    assert (text.final_norm, text.padding_embedding) == (True, False)


def test_improved_diffusion_needs_a_size():
    constructor = {key: value for key, value in GUIDED.items() if key != "image_size"}
    with pytest.raises(ValueError, match="pass image_size"):
        openai.net_config(constructor)
    assert openai.net_config(constructor, image_size=32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="model_channels"):
        openai.net_config({"image_size": 8, "in_channels": 3})


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(act_fn="gelu"), "act_fn='gelu' cannot be converted; supported: 'silu', 'swish'"),
        (dict(time_embedding_type="fourier"), "time_embedding_type"),
        (dict(freq_shift=2), "freq_shift"),
        (dict(center_input_sample=True), "center_input_sample"),
        (dict(class_embed_type="timestep"), "class_embed_type"),
        (dict(mid_block_scale_factor=1.4), "mid_block_scale_factor"),
        (dict(time_embedding_dim=99), "time_embedding_dim"),
        (dict(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups=None"),
        (dict(down_block_types=["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]), "SkipDownBlock2D"),
        (dict(block_out_channels=[32, 48]), "there are 2"),
        (dict(sample_size=None), "pass image_size"),
        (dict(spam=1), "spam=1"),
    ],
)
def test_diffusers_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        diffusers.net_config(DIFFUSERS | options)


def test_other_output_channels_than_those_of_the_data():
    """A program may have any; here more than those of the data stand for a learned variance."""
    architecture = openai.net_config(GUIDED | dict(out_channels=4))
    assert architecture.build().net.out_channels == 4


def test_an_order_of_conditions_is_that_of_the_sequence():
    """A prior reads the caption, then its embedding; a decoder the tokens of the picture's embedding first."""
    prior = karlo.net_config(
        dict(text_ctx=5, xf_width=16, xf_layers=1, xf_heads=2, xf_final_ln=False, clip_dim=6), model="PriorTransformer"
    )
    names = [name for name, _ in prior.build().encoders]
    assert (names, prior.shape, prior.build().net.final_norm) == (["text_features", "text_embedding"], (6,), False)


def test_diffusers_options():
    architecture = diffusers.net_config(
        DIFFUSERS | dict(attention_head_dim=None, _class_name="UNet2DModel", sample_size=[8, 12]))  # fmt: skip
    net = architecture.net
    assert architecture.shape == (8, 12, 3)
    assert architecture.conditions["label"]["num_classes"] == 5
    assert (net["attention"], net["attention_up"]) == ((2,), (1, 2))
    assert (net["heads"], net["head_channels"]) == (1, 0)
    assert (net["downsample_pad"], net["sinusoid"]) == ("both", "openai")
    assert architecture.build().net.widths == (32, 48, 64)


@pytest.mark.parametrize("width, base", [(49, 107), (160, 96), (3, 7), (224, 224)])
def test_a_level_gets_its_exact_width(width, base):
    assert int(diffusers._multiple(width, base) * base) == width


def test_the_timestep_embedding_of_diffusers_is_swapped_where_the_order_differs():
    net = spec("network", "unet", channels=32, channel_mult=(1,), num_res_blocks=1, attention=())
    model = image_model(net, shape=(8, 8, 3), out_channels=3, conditions={}).model()
    weight = np.arange(128 * 32, dtype=np.float32).reshape(128, 32)
    rows = {}
    for flip in (True, False):
        table = diffusers.table(model, flip_sin_to_cos=flip)
        state_dict = random_state_dict(table) | {"time_embedding.linear_1.weight": weight}
        rows[flip] = weights.to_flax(state_dict, table)["net"]["time_0"]["kernel"]
    np.testing.assert_array_equal(rows[True], weight.T)
    np.testing.assert_array_equal(rows[False], np.roll(weight.T, 16, axis=0))


def test_old_names_of_diffusers():
    old = {"mid_block.attentions.0.query.weight": 1, "up_blocks.1.attentions.2.proj_attn.bias": 2, "conv_in.bias": 3}
    assert diffusers.modern_names(old) == {
        "mid_block.attentions.0.to_q.weight": 1,
        "up_blocks.1.attentions.2.to_out.0.bias": 2,
        "conv_in.bias": 3,
    }


def test_tables_name_every_parameter_once():
    _, table = small("biggan")
    keys = [key for entry in table for key in entry.keys]
    assert len(set(keys)) == len(keys)
    assert len({entry.path for entry in table}) == len(table)
    assert isinstance(table[0], tables.Entry)
