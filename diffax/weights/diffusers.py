"""Weights and options of `UNet2DModel` of huggingface/diffusers (google/ddpm-cifar10-32, ...), and names of its kin."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffax.components import spec
from diffax.weights.architecture import Architecture, image_model, refuse
from diffax.weights.openai import Rename, core
from diffax.weights.table import DENSE, DENSE_2D, SAME, Layout, Path, Table, kernel, make_table, param_shapes

RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
TOP = {
    "conv_in": "conv_in",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "embed": "class_embedding",
}
LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
PROJECTIONS = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}


def table(model: Any, *, flip_sin_to_cos: bool | None = None) -> Table:
    """The map between the parameters of `UNet2DModel` and those of a diffusion model.

    Args:
      model: a diffusion model with a U-Net.
      flip_sin_to_cos: whether the published timestep embedding has its cosines first. Where the network's own order
        differs, the rows of the layer that reads it are swapped; None: it does not.

    Raises:
      ValueError: a network that `UNet2DModel` cannot express.
    """
    return make_table(param_shapes(model.init), renaming(core(model), flip_sin_to_cos))


def renaming(net: nn.Module, flip_sin_to_cos: bool | None = None) -> Rename:
    """(path, shape) of a U-Net's parameter -> (diffusers' names, layout); see `table`."""
    if not hasattr(net, "attention_up"):
        raise ValueError("diffusers' UNet2DModel is a U-Net, and this network is none")
    swap = flip_sin_to_cos not in (None, net.sinusoid == "openai")
    levels = len(net.channel_mult)

    def block_key(name: str) -> str:
        """'up_0_attention_1' -> 'up_blocks.3.attentions.1', of four levels."""
        way, level, kind, i = re.fullmatch(r"(down|mid|up)_?(\d*)_(\w+?)_?(\d*)", name).groups()
        child = {"block": "resnets", "attention": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}[
            kind
        ] + f".{i or 0}"
        if way == "mid":
            return f"mid_block.{child}"
        return f"{way}_blocks.{level if way == 'down' else levels - 1 - int(level)}.{child}"

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        if path[0] not in ("net", "label"):
            raise ValueError(f"diffusers' UNet2DModel has no {'/'.join(path)}; use the conditions that it has")
        top, *inner, leaf = path[1:]
        layout = kernel(shape) if leaf == "kernel" else SAME
        if top in TOP:
            if swap and (top, leaf) == ("time_0", "kernel"):
                layout = _swapped_sinusoid(shape)
            return [f"{TOP[top]}.{LEAF[leaf]}"], layout
        block = block_key(top)
        if inner[0] in RES_BLOCK:
            layout = DENSE_2D if (inner[0], leaf) == ("skip", "kernel") else layout
            return [f"{block}.{RES_BLOCK[inner[0]]}.{LEAF[leaf]}"], layout
        if inner[0] == "conv":
            return [f"{block}.conv.{LEAF[leaf]}"], layout
        projection, _, leaf = leaf.rpartition("_")
        if projection:
            layout = split_qkv_kernel(shape) if leaf == "kernel" else split_qkv_bias(shape)
            return [f"{block}.{name}.{LEAF[leaf]}" for name in PROJECTIONS[projection]], layout
        child = {"norm": "group_norm", "proj": "to_out.0"}[inner[-1]]
        return [f"{block}.{child}.{LEAF[leaf]}"], layout

    return rename


def _swapped_sinusoid(shape: tuple[int, ...]) -> Layout:
    """Linear, whose rows for the sines and for the cosines change places."""
    half = shape[0] // 2
    order = np.r_[half : 2 * half, :half, 2 * half : shape[0]]
    return Layout(lambda w: DENSE.to_flax(w)[order], lambda w: DENSE.to_torch(w[order]))


def split_qkv_kernel(shape: tuple[int, ...]) -> Layout:
    """P of [C, E] <-> [E, P, heads, D]: P projections from E channels to C = heads * D."""
    inputs, parts, heads, width = shape
    return Layout(
        lambda *w: np.stack([part.T.reshape(inputs, heads, width) for part in w], 1),
        lambda w: tuple(w[:, i].reshape(inputs, heads * width).T for i in range(parts)),
    )


def split_qkv_bias(shape: tuple[int, ...]) -> Layout:
    """P of [C] <-> [P, heads, D]."""
    return Layout(lambda *w: np.stack(w).reshape(shape), lambda w: tuple(part.reshape(-1) for part in w))


def modern_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the attention layers of files from before diffusers 0.15 to today's names."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(?<=\.attentions\.)(\d+)\.(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{old[m[2]]}.", key): value for key, value in state_dict.items()}


# Arguments of `UNet2DModel` and their defaults, and the values of those that only some are supported of.
DEFAULTS = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    mid_block_type="UNetMidBlock2D",
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(224, 448, 672, 896),
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    downsample_type="conv",
    upsample_type="conv",
    dropout=0.0,
    act_fn="silu",
    attention_head_dim=8,
    norm_num_groups=32,
    attn_norm_num_groups=None,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
    num_train_timesteps=None,
)
SUPPORTED = dict(
    center_input_sample=(False,),
    time_embedding_type=("positional",),
    freq_shift=(0, 1),
    mid_block_type=("UNetMidBlock2D",),
    mid_block_scale_factor=(1,),
    downsample_padding=(0, 1),
    downsample_type=("conv",),
    upsample_type=("conv",),
    act_fn=("silu", "swish"),
    resnet_time_scale_shift=("default", "scale_shift"),
    class_embed_type=(None,),
)
MODEL = "UNet2DModel"


def net_config(config: Mapping, *, image_size: int | Sequence[int] | None = None) -> Architecture:
    """The architecture that the config.json of a `UNet2DModel` describes.

    Args:
      config: the constructor arguments; those left out have the defaults of diffusers. Names that start with an
        underscore are ignored.
      image_size: wins over `sample_size`; needed if there is none.

    Raises:
      ValueError: an argument has a value that is not supported.
    """
    c = _options(config)
    size = image_size or c["sample_size"]
    if not size:
        raise ValueError(f"{MODEL} has no sample_size; pass image_size")
    height, width = (size, size) if isinstance(size, int) else size
    labels = c["num_class_embeds"]
    return image_model(
        _unet(c),
        shape=(height, width, c["in_channels"]),
        out_channels=c["out_channels"],
        conditions={} if labels is None else {"label": spec("condition", "label", num_classes=labels)},
    )


def _options(config: Mapping) -> dict[str, Any]:
    """All arguments of a `UNet2DModel`, checked."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in given:
        if key not in DEFAULTS:
            refuse(MODEL, key, given[key], "this option is unknown")
    c = {**DEFAULTS, **given}
    for key, values in SUPPORTED.items():
        if c[key] not in values:
            refuse(MODEL, key, c[key], f"supported: {', '.join(map(repr, values))}")
    base, groups = c["block_out_channels"][0], c["norm_num_groups"]
    if c["time_embedding_dim"] not in (None, 4 * base):
        refuse(MODEL, "time_embedding_dim", c["time_embedding_dim"], f"supported: {4 * base}")
    # diffusers leaves the norm out of the middle's attention when the blocks scale and shift
    plain = c["resnet_time_scale_shift"] == "default"
    middle = c["attn_norm_num_groups"] or (groups if plain else None)
    if c["add_attention"] and middle != groups:
        refuse(
            MODEL,
            "attn_norm_num_groups",
            c["attn_norm_num_groups"],
            f"the middle attention must be normalised like the rest, in {groups} groups",
        )
    return c


def _unet(c: Mapping[str, Any]) -> Any:
    """The section of the network with these options."""
    base, levels = c["block_out_channels"][0], len(c["block_out_channels"])
    down = _factors(_attends(MODEL, c["down_block_types"], "DownBlock2D", levels))
    up = _factors(_attends(MODEL, c["up_block_types"], "UpBlock2D", levels)[::-1])
    return spec(
        "network",
        "unet",
        channels=base,
        channel_mult=tuple(_multiple(width, base) for width in c["block_out_channels"]),
        num_res_blocks=c["layers_per_block"],
        attention=down,
        attention_up=None if up == down else up,
        mid_attention=bool(c["add_attention"]),
        heads=1,
        head_channels=c["attention_head_dim"] or 0,
        dropout=float(c["dropout"]),
        scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
        resample="conv",
        downsample_pad="both" if c["downsample_padding"] else "end",
        sinusoid="ho" if c["freq_shift"] else "openai",
        norm_eps=c["norm_eps"],
        groups=c["norm_num_groups"],
        kernel_init="ho",
    )


def _factors(attends: Sequence[bool]) -> tuple[int, ...]:
    """The downsampling factors of the levels with attention."""
    return tuple(2**level for level, yes in enumerate(attends) if yes)


def _attends(model: str, types: Sequence[str], plain: str, levels: int) -> list[bool]:
    """Whether each block has attention."""
    for kind in types:
        if kind not in (plain, f"Attn{plain}"):
            refuse(model, "block type", kind, f"supported: {plain!r}, {'Attn' + plain!r}")
    if len(types) != levels:
        refuse(model, "block types", types, f"there are {levels} block_out_channels")
    return [kind.startswith("Attn") for kind in types]


def _multiple(width: int, base: int) -> float:
    """The multiplier m with int(m * base) == width."""
    exact = width / base
    if exact.is_integer():
        return int(exact)
    return exact if int(exact * base) == width else math.nextafter(exact, math.inf)
