"""Weights and options of kakaobrain/karlo, and of huggingface/diffusers' copy of it.

karlo is an unCLIP system as in DALL-E 2: a diffusion prior, a decoder and two upsamplers, of which the second takes the
last step. Its U-Nets are guided-diffusion's, with GLIDE's attention; their parameters bear the names that `openai`
knows. Its text and pictures are read by CLIP (ViT-L/14), which is a model of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffax import config as configs
from diffax.components import each, spec
from diffax.weights import diffusers, openai
from diffax.weights.architecture import Architecture, ClipSizes, Ids, image_model, refuse
from diffax.weights.diffusers import PROJECTIONS, split_qkv_bias, split_qkv_kernel
from diffax.weights.glide import BLOCK
from diffax.weights.openai import LEAF, Rename, plain, qkv_bias, qkv_kernel
from diffax.weights.table import SAME, Entry, Layout, Path, Table, make_table, param_shapes

# a class of karlo's, or of a whole file of weights, and which network is in it
MODELS = {
    "PriorTransformer": "prior",
    "PriorDiffusionModel": "prior",
    "PLMImUNet": "decoder",
    "Text2ImModel": "decoder",
    "Text2ImProgressiveModel": "decoder",
    "SuperResUNetModel": "upsampler",
    "ImprovedSupRes64to256ProgressiveModel": "upsampler",
}
UPSAMPLERS = {"first": "model_first_steps", "last": "model_last_step"}
# parameters outside of blocks: karlo's names of a prior's and of a decoder's, diffusers' of a prior's
PRIOR = {
    "net/position": "positional_embedding",
    "net/query": "prd_emb",
    "net/time_0": "time_embed.0",
    "net/time_1": "time_embed.2",
    "net/proj_in": "clip_img_proj",
    "net/norm_out": "final_ln",
    "net/proj_out": "out_proj",
    "text_embedding/tokens": "text_emb_proj",
    "text_features/proj": "text_enc_proj",
}
DECODER = {
    "image_embedding/null": "cf_param",
    "image_embedding/vector": "clip_emb",
    "image_embedding/tokens": "clip_tok_proj",
    "text_embedding/vector": "text_feat_proj",
    "text_features/proj": "text_seq_proj.0",
    "text_features/norm": "text_seq_proj.1",
}
DIFFUSERS_PRIOR = {
    "net/position": "positional_embedding",
    "net/query": "prd_embedding",
    "net/time_0": "time_embedding.linear_1",
    "net/time_1": "time_embedding.linear_2",
    "net/proj_in": "proj_in",
    "net/norm_out": "norm_out",
    "net/proj_out": "proj_to_clip_embeddings",
    "text_embedding/tokens": "embedding_proj",
    "text_features/proj": "encoder_hidden_states_proj",
}
DIFFUSERS_DECODER = {
    "image_embedding/null": "learned_classifier_free_guidance_embeddings",
    "image_embedding/vector": "clip_image_embeddings_project_to_time_embeddings",
    "image_embedding/tokens": "clip_extra_context_tokens_proj",
    "text_embedding/vector": "embedding_proj",
    "text_features/proj": "encoder_hidden_states_proj",
    "text_features/norm": "text_encoder_hidden_states_norm",
}
DIFFUSERS_BLOCK = {
    "norm1": "norm1",
    "proj": "attn1.to_out.0",
    "norm2": "norm3",
    "mlp_0": "ff.net.0.proj",
    "mlp_1": "ff.net.2",
}


def table(model: Any, *, prefix: str = "") -> Table:
    """The map between karlo's parameters and those of a model: a prior, a decoder or an upsampler.

    Args:
      model: a diffusion model, such as `net_config(...).model()`.
      prefix: of all names in the file: 'model.' in those of the prior and the decoder. Those of the upsamplers are
        `upsampler_table`'s.

    Raises:
      ValueError: a network that karlo's classes cannot express.
    """
    shapes = param_shapes(model.init)
    if _is_prior(model):
        return _prefixed(make_table(shapes, _prior), prefix)
    rename_unet = _unet(openai.core(model), shapes)

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        return _outside(DECODER, path, shape) if path[0] not in ("net", "low_res") else rename_unet(path, shape)

    return _prefixed(make_table(shapes, rename), prefix)


def _is_prior(model: Any) -> bool:
    return len(model.shape) == 1


def upsampler_table(model: Any) -> Table:
    """The map between the file of karlo's upsamplers and {'first': parameters, 'last': parameters} of a model.

    'first' walks all steps but the last, 'last' that one. Arguments and errors are those of `table`.
    """
    one = table(model)
    return [
        entry._replace(path=(part, *entry.path))
        for part, prefix in UPSAMPLERS.items()
        for entry in _prefixed(one, f"{prefix}.")
    ]


def diffusers_table(model: Any) -> Table:
    """The map between diffusers' `PriorTransformer` and {'net': parameters of a model, 'stats': ...}.

    Its file holds 'clip_mean' and 'clip_std' besides, the statistics of the embeddings [D], which are under 'stats' as
    'mean' and 'std'; karlo keeps them in a file of their own.
    """
    if not _is_prior(model):
        raise ValueError("diffusers' PriorTransformer makes embeddings, and this model makes pictures")
    net = [
        entry._replace(path=("net", *entry.path)) for entry in make_table(param_shapes(model.init), _diffusers_prior)
    ]
    (size,) = model.shape
    stats = [
        Entry((f"clip_{name}",), ((1, size),), ("stats", name), (size,), _leading_one(1)) for name in ("mean", "std")
    ]
    return net + stats


def diffusers_decoder_table(model: Any, *, part: str) -> Table:
    """The map between one of the two files of diffusers' decoder and its share of the parameters of a model.

    An upsampler in diffusers is a `UNet2DModel`, of which `diffusers.table` knows the names.

    Args:
      model: see `table`.
      part: 'decoder', the U-Net (`UNet2DConditionModel`), or 'text_proj', what brings the embeddings to it
        (`UnCLIPTextProjModel`).

    Raises:
      ValueError: a network that these classes cannot express.
    """
    rename_unet = diffusers.renaming(openai.core(model))

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        return _outside(DIFFUSERS_DECODER, path, shape) if path[0] != "net" else rename_unet(path, shape)

    whole = make_table(param_shapes(model.init), rename)
    return [entry for entry in whole if (entry.path[0] == "net") == (part == "decoder")]


def stats_table(model: Any) -> Table:
    """The map between karlo's file of statistics (ViT-L-14_stats.th), see `flat`, and {'stats': {'mean', 'std'}}.

    Args:
      model: the CLIP whose embeddings they are of.
    """
    size = model.features
    return [Entry((str(i),), ((size,),), ("stats", name), (size,), SAME) for i, name in enumerate(("mean", "std"))]


def flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The two arrays of a file of statistics, read, as [D]; another file is left as it is."""
    if set(state_dict) != {"0", "1"}:
        return dict(state_dict)
    return {key: np.asarray(value).reshape(-1) for key, value in state_dict.items()}


def stats(mean: Any, std: Any) -> dict[str, np.ndarray]:
    """The two arrays of karlo's file of statistics (ViT-L-14_stats.th), checked: {'mean': [D], 'std': [D]} float32.

    The prior works on (embedding - mean) / std of raw embeddings, which are not of unit length.

    Raises:
      ValueError: they are no two vectors of one size, or a deviation is not positive.
    """
    mean, std = (np.asarray(a, np.float32).reshape(-1) for a in (mean, std))
    if mean.shape != std.shape or not np.isfinite(mean).all() or not (np.isfinite(std) & (std > 0)).all():
        raise ValueError(
            f"the statistics are {mean.shape} and {std.shape}, or not positive numbers; give the mean and the "
            "standard deviation of the embeddings, in this order"
        )
    return {"mean": mean, "std": std}


def _prefixed(entries: Table, prefix: str) -> Table:
    return [entry._replace(keys=tuple(prefix + key for key in entry.keys)) for entry in entries]


def _outside(names: Mapping[str, str], path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """A parameter outside of blocks."""
    place = "/".join(path[:2])
    if place not in names:
        raise ValueError(f"karlo's networks have no {'/'.join(path)}; use the conditions that they have")
    if len(path) == 2:
        return [names[place]], SAME if path[1] == "null" else _leading_one(3 - len(shape))
    leaf = path[-1]
    layout = _tokens(shape, leaf) if path[1] == "tokens" else plain(leaf, shape)
    return [f"{names[place]}.{LEAF[leaf]}"], layout


def _leading_one(count: int) -> Layout:
    """[1, ..., N] <-> [N], `count` ones."""
    return Layout(lambda w: w[(0,) * count], lambda w: (w[(None,) * count],))


def _tokens(shape: tuple[int, ...], leaf: str) -> Layout:
    """A linear layer whose output is c * tokens + token <-> [..., tokens, width]."""
    tokens, width = shape[-2:]
    if leaf == "bias":
        return Layout(lambda w: w.reshape(width, tokens).T, lambda w: (w.T.reshape(-1),))
    inputs = shape[0]
    return Layout(
        lambda w: w.reshape(width, tokens, inputs).transpose(2, 1, 0),
        lambda w: (w.transpose(2, 1, 0).reshape(width * tokens, inputs),),
    )


def _prior(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """A parameter of the prior, in karlo's names."""
    if not path[1].startswith("block_"):
        return _outside(PRIOR, path, shape)
    block, leaf = path[1].replace("block_", "transformer.resblocks."), path[-1]
    projection, _, leaf = leaf.rpartition("_")
    if projection:
        layout = qkv_kernel(shape, "legacy", ()) if leaf == "kernel" else qkv_bias(shape, "legacy")
    else:
        layout = plain(leaf, shape)
    return [f"{block}.{BLOCK[projection or path[-2]]}.{LEAF[leaf]}"], layout


def _diffusers_prior(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """A parameter of the prior, in diffusers' names."""
    if not path[1].startswith("block_"):
        return _outside(DIFFUSERS_PRIOR, path, shape)
    block, leaf = path[1].replace("block_", "transformer_blocks."), path[-1]
    if leaf.startswith("qkv_"):
        kernel = leaf == "qkv_kernel"
        layout = split_qkv_kernel(shape) if kernel else split_qkv_bias(shape)
        return [f"{block}.attn1.{part}.{'weight' if kernel else 'bias'}" for part in PROJECTIONS["qkv"]], layout
    return [f"{block}.{DIFFUSERS_BLOCK[path[-2]]}.{LEAF[leaf]}"], plain(leaf, shape)


def _unet(net: nn.Module, shapes: Mapping[Path, tuple[int, ...]]) -> Rename:
    """(path, shape) of a U-Net's parameter -> (karlo's names, layout)."""
    if getattr(net, "mid_attention", True):
        return openai.renaming(net, shapes, "legacy")
    # guided-diffusion has attention between the two middle blocks, so that the second of them is its third
    rename_openai = openai.renaming(net.clone(mid_attention=True), shapes, "legacy")

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        keys, layout = rename_openai(path, shape)
        return [key.replace("middle_block.2.", "middle_block.1.") for key in keys], layout

    return rename


def net_config(constructor: Mapping, *, model: str, image_size: int = 64) -> Architecture:
    """The architecture that a constructor call of karlo's code describes.

    Args:
      constructor: the keyword arguments of the class, or, of 'ImprovedSupRes64to256ProgressiveModel', the
        hyper-parameters of its config: channels, depth, channels_multiple, dropout.
      model: a key of `MODELS`.
      image_size: of what a U-Net makes: 64, or 256 of the upsamplers, in the models that were published.

    Raises:
      ValueError: an argument is missing, or has a value that is not supported.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; use one of {tuple(MODELS)}")
    make = {"prior": _prior_config, "decoder": _decoder_config, "upsampler": _upsampler_config}[MODELS[model]]
    return make(model, dict(constructor), image_size)


def _prior_config(model: str, c: dict[str, Any], image_size: int) -> Architecture:
    del image_size
    _need(model, c, ("text_ctx", "xf_width", "xf_layers", "xf_heads", "xf_final_ln", "clip_dim"))
    size = c["clip_dim"]
    net = spec("network", "prior", width=c["xf_width"], layers=c["xf_layers"], heads=c["xf_heads"])
    net.final_norm = bool(c["xf_final_ln"])
    section = configs.section("diffusion", shape=(size,), clip="clip", net=net, predicts="x", variance="fixed_small")
    section.conditions = each(
        "condition", "text_features", text_embedding=spec("condition", "text_embedding", enters="token")
    )
    return Architecture(section, size, clip=ClipSizes(size, size, Ids(length=c["text_ctx"])))


def _decoder_config(model: str, c: dict[str, Any], image_size: int) -> Architecture:
    own = ("text_ctx", "xf_width", "clip_dim", "clip_emb_mult", "clip_emb_type", "clip_emb_drop")
    _need(model, {key: c[key] for key in own if key in c}, own)
    if c["clip_emb_type"] != "image":
        refuse(model, "clip_emb_type", c["clip_emb_type"], "only a decoder of image embeddings is supported")
    width, size = c["xf_width"], c["clip_dim"]
    unet = openai.net_config({key: c[key] for key in c if key not in own} | {"image_size": image_size})
    conditions = {
        "image_embedding": spec("condition", "image_embedding", tokens=c["clip_emb_mult"], width=width),
        "text_embedding": spec("condition", "text_embedding"),
        "text_features": spec("condition", "text_features", width=width, norm=True),
    }
    clip = ClipSizes(size, size, Ids(length=c["text_ctx"]), shape=unet.shape)
    return image_model(unet.net, shape=unet.shape, out_channels=unet.out_channels, conditions=conditions, clip=clip)


def diffusers_net_config(config: Mapping) -> Architecture:
    """The architecture that the config.json of diffusers' `PriorTransformer` describes.

    Args:
      config: the constructor arguments; those left out have the defaults of diffusers. Names that start with an
        underscore are ignored.

    Raises:
      ValueError: an argument has a value that karlo's prior does not have.
    """
    model = "PriorTransformer"
    sizes = dict(
        num_attention_heads=32,
        attention_head_dim=64,
        num_layers=20,
        embedding_dim=768,
        num_embeddings=77,
    )
    fixed = dict(
        additional_embeddings=4,
        dropout=0.0,
        time_embed_act_fn="silu",
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_dim=None,
        embedding_proj_dim=None,
        clip_embed_dim=None,
    )
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in given.items():
        if key not in sizes and value != fixed.get(key, NotImplemented):
            why = f"only {fixed[key]!r} is supported" if key in fixed else "this option is unknown"
            refuse(model, key, value, why)
    c = sizes | given
    return net_config(
        dict(
            text_ctx=c["num_embeddings"],
            xf_width=c["num_attention_heads"] * c["attention_head_dim"],
            xf_layers=c["num_layers"],
            xf_heads=c["num_attention_heads"],
            xf_final_ln=True,
            clip_dim=c["embedding_dim"],
        ),
        model=model,
    )


def _upsampler_config(model: str, c: dict[str, Any], image_size: int) -> Architecture:
    if model != "SuperResUNetModel":
        _need(model, c, ("channels", "depth", "channels_multiple", "dropout"))
        c = dict(
            in_channels=3,
            model_channels=c["channels"],
            out_channels=3,
            num_res_blocks=c["depth"],
            channel_mult=c["channels_multiple"],
            dropout=c["dropout"],
            attention_resolutions=(),
            resblock_updown=True,
        )
    mid_attention = c.pop("use_middle_attention", False)
    unet = openai.net_config(c | {"image_size": image_size}, model="SuperResModel")
    unet.net.mid_attention = bool(mid_attention)
    unet.conditions["low_res"].resize = "bicubic"
    return unet


def _need(model: str, given: Mapping, names: Sequence[str]) -> None:
    """Raises a ValueError unless exactly `names` are given."""
    for key in names:
        if key not in given:
            raise ValueError(f"{model} needs {key}; pass all constructor arguments")
    for key in given:
        if key not in names:
            refuse(model, key, given[key], "this option is unknown")
