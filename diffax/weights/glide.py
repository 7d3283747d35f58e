"""Weights and options of openai/glide-text2im.

Its `Text2ImUNet` is guided-diffusion's `UNetModel` with a text transformer beside it, which every attention layer
reads. The U-Net's parameters bear the names that `openai` knows, and attention is in its legacy order throughout.
"""

from collections.abc import Mapping
from typing import Any

from diffax.components import spec
from diffax.weights import openai
from diffax.weights.architecture import IDS, Architecture, image_model, refuse
from diffax.weights.openai import LEAF, plain, qkv_bias, qkv_kernel
from diffax.weights.table import Layout, Path, Table, make_table, param_shapes

# the conditions that a class reads besides the text, in the order of their channels
MODELS = {
    "Text2ImUNet": (),
    "SuperResText2ImUNet": ("low_res",),
    "InpaintText2ImUNet": ("inpaint",),
    "SuperResInpaintText2ImUnet": ("inpaint", "low_res"),
}
OPTIONS = {
    "xf_width": "width",
    "xf_layers": "layers",
    "xf_heads": "heads",
    "n_vocab": "vocab_size",
    "text_ctx": "length",
    "xf_final_ln": "final_norm",
    "xf_padding": "padding_embedding",
}
# the text transformer's parameters outside of blocks, and in one
TOP = {
    "token": "token_embedding",
    "position": "positional_embedding",
    "padding": "padding_embedding",
    "norm_out": "final_ln",
    "proj": "transformer_proj",
}
BLOCK = {
    "norm1": "ln_1",
    "qkv": "attn.c_qkv",
    "proj": "attn.c_proj",
    "norm2": "ln_2",
    "mlp_0": "mlp.c_fc",
    "mlp_1": "mlp.c_proj",
}


def table(model: Any) -> Table:
    """The map between GLIDE's parameters and those of a diffusion model with the condition 'text'.

    Raises:
      ValueError: a network that GLIDE's classes cannot express.
    """
    shapes = param_shapes(model.init)
    for name, _ in getattr(model.net, "encoders", ()):
        if name not in ("text", "inpaint", "low_res"):
            raise ValueError(f"GLIDE's networks have no names for the condition {name!r}")
    unet = openai.renaming(openai.core(model), shapes, "legacy")

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        return _text(path[1:], shape) if path[0] == "text" else unet(path, shape)

    return make_table(shapes, rename)


def _text(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
    """The parameters of the text transformer."""
    top, *inner = path
    if top in TOP:
        leaf = inner[0] if inner else ""
        return [".".join([TOP[top], *(LEAF[name] for name in inner)])], plain(leaf, shape)
    block = top.replace("block_", "transformer.resblocks.")
    projection, _, leaf = inner[-1].rpartition("_")
    if projection:
        layout = qkv_kernel(shape, "legacy", ()) if leaf == "kernel" else qkv_bias(shape, "legacy")
    else:
        layout = plain(leaf, shape)
    return [f"{block}.{BLOCK[projection or inner[-2]]}.{LEAF[leaf]}"], layout


def net_config(constructor: Mapping, *, model: str = "Text2ImUNet", image_size: int) -> Architecture:
    """The architecture that a constructor call of GLIDE's code describes.

    Args:
      constructor: the keyword arguments, with n_vocab in place of the tokenizer; those left out have GLIDE's defaults.
      model: 'Text2ImUNet', 'SuperResText2ImUNet', 'InpaintText2ImUNet' or 'SuperResInpaintText2ImUnet'.
      image_size: of what it makes: 64, or 256 for an upsampler, in the models that were published.

    Raises:
      ValueError: an argument is missing, or has a value that is not supported.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; use one of {tuple(MODELS)}")
    c = dict(xf_padding=False, xf_ar=0.0, share_unemb=False, cache_text_emb=False, num_classes=None) | dict(constructor)
    for key in OPTIONS:
        if key not in c:
            raise ValueError(f"{model} needs {key}; pass all constructor arguments")
    if not c["xf_width"]:
        refuse(model, "xf_width", c["xf_width"], "only networks that read text are supported")
    if c["xf_ar"]:
        refuse(model, "xf_ar", c["xf_ar"], "a language model's loss on the text is not supported")
    if c["num_classes"]:
        refuse(model, "num_classes", c["num_classes"], "GLIDE's networks read no label")
    ours = {*OPTIONS, "xf_ar", "share_unemb", "cache_text_emb"}
    unet = openai.net_config({key: c[key] for key in c if key not in ours} | {"image_size": image_size})
    text = {name: c[key] for key, name in OPTIONS.items()}
    ids = {"name": IDS, "length": text.pop("length"), "vocab_size": text["vocab_size"]}
    conditions = {"text": spec("condition", "text", tokenizer=ids, **text)}
    for name in MODELS[model]:
        conditions[name] = spec("condition", name, **({"factor": 2} if name == "low_res" else {}))  # any factor
    return image_model(unet.net, shape=unet.shape, out_channels=unet.out_channels, conditions=conditions)
