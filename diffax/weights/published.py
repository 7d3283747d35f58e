"""The files that were published, how each is recognised, and the way from a file to a workdir and back.

A file says nothing of its network. It is told by the number of its parameters, and then by the names and shapes of all
its arrays, which must be those that the network of a config would have.
"""

import copy
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from diffax import config as configs
from diffax import networks
from diffax.data import images
from diffax.errors import UserError
from diffax.models import stages
from diffax.networks.clip import CLIP
from diffax.training import checkpoint
from diffax.weights import clip, diffusers, glide, karlo, openai
from diffax.weights import files as weights
from diffax.weights.architecture import Architecture, refuse
from diffax.weights.table import Table, misfit, parameter, to_torch


class Family(NamedTuple):
    """Files of one program.

    Attributes:
      marks: arrays of which they have one, and those of the families further down none.
      table: (network, shape, **options) -> the table.
      rename: {name: array} of an old file -> the same under today's names.
      networks: what it is a table of.
      parts: of files that hold more than one thing, the first names of the table's paths, and the field of the section
        that names whose it is; '' for the section itself. 'stats' are no parameters but go into the section's
        `embedding`.
      rests: of files that hold a part of a network, by the table's option that says which: the folder of the others.
    """

    marks: tuple[str, ...]
    table: Callable[..., Table]
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    networks: tuple[type, ...] = (networks.Network,)
    parts: Mapping[str, str] = {}
    rests: Mapping[str, str] = {}


def _clip(names: str, *marks: str, **rests: str) -> Family:
    """The family of CLIPs of these names; `rests` are those of files of one encoder."""
    table = functools.partial(clip.file_table, names=names)
    return Family(marks, table, clip.without_buffers, (CLIP,), rests=rests)


FAMILIES = {
    "glide": Family(("transformer_proj.weight",), glide.table),
    "openai": Family(("input_blocks.0.0.weight",), openai.table, networks=(networks.Network, networks.Classifier)),
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
    "karlo": Family(("model.prd_emb", "model.cf_param"), functools.partial(karlo.table, prefix="model.")),
    "karlo-upsampler": Family(
        ("model_first_steps.input_blocks.0.0.weight",), karlo.upsampler_table, parts={"first": "", "last": "last"}
    ),
    "karlo-stats": Family(("0",), karlo.stats_table, karlo.flat, (CLIP,), {"stats": ""}),
    "diffusers-prior": Family(("prd_embedding",), karlo.diffusers_table, parts={"net": "", "stats": "clip"}),
}
HO = {"flip_sin_to_cos": False}
# Options of a family's table for networks that were not published.
CHOICES = {
    "openai": [{"attention_order": "legacy"}],
    "glide-clip": [{"tower": tower} for tower in clip.GLIDE_FILES],
    "transformers": [{}, {"tower": "text"}, {"tower": "image"}],
    "diffusers-decoder": [{"part": "decoder"}, {"part": "text_proj"}],
}
# The folders of a system of diffusers that hold a part each; of the encoders, only if both are there.
PARTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
ENCODERS = ("text_encoder", "image_encoder")


class Published(NamedTuple):
    """A file that was published.

    Attributes:
      file: its name.
      place: where it lies: the address of its folder, or the name of a model on the Hugging Face hub, and the folder
        in that.
      family: key of `FAMILIES`.
      parameters: how many numbers it holds.
      config: which config is of it, with the variant; '' if there is none.
      section: which section of that; of a file of several, the first.
      options: of the family's table.
      architecture: the network, where there is no config.
    """

    file: str
    place: str
    family: str
    parameters: int
    config: str = ""
    section: str = "base"
    options: Mapping[str, Any] = {}
    architecture: Callable[[], Architecture] | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return pathlib.Path(self.file).stem

    @property
    def folder(self) -> str:
        """The name of the folder that it lies in."""
        return self.place.rpartition("/")[2]

    @property
    def rest(self) -> str:
        """The folder of the rest of its network, if it holds a part alone."""
        rests = FAMILIES[self.family].rests
        return next((rests[value] for value in self.options.values() if value in rests), "")


IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021"
GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
GLIDE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
NEW = {"attention_order": "new"}
UNET, MODEL, UP = "diffusion_pytorch_model.safetensors", "model.safetensors", "up"
GENERIC = ("diffusion_pytorch_model", "model", "pytorch_model")  # what tells nothing of a file; its folder does
CLIPS = "https://openaipublic.azureedge.net/clip/models"
KARLO = "https://arena.kakaocdn.net/brainrepo/models/karlo-public/v1.0.0.alpha"
KARLO_HUB = "kakaobrain/karlo-v1-alpha"
VIT_B_32 = functools.partial(clip.transformers_config, {"vision_config": {"patch_size": 32}})

# Parameters as counted in the networks that the programs build from the flags of their README files.
PUBLISHED = (
    Published("imagenet64_uncond_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64"),
    Published("imagenet64_uncond_vlb_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64:vlb"),
    Published("imagenet64_cond_270M_250K.pt", IMPROVED, "openai", 273_049_350, "iddpm_imagenet_64:cond"),
    Published("cifar10_uncond_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10"),
    Published("cifar10_uncond_vlb_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10:vlb"),
    Published("upsample_cond_500K.pt", IMPROVED, "openai", 279_792_390, "iddpm_upsample_64_256", UP),
    Published("lsun_uncond_100M_1200K_bs128.pt", IMPROVED, "openai", 113_676_678, "iddpm_lsun_256"),
    Published("lsun_uncond_100M_2400K_bs64.pt", IMPROVED, "openai", 113_676_678, "iddpm_lsun_256:bs64"),
    Published("64x64_diffusion.pt", GUIDED, "openai", 295_904_454, "adm_imagenet_64", options=NEW),
    Published("128x128_diffusion.pt", GUIDED, "openai", 421_529_606, "adm_imagenet_128"),
    Published("256x256_diffusion.pt", GUIDED, "openai", 553_838_086, "adm_imagenet_256"),
    Published("256x256_diffusion_uncond.pt", GUIDED, "openai", 552_814_086, "adm_imagenet_256_uncond"),
    Published("512x512_diffusion.pt", GUIDED, "openai", 558_997_638, "adm_imagenet_512"),
    Published("lsun_bedroom.pt", GUIDED, "openai", 552_814_086, "adm_lsun_bedroom"),
    Published("lsun_cat.pt", GUIDED, "openai", 552_814_086, "adm_lsun_cat"),
    Published("lsun_horse.pt", GUIDED, "openai", 552_814_086, "adm_lsun_horse"),
    Published("lsun_horse_nodropout.pt", GUIDED, "openai", 552_814_086, "adm_lsun_horse:nodropout"),
    Published("64_256_upsampler.pt", GUIDED, "openai", 311_795_910, "adm_upsample_64_256", UP),
    Published("128_512_upsampler.pt", GUIDED, "openai", 308_835_270, "adm_upsample_128_512", UP),
    Published("64x64_classifier.pt", GUIDED, "openai", 65_438_568, "adm_classifier_64", "classifier"),
    Published("128x128_classifier.pt", GUIDED, "openai", 42_568_040, "adm_classifier_128", "classifier"),
    Published("256x256_classifier.pt", GUIDED, "openai", 54_096_360, "adm_classifier_256", "classifier"),
    Published("512x512_classifier.pt", GUIDED, "openai", 54_448_360, "adm_classifier_512", "classifier"),
    Published("base.pt", GLIDE, "glide", 385_030_726, "glide_base_64"),
    Published("upsample.pt", GLIDE, "glide", 398_361_286, "glide_upsample_256", UP),
    Published("base_inpaint.pt", GLIDE, "glide", 385_037_638, "glide_inpaint_64"),
    Published("upsample_inpaint.pt", GLIDE, "glide", 398_368_198, "glide_inpaint_256", UP),
    Published("clip_image_enc.pt", GLIDE, "glide-clip", 86_443_776, "glide_clip", "clip", {"tower": "image"}),
    Published("clip_text_enc.pt", GLIDE, "glide-clip", 71_679_488, "glide_clip", "clip", {"tower": "text"}),
    Published("ViT-B-32.pt", CLIPS, "openai-clip", 151_277_313, architecture=VIT_B_32),
    Published("ViT-B-16.pt", CLIPS, "openai-clip", 149_620_737, "clip_vit_b16", "clip"),
    Published("ViT-L-14.pt", CLIPS, "openai-clip", 427_616_513, "karlo", "clip"),
    Published(MODEL, "openai/clip-vit-base-patch32", "transformers", 151_277_313, architecture=VIT_B_32),
    Published(MODEL, "openai/clip-vit-base-patch16", "transformers", 149_620_737, "clip_vit_b16", "clip"),
    Published(MODEL, "openai/clip-vit-large-patch14", "transformers", 427_616_513, "karlo", "clip"),
    Published("prior-ckpt-step=01000000-of-01000000.ckpt", KARLO, "karlo", 1_022_028_544, "karlo", "prior"),
    Published("decoder-ckpt-step=01000000-of-01000000.ckpt", KARLO, "karlo", 893_318_086, "karlo", "decoder"),
    Published("improved-sr-ckpt-step=1.2M.ckpt", KARLO, "karlo-upsampler", 1_383_159_046, "karlo", UP),
    Published("ViT-L-14_stats.th", KARLO, "karlo-stats", 1_536, "karlo", "clip"),
    Published(UNET, f"{KARLO_HUB}/prior", "diffusers-prior", 1_022_030_080, "karlo", "prior"),
    Published(UNET, f"{KARLO_HUB}/decoder", "diffusers-decoder", 885_439_686, "karlo", "decoder", {"part": "decoder"}),
    Published(
        UNET, f"{KARLO_HUB}/text_proj", "diffusers-decoder", 7_878_400, "karlo", "decoder", {"part": "text_proj"}
    ),
    Published(UNET, f"{KARLO_HUB}/super_res_first", "diffusers-upsampler", 691_579_523, "karlo", UP),
    Published(UNET, f"{KARLO_HUB}/super_res_last", "diffusers-upsampler", 691_579_523, "karlo", "up_last"),
    Published(MODEL, f"{KARLO_HUB}/text_encoder", "transformers", 123_650_304, "karlo", "clip", {"tower": "text"}),
    Published(
        MODEL,
        f"{KARLO_HUB}-image-variations/image_encoder",
        "transformers",
        303_966_208,
        "karlo",
        "clip",
        {"tower": "image"},
    ),
    Published(UNET, "google/ddpm-cifar10-32", "diffusers", 35_746_307, "ddpm_cifar10", options=HO),
    Published(UNET, "google/ddpm-cat-256", "diffusers", 113_673_219, "ddpm_lsun_256:cat", options=HO),
)
# Configs that put the sections of several of these together, besides those that name them.
SYSTEMS = ("glide", "glide_base_64:clip", "glide:clip")


# ---- recognising -----------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A file of weights, and what it is.

    Attributes:
      path: the file.
      tensors: {name: Tensor}, not read yet.
      config: the config that its networks are in, a plain dict.
      sections: {section of that: the map between the arrays and its parameters}; together they fit.
      settings: {(section, field, field): value} of what it says besides: statistics of embeddings.
      also: another file, whose arrays are among these.
      rest: the folder of the rest of the network of its one section, of which this is a part; '' if nothing is missing.
    """

    path: pathlib.Path
    tensors: Mapping[str, Any]
    config: dict[str, Any]
    sections: Mapping[str, Table]
    settings: Mapping[tuple[str, ...], Any] = {}
    also: pathlib.Path | None = None
    rest: str = ""


def network(row: Published) -> tuple[Any, tuple[int, ...]]:
    """The network of a published file, and the shape of its pictures."""
    if row.architecture is not None:
        architecture = row.architecture()
        return architecture.build(), architecture.shape
    model = stages.build(_config(row.config), row.section)
    return model.net, model.shape


def table(row: Published) -> Table:
    """The map between the arrays of a published file and parameters; a ValueError where its network cannot have one."""
    return _table(row.family, *network(row), **row.options)


def _table(family: str, net: Any, shape: Sequence[int], **options: Any) -> Table:
    if not isinstance(net, FAMILIES[family].networks):
        raise ValueError(f"{family} has no such network")
    return FAMILIES[family].table(net, shape, **options)


def recognise(tensors: Mapping[str, Any], name: str = "") -> tuple[Published, Table]:
    """The published file that arrays come from, and its table.

    Args:
      tensors: {name: array}, of which shapes alone are looked at; under today's names (see `Family.rename`).
      name: of the file, or of the folder that it was in, for files whose arrays have the same shapes.

    Raises:
      UserError: no published file has arrays of these names and shapes, or several have.
    """
    shapes = weights.shapes(tensors)
    size = weights.count(list(shapes.values()))
    rows = [row for row in PUBLISHED if row.parameters == size and _bears_marks(tensors, FAMILIES[row.family])]
    rows = [row for row in rows if name in (row.name, row.folder)] or rows
    found = [(row, known) for row, known in ((row, table(row)) for row in rows) if not misfit(shapes, known)]
    if not found:
        raise UserError(
            f"these {len(shapes)} arrays of {size:,} numbers are of no model that was published; pass --model=CONFIG, "
            "of the network that they were trained with"
        )
    if len(found) > 1:
        if len({row.config for row, _ in found}) == 1:
            there = " or ".join(row.folder for row, _ in found)
            raise UserError(f"these arrays could be of {there}; call the file, or its folder, after the one that it is")
        there = ", ".join(row.config or row.name for row, _ in found)
        raise UserError(f"these arrays could be of any of {there}; pass --model=NAME of one")
    return found[0]


def match(
    path: str | os.PathLike[str], *, model: str | None = None, which: str | None = None, attention_order: str = ""
) -> Match:
    """Reads which arrays a file holds, and finds their network.

    Args:
      path: a file (see `weights.read`), or the folder of a model of diffusers or transformers. Of the two files of
        GLIDE's CLIP either one, if the other lies beside it. A file with a part of a network is for `match_all`.
      model: the config, or the published file, that it is; by default it is recognised.
      which: of several state dicts in the file, see `weights.read`.
      attention_order: of one of OpenAI's networks that was not published, 'legacy' or 'new', see `openai.table`.

    Raises:
      UserError: the file cannot be read, is not recognised, or does not fit the model.
    """
    found = _match(path, model, which, attention_order)
    _check_whole(found)
    return found


def _match(path: str | os.PathLike[str], model: str | None, which: str | None, attention_order: str = "") -> Match:
    """`match`, of a part of a network too."""
    path = pathlib.Path(path)
    file = _file_in(path)
    tensors = weights.read(file, which)
    family = next((name for name, f in FAMILIES.items() if _bears_marks(f.rename(tensors), f)), None)
    if family is None:
        raise UserError(f"these are weights of no known program; {file}; known are those listed by --list")
    tensors = FAMILIES[family].rename(tensors)
    if path.is_dir() and model is None and family == "diffusers":
        return _match_folder(path, file, tensors)
    name = path.absolute().parent.name if path.stem in GENERIC else path.stem
    try:
        row, known = _named(tensors, model, family, attention_order, name) if model else recognise(tensors, name)
    except UserError as error:
        if not model and (found := _other_clip(file, tensors, family)):
            return found
        what, _, advice = str(error).partition("; ")
        raise UserError(f"{what}; {file}; {advice}") from None
    if row.architecture:
        name = row.name if row.place == CLIPS else row.place.rpartition("/")[2]
        return Match(file, tensors, _clip_config(name, row.architecture()), {"clip": known})
    config = _config(row.config)
    sections, settings = _parts(tensors, family, config, row.section, known)
    found = Match(file, tensors, config, sections, settings, rest=row.rest)
    return _with_other_encoder(found, row) if family == "glide-clip" else found


def match_all(
    files: Sequence[str | os.PathLike[str]], *, model: str | None = None, which: str | None = None, **options: Any
) -> list[Match]:
    """`match` of files that make one system.

    Args:
      files: the files, and folders of models or of a whole system of diffusers (see `PARTS`). Of the two of GLIDE's
        CLIP one is enough.
      model: the config of the first one, and of others that are not recognised by themselves.
      which: see `match`.
      **options: see `match`.

    Raises:
      UserError: see `match`; or two files are of one section; or the rest of a network is not among them.
    """
    found: list[Match] = []
    for file in itertools.chain.from_iterable(map(_parts_in, files)):
        if file in [m.also for m in found]:
            continue
        m = _match(file, model, which, **options) if not found else None
        for name in (None, model) if m is None else ():
            try:
                m = _match(file, name, which, **options)
                break
            except UserError:
                if name == model:
                    raise
        other = next((i for i, other in enumerate(found) if _are_one_network(other, m)), None)
        if other is not None:
            found[other] = _joined(found[other], m)
            continue
        for section in m.sections:
            if any(section in other.sections for other in found):
                raise UserError(f"{m.path} is one more {section}; {files[0]}; pass one file for each part of a system")
        found.append(m)
    for m in found:
        _check_whole(m)
    return found


def _are_one_network(a: Match, b: Match) -> bool:
    """Whether two files hold different parts of the network of one section."""
    return bool(a.rest and b.rest) and a.rest != b.rest and {*a.sections} == {*b.sections}


def _joined(a: Match, b: Match) -> Match:
    """The network of which two files hold a part each; their arrays have different names."""
    sections = {name: [*table, *b.sections[name]] for name, table in a.sections.items()}
    return a._replace(tensors={**a.tensors, **b.tensors}, sections=sections, rest="")


def _check_whole(m: Match) -> None:
    """Raises UserError if a file holds a part of a network alone."""
    if m.rest:
        (section,) = m.sections
        raise UserError(
            f"this is a part of the {section} of {m.config['name']}, and {m.rest} is missing; {m.path}; pass the file "
            "of that too, or one file of the whole"
        )


def _parts(
    tensors: Mapping[str, Any], family: str, config: Mapping[str, Any], section: str, known: Table
) -> tuple[dict[str, Table], dict[tuple[str, ...], Any]]:
    """What a file holds, by the sections of a config: tables, and settings."""
    parts = FAMILIES[family].parts
    if not parts:
        return {section: known}, {}
    sections, settings = {}, {}
    for top, field in parts.items():
        owner = config[section][field] if field else section
        entries = [entry._replace(path=entry.path[1:]) for entry in known if entry.path[0] == top]
        if top == "stats":
            arrays = {entry.path[0]: parameter(tensors, entry) for entry in entries}
            settings |= {(owner, "embedding", name): a.tolist() for name, a in karlo.stats(**arrays).items()}
        else:
            sections[owner] = entries
    return sections, settings


def _other_clip(file: pathlib.Path, tensors: Mapping[str, Any], family: str) -> Match | None:
    """A CLIP of a size that OpenAI did not publish, as its arrays or the config.json beside it describe it."""
    if family not in ("openai-clip", "transformers"):
        return None
    beside, settings = file.with_name("config.json"), {}
    if family == "transformers":
        if not beside.exists():
            return None
        settings = _json(beside)
        if settings.get("architectures", ["CLIPModel"]) != ["CLIPModel"]:
            return None
    try:
        hf = family == "transformers"
        architecture = clip.transformers_config(settings) if hf else clip.openai_config(tensors)
        known = _table(family, architecture.build(), architecture.shape)
        name = file.absolute().parent.name if hf else file.stem
        config = _clip_config(_name(name) or "clip", architecture)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}; {file}; convert another model") from error
    if complaint := misfit(weights.shapes(tensors), known):
        raise UserError(
            f"the weights are not those of their sizes: {complaint.replace('; ', ', ')}; {file}; download it again"
        )
    return Match(file, tensors, config, {"clip": known})


def _name(text: str) -> str:
    """A text as the name of a config: '' if nothing is left of it."""
    return re.sub(r"[^\w.+-]", "_", text).lstrip("_.+-")


def _clip_config(name: str, architecture: Architecture) -> dict[str, Any]:
    """A config of one section, the CLIP of an architecture.

    Raises:
      ValueError: a config has no field for one of its options.
    """
    config = configs.config_defaults(name, stages=("clip",))
    section, net = config.clip, architecture.net
    section.shape, section.takes = architecture.shape, ("text",)
    section.text.update(tokenizer="clip", length=net["text"]["length"])
    section.net.update(name="clip", features=net["features"], activation=net["activation"])
    for tower in ("image", "text"):
        options = net[tower]
        if options.get("hidden", 0) not in (0, 4 * options["width"]):
            refuse("CLIPModel", "intermediate_size", options["hidden"], f"supported: {4 * options['width']}")
        section.net[tower].update({key: options[key] for key in ("width", "layers", "heads")})
    section.net.image.update(patch=net["image"]["patch"], noised=False)
    section.net.text.vocab_size = net["text"]["vocab_size"]
    config.eval.num = 0
    configs.validate(config)
    return configs.to_dict(config)


def _bears_marks(tensors: Mapping[str, Any], family: Family) -> bool:
    return any(mark in tensors for mark in family.marks)


def _with_other_encoder(found: Match, row: Published) -> Match:
    """The CLIP of which `found` is one encoder: the file of the other lies beside it, under its published name."""
    mine = row.options["tower"]
    ((other, name),) = ((tower, name) for tower, name in clip.GLIDE_FILES.items() if tower != mine)
    file = found.path.with_name(name)
    if not file.exists():
        raise UserError(f"this is one encoder of a CLIP, and {name} is not beside it; {found.path}; put both there")
    network = stages.build(found.config, row.section).net
    tensors = {mine: found.tensors, other: weights.read(file)}
    if complaint := misfit(weights.shapes(tensors[other]), clip.table(getattr(network, other), "glide")):
        what = f"this is not the {other} encoder that goes with {found.path.name}: {complaint.replace('; ', ', ')}"
        raise UserError(f"{what}; {file}; download it again")
    sections = {row.section: clip.glide_table(network)}
    return found._replace(tensors=clip.glide_arrays(**tensors), sections=sections, also=file)


def _named(
    tensors: Mapping[str, Any], model: str, family: str, attention_order: str, name: str
) -> tuple[Published, Table]:
    """The published file of that name or config, or else the section of a config, that arrays fit.

    Sections that a published file of this `name` is of are tried first: those of an upsampler are alike.
    """
    rows = [row for row in PUBLISHED if model in (row.file, row.name, row.place, row.config)]
    of_family = [row for row in rows if row.family == family]
    if not of_family and (not rows or model in [row.config for row in rows]):
        ways = itertools.product(configs.trained_sections(_config(model)), CHOICES.get(family, [{}]))
        rows = [Published("", "", family, 0, model, section, options) for section, options in ways]
    namesakes = [row.section for row in PUBLISHED if name in (row.name, row.folder)]
    rows = sorted(of_family or rows, key=lambda row: row.section not in namesakes)
    if attention_order and family == "openai":
        rows = [row._replace(options={"attention_order": attention_order}) for row in rows]
    shapes = weights.shapes(tensors)
    tried = []
    for row in rows:
        tried.append(_tried(row, shapes))
        if not tried[-1][2]:
            break
    row, known, complaint = min(tried, key=lambda found: len(found[2]))
    if complaint:
        raise UserError(
            f"the weights do not fit {model}: {complaint.replace('; ', ', ')}; pass the --model they are of"
        )
    return row, known


def _tried(row: Published, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Published, Table, str]:
    """The table of a row, and what keeps arrays of these shapes from fitting it."""
    try:
        known = table(row)
    except ValueError as error:
        return row, [], str(error)
    return row, known, misfit(shapes, known)


def _config(name: str) -> dict[str, Any]:
    config = configs.load(name)
    configs.validate(config)
    return configs.to_dict(config)


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights in the folder of a model of diffusers, or of transformers; the better one first."""
    wanted = ("diffusion_pytorch_model.*", "unet/diffusion_pytorch_model.*", MODEL, "pytorch_model.bin")
    found = [file for pattern in wanted for file in sorted(folder.glob(pattern), reverse=True)]
    return [file for file in found if file.suffix in (".safetensors", ".bin")]


def _parts_in(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The folders of the models in the folder of a system of diffusers; anything else is itself."""
    path = pathlib.Path(path)
    if not path.is_dir() or _files_in(path):
        return [path]
    there = [path / name for name in (*PARTS, *ENCODERS) if _files_in(path / name)]
    if {path / name for name in ENCODERS} <= {*there}:
        return there
    return [folder for folder in there if folder.name not in ENCODERS] or [path]


def _file_in(path: pathlib.Path) -> pathlib.Path:
    """The file of weights that a folder holds; a file is itself."""
    if not path.is_dir():
        return path
    if found := _files_in(path):
        return found[0]
    raise UserError(
        f"there is no diffusion_pytorch_model.safetensors or .bin, and no {MODEL}; {path}; download it, or pass a file"
    )


# ---- folders of diffusers --------------------------------------------------------------------------------------------

SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    variance_type="fixed_small",
    clip_sample=True,
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    thresholding=False,
)
BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
VARIANCES = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}


def _match_folder(path: pathlib.Path, file: pathlib.Path, tensors: Mapping[str, Any]) -> Match:
    """A `UNet2DModel` of diffusers with its config.json, and the settings of its scheduler if they are there."""
    model = _json(file.parent / "config.json")
    config = configs.config_defaults(_name(path.resolve().name) or "diffusers")
    stage = config.base
    if model.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"this is a {model['_class_name']}; {file.parent}; only a UNet2DModel can be converted")
    scheduler = file.parent / "scheduler_config.json"
    if not scheduler.exists():
        scheduler = path / "scheduler" / "scheduler_config.json"
    try:
        architecture = diffusers.net_config(model)
        net = architecture.net
        if net.pop("attention_up") != net["attention"] or not net.pop("mid_attention"):
            raise ValueError("attention must be at the same levels on both sides, and in the middle")
        stage.shape, stage.takes = architecture.shape, architecture.takes
        stage.num_classes = architecture.num_classes
        stage.net.update(net)
        _set_scheduler(stage, _json(scheduler) if scheduler.exists() else {})
        configs.validate(config)
    except ValueError as error:
        raise UserError(f"{error}; {file.parent}; convert another model") from error
    found = diffusers.table(
        architecture.build(), architecture.shape, flip_sin_to_cos=model.get("flip_sin_to_cos", True)
    )
    if complaint := misfit(weights.shapes(tensors), found):
        raise UserError(f"the weights do not fit the config.json beside them: {complaint}; {file}; download both again")
    return Match(file, tensors, configs.to_dict(config), {"base": found})


def _set_scheduler(stage: Any, settings: Mapping[str, Any]) -> None:
    """Sets a stage's schedule and variance as a scheduler_config.json says, by default as DDPMScheduler does."""
    c = {**SCHEDULER, **{key: settings[key] for key in SCHEDULER if key in settings}}
    for key, known in (("beta_schedule", BETAS), ("prediction_type", PREDICTS), ("variance_type", VARIANCES)):
        if c[key] not in known:
            raise ValueError(f"the scheduler has {key}={c[key]!r}, supported are {', '.join(known)}")
    for key in ("trained_betas", "rescale_betas_zero_snr", "thresholding"):
        if c[key]:
            raise ValueError(f"the scheduler has {key}={c[key]!r}, which is not supported")
    stage.schedule.update(name=BETAS[c["beta_schedule"]], steps=c["num_train_timesteps"])
    stage.schedule.update(beta_start=c["beta_start"], beta_end=c["beta_end"])
    stage.predicts, stage.variance = PREDICTS[c["prediction_type"]], VARIANCES[c["variance_type"]]
    if stage.variance == "learned_range":
        stage.loss.name = "hybrid"
    stage.guidance = ("clip_denoised",) if c["clip_sample"] else ()


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name} ({error}); {path.parent}; it must lie beside the weights") from error
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no settings; {path.parent}; it must lie beside the weights")
    return found


# ---- into a workdir, or straight into memory -------------------------------------------------------------------------


def is_weights(source: Any) -> bool:
    """Whether `source` names files of weights and not a workdir: a file, a folder that holds one, or a list of them."""
    if isinstance(source, list | tuple):
        return all(map(is_weights, source))
    path = pathlib.Path(source)
    if path.is_dir():
        return any(map(_files_in, _parts_in(path)))
    return path.suffix in weights.SUFFIXES or (path.is_file() and path.suffix != ".py")


def load(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], config: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The parameters in files of weights.

    Args:
      files: one file, or several that make one system, such as a model and the classifier that guides it.
      config: the name of the config that the first one is of, and others that are not recognised by themselves; by
        default it is recognised.

    Returns:
      (config, {section: parameters}, {section: training step}). Stages whose file is not given are left out of the
      config, and so is guidance by a classifier whose file is not given.

    Raises:
      UserError: a file cannot be read, is not recognised or fits nothing; two files are of one section; a stage reads
        captions or pictures by a CLIP whose file is not given.
    """
    files = files if isinstance(files, list | tuple) else [files]
    found = match_all(files, model=os.fspath(config) if config else None)
    names = [name for m in found for name in m.sections]
    whole = _together(found, [], {}, [m.config for m in found])
    if whole is None:
        raise UserError(f"no config has all of {', '.join(names)}; {files[0]}; load the files one by one")
    for name in names:
        if (needed := whole[name]["clip"]) and needed not in names:
            raise UserError(f"{name} reads captions or pictures by a CLIP, {needed}; {files[0]}; pass its file too")
        if (needed := whole[name]["last"]) and needed not in names:
            raise UserError(f"the last step of {name} is that of {needed}; {files[0]}; pass its file too")
    params = {
        name: traverse_util.unflatten_dict({entry.path: parameter(m.tensors, entry) for entry in table})
        for m in found
        for name, table in m.sections.items()
    }
    return whole, params, {name: training_step(m, name) for m in found for name in m.sections}


def _together(
    found: Sequence[Match],
    present: Sequence[str],
    settings: Mapping[tuple[str, ...], Any],
    whole: Sequence[dict[str, Any]],
) -> dict[str, Any] | None:
    """The config of what some files hold, and of sections that are there already; None if there is no such system.

    Args:
      found: the files.
      present: the other sections.
      settings: see `Match`; those that are there already.
      whole: configs to take if they have all sections, before those of `SYSTEMS`.

    Raises:
      UserError: the network of a section differs in that system; statistics alone.
    """
    names = [*present, *(name for m in found for name in m.sections)]
    config = _holding(names, whole)
    if config is None:
        return None
    for m in found:
        _check_same_networks(m, config)
        settings = {**settings, **m.settings}
    if not names:
        raise UserError(f"these are statistics of embeddings alone; {found[0].path}; give the files of the models too")
    return _with_settings(only(config, names), settings)


def _with_settings(config: Mapping[str, Any], settings: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The config with these values of `Match.settings`; those of sections that it has not are left out."""
    config = copy.deepcopy(dict(config))
    for (section, *path, leaf), value in settings.items():
        if section in config:
            functools.reduce(dict.__getitem__, path, config[section])[leaf] = value
    return config


def _settings(config: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """What conversion may have set in a config."""
    sections = {name: c for name, c in config.items() if isinstance(c, Mapping) and "embedding" in c}
    return {(name, "embedding", key): c["embedding"][key] for name, c in sections.items() for key in ("mean", "std")}


def _holding(sections: Sequence[str], whole: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of some configs, or of `SYSTEMS`, that has all these sections."""
    for config in itertools.chain(whole, map(_config, SYSTEMS)):
        if {*sections} <= {*configs.trained_sections(config)}:
            return config
    return None


def _check_same_networks(m: Match, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the sections of a config have the networks of those of the match."""
    for section, field in itertools.product(m.sections, ("shape", "takes", "num_classes", "net", "schedule", "text")):
        if m.config[section][field] != config[section][field]:
            raise UserError(
                f"this is the {section} of {m.config['name']}, which differs from that of {config['name']} in "
                f"{field}; {m.path}; keep the two apart"
            )


def only(config: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """A config without the sections that are not named, and without guidance by a classifier among them.

    A CLIP whose embeddings a named one reads stays, because without it nothing can be said of that; and so does the
    network of its last step.
    """
    needed = {config[name][field] for name in sections for field in ("clip", "last")}
    left_out = {*configs.trained_sections(config)} - {*sections} - needed
    config = {key: value for key, value in config.items() if key not in left_out}
    config["stages"] = [name for name in config["stages"] if name in sections]
    for name in sections:
        stage = config[name]
        if stage["classifier"] in left_out:
            guidance = [guide for guide in stage["guidance"] if guide not in ("classifier", "clip")]
            config[name] = {**stage, "classifier": "", "guidance": guidance}
    made = [config[name] for name in config["stages"]]
    if not any(set(stage["guidance"]) & set(configs.SCALED) for stage in made):
        config["eval"] = {**config["eval"], "guidance": []}
    if not any(stage["low_res"]["noise"] for stage in made):
        config["eval"] = {**config["eval"], "levels": []}
    # A classifier alone is trained as a stage of its own; among stages it is one where the config says so.
    config["stages"] = config["stages"] or list(sections)
    return config


def training_step(m: Match, section: str) -> int:
    """How long a section was trained: as the file's name says ('ema_0.9999_540000.pt'), else as its config does."""
    said = re.search(r"(?:model|ema_[\d.]+_)(\d{6,})$", m.path.stem)
    return int(said[1]) if said else int(m.config[section]["train"]["steps"])


def save(found: Match | Sequence[Match], workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes the parameters in files to a workdir, as training would have left them, and returns the workdir's config.

    What a published file holds counts as the average of the parameters, where the config has one: none of them says
    whether it does. More files may follow into the same workdir, such as that of the classifier.

    Args:
      found: what `match` or `match_all` found.
      workdir: a new folder, or one that this function wrote.

    Raises:
      UserError: the workdir has such a section already, or another system.
      RunError: it cannot be written.
    """
    workdir = pathlib.Path(workdir)
    found = [found] if isinstance(found, Match) else list(found)
    config = _system(found, workdir)
    configs.validate(configs.from_dict(config))
    with checkpoint.lock(workdir):
        for m in found:
            for name, table in m.sections.items():
                _save_section(m, name, table, config, workdir)
        text = json.dumps(config, indent=2) + "\n"
        images.write_atomically(workdir / "config.json", lambda file: file.write(text.encode()))
    return config


def _save_section(m: Match, name: str, table: Table, config: Mapping[str, Any], workdir: pathlib.Path) -> None:
    params = _unread(m.tensors, table)
    decay = next((str(d) for d in config[name]["train"]["ema"]), None)
    state, ema = ({}, {decay: params}) if decay else ({"params": params}, {})
    with checkpoint.Checkpoints(workdir / name / "checkpoints", keep=1) as checkpoints:
        meta = {"stage": config[name], "seed": config["seed"]}
        checkpoints.save(training_step(m, name), state, ema=ema, meta=meta)
        checkpoints.wait()


def _unread(tensors: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The tree of a file's parameters, each read and converted when it is written: never all of them at once."""
    return traverse_util.unflatten_dict(
        {
            entry.path: checkpoint.LazyArray(
                entry.shape, np.dtype(np.float32), functools.partial(parameter, tensors, entry)
            )
            for entry in table
        }
    )


def _system(found: Sequence[Match], workdir: pathlib.Path) -> dict[str, Any]:
    """The config of a workdir once these files are in it."""
    wanted = [name for m in found for name in m.sections]
    for name in wanted:
        if (workdir / name / "checkpoints").exists():
            raise UserError(f"there are parameters of {name} already; {workdir}; choose another workdir")
    if not (workdir / "config.json").exists():
        config = _together(found, [], {}, [m.config for m in found])
        if config is None:
            raise UserError(f"no config has all of {', '.join(wanted)}; {workdir}; convert them into several workdirs")
        return config
    there = configs.to_dict(configs.from_dict(_json(workdir / "config.json")))
    present = [name for name in there if (workdir / name / "checkpoints").exists()]
    names = dict.fromkeys([*(r.config for r in PUBLISHED if r.config), *SYSTEMS])
    # a variant may have a name of its own
    systems = [_config(n) for n in names if there["name"] in (n.replace(":", "_"), n.partition(":")[0])]
    systems += [m.config for m in found if m.config["name"] == there["name"]]
    whole = [system for system in systems if {*present} <= {*configs.trained_sections(system)}]
    # Only what this module wrote is written again: nothing that a user has set gets lost.
    settings = _settings(there)
    mine = [system for system in whole if _with_settings(only(system, present), settings) == there]
    config = _together(found, present, settings, [*mine, *(m.config for m in found)]) if mine else None
    if config is not None:
        return config
    raise UserError(
        f"the workdir holds {there['name']}, which has no {' or '.join(wanted)} like this one, or was edited; "
        f"{workdir}; choose another workdir"
    )


# ---- back out --------------------------------------------------------------------------------------------------------


def export(
    workdir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    stage: str | None = None,
    decay: str | None = None,
    attention_order: str = "",
) -> int:
    """Writes the parameters of one section of a workdir as .safetensors under PyTorch's names.

    The names are those of openai/guided-diffusion; of openai/glide-text2im for networks that read text, and for a CLIP
    of noisy pictures, whose two files are one here, with 'image.' and 'text.' before the names, and the log of the
    scale as 'logit_scale'; of diffusers' `UNet2DModel` for networks of the DDPM paper; of openai/CLIP for a CLIP of
    clean pictures; of karlo for priors and for what reads their embeddings, and for upsamplers without attention, of
    which one file holds two: that of the stage, and that of its last step.

    Args:
      workdir: what training or `save` wrote.
      path: the file.
      stage: the section; needed if there are several.
      decay: which average, by default the first configured one; the parameters themselves where there is none.
      attention_order: see `openai.table`; by default that of the published file of the same config, or 'legacy'.

    Returns:
      The training step of the parameters.

    Raises:
      UserError: there is no such workdir, section or average; the network has no counterpart in those programs.
    """
    workdir = pathlib.Path(workdir)
    config = configs.to_dict(configs.from_dict(_json(workdir / "config.json")))
    sections = configs.trained_sections(config)
    if stage not in sections and (stage or len(sections) > 1):
        raise UserError(
            f"there is {'no such' if stage else 'more than one'} stage; {workdir}; pass --stage of {sections}"
        )
    stage = stage or sections[0]
    model = stages.build(config, stage)
    family, options = _family(config[stage])
    owners = _owners(config, stage, family, workdir)
    known = [r for r in PUBLISHED if (r.config.replace(":", "_"), r.section) == (config["name"], stage)]
    if family == "openai":
        options = {
            "attention_order": attention_order or (known[0].options if known else {}).get("attention_order", "legacy")
        }
    try:
        names = _table(family, model.net, model.shape, **options)
    except ValueError as error:
        raise UserError(
            f"{stage} cannot be written under PyTorch's names: {error}; {workdir}; load it in diffax"
        ) from None
    found = {part: _restored(config, name, workdir, decay) for part, name in owners.items()}
    step, params = next(iter(found.values()))
    if len(found) > 1:
        params = {part: params for part, (_, params) in found.items()}
    about = {"format": "pt", "config": config["name"], "stage": stage, "step": str(step), "names": family}
    about |= {key: str(value) for key, value in options.items()}
    weights.write(path, to_torch(params, names), about)
    return step


def _owners(config: Mapping[str, Any], stage: str, family: str, workdir: pathlib.Path) -> dict[str, str]:
    """{part of the file of a stage: the section that has its parameters}, see `Family.parts`; one is the stage itself.

    Raises:
      UserError: the upsampler of karlo, if one of its two networks is missing.
    """
    if family != "karlo-upsampler":
        return {"": stage}
    for name in config["stages"]:
        if config[name]["last"] == stage:
            raise UserError(
                f"{stage} is in one file with {name}, whose last step it takes; {workdir}; pass --stage={name}"
            )
    owners = {part: config[stage][field] if field else stage for part, field in FAMILIES[family].parts.items()}
    if not all(owners.values()):
        raise UserError(
            f"karlo's file of an upsampler holds a network for the last step too, and {stage} has none; {workdir}; "
            "load it in diffax"
        )
    missing = [name for name in owners.values() if not _checkpoints(config, name, workdir).exists()]
    if missing:
        raise UserError(
            f"karlo's file of an upsampler holds {' and '.join(owners.values())}, and there are no parameters of "
            f"{' and '.join(missing)}; {workdir}; train it, or convert its file into this workdir"
        )
    return owners


def _checkpoints(config: Mapping[str, Any], name: str, workdir: pathlib.Path) -> pathlib.Path:
    """The folder of a section's checkpoints."""
    return pathlib.Path(config[name]["workdir"] or workdir) / name / "checkpoints"


def _restored(
    config: Mapping[str, Any], name: str, workdir: pathlib.Path, decay: str | None
) -> tuple[int, dict[str, Any]]:
    """(training step, an average of the parameters of a section): see `export`."""
    average = decay or next((str(d) for d in config[name]["train"]["ema"]), None)
    with checkpoint.Checkpoints(_checkpoints(config, name, workdir), read_only=True) as checkpoints:
        step, params, _ = checkpoints.restore_ema(decay=average, raw=average is None)
    return step, params


def _family(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whose names a network bears: those of the program that has such a network."""
    if configs.is_clip(section):
        return "noised-clip" if section["net"]["image"]["noised"] else "openai-clip", {}
    if {*configs.EMBEDDINGS} & {*section["takes"]}:
        return "karlo", {}
    if "text" in section["takes"]:
        return "glide", {}
    if section["net"]["name"] == "unet" and not section["net"]["mid_attention"] and "low_res" in section["takes"]:
        return "karlo-upsampler", {}
    return ("diffusers", HO) if section["net"]["sinusoid"] == "ho" else ("openai", {})
