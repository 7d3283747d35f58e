"""Weights and options of openai/improved-diffusion and openai/guided-diffusion.

Their `UNetModel`, `SuperResModel` and `EncoderUNetModel` number the blocks in the order they run;
here a block is called after its level.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

from diffax import config as configs
from diffax.components import spec
from diffax.weights.architecture import Architecture, image_model, refuse
from diffax.weights.table import DENSE_1D, DENSE_2D, SAME, Layout, Path, Table, kernel, make_table, param_shapes

ORDERS = ("legacy", "new")
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
# the layers outside of blocks, and the classifier's heads by their pool
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_0": "time_embed.0",
    "time_1": "time_embed.2",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "embed": "label_emb",
}
HEADS = {
    "attention": {"attention": "out.2"},
    "adaptive": {"logits": "out.3"},
    "spatial": {"hidden": "out.0", "logits": "out.2"},
    "spatial_v2": {"hidden": "out.0", "norm_hidden": "out.1", "logits": "out.3"},
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "encoder_kv": "encoder_kv", "proj": "proj_out"}
ATTENTION_POOL = {"qkv": "qkv_proj", "proj": "c_proj"}
LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
Rename = Callable[[Path, tuple[int, ...]], tuple[list[str], Layout]]


def table(model: Any, *, attention_order: str = "legacy") -> Table:
    """The map between OpenAI's parameters and those of a model.

    Args:
      model: a diffusion model with a U-Net, or a classifier.
      attention_order: how the channels of qkv are sorted: 'legacy' (heads, then q, k, v: all of
        improved-diffusion, most of guided-diffusion) or 'new' (q, k, v, then heads: the flag
        `use_new_attention_order`). The wrong one loads, and
        samples noise.

    Raises:
      ValueError: an unknown attention_order, or a network that OpenAI's classes cannot express.
    """
    for name, _ in getattr(model.net, "encoders", ()):
        if name not in ("label", "low_res"):
            raise ValueError(f"OpenAI's networks have no names for the condition {name!r}")
    shapes = param_shapes(model.init)
    if any(path[0] == "low_res" for path in shapes):
        raise ValueError("OpenAI's networks have no names for the noise level of 'low_res'")
    return make_table(shapes, renaming(core(model), shapes, attention_order))


def core(model: Any) -> nn.Module:
    """The network of a model without the encoders of its conditions."""
    return getattr(model.net, "net", model.net)


def renaming(net: nn.Module, paths: Iterable[Path], attention_order: str) -> Rename:
    """(path, shape) of a parameter -> (OpenAI's names, layout), see `table`.

    Args:
      net: the U-Net, or the classifier.
      paths: of all parameters.
      attention_order: see `table`.
    """
    if attention_order not in ORDERS:
        raise ValueError(f"attention_order {attention_order!r} is unknown; use one of {ORDERS}")
    if not getattr(net, "mid_attention", False):
        raise ValueError("OpenAI's networks are U-Nets with attention in the middle; set mid_attention")
    block_key, pool = _block_key(net, paths), getattr(net, "pool", "")

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        *module, leaf = path[1:] if path[0] in ("net", "label") else path
        if leaf == "position":
            return ["out.2.positional_embedding"], kernel(shape)
        top, *inner = module
        if top in TOP:
            return [f"{TOP[top]}.{LEAF[leaf]}"], plain(leaf, shape)
        if pool and top in HEADS[pool]:
            return _head(pool, top, inner, leaf, shape)
        block = block_key(top)
        if inner[0] in RES_BLOCK:
            layout = DENSE_2D if (inner[0], leaf) == ("skip", "kernel") else plain(leaf, shape)
            return [f"{block}.{RES_BLOCK[inner[0]]}.{LEAF[leaf]}"], layout
        if inner[0] == "conv":
            child = "op" if top.startswith("down") else "conv"
            return [f"{block}.{child}.{LEAF[leaf]}"], plain(leaf, shape)
        return _attention(block, ATTENTION, inner, leaf, shape, attention_order)

    return rename


def _head(pool: str, top: str, inner: list[str], leaf: str, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """The parameters of a classifier's head."""
    name = HEADS[pool][top]
    if top == "attention":
        return _attention(name, ATTENTION_POOL, inner, leaf, shape, "new")
    return [f"{name}.{LEAF[leaf]}"], DENSE_2D if pool == "adaptive" and leaf == "kernel" else plain(leaf, shape)


def _block_key(net: nn.Module, paths: Iterable[Path]) -> Callable[[str], str]:
    """The number of a block: 'down_1_attention_0' -> 'input_blocks.5.1'."""
    levels, blocks = len(net.channel_mult), net.num_res_blocks
    places = {path[:-1] for path in paths}

    def block_key(name: str) -> str:
        found = re.fullmatch(r"(down|mid|up)_?(\d*)_(\w+?)_?(\d*)", name)
        if not found:
            raise ValueError(f"OpenAI's networks have no {name}")
        way, level, kind, i = found.groups()
        child = int(kind == "attention")
        if way == "mid":
            return f"middle_block.{1 if child else 2 * int(i)}"
        level = int(level)
        if way == "down":
            index = (level + 1) * (blocks + 1) if kind == "downsample" else (1 + level * (blocks + 1) + int(i))
            return f"input_blocks.{index}.{child}"
        first = (levels - 1 - level) * (blocks + 1)
        if kind == "upsample":
            # the last child of the level's last block
            attends = any(f"up_{level}_attention_{blocks}" in place for place in places)
            return f"output_blocks.{first + blocks}.{1 + attends}"
        return f"output_blocks.{first + int(i)}.{child}"

    return block_key


def plain(leaf: str, shape: tuple[int, ...]) -> Layout:
    """The layout of a layer that both sides store alike."""
    return kernel(shape) if leaf == "kernel" else SAME


def _attention(
    block: str, names: Mapping[str, str], inner: list[str], leaf: str, shape: tuple[int, ...], order: str
) -> tuple[list[str], Layout]:
    """The parameters under one attention block or pool."""
    projection, _, leaf = leaf.rpartition("_")
    if projection:
        layout = qkv_kernel(shape, order) if leaf == "kernel" else qkv_bias(shape, order)
    else:
        layout = DENSE_1D if leaf == "kernel" else SAME
    return [f"{block}.{names[projection or inner[-1]]}.{LEAF[leaf]}"], layout


def qkv_kernel(shape: tuple[int, ...], order: str, trailing: tuple[int, ...] = (1,)) -> Layout:
    """[PC, E, *trailing] <-> [E, P, heads, D]: P projections from E channels to C = heads * D."""
    inputs, parts, heads, width = shape

    def to_flax(w):
        if order == "legacy":
            return w.reshape(heads, parts, width, inputs).transpose(3, 1, 0, 2)
        return w.reshape(parts, heads, width, inputs).transpose(3, 0, 1, 2)

    def to_torch(w):
        w = w.transpose(2, 1, 3, 0) if order == "legacy" else w.transpose(1, 2, 3, 0)
        return (w.reshape(parts * heads * width, inputs, *trailing),)

    return Layout(to_flax, to_torch)


def qkv_bias(shape: tuple[int, ...], order: str) -> Layout:
    """[PC] <-> [P, heads, D]."""
    parts, heads, width = shape

    def to_flax(w):
        if order == "legacy":
            return w.reshape(heads, parts, width).transpose(1, 0, 2)
        return w.reshape(parts, heads, width)

    def to_torch(w):
        return ((w.transpose(1, 0, 2) if order == "legacy" else w).reshape(-1),)

    return Layout(to_flax, to_torch)


# Options of the constructors that may be left out, and those that may not.
DEFAULTS = dict(
    dropout=0,
    channel_mult=(1, 2, 4, 8),
    conv_resample=True,
    dims=2,
    num_classes=None,
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    resblock_updown=False,
    pool="adaptive",
    use_new_attention_order=False,
    image_size=None,
    use_checkpoint=False,
    use_fp16=False,
)
NEEDED = ("in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
MODELS = ("UNetModel", "SuperResModel", "EncoderUNetModel")


def net_config(constructor: Mapping, *, model: str = "UNetModel", image_size: int | None = None) -> Architecture:
    """The architecture that a constructor call of OpenAI's code describes.

    Args:
      constructor: the keyword arguments; those left out have OpenAI's defaults.
      model: 'UNetModel', 'SuperResModel' or 'EncoderUNetModel'.
      image_size: needed where the constructor has none (improved-diffusion); wins over it.

    Raises:
      ValueError: an argument has a value that is not supported.
    """
    c = _options(constructor, model, image_size)
    shape = (image_size or c["image_size"],) * 2 + (c["in_channels"],)
    order = ORDERS[bool(c["use_new_attention_order"])]
    if model == "EncoderUNetModel":
        net = spec("network", "classifier", **_encoder(c), pool=c["pool"])
        section = configs.section("classifier", shape=shape, num_classes=c["out_channels"], net=net)
        return Architecture(section, c["out_channels"], order)
    conditions = {"label": spec("condition", "label", num_classes=c["num_classes"])} if c["num_classes"] else {}
    if model == "SuperResModel":
        conditions["low_res"] = spec("condition", "low_res", factor=2)  # any: the constructor has none
    net = spec("network", "unet", **_encoder(c), heads_up=max(c["num_heads_upsample"] or 0, 0))
    return image_model(net, shape=shape, out_channels=c["out_channels"], conditions=conditions, attention_order=order)


def _options(constructor: Mapping, model: str, image_size: int | None) -> dict[str, Any]:
    """All options of a constructor call, checked."""
    given = dict(constructor)
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; use one of {MODELS}")
    for key in given:
        if key not in DEFAULTS and key not in NEEDED:
            refuse(model, key, given[key], "this option is unknown")
    for key in NEEDED:
        if key not in given:
            raise ValueError(f"{model} needs {key}; pass all constructor arguments")
    c = {**DEFAULTS, **given}
    if c["dims"] != 2:
        refuse(model, "dims", c["dims"], "only images (2) are supported")
    if not (image_size or c["image_size"]):
        raise ValueError(f"{model} has no image_size among its arguments; pass image_size")
    if "image_size" not in given and c["channel_mult"][0] != 1 and model != "EncoderUNetModel":
        refuse(
            model,
            "channel_mult",
            c["channel_mult"],
            "improved-diffusion starts at the base width; pass image_size in the constructor for guided-diffusion",
        )
    return c


def _encoder(c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the U-Net and its encoder share."""
    factors = [2**level for level in range(len(c["channel_mult"]))]
    return dict(
        channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention=tuple(f for f in factors if f in tuple(c["attention_resolutions"])),
        heads=max(c["num_heads"] or 0, 1),  # -1 where num_head_channels counts
        head_channels=max(c["num_head_channels"] or 0, 0),
        dropout=float(c["dropout"]),
        scale_shift=bool(c["use_scale_shift_norm"]),
        resample="biggan" if c["resblock_updown"] else "conv" if c["conv_resample"] else "pool",
        remat="blocks" if c["use_checkpoint"] else "none",
    )
