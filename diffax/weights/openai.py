"""Weights and options of openai/improved-diffusion and openai/guided-diffusion.

Their `UNetModel`, `SuperResModel` and `EncoderUNetModel` number the blocks in the order they run;
here a block is called after its level.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn

from diffax.networks import Classifier, example_inputs
from diffax.weights.architecture import Architecture, refuse
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


def table(network: nn.Module, shape: Sequence[int], *, attention_order: str = "legacy") -> Table:
    """The map between OpenAI's parameters and those of `network`.

    Args:
      network: a `Network` or a `Classifier` (see `diffax.networks.build`).
      shape: (H, W, C) of its images.
      attention_order: how the channels of qkv are sorted: 'legacy' (heads, then q, k, v: all of
        improved-diffusion, most of guided-diffusion) or 'new' (q, k, v, then heads: the flag
        `use_new_attention_order`). The wrong one loads, and samples noise.

    Raises:
      ValueError: an unknown attention_order, or a network that OpenAI's classes cannot express.
    """
    for name, _ in getattr(network, "conditioners", ()):
        if name not in ("label", "low_res"):
            raise ValueError(f"OpenAI's networks have no names for the condition {name!r}")
    shapes = param_shapes(network, *example_inputs(network, shape))
    return make_table(shapes, renaming(network, shapes, attention_order))


def renaming(network: nn.Module, paths: Iterable[Path], attention_order: str) -> Rename:
    """(path, shape) of a parameter -> (OpenAI's names, layout), for the parameters at `paths`; see `table`."""
    if attention_order not in ORDERS:
        raise ValueError(f"attention_order {attention_order!r} is unknown; use one of {ORDERS}")
    net = network if isinstance(network, Classifier) else network.unet
    if not net.mid_attention:
        raise ValueError("OpenAI's networks have attention in the middle; set mid_attention")
    levels, blocks = len(net.channel_mult), net.num_res_blocks
    places = {path[:-1] for path in paths}

    def block_key(name: str) -> str:
        """The number of a block: 'down_1_attention_0' -> 'input_blocks.5.1'."""
        way, level, kind, i = re.fullmatch(r"(down|mid|up)_?(\d*)_(\w+?)_?(\d*)", name).groups()
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

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        *module, leaf = path[1:] if path[0] in ("unet", "label") else path
        if leaf == "position":
            return ["out.2.positional_embedding"], kernel(shape)
        top, *inner = module
        if top in TOP:
            return [f"{TOP[top]}.{LEAF[leaf]}"], plain(leaf, shape)
        pool = isinstance(network, Classifier) and HEADS[net.pool]
        if pool and top in pool:
            if top != "attention":
                layout = DENSE_2D if net.pool == "adaptive" and leaf == "kernel" else (plain(leaf, shape))
                return [f"{pool[top]}.{LEAF[leaf]}"], layout
            return _attention(pool[top], ATTENTION_POOL, inner, leaf, shape, "new")
        block = block_key(top)
        if inner[0] in RES_BLOCK:
            layout = DENSE_2D if (inner[0], leaf) == ("skip", "kernel") else plain(leaf, shape)
            return [f"{block}.{RES_BLOCK[inner[0]]}.{LEAF[leaf]}"], layout
        if inner[0] == "conv":
            child = "op" if top.startswith("down") else "conv"
            return [f"{block}.{child}.{LEAF[leaf]}"], plain(leaf, shape)
        return _attention(block, ATTENTION, inner, leaf, shape, attention_order)

    return rename


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


def net_config(constructor: Mapping, *, model: str = "UNetModel", image_size: int | None = None) -> Architecture:
    """The architecture that a constructor call of OpenAI's code describes.

    Args:
      constructor: the keyword arguments; those left out have OpenAI's defaults.
      model: 'UNetModel', 'SuperResModel' or 'EncoderUNetModel'.
      image_size: needed where the constructor has none (improved-diffusion); wins over it.

    Raises:
      ValueError: an argument has a value that is not supported.
    """
    given = dict(constructor)
    models = ("UNetModel", "SuperResModel", "EncoderUNetModel")
    if model not in models:
        raise ValueError(f"model {model!r} is unknown; use one of {models}")
    defaults = dict(
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
    needed = ("in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")
    for key in given:
        if key not in defaults and key not in needed:
            refuse(model, key, given[key], "this option is unknown")
    for key in needed:
        if key not in given:
            raise ValueError(f"{model} needs {key}; pass all constructor arguments")
    c = {**defaults, **given}
    if c["dims"] != 2:
        refuse(model, "dims", c["dims"], "only images (2) are supported")
    size = image_size or c["image_size"]
    if not size:
        raise ValueError(f"{model} has no image_size among its arguments; pass image_size")
    improved = "image_size" not in given
    if improved and c["channel_mult"][0] != 1 and model != "EncoderUNetModel":
        refuse(
            model,
            "channel_mult",
            c["channel_mult"],
            "improved-diffusion starts at the base width; pass image_size in the constructor for guided-diffusion",
        )

    factors = [2**level for level in range(len(c["channel_mult"]))]
    positive = {key: max(c[key] or 0, 0) for key in ("num_head_channels", "num_heads_upsample")}
    net = dict(
        name="unet",
        channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention=tuple(f for f in factors if f in tuple(c["attention_resolutions"])),
        heads=c["num_heads"],
        head_channels=positive["num_head_channels"],
        dropout=float(c["dropout"]),
        scale_shift=bool(c["use_scale_shift_norm"]),
        resample="biggan" if c["resblock_updown"] else "conv" if c["conv_resample"] else "pool",
        remat="blocks" if c["use_checkpoint"] else "none",
    )
    takes = []
    if model == "EncoderUNetModel":
        net.update(name="classifier", pool=c["pool"])
    else:
        net.update(heads_up=positive["num_heads_upsample"])
        takes += ["label"] if c["num_classes"] else []
        takes += ["low_res"] if model == "SuperResModel" else []
    return Architecture(
        net=net,
        shape=(size, size, c["in_channels"]),
        takes=tuple(takes),
        num_classes=c["num_classes"] or 0,
        out_channels=c["out_channels"],
        attention_order=ORDERS[bool(c["use_new_attention_order"])],
    )
