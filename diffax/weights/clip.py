"""Weights and options of CLIP: openai/CLIP, transformers' `CLIPModel`, and the noised one of openai/glide-text2im.

A table is of a whole CLIP or of one encoder. GLIDE's two files are of one encoder each; so are the files of
transformers' `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from diffax import config as configs
from diffax.components import spec
from diffax.weights.architecture import IDS, Architecture, refuse
from diffax.weights.diffusers import split_qkv_bias, split_qkv_kernel
from diffax.weights.openai import plain, qkv_bias, qkv_kernel
from diffax.weights.table import SAME, Entry, Layout, Path, Table, make_table, param_shapes, to_flax


class Names(NamedTuple):
    """How one program names CLIP's parameters.

    Attributes:
      image: of the image encoder, outside of blocks, by our name: of a layer, or of an array of its own.
      text: the same of the text encoder.
      image_block: before the names of a block's layers; {} is its number.
      text_block: the same.
      block: of a block's layers.
      qkv: of the three projections; one name where they are one array.
      leaf: of a layer's arrays.
      projection: the layout of the two last layers' kernels.
    """

    image: Mapping[str, str]
    text: Mapping[str, str]
    image_block: str
    text_block: str
    block: Mapping[str, str]
    qkv: tuple[str, ...]
    leaf: Mapping[str, str]
    projection: Layout | None = None


TORCH_LEAF = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}
NAMES = {
    "openai": Names(
        image={
            "class": "visual.class_embedding",
            "patch": "visual.conv1",
            "position": "visual.positional_embedding",
            "norm_in": "visual.ln_pre",
            "norm_out": "visual.ln_post",
            "proj/kernel": "visual.proj",
        },
        text={
            "token": "token_embedding",
            "position": "positional_embedding",
            "norm_out": "ln_final",
            "proj/kernel": "text_projection",
        },
        image_block="visual.transformer.resblocks.{}.",
        text_block="transformer.resblocks.{}.",
        block={
            "norm1": "ln_1",
            "attention/proj": "attn.out_proj",
            "norm2": "ln_2",
            "mlp_0": "mlp.c_fc",
            "mlp_1": "mlp.c_proj",
        },
        qkv=("attn.in_proj_",),
        leaf=TORCH_LEAF,
        projection=SAME,
    ),
    "transformers": Names(
        image={
            "class": "vision_model.embeddings.class_embedding",
            "patch": "vision_model.embeddings.patch_embedding",
            "position": "vision_model.embeddings.position_embedding.weight",
            "norm_in": "vision_model.pre_layrnorm",  # so spelt
            "norm_out": "vision_model.post_layernorm",
            "proj": "visual_projection",
        },
        text={
            "token": "text_model.embeddings.token_embedding",
            "position": "text_model.embeddings.position_embedding.weight",
            "norm_out": "text_model.final_layer_norm",
            "proj": "text_projection",
        },
        image_block="vision_model.encoder.layers.{}.",
        text_block="text_model.encoder.layers.{}.",
        block={
            "norm1": "layer_norm1",
            "attention/proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp_0": "mlp.fc1",
            "mlp_1": "mlp.fc2",
        },
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        leaf=TORCH_LEAF,
    ),
    "glide": Names(
        image={
            "class": "blocks.input.pred_state",
            "time": "blocks.input.w_t",
            "patch/kernel": "blocks.input.patch_proj",
            "position": "blocks.input.w_pos",
            "norm_in": "blocks.input.ln",
            "norm_out": "blocks.output.ln",
            "proj": "blocks.output.f",
        },
        text={
            "token/embedding": "blocks.input.w_voc",
            "position": "blocks.input.w_pos",
            "norm_out": "blocks.output.ln",
            "proj": "blocks.output.f",
        },
        image_block="blocks.block_{}.",
        text_block="blocks.block_{}.",
        block={
            "norm1": "f_attn.ln",
            "attention/proj": "f_attn.f_c",
            "norm2": "f_mlp.ln",
            "mlp_0": "f_mlp.f_1",
            "mlp_1": "f_mlp.f_2",
        },
        qkv=("f_attn.f_q", "f_attn.f_k", "f_attn.f_v"),
        leaf={"kernel": ".w", "scale": ".g", "bias": ".b"},
    ),
}
# the files of GLIDE's CLIP
GLIDE_FILES = {"image": "clip_image_enc.pt", "text": "clip_text_enc.pt"}
# what old files hold besides parameters
BUFFERS = ("input_resolution", "context_length", "vocab_size", r"\w+\.embeddings\.position_ids")


def table(network: nn.Module, names: str) -> Table:
    """The map between published parameters and those of `network`.

    GLIDE's layers have no bias on the keys, which adds the same to all logits of a query and so changes nothing. It
    starts as zero here, and `to_torch` leaves it out.

    Args:
      network: a whole CLIP (see `diffax.networks.clip`), or its `image` or `text` alone.
      names: 'openai', 'transformers' or 'glide'.

    Raises:
      ValueError: unknown names; a whole CLIP with GLIDE's; an encoder of noisy images with others than GLIDE's.
    """
    if names not in NAMES:
        raise ValueError(f"names {names!r} are unknown; use one of {', '.join(map(repr, NAMES))}")
    whole = hasattr(network, "image")
    if names == "glide" and whole:
        raise ValueError("GLIDE's encoders have one file each; make a table of network.image and one of network.text")
    image = network.image if whole else network
    if names != "glide" and getattr(image, "times", 0):
        raise ValueError(f"{names!r} has no names for an encoder of noisy images; set times to 0 or use 'glide'")
    chosen, tower = NAMES[names], "image" if hasattr(network, "patch") else "text"

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        if path == ("logit_scale",):
            return ["logit_scale"], SAME
        return _rename(chosen, *(path if whole else (tower, *path)), shape=shape)

    return make_table(param_shapes(lambda key: network.init(key, *network.example())["params"]), rename)


def _rename(names: Names, tower: str, top: str, *inner: str, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """The names and the layout of one parameter of the encoder `tower`."""
    leaf = inner[-1] if inner else ""
    if not top.startswith("block_"):
        known = names.image if tower == "image" else names.text
        layout = names.projection if top == "proj" and names.projection else plain(leaf, shape)
        whole = "/".join([top, *inner])
        return [known[whole] if whole in known else known[top] + names.leaf[leaf]], layout
    block = (names.image_block if tower == "image" else names.text_block).format(top.removeprefix("block_"))
    if not leaf.startswith("qkv_"):
        return [block + names.block["/".join(inner[:-1])] + names.leaf[leaf]], plain(leaf, shape)
    leaf = leaf.removeprefix("qkv_")
    if len(names.qkv) == 1:
        layout = qkv_kernel(shape, "new", ()) if leaf == "kernel" else qkv_bias(shape, "new")
        return [block + names.qkv[0] + names.leaf[leaf].removeprefix(".")], layout
    keys = [block + name + names.leaf[leaf] for name in names.qkv]
    if leaf == "kernel":
        return keys, split_qkv_kernel(shape)
    if names is NAMES["glide"]:
        return keys[::2], _without_key_bias(shape)
    return keys, split_qkv_bias(shape)


def _without_key_bias(shape: tuple[int, ...]) -> Layout:
    """Two of [C], of the queries and the values <-> [3, heads, D]."""
    return Layout(
        lambda q, v: np.stack([q, np.zeros_like(q), v]).reshape(shape),
        lambda w: (w[0].reshape(-1), w[2].reshape(-1)),
    )


def without_buffers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what is no parameter: the position ids of old transformers files, the sizes in OpenAI's archives."""
    pattern = re.compile("|".join(BUFFERS))
    return {key: value for key, value in state_dict.items() if not pattern.fullmatch(key)}


def file_table(model: Any, *, names: str, tower: str = "") -> Table:
    """The map between a file and the parameters of a whole CLIP, or of its encoder `tower`.

    Args:
      model: a CLIP.
      names: see `table`; with 'glide' a whole CLIP is both of GLIDE's files in one, see `glide_table`, and the log of
        the scale as 'logit_scale'.
      tower: 'image' or 'text', or '' for both. The file of transformers' text encoder has no scale, which comes with
        it here as 100, that of OpenAI's own.

    Raises:
      ValueError: the network cannot bear such names.
    """
    network = model.net
    if tower:
        entries = _tower(network, names, tower)
        return entries + [_scale(100.0)] * (names == "transformers" and tower == "text")
    if names == "glide":
        return [*_glide_towers(network), Entry(("logit_scale",), ((),), ("logit_scale",), (), SAME)]
    return table(network, names)


def _tower(network: nn.Module, names: str, tower: str) -> Table:
    """The map between the file of one encoder and its parameters in a whole CLIP."""
    return [entry._replace(path=(tower, *entry.path)) for entry in table(getattr(network, tower), names)]


def _glide_towers(network: nn.Module) -> Table:
    """The map between GLIDE's two files, their names led by 'image.' and 'text.', and both encoders."""
    return [
        entry._replace(keys=tuple(f"{tower}.{key}" for key in entry.keys))
        for tower in GLIDE_FILES
        for entry in _tower(network, "glide", tower)
    ]


def glide_table(network: nn.Module, *, logit_scale: float = 100.0) -> Table:
    """The map between GLIDE's two files, their names led by 'image.' and 'text.', and a noised CLIP's parameters.

    Args:
      network: a whole CLIP, see `glide_config`.
      logit_scale: what multiplies the cosines (not its log), which is in the config file and in neither of these: 100.
    """
    return [*_glide_towers(network), _scale(logit_scale)]


def _scale(logit_scale: float) -> Entry:
    """The scale of the cosines (not its log), which no file holds."""
    return Entry((), (), ("logit_scale",), (), Layout(lambda: np.log(logit_scale).astype(np.float32), lambda w: ()))


def glide_arrays(**files: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of GLIDE's two files, `image` and `text`, under the names of `glide_table`."""
    return {f"{tower}.{key}": value for tower, arrays in files.items() for key, value in arrays.items()}


def from_glide(
    image_enc: Mapping[str, Any], text_enc: Mapping[str, Any], network: nn.Module, *, logit_scale: float = 100.0
) -> dict:
    """The parameters of a noised CLIP out of GLIDE's two files.

    Args:
      image_enc: state_dict of clip_image_enc.pt.
      text_enc: state_dict of clip_text_enc.pt.
      network: see `glide_config`.
      logit_scale: see `glide_table`.

    Raises:
      ValueError: arrays are missing, unexpected or of another shape.
    """
    return to_flax(glide_arrays(image=image_enc, text=text_enc), glide_table(network, logit_scale=logit_scale))


def _architecture(
    size: int, *, features: int, activation: str, image: Mapping, text: Mapping, times: int = 0
) -> Architecture:
    """The architecture of a CLIP of `size` x `size` pictures.

    Args:
      size, features, activation, image, text: see `networks.clip`; `text` has the length of captions too.
      times: steps of the noise schedule; 0: a CLIP of clean pictures.
    """
    text = dict(text)
    section = configs.section("clip", shape=(size, size, 3), noised=times > 0)
    # the sizes alone: a config of it has the tokenizer itself, see `catalogue.clip_config`
    section.tokenizer = spec("tokenizer", IDS, length=text.pop("length"), vocab_size=text["vocab_size"])
    section.net.update(features=features, activation=activation)
    section.net.image.update(image)
    section.net.text.update(text)
    if times:
        section.schedule = spec("schedule", "cosine", num_timesteps=times)
    return Architecture(section, features)


def _pick(model: str, config: Mapping, names: Mapping[str, str]) -> dict[str, Any]:
    """{our name: the value of theirs}."""
    for key in names.values():
        if key not in config:
            raise ValueError(f"{model} needs {key}; pass the whole configuration")
    return {ours: config[key] for ours, key in names.items()}


def glide_config(config: Mapping) -> Architecture:
    """The architecture that GLIDE's clip/config.yaml describes.

    Args:
      config: its contents; logit_scale and beta_schedule are not of the architecture, and passed over.

    Raises:
      ValueError: an entry is missing.
    """
    shared = _pick("GLIDE's CLIP", config, {"size": "image_size", "features": "n_embd"})
    image = {"patch": "patch_size", "times": "n_timesteps", "layers": "n_xf_blocks_image", "heads": "n_head_image"}
    text = {"length": "max_text_len", "vocab_size": "n_vocab", "layers": "n_xf_blocks_text", "heads": "n_head_text"}
    towers = {}
    for tower, names in (("image", image), ("text", text)):
        options = _pick("GLIDE's CLIP", config, names | {"head": f"n_head_state_{tower}"})
        towers[tower] = options | {"width": options.pop("head") * options["heads"]}
    times = towers["image"].pop("times")
    return _architecture(**shared, activation="gelu", **towers, times=times)


def transformers_config(config: Mapping) -> Architecture:
    """The architecture that the config.json of a transformers `CLIPModel` describes.

    Args:
      config: its contents; entries left out have the defaults of transformers, entries of which no parameter or
        result depends are passed over.

    Raises:
      ValueError: an entry has a value that is not supported.
    """
    model = "CLIPModel"
    common: dict[str, Any] = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, num_hidden_layers=12)
    text = common | dict(hidden_size=512, num_attention_heads=8, vocab_size=49408, max_position_embeddings=77)
    image = common | dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=32, num_channels=3)
    text["intermediate_size"], image["intermediate_size"] = 2048, 3072
    text |= config.get("text_config") or {}
    image |= config.get("vision_config") or {}
    for c in (text, image):
        if c["layer_norm_eps"] != 1e-5:
            refuse(model, "layer_norm_eps", c["layer_norm_eps"], "supported: 1e-05")
        if c["hidden_act"] not in ("quick_gelu", "gelu"):
            refuse(model, "hidden_act", c["hidden_act"], "supported: 'quick_gelu', 'gelu'")
    if image["num_channels"] != 3:
        refuse(model, "num_channels", image["num_channels"], "supported: 3")
    tower = {"width": "hidden_size", "hidden": "intermediate_size"}
    tower |= {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
    own = {} if image["hidden_act"] == text["hidden_act"] else {"activation": image["hidden_act"]}
    return _architecture(
        image["image_size"],
        features=config.get("projection_dim", 512),
        activation=text["hidden_act"],
        image=_pick(model, image, tower | {"patch": "patch_size"}) | own | _head_channels(image),
        text=_pick(model, text, tower | {"vocab_size": "vocab_size", "length": "max_position_embeddings"})
        | _head_channels(text),
    )


def _head_channels(c: Mapping) -> dict[str, int]:
    """The channels of a head, where they are not the width over the number of heads."""
    head, heads = c.get("head_dim"), c["num_attention_heads"]
    return {} if not head or head * heads == c["hidden_size"] else {"head_channels": head}


def openai_config(state_dict: Mapping[str, Any]) -> Architecture:
    """The architecture of one of OpenAI's vision transformers, by the shapes of its arrays; a head has 64 channels.

    Raises:
      ValueError: a ResNet.
    """
    if "visual.proj" not in state_dict:
        raise ValueError("this is no vision transformer of openai/CLIP; its ResNets are not supported")
    shapes = {key: np.shape(value) for key, value in state_dict.items()}

    def layers(prefix: str) -> int:
        return sum(key.startswith(prefix) and key.endswith(".attn.in_proj_weight") for key in shapes)

    width, _, patch, _ = shapes["visual.conv1.weight"]
    grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    vocab_size, text_width = shapes["token_embedding.weight"]
    return _architecture(
        patch * grid,
        features=shapes["text_projection"][1],
        activation="quick_gelu",
        image=dict(width=width, layers=layers("visual."), heads=width // 64, patch=patch),
        text=dict(
            width=text_width,
            layers=layers("transformer."),
            heads=text_width // 64,
            vocab_size=vocab_size,
            length=shapes["positional_embedding"][0],
        ),
    )
