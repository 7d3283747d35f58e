"""The programs whose files are known, and how a file of each is mapped to a section of a config."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffax import config as configs
from diffax.models.system import System
from diffax.weights import clip, diffusers, glide, karlo, openai
from diffax.weights.table import Table


class Family(NamedTuple):
    """Files of one program.

    Attributes:
      marks: arrays of which they have one, and those of the families further down none.
      table: (model, **options) -> the table.
      rename: {name: array} of an old file -> the same under today's names.
      networks: network components that the program has.
      parts: of files that hold more than one thing, the first names of the table's paths, and (section) -> the name of
        the section that each belongs to; None: the section itself. 'stats' are no parameters but go into the section's
        `embedding`.
      rests: of files that hold a part of a network, by the table's option that says which: the folder of the others.
    """

    marks: tuple[str, ...]
    table: Callable[..., Table]
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    networks: tuple[str, ...] = ("unet",)
    parts: Mapping[str, Callable[[Mapping[str, Any]], str] | None] = {}
    rests: Mapping[str, str] = {}


def finishing(section: Mapping[str, Any]) -> str:
    """The section of the network that takes the last step of a section's model; '' if it takes them all."""
    return next((g["section"] for g in section.get("guidance", {}).values() if g["name"] == "finish_with"), "")


def _its_clip(section: Mapping[str, Any]) -> str:
    return section["clip"]


def _clip(names: str, *marks: str, **rests: str) -> Family:
    """The family of CLIPs of these names; `rests` are those of files of one encoder."""
    table = functools.partial(clip.file_table, names=names)
    return Family(marks, table, clip.without_buffers, ("clip",), rests=rests)


FAMILIES = {
    "glide": Family(("transformer_proj.weight",), glide.table),
    "openai": Family(("input_blocks.0.0.weight",), openai.table, networks=("unet", "classifier")),
    "diffusers-decoder": Family(
        ("mid_block.attentions.0.add_k_proj.weight", "learned_classifier_free_guidance_embeddings"),
        karlo.diffusers_decoder_table,
        rests={"decoder": "text_proj", "text_proj": "decoder"},
    ),
    "diffusers-upsampler": Family(("down_blocks.0.downsamplers.0.norm1.weight",), diffusers.table),
    "diffusers": Family(("conv_in.weight",), diffusers.table, diffusers.modern_names),
    "glide-clip": _clip("glide", "blocks.input.patch_proj", "blocks.input.w_voc"),
    "openai-clip": _clip("openai", "visual.proj"),
    "transformers": _clip(
        "transformers",
        "visual_projection.weight",
        "text_projection.weight",
        text="image_encoder",
        image="text_encoder",
    ),
    "noised-clip": _clip("glide", "image.blocks.input.patch_proj"),
    "karlo": Family(
        ("model.prd_emb", "model.cf_param"), functools.partial(karlo.table, prefix="model."), networks=("unet", "prior")
    ),
    "karlo-upsampler": Family(
        ("model_first_steps.input_blocks.0.0.weight",), karlo.upsampler_table, parts={"first": None, "last": finishing}
    ),
    "karlo-stats": Family(("0",), karlo.stats_table, karlo.flat, ("clip",), {"stats": None}),
    "diffusers-prior": Family(
        ("prd_embedding",), karlo.diffusers_table, networks=("prior",), parts={"net": None, "stats": _its_clip}
    ),
}
HO = {"flip_sin_to_cos": False}  # of the networks of the DDPM paper
# Options of a family's table for networks that were not published.
CHOICES = {
    "openai": [{"attention_order": "legacy"}],
    "glide-clip": [{"tower": tower} for tower in clip.GLIDE_FILES],
    "transformers": [{}, {"tower": "text"}, {"tower": "image"}],
    "diffusers-decoder": [{"part": "decoder"}, {"part": "text_proj"}],
}


def bears_marks(tensors: Mapping[str, Any], family: Family) -> bool:
    """Whether a file of these arrays can be of a family."""
    return any(mark in tensors for mark in family.marks)


def table_of(family: str, config: Mapping[str, Any], section: str, **options: Any) -> Table:
    """The map between the arrays of a file and the parameters of a section.

    Args:
      family: key of `FAMILIES`.
      config: a whole config.
      section: of that.
      **options: of the family's table.

    Raises:
      ValueError: the program has no such network.
    """
    if config[section]["net"]["name"] not in FAMILIES[family].networks:
        raise ValueError(f"{family} has no such network")
    return FAMILIES[family].table(system_of(config).model(section), **options)


def system_of(config: Mapping[str, Any]) -> System:
    """The models of a config, a plain dict."""
    return System(configs.from_dict(config))


def named_config(name: str) -> dict[str, Any]:
    """A config by name, checked, as a plain dict."""
    config = configs.load(name)
    configs.check(config)
    return configs.to_dict(config)
