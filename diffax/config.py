"""Configs: the table of every field, reading one by name with overrides, and the checks (leaf).

`STAGE` and `TOP` are the schema: the default of each field and what it may hold. A config file
starts from `config_defaults` and states only what differs. Everything that a user can get wrong
raises a `UserError` of one line that names the field.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from diffax.conditions.tokenizer import VOCAB_SIZES
from diffax.errors import UserError

# ---- the schema ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Field:
    """The default of a field and what it may hold.

    Attributes:
      default: the value in `stage_defaults` or `config_defaults`.
      kind: int, float, bool or str; of the items where the default is a tuple.
      low: smallest number allowed, itself excluded if `above`.
      high: largest number allowed, itself excluded if `below`.
      choices: strings allowed; a float field with choices takes either.
      lengths: fewest and most items of a tuple.
    """

    default: Any
    kind: type
    low: float = 0
    high: float = 2**31 - 1
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()
    lengths: tuple[int, int] = (0, 64)

    @property
    def many(self) -> bool:
        """Whether the field is a tuple."""
        return isinstance(self.default, tuple)

    @property
    def allowed(self) -> str:
        """What the field may hold, in words."""
        words = {bool: "true or false", str: "text"}.get(self.kind)
        if self.choices:
            words = "one of " + ", ".join(map(repr, self.choices))
        if self.kind in (int, float):
            number = "a whole number" if self.kind is int else "a number"
            brackets = "(["[not self.above], ")]"[not self.below]
            number += f" in {brackets[0]}{self.low:g}, {self.high:.10g}{brackets[1]}"
            words = f"{words} or {number}" if self.choices else number
        if not self.many:
            return words
        low, high = self.lengths
        count = f"{low}" if low == high else f"{low} to {high}"
        return f"a tuple of {count} items, each {words}"

    def has_type(self, value: Any) -> bool:
        """Whether a value, or every item of a tuple, is of the right type."""
        if self.many:
            return isinstance(value, tuple) and all(map(self._item_has_type, value))
        return self._item_has_type(value)

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type lies in the range."""
        if self.many:
            return self.lengths[0] <= len(value) <= self.lengths[1] and all(map(self._in, value))
        return self._in(value)

    def _item_has_type(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.kind is str or bool(self.choices)
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, (int, float) if self.kind is float else self.kind)

    def _in(self, value: Any) -> bool:
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if isinstance(value, bool):
            return True
        return (
            math.isfinite(value)
            and (value > self.low if self.above else value >= self.low)
            and (value < self.high if self.below else value <= self.high)
        )


def _int(default, low=0, high=2**31 - 1, lengths=(0, 64)) -> Field:
    return Field(default, int, low, high, lengths=lengths)


def _float(default, low, high, *, above=False, below=False, lengths=(0, 64)) -> Field:
    return Field(default, float, low, high, above, below, lengths=lengths)


def _choice(default, *choices) -> Field:
    return Field(default, str, choices=choices)


CONTINUOUS = ("cosine_logsnr",)
SAMPLERS = ("ddpm", "ddim", "heun", "dpm_solver_2m", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc")
SCALED = ("classifier", "classifier_free", "clip")  # guidance that has a scale
EMBEDDINGS = ("image_embedding", "text_embedding", "text_features")  # conditions that a CLIP makes
NEEDS_PATH = ("folder", "captions", "tfds", "mix")

STAGE: dict[str, Field] = {
    "shape": _int((32, 32, 3), 1, 8192, lengths=(1, 3)),  # of a prior, the size of the embedding
    "takes": _choice((), "label", "text", "inpaint", "low_res", *EMBEDDINGS),
    "num_classes": _int(0, high=10**7),
    "low_res.factor": _int(4, 2, 64),
    "low_res.noise": _float(0.0, 0, 1),
    "low_res.level": _float(0.0, 0, 1),
    "low_res.truncated": Field(False, bool),
    "low_res.blur": _float(0.0, 0, 1),
    "low_res.blur_sigma": _float((0.4, 0.6), 0, 100, lengths=(2, 2)),
    "low_res.round": Field(True, bool),
    "low_res.jpeg": _int((), 1, 100, lengths=(0, 2)),
    "low_res.crop": _int(0, high=8192),
    "low_res.degrade": _choice("none", "none", "bsr", "bsr_light"),  # BSRGAN's, in place of blur and jpeg
    "text.tokenizer": _choice("glide", "glide", "clip", "demo"),
    "text.vocab": Field("", str),
    "text.length": _int(128, 1, 4096),
    "inpaint.empty": _float(0.0, 0, 1),
    "clip": Field("", str),  # the section of the CLIP whose embeddings it takes or makes
    "embedding.norm": _float(0.0, 0, 10**4),  # of a CLIP: the length its embeddings are given; 0: their own
    "embedding.mean": _float((), -(10**4), 10**4, lengths=(0, 8192)),  # a prior works on (embedding - mean) / std
    "embedding.std": _float((), 0, 10**4, above=True, lengths=(0, 8192)),
    "codes.components": _int(319, 1, 8192),  # of a code prior: the principal components that it writes
    "codes.buckets": _int(1024, 2, 2**16),  # codes of each, and of the product of the two embeddings
    "codes.examples": _int(100_000, 1),  # embeddings that these are fitted to
    "codes.percentile": _float(50.0, 0, 100, below=True),  # sampling asks for a product of this rank or above
    "data.name": _choice(
        "cifar10", "digits", "shapes", "photos", "folder", "captions", "cifar10", "mnist", "tfds", "mix"
    ),
    "data.path": Field("", str),
    "data.data_dir": Field("", str),
    "data.embeddings": Field("", str),  # folder of image embeddings, made by --mode=embed; "": as pictures are read
    "data.split": Field("train", str),
    "data.flip": Field(False, bool),
    "data.crop": _choice("center", "center", "random"),
    "data.max_bad": _int(100),
    "data.workers": _int(0, high=1024),
    "data.shuffle_seed": _int(0),
    "data.holdout": Field((), str, lengths=(0, 48)),
    "data.single": Field(False, bool),
    "data.label": Field("label", str),
    "net.name": _choice("unet", "unet", "classifier", "clip", "prior", "code_prior"),
    "net.channels": _int(128, 4, 2**16),
    "net.channel_mult": _float((1, 2, 2, 2), 0, 64, above=True, lengths=(1, 12)),
    "net.num_res_blocks": _int(2, 1, 64),
    "net.attention": _int((2,), 1, 2**12, lengths=(0, 12)),
    "net.heads": _int(1, 1, 1024),
    "net.head_channels": _int(0, high=2**16),
    "net.heads_up": _int(0, high=1024),
    "net.dropout": _float(0.0, 0, 1, below=True),
    "net.scale_shift": Field(False, bool),
    "net.resample": _choice("conv", "conv", "pool", "biggan"),
    "net.downsample_pad": _choice("both", "both", "end"),
    "net.sinusoid": _choice("openai", "openai", "ho"),
    "net.norm_eps": _float(1e-5, 0, 1, above=True),
    "net.groups": _int(32, 1, 2**16),
    "net.kernel_init": _choice("torch", "torch", "ho"),
    "net.mid_attention": Field(True, bool),
    "net.low_res_resize": _choice("bilinear", "bilinear", "bicubic"),
    "net.pool": _choice("attention", "attention", "adaptive", "spatial", "spatial_v2"),
    "net.text.width": _int(512, 1, 2**16),
    "net.text.layers": _int(16, 1, 256),
    "net.text.heads": _int(8, 1, 1024),
    "net.text.vocab_size": _int(0, high=10**7),
    "net.text.final_norm": Field(True, bool),
    "net.text.padding_embedding": Field(True, bool),
    "net.prior.width": _int(2048, 1, 2**16),
    "net.prior.layers": _int(24, 1, 256),
    "net.prior.heads": _int(32, 1, 1024),
    "net.clip.tokens": _int(4, 1, 256),  # that a U-Net makes of an image embedding
    "net.clip.sequence_width": _int(1536, 1, 2**16),  # of them, where no trained text transformer says it
    "net.image.width": _int(768, 1, 2**16),
    "net.image.layers": _int(12, 1, 256),
    "net.image.heads": _int(12, 1, 1024),
    "net.image.patch": _int(4, 1, 1024),
    "net.image.noised": Field(True, bool),
    "net.features": _int(512, 1, 2**16),
    "net.activation": _choice("gelu", "gelu", "quick_gelu"),
    "net.dtype": _choice("float32", "float32", "bfloat16"),
    "net.remat": _choice("none", "none", "blocks"),
    "net.flash": Field(False, bool),
    "schedule.name": _choice("linear", "linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine", *CONTINUOUS),
    "schedule.steps": _int(1000, 1, 10**6),
    "schedule.beta_start": _float(1e-4, 0, 1, above=True),
    "schedule.beta_end": _float(0.02, 0, 1, above=True),
    "schedule.logsnr_min": _float(-20.0, -100, 100),
    "schedule.logsnr_max": _float(20.0, -100, 100),
    "schedule.rescale_time": Field(False, bool),
    "schedule.continuous": Field(False, bool),
    "predicts": _choice("eps", "eps", "x", "v", "previous_x"),
    "variance": Field(
        "fixed_large",
        float,
        high=1,
        choices=("fixed_small", "fixed_large", "learned", "learned_range", "analytic"),
    ),
    "loss.name": _choice("simple", "simple", "vlb", "hybrid"),
    "loss.weight": _float(1.0, 0, 10**6, above=True),
    "timesteps.name": _choice("uniform", "uniform", "stratified", "loss_second_moment"),
    "drop": _float(0.0, 0, 1, below=True),
    "drop_text": _float(0.0, 0, 1, below=True),  # of the caption, on its own; 0: together with the rest
    "guidance": _choice(("clip_denoised",), "clip_denoised", "dynamic_threshold", "keep_known", *SCALED),
    "guidance_scale": _float(1.0, -(10**4), 10**4),
    "limit": _float(1.0, 0, 10**4, above=True),  # of 'clip_denoised'
    "candidates": _int(1, 1, 64),  # that a prior makes, of which the one nearest to the caption is kept
    "classifier": Field("", str),
    "last": Field("", str),  # the section of a network for the last step of sampling
    "workdir": Field("", str),
    "sampler.name": _choice("ddpm", *SAMPLERS),
    "sampler.eta": _float(0.0, 0, 1),
    "sampler.temperature": _float(1.0, 0, 2),
    "steps": Field("", str),
    "train.start_from": Field("", str),
    "train.steps": _int(800_000, 1),
    "train.batch_size": _int(128, 1, 10**7),
    "train.accumulate": _int(1, 1, 10**5),
    "train.learning_rate": _float(2e-4, 0, 10, above=True),
    "train.text_rate": _float(1.0, 0, 10),
    "train.optimizer": _choice("adam", "adam", "adamw"),
    "train.b1": _float(0.9, 0, 1, below=True),
    "train.b2": _float(0.999, 0, 1, below=True),
    "train.eps": _float(1e-8, 0, 1, above=True),
    "train.weight_decay": _float(0.0, 0, 10),
    "train.decay": _choice("all", "all", "kernels"),
    "train.warmup_steps": _int(5000),
    "train.anneal": _choice("none", "none", "linear", "cosine"),
    "train.clip": _float(1.0, 0, 10**6),
    "train.sam": _float(0.0, 0, 100),  # rho of sharpness-aware minimisation; 0: without
    "train.ema": _float((0.9999,), 0, 1, below=True, lengths=(0, 8)),
    "train.ema_warmup": Field(False, bool),
    "train.log_every": _int(100, 1),
    "train.save_every": _int(10_000, 1),
    "train.sample_every": _int(10_000),
    "train.keep": _int(3, 1, 10**6),
    "train.max_nonfinite": _int(10, 1),
}

TOP: dict[str, Field] = {
    "name": Field("", str),
    "seed": _int(0),
    "parallel": _choice("pmap", "pmap", "jit", "fsdp"),
    "stages": Field(("base",), str, lengths=(1, 16)),
    "sample.num": _int(64, 1, 10**8),
    "sample.batch_size": _int(64, 1, 10**6),
    "sample.seed": _int(0),
    "sample.columns": _int(8, 1, 10**4),
    "sample.save": Field(False, bool),
    "sample.tile": _int(0, high=8192),
    "sample.prompts": Field((), str, lengths=(0, 10**4)),
    "eval.num": _int(1000, high=10**8),
    "eval.batch_size": _int(100, 1, 10**6),
    "eval.bpd_num": _int(64, high=10**8),
    "eval.steps": Field((), str),
    "eval.samplers": _choice((), *SAMPLERS),
    "eval.guidance": _float((), -(10**4), 10**4),
    "eval.levels": _float((), 0, 1),
    "eval.template": Field("a photo of a {}.", str),  # what a CLIP is told of a class: zero-shot accuracy
    "eval.judge": _choice("svc", "svc", "network", "captions"),
}
_RESERVED = {path.split(".")[0] for path in TOP}

# What people type who come from other code, and the field that they mean.
_SYNONYMS = {
    "width": "channels",
    "model_channels": "channels",
    "depth": "num_res_blocks",
    "lr": "learning_rate",
    "bs": "batch_size",
    "batch": "batch_size",
    "microbatch": "accumulate",
    "ema_decay": "ema",
    "ema_rate": "ema",
    "num_steps": "steps",
    "iterations": "steps",
    "grad_clip": "clip",
    "warmup": "warmup_steps",
    "image_size": "shape",
    "resolution": "shape",
    "attention_resolutions": "attention",
    "num_heads": "heads",
    "num_head_channels": "head_channels",
    "resblock_updown": "resample",
    "timestep_respacing": "steps",
    "diffusion_steps": "steps",
    "noise_schedule": "name",
    "class_cond": "takes",
}


def _nest(fields: Mapping[str, Field]) -> ConfigDict:
    config = ConfigDict()
    for path, field in fields.items():
        *sections, leaf = path.split(".")
        section = config
        for name in sections:
            if name not in section:
                section[name] = ConfigDict()
            section = section[name]
        section[leaf] = field.default
        if field.kind is float and field.choices:  # text or a number: no one type to enforce
            section[leaf] = config_dict.FieldReference(field.default, field_type=object)
    return config


def stage_defaults() -> ConfigDict:
    """A stage's section with every field of `STAGE` at its default."""
    return _nest(STAGE)


def add_section(config: ConfigDict, name: str, section: ConfigDict | None = None) -> ConfigDict:
    """Adds a section to a locked config (default values unless given) and returns it."""
    with config.unlocked():
        config[name] = stage_defaults() if section is None else section
    return config[name]


def config_defaults(name: str, stages: Sequence[str] = ("base",)) -> ConfigDict:
    """A config of these stages with every field at its default; locked.

    More sections are added by `add_section(config, 'up')`, and named in `config.stages` if they are stages.
    """
    config = _nest(TOP)
    config.name, config.stages = name, tuple(stages)
    for stage in stages:
        config[stage] = stage_defaults()
    return config.lock()


EMBEDDED = {"digits": (1, 10), "shapes": (3, 6), "photos": (3, 2)}  # data: channels, classes


def tiny(config: ConfigDict, data: str = "digits") -> ConfigDict:
    """Shrinks every stage to 16 pixels of an embedded dataset: minutes on two CPU cores.

    What makes the method stays (prediction, variance, loss, schedule, attention style); size,
    data and length change.

    Args:
      config: edited in place.
      data: a key of `EMBEDDED`.

    Returns:
      The same config.
    """
    channels, classes = EMBEDDED[data]
    for name in trained_sections(config):
        stage = config[name]
        if not is_prior(stage):
            stage.shape = (16, 16, channels)
        stage.num_classes = classes if "label" in stage.takes or is_classifier(stage) else 0
        stage.data.update(name=data, path="", flip=False, crop="center")
        stage.net.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
        stage.net.update(groups=8, dropout=0.0, head_channels=16 if stage.net.head_channels else 0)
        if is_prior(stage):
            stage.net.prior.update(width=64, layers=2, heads=4)
        if "text" in stage.takes:
            stage.text.update(tokenizer="demo", length=16)
            stage.net.text.update(width=64, layers=2, heads=4)
        stage.steps = "50"
        stage.train.update(steps=1000, batch_size=32, accumulate=1, learning_rate=1e-3)
        stage.train.update(warmup_steps=100, ema=(0.99,) if stage.train.ema else (), ema_warmup=True)
        stage.train.update(log_every=50, save_every=500, sample_every=500)
    config.name = f"{config.name}_tiny"
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=64, batch_size=64, bpd_num=32, template="a {}")
    return config


# ---- errors --------------------------------------------------------------------------------------


def closest(word: str, options: Iterable[str], count: int = 1) -> str:
    """`; did you mean a or b?`, or nothing where no option is near."""
    near = difflib.get_close_matches(word, list(options), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(path: str, allowed: str, value: Any) -> UserError:
    return UserError(f"{path} must be {allowed}, got {_show(value)}")


def _unknown(path: str, known: Sequence[str]) -> UserError:
    """The error for a field that is not there; `known` are full dotted paths."""
    parent, _, leaf = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == parent}
    wanted = (leaf, _SYNONYMS.get(leaf))
    near = [p for p in known if p.rpartition(".")[2] in wanted]
    near.sort(key=lambda p: p not in siblings.values())
    if not near and siblings:
        words = siblings | {w: siblings[f] for w, f in _SYNONYMS.items() if f in siblings}
        near = [words[word] for word in difflib.get_close_matches(leaf, words, n=1)]
        elsewhere = {p.rpartition(".")[2]: p for p in known}
        near = near or [elsewhere[word] for word in difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.8)]
    elif not near:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    if near:
        hint = f"did you mean {' or '.join(near[:3])}?"
    elif siblings:
        hint = f"{parent} has {', '.join(siblings)}"
    else:
        hint = f"the sections are {', '.join(sorted({p.split('.')[1] for p in known}))}"
    return UserError(f"unknown field {path}; {hint}")


# ---- reading -------------------------------------------------------------------------------------


def load(path_or_name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config and applies overrides; the result is locked, and not yet validated.

    Args:
      path_or_name: `configs/NAME.py[:variant]`, `NAME[:variant]` or any path to a .py file. What
        is not there as a file is looked up by name among the configs that come with diffax.
        Variants are joined by `,` or `+`.
      overrides: such as `config.base.train.steps=1e3`, with or without `--` in front. Tuples are
        written `1,2,2` or `(1,2,2)`, booleans true or false, the empty tuple none or `()`.

    Returns:
      The config.

    Raises:
      UserError: no such config, variant or field, or a value of the wrong type.
    """
    spec, _, variant = path_or_name.partition(":")
    module = _import(_find(spec))
    if not hasattr(module, "get_config"):
        raise UserError(f"{spec} has no function get_config(variant); it is not a config file")
    known = getattr(module, "VARIANTS", {})
    split_variant(variant, known)
    try:
        config = module.get_config(variant)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the config fails with {type(error).__name__}: {reason}; {path_or_name}; correct the "
            "file (fields are listed in diffax.config)"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config returned {type(config).__name__}; {spec}; return a ConfigDict")
    override(config, overrides)
    return config.lock()


def override(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields of a config in place, as `load` does.

    Raises:
      UserError: an unknown field, or a value of the wrong type.
    """
    for path, text in overridden(overrides).items():
        _override(config, path, text)


def overridden(overrides: Sequence[str]) -> dict[str, str]:
    """The fields that a user sets, {dotted path: text}; the last of two for one field wins.

    Raises:
      UserError: an override is not of the form `config.field=value`.
    """
    found = {}
    for override in overrides:
        path, equals, text = override.removeprefix("--").partition("=")
        if not equals or not path.startswith("config."):
            raise UserError(f"override {_show(override)} is not of the form --config.section.field=value")
        found[path] = text
    return found


def split_variant(variant: str, known: Mapping[str, str], exclusive: Sequence[str] = ()) -> tuple[str, ...]:
    """Splits `vlb,tiny` or `vlb+tiny` into its parts.

    Args:
      variant: what follows the colon; may be empty.
      known: {variant: what it is}.
      exclusive: variants of which one at most can be chosen.

    Raises:
      UserError: a part is unknown or twice there, or excludes another.
    """
    parts = tuple(part for part in re.split("[,+]", variant) if part)
    for i, part in enumerate(parts):
        if part not in known:
            there = "; ".join(f"{name} ({what})" for name, what in known.items()) or "none"
            raise UserError(f"unknown variant {part!r}{closest(part, known)}; variants: {there}")
        if part in parts[:i]:
            raise UserError(f"variant {part!r} is given twice; give it once")
    chosen = [part for part in parts if part in exclusive]
    if len(chosen) > 1:
        raise UserError(f"variants {' and '.join(chosen)} exclude each other; choose one")
    return parts


def available() -> dict[str, tuple[str, dict[str, str]]]:
    """The configs that come with diffax: {name: (first line of the docstring, its variants)}."""
    modules = {name: _import(_folder() / f"{name}.py") for name in _names()}
    return {
        name: ((module.__doc__ or "").strip().split("\n")[0], dict(module.VARIANTS)) for name, module in modules.items()
    }


def _folder() -> Path:
    """Where diffax.configs is installed, or configs/ beside the package in a bare checkout."""
    spec = importlib.util.find_spec("diffax.configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(list(spec.submodule_search_locations)[0])
    return Path(__file__).parent.parent / "configs"


def _names() -> list[str]:
    return sorted(p.stem for p in _folder().glob("*.py") if not p.stem.startswith("_"))


def _find(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.suffix == ".py" and path.is_file():
        return path
    name, names = path.name.removesuffix(".py"), _names()
    if path.parent.as_posix() in (".", "configs") and name in names:
        return _folder() / f"{name}.py"
    raise UserError(
        f"there is no config {_show(spec)}{closest(name, names)}; start with quickstart, see --help for all "
        f"{len(names)}, or give the path of a .py file"
    )


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"diffax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read the config: {type(error).__name__}: {reason}; {path}; correct the file"
        ) from error
    return module


def _override(config: ConfigDict, path: str, text: str):
    fields = _fields(config)
    if path not in fields:
        inside = [known for known in fields if known.startswith(path + ".")]
        if inside:
            raise UserError(f"{path} is a section; set one of its fields, such as {inside[0]}")
        raise _unknown(path, list(fields))
    field = fields[path]
    try:
        value = _parse(field, text.strip())
    except (ValueError, OverflowError):
        raise _bad(path, field.allowed, text) from None
    _set(config, path, value)


def _set(config: ConfigDict, path: str, value: Any):
    *sections, leaf = path.split(".")[1:]
    for name in sections:
        config = config[name]
    config[leaf] = value


def _parse(field: Field, text: str) -> Any:
    """Text -> a value of the field's type; ValueError where it is none."""
    if not field.many:
        return _parse_item(field, text)
    if text.lower() in ("none", "()", "[]", ""):
        return ()
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = None
    if isinstance(literal, tuple | list):
        items = [str(item) for item in literal]
    else:
        items = re.sub(r"^[(\[](.*)[)\]]$", r"\1", text).rstrip(",").split(",")
    return tuple(_parse_item(field, item.strip()) for item in items)


def _parse_item(field: Field, text: str) -> Any:
    if field.kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if field.kind is str or text in field.choices:
        return text
    try:
        number = int(text)
    except ValueError:
        number = float(text)
    if field.kind is float:
        return number if field.many else float(number)
    if number != int(number):
        raise ValueError(text)
    return int(number)


# ---- checking ------------------------------------------------------------------------------------


def _fields(config: ConfigDict) -> dict[str, Field]:
    """The schema of a config with these stages: {full dotted path: field}."""
    fields = {f"config.{path}": field for path, field in TOP.items()}
    for name in _sections(config):
        fields |= {f"config.{name}.{path}": field for path, field in STAGE.items()}
    return fields


def _sections(config: ConfigDict) -> list[str]:
    """The stages, and other sections that look like one (a stage that is not run this time)."""
    stages = config.get("stages", ())
    wanted = [s for s in stages if isinstance(s, str)] if isinstance(stages, tuple) else []
    others = [
        name
        for name, value in config.items()
        if name not in _RESERVED and isinstance(value, ConfigDict) and {"net", "train"} < set(value)
    ]
    return list(dict.fromkeys([*wanted, *others]))


def _walk(config: ConfigDict, path: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _walk(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def validate(config: ConfigDict, *, device_count: int = 1, process_count: int = 1) -> None:
    """Checks every field and how they go together; nothing has been written or compiled yet.

    Args:
      config: from `load` or `from_dict`.
      device_count: devices of all processes.
      process_count: processes.

    Raises:
      UserError: the first problem: the field, what is allowed, what was found.
    """
    _check_stage_names(config)
    fields = _fields(config)
    found = dict(_walk(config, "config"))
    for path, value in found.items():
        _check_known(path, value, fields)
    for path, field in fields.items():
        if path not in found:
            raise UserError(f"{path} is missing; its default is {_show(field.default)}")
        _check_value(path, field, found[path])
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", config.name):
        raise _bad("config.name", "a word of letters, digits, '_', '-' and '.'", config.name)
    guided = [name for name in config.stages if set(config[name].guidance) & set(SCALED)]
    if config.eval.guidance and not guided:
        raise UserError(
            f"config.eval.guidance is {config.eval.guidance}, but no stage is guided; leave it empty, or add "
            f"{' or '.join(map(repr, SCALED))} to a stage's guidance"
        )
    if config.eval.template.count("{}") != 1:
        raise _bad("config.eval.template", "a text with one {} for the name of the class", config.eval.template)
    _check_texts_agree(config)
    before = None
    for name in trained_sections(config):
        stage, where = config[name], f"config.{name}"
        _check_shape(stage, where)
        _check_conditions(stage, where)
        if not is_clip(stage) and not is_prior(stage):
            _check_net(stage, where)
        _check_schedule(stage.schedule, f"{where}.schedule")
        _check_embeddings(config, stage, where)
        if is_clip(stage):
            _check_clip(stage, where)
        elif is_classifier(stage):
            _check_classifier(stage, where)
        else:
            _check_guidance(config, stage, where)
            _check_diffusion(stage, where)
            if is_prior(stage):
                _check_prior(config, stage, where)
            in_row = makes_pictures(stage) and name in config.stages
            _check_low_res(stage, where, config[before] if before and in_row else None, before)
            _check_last(config, stage, where)
            before = name if in_row else before
            for steps in config.eval.steps:
                _check_steps(stage, "config.eval.steps", steps)
        _check_train(stage, where, device_count, process_count)
    if config.eval.levels and not any(config[name].low_res.noise for name in config.stages):
        raise UserError(
            f"config.eval.levels is {config.eval.levels}, but no stage takes a noised picture; leave it empty, or set "
            "the low_res.noise of a stage"
        )
    last = [name for name in config.stages if is_sampled(config[name])][-1:]
    if config.eval.bpd_num and any(set(config[name].takes) & {*EMBEDDINGS} for name in last):
        raise UserError(
            f"config.eval.bpd_num must be 0, as config.{last[0]} takes embeddings, got {config.eval.bpd_num}; bits per "
            "dimension are of a stage that takes none"
        )
    if config.sample.save and any(config[name].low_res.truncated for name in config.stages):
        raise UserError("config.sample.save keeps clean pictures, but a stage's low_res.truncated leaves noise on them")


def is_classifier(section: Mapping[str, Any]) -> bool:
    """Whether a section describes a noised classifier and not a diffusion stage."""
    return section["net"]["name"] == "classifier"


def is_clip(section: Mapping[str, Any]) -> bool:
    """Whether a section describes a CLIP, noised or not."""
    return section["net"]["name"] == "clip"


def is_prior(section: Mapping[str, Any]) -> bool:
    """Whether a section describes a prior, a stage whose sample is an embedding."""
    return section["net"]["name"] in ("prior", "code_prior")


def is_code_prior(section: Mapping[str, Any]) -> bool:
    """Whether a section describes an autoregressive prior, which writes the embedding code by code."""
    return section["net"]["name"] == "code_prior"


def has_fitted(section: Mapping[str, Any]) -> bool:
    """Whether sampling needs, besides parameters, what is fitted to the data: a codec, or an analytic variance."""
    return is_code_prior(section) or section["variance"] == "analytic"


def is_sampled(section: Mapping[str, Any]) -> bool:
    """Whether a section describes a stage that sampling runs, and not a classifier or CLIP."""
    return not is_classifier(section) and not is_clip(section)


def makes_pictures(section: Mapping[str, Any]) -> bool:
    """Whether a section describes a diffusion stage whose sample is a picture."""
    return is_sampled(section) and not is_prior(section)


def trained_sections(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The sections that a config trains or needs trained, in this order: the CLIPs whose embeddings its stages read,
    the stages, and what helps these to sample: classifiers and CLIPs that guide, networks for the last step."""
    stages = config["stages"]
    named = [[config[name][field] for name in stages] for field in ("clip", "classifier", "last")]
    clips, guides, last = ([name for name in names if name in config] for names in named)
    return tuple(dict.fromkeys([*clips, *stages, *guides, *last]))


def picture_shape(config: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """(H, W, C) of the pictures that training a section reads.

    A prior reads those of its CLIP. A stage that takes image embeddings reads a whole multiple of its own, which is no
    smaller than its CLIP's.
    """
    section = config[name]
    clip = config[section["clip"]]["shape"] if section["clip"] else None
    if is_prior(section):
        return tuple(clip)
    height, width, channels = section["shape"]
    times = -(-clip[0] // height) if "image_embedding" in section["takes"] else 1
    return (times * height, times * width, channels)


def training_shape(config: Mapping[str, Any], name: str) -> tuple[int, int, int]:
    """`picture_shape`, or what is left of it where image embeddings are read from files: a prior needs no picture."""
    section = config[name]
    if not section["data"]["embeddings"]:
        return picture_shape(config, name)
    return (1, 1, 3) if is_prior(section) else tuple(section["shape"])


def _check_known(path: str, value: Any, fields: Mapping[str, Field]):
    if path in fields:
        return
    if any(known.startswith(path + ".") for known in fields):
        raise _bad(path, "a section of fields", value)
    raise _unknown(path, list(fields))


def _check_stage_names(config: ConfigDict):
    stages = config.get("stages", None)
    if not isinstance(stages, tuple) or not stages:
        raise _bad("config.stages", "a tuple of the names of 1 or more stages", stages)
    for i, name in enumerate(stages):
        if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise _bad("config.stages", "names of small letters, digits and '_'", name)
        if name in _RESERVED or name in stages[:i]:
            raise _bad("config.stages", "different names that are no other field's", stages)
        if not isinstance(config.get(name, None), ConfigDict):
            there = _sections(config)
            there.remove(name)
            hint = closest(name, there) or f"; the stages are {', '.join(there)}" * bool(there)
            raise UserError(f"config.stages names {name!r}, but there is no section config.{name}{hint}")


def _check_value(path: str, field: Field, value: Any):
    if field.has_type(value) and field.accepts(value):
        return
    items = value if field.many and isinstance(value, tuple) else (value,)
    wrong = [item for item in items if isinstance(item, str) and item not in field.choices]
    hint = closest(wrong[0], field.choices) if wrong and field.choices else ""
    raise UserError(f"{_bad(path, field.allowed, value)}{hint}")


def _check_shape(stage: ConfigDict, where: str):
    if is_prior(stage) and len(stage.shape) != 1:
        raise UserError(f"{where}.shape must be one number for a prior, the size of the embedding, got {stage.shape}")
    if not is_prior(stage) and len(stage.shape) != 3:
        raise UserError(f"{where}.shape must be (height, width, 1) or (height, width, 3), got {stage.shape}")


def _check_conditions(stage: ConfigDict, where: str):
    if len(set(stage.takes)) < len(stage.takes):
        raise _bad(f"{where}.takes", "different conditions", stage.takes)
    if ("label" in stage.takes) != (stage.num_classes > 0) and not is_classifier(stage):
        if stage.num_classes:
            raise UserError(
                f"{where}.num_classes is {stage.num_classes}, but {where}.takes has no 'label'; "
                "set num_classes to 0 or add 'label'"
            )
        raise UserError(f"{where}.num_classes must be 1 or more when {where}.takes has 'label', got 0")
    if stage.data.name in NEEDS_PATH and not stage.data.path:
        raise UserError(f"{where}.data.path must name the folder of the data {stage.data.name!r}, got ''")
    if stage.data.holdout and stage.data.name != "shapes":
        raise UserError(
            f"{where}.data.holdout is for the data 'shapes', but {where}.data.name is "
            f"{stage.data.name!r}; leave it empty"
        )
    if stage.data.single and stage.data.name != "shapes":
        raise UserError(f"{where}.data.single is for the data 'shapes', but {where}.data.name is {stage.data.name!r}")
    if stage.data.name == "mix" and "label" in stage.takes:
        raise UserError(f"{where}.takes has 'label', but labels of mixed data have no one meaning; choose other data")
    if stage.data.label != "label" and stage.data.name in ("folder", "captions", "mix"):
        raise UserError(f"{where}.data.label is for data with several columns, but data.name is {stage.data.name!r}")
    if not stage.data.split:
        raise _bad(f"{where}.data.split", "the name of a split, such as 'train'", "")
    if "text" in stage.takes and stage.text.tokenizer == "clip" and stage.text.length < 3:
        raise UserError(f"{where}.text.length must be 3 or more for CLIP's tokenizer, got {stage.text.length}")
    text = stage.net.text
    ids = VOCAB_SIZES[stage.text.tokenizer]
    if text.vocab_size and text.vocab_size < ids:
        raise UserError(
            f"{where}.net.text.vocab_size must be 0 or at least {ids}, the tokenizer's, got {text.vocab_size}"
        )
    if "text" in stage.takes and text.width % text.heads:
        raise UserError(f"{where}.net.text.heads must divide {where}.net.text.width, {text.width}, got {text.heads}")
    default = stage_defaults()
    for kinds, path, section, usual in (
        (("prior", "code_prior"), "net.prior", stage.net.prior, default.net.prior),
        (("code_prior",), "codes", stage.codes, default.codes),
        (("clip",), "embedding", stage.embedding, default.embedding),
    ):
        if stage.net.name not in kinds and section.to_dict() != usual.to_dict():
            raise UserError(
                f"{where}.{path} is set, but {where}.net.name is {stage.net.name!r}; it is for "
                f"{' and '.join(map(repr, kinds))}: leave it alone"
            )
    for condition, section in (("text", stage.text), ("inpaint", stage.inpaint), ("text", text)):
        path = "net.text" if section is text else condition
        default = stage_defaults().net.text if section is text else stage_defaults()[condition]
        if condition not in stage.takes and section.to_dict() != default.to_dict():
            raise UserError(
                f"{where}.{path} is set, but {where}.takes has no {condition!r}; add it or leave {path} alone"
            )


def _check_texts_agree(config: ConfigDict):
    """Stages read one prompt, in one vocabulary; CLIPs in theirs."""
    readers = [name for name in config.stages if "text" in config[name].takes and is_sampled(config[name])]
    for name in readers[1:]:
        if config[name].text != config[readers[0]].text:
            raise UserError(
                f"config.{name}.text must equal config.{readers[0]}.text, as both read one prompt; got "
                f"{_show(config[name].text.to_dict())} and {_show(config[readers[0]].text.to_dict())}"
            )
    readers += [n for n in config.stages if set(config[n].takes) & {"text_embedding", "text_features"}]
    if config.sample.prompts and not readers:
        raise UserError("config.sample.prompts is set, but no stage takes 'text'; leave it empty")


def _check_low_res(stage: ConfigDict, where: str, before: ConfigDict | None, name: str):
    """How a stage meets the smaller picture; `before` is the stage, of that name, that makes it."""
    c = stage.low_res
    if "low_res" not in stage.takes:
        if before is not None:
            raise UserError(f"{where}.takes must hold 'low_res', as {where} comes after config.{name}")
        if c.to_dict() != stage_defaults().low_res.to_dict():
            raise UserError(
                f"{where}.low_res is set, but {where}.takes has no 'low_res'; add it or leave low_res alone"
            )
        return
    where = f"{where}.low_res"
    if any(side % c.factor for side in stage.shape[:2]):
        raise UserError(f"{where}.factor must divide the sides of {stage.shape}, got {c.factor}")
    small = (*(side // c.factor for side in stage.shape[:2]), stage.shape[2])
    if before is not None and before.shape != small:
        raise UserError(
            f"{where}.factor {c.factor} takes pictures of {small} to {stage.shape}, but config.{name}.shape is "
            f"{before.shape}"
        )
    if c.level > c.noise:
        raise UserError(f"{where}.level must be at most {where}.noise, {c.noise:g}, got {c.level:g}")
    if c.degrade != "none" and (c.blur or c.jpeg):
        raise UserError(
            f"{where}.degrade is {c.degrade!r}, which blurs and writes JPEG itself; leave blur and jpeg out"
        )
    if c.blur_sigma[0] > c.blur_sigma[1] or (c.jpeg and c.jpeg[0] > c.jpeg[-1]):
        raise UserError(f"{where}.blur_sigma and jpeg are ranges, lowest first; got {c.blur_sigma} and {c.jpeg}")
    step = math.lcm(c.factor, 2 ** (len(stage.net.channel_mult) - 1))
    if c.crop and (c.crop % step or c.crop > min(stage.shape[:2])):
        raise UserError(f"{where}.crop must be a multiple of {step} and at most {min(stage.shape[:2])}, got {c.crop}")
    if not c.truncated:
        return
    if before is None or not c.level:
        raise UserError(f"{where}.truncated needs a stage before and a level above 0; got level {c.level:g}")
    if before.schedule != stage.schedule:
        raise UserError(f"{where}.truncated needs the schedule of config.{name}; make them equal")
    from diffax.diffusion import schedules

    schedule, train_steps = schedules.build(before.schedule)
    try:
        level = schedule(np.array([c.level]))
        schedules.until(schedules.build_steps(schedule, train_steps, before.steps), float(level.logsnr[0]))
    except ValueError as error:
        raise UserError(f"{where}.level {c.level:g}: {error}") from None


def _check_net(stage: ConfigDict, where: str):
    net, levels = stage.net, len(stage.net.channel_mult)
    if stage.shape[2] not in (1, 3):
        raise UserError(f"{where}.shape must be (height, width, 1) or (height, width, 3), got {stage.shape}")
    factor = 2 ** (levels - 1)
    if any(side % factor for side in stage.shape[:2]):
        raise UserError(
            f"{where}.shape must have sides divisible by {factor} for the {levels} levels of "
            f"{where}.net.channel_mult, got {stage.shape}"
        )
    factors = [2**level for level in range(levels)]
    for wanted in net.attention:
        if wanted not in factors:
            raise UserError(
                f"{where}.net.attention must hold downsampling factors among "
                f"{', '.join(map(str, factors))} (not resolutions), got {net.attention}"
            )
    if len(set(net.attention)) < len(net.attention):
        raise _bad(f"{where}.net.attention", "different factors", net.attention)
    if net.channels % 2:
        raise _bad(f"{where}.net.channels", "even", net.channels)
    heads = {"head_channels": net.head_channels} if net.head_channels else {"heads": net.heads}
    if net.heads_up and not net.head_channels:
        heads["heads_up"] = net.heads_up
    for level, mult in enumerate(net.channel_mult):
        width = net.channels * mult
        level_text = f"{net.channels} x {mult} = {width:g} channels of level {level}"
        if width != int(width) or width % net.groups:
            raise UserError(
                f"{where}.net.groups must divide the {level_text}, got {net.groups}; change "
                "groups, channels or channel_mult"
            )
        # The middle of the network, at the width of the last level, always attends.
        if factors[level] in net.attention or level == levels - 1:
            for name, value in heads.items():
                if width % value:
                    raise UserError(f"{where}.net.{name} must divide the {level_text}, got {value}")


def _is_continuous(schedule: ConfigDict) -> bool:
    return schedule.name in CONTINUOUS or schedule.continuous


def _check_schedule(schedule: ConfigDict, where: str):
    if schedule.name not in CONTINUOUS:
        _check_betas(schedule, where)
    elif not schedule.logsnr_min < schedule.logsnr_max:
        raise UserError(
            f"{where}.logsnr_min must be below logsnr_max, got {schedule.logsnr_min} and {schedule.logsnr_max}"
        )


def _check_classifier(stage: ConfigDict, where: str):
    if stage.takes:
        raise UserError(f"{where}.takes must be empty for a classifier, got {stage.takes}; it reads the picture alone")
    if not stage.num_classes:
        raise UserError(f"{where}.num_classes must be 1 or more for a classifier, got 0")
    if stage.timesteps.name == "loss_second_moment":
        raise UserError(f"{where}.timesteps.name 'loss_second_moment' is for the bound; a classifier takes 'uniform'")
    factor = 2 ** (len(stage.net.channel_mult) - 1)
    if stage.net.pool.startswith("spatial") and any(side % factor for side in stage.shape[:2]):
        raise UserError(f"{where}.shape must have sides divisible by {factor}, got {stage.shape}")


def _check_clip(stage: ConfigDict, where: str):
    if stage.takes != ("text",):
        raise UserError(f"{where}.takes must be ('text',) for a CLIP, got {stage.takes}")
    for tower in ("image", "text"):
        c = stage.net[tower]
        if c.width % c.heads:
            raise UserError(
                f"{where}.net.{tower}.heads must divide {where}.net.{tower}.width, {c.width}, got {c.heads}"
            )
    if any(side % stage.net.image.patch for side in stage.shape[:2]):
        raise UserError(f"{where}.net.image.patch must divide the sides of {stage.shape}, got {stage.net.image.patch}")
    if stage.shape[2] != 3:
        raise UserError(f"{where}.shape must have 3 channels for a CLIP, got {stage.shape}")
    if stage.net.image.noised and _is_continuous(stage.schedule):
        raise UserError(f"{where}.schedule must have discrete steps for a CLIP that has an embedding of each")
    if stage.timesteps.name == "loss_second_moment":
        raise UserError(f"{where}.timesteps.name 'loss_second_moment' is for the bound; a CLIP takes 'uniform'")


def _check_embeddings(config: ConfigDict, stage: ConfigDict, where: str):
    """A stage that reads or makes embeddings, and the CLIP that it gets them from."""
    taken = [name for name in stage.takes if name in EMBEDDINGS]
    if stage.data.embeddings and not is_prior(stage) and "image_embedding" not in taken:
        raise UserError(f"{where}.data.embeddings is set, but {where} reads no image embedding; leave it empty")
    if not taken and not is_prior(stage):
        if stage.clip:
            raise UserError(
                f"{where}.clip is {stage.clip!r}, but {where}.takes has none of {', '.join(map(repr, EMBEDDINGS))}; "
                "leave clip empty or add one"
            )
        return
    clip = config.get(stage.clip, None)
    if not isinstance(clip, ConfigDict) or "net" not in clip or not is_clip(clip):
        there = [name for name in _sections(config) if is_clip(config[name])]
        hint = f"; there is {', '.join(there)}" if there else "; its net.name is 'clip'"
        raise UserError(f"{where}.clip must name the section of a CLIP, got {stage.clip!r}{hint}")
    others = {config[name].clip for name in config.stages if config[name].clip} - {stage.clip}
    if others:
        raise UserError(f"{where}.clip is {stage.clip!r} and that of another stage {others.pop()!r}; use one CLIP")
    if clip.net.image.noised:
        raise UserError(f"config.{stage.clip}.net.image.noised must be false for a CLIP whose embeddings {where} reads")
    if is_prior(stage):
        return
    if stage.shape[0] * clip.shape[1] != stage.shape[1] * clip.shape[0] or stage.shape[2] != clip.shape[2]:
        raise UserError(
            f"{where}.shape must have the proportions and channels of its CLIP's, config.{stage.clip}.shape "
            f"{clip.shape}, got {stage.shape}"
        )


def _check_prior(config: ConfigDict, stage: ConfigDict, where: str):
    clip, net = config[stage.clip], stage.net.prior
    if stage.shape != (clip.net.features,):
        raise UserError(
            f"{where}.shape must be ({clip.net.features},), config.{stage.clip}.net.features, got {stage.shape}"
        )
    readable = ("text", "text_features", "text_embedding")
    if not stage.takes or set(stage.takes) - {*readable}:
        some = ", ".join(map(repr, readable))
        raise UserError(f"{where}.takes must be some of {some} for a prior, got {stage.takes}")
    guidance = ("classifier_free",) if is_code_prior(stage) else ("classifier_free", "clip_denoised")
    if is_code_prior(stage):
        _check_codes(stage, where)
    if net.width % net.heads:
        raise UserError(f"{where}.net.prior.heads must divide {where}.net.prior.width, {net.width}, got {net.heads}")
    for field, value, allowed in (
        ("loss.name", stage.loss.name, ("simple",)),
        ("timesteps.name", stage.timesteps.name, ("uniform", "stratified")),
        ("predicts", stage.predicts, ("x", "eps", "v")),
        *(("guidance", name, guidance) for name in stage.guidance),
    ):
        if value not in allowed:
            raise UserError(f"{where}.{field} must be of {', '.join(map(repr, allowed))} for a prior, got {value!r}")
    if stage.candidates > 1 and "text_embedding" not in stage.takes:
        raise UserError(f"{where}.candidates must be 1 where {where}.takes has no 'text_embedding' to compare with")
    for name in ("mean", "std"):
        count = len(clip.embedding[name])
        if count not in (0, 1, *stage.shape):
            raise UserError(
                f"config.{stage.clip}.embedding.{name} must be 0, 1 or {stage.shape[0]} numbers, got {count} of them"
            )


def _check_codes(stage: ConfigDict, where: str):
    c = stage.codes
    if c.components > stage.shape[0]:
        raise UserError(f"{where}.codes.components must be at most the {stage.shape[0]} dimensions, got {c.components}")
    if c.examples < max(c.buckets, c.components):
        raise UserError(
            f"{where}.codes.examples must be at least codes.buckets and codes.components, {c.buckets} and "
            f"{c.components}, got {c.examples}"
        )
    if "text_embedding" not in stage.takes:
        raise UserError(f"{where}.takes must hold 'text_embedding' for a code prior, got {stage.takes}")


def _check_last(config: ConfigDict, stage: ConfigDict, where: str):
    """The network that takes over in the last step of sampling."""
    if not stage.last:
        return
    other = config.get(stage.last, None)
    if not isinstance(other, ConfigDict) or "net" not in other or config[stage.last] is stage:
        raise UserError(f"{where}.last must name another section, of the same network, got {stage.last!r}")
    for field in ("shape", "takes", "net", "schedule", "predicts", "variance"):
        if other[field] != stage[field]:
            raise UserError(f"{where}.{field} must equal that of its network for the last step, config.{stage.last}")
    if stage.takes != ("low_res",):
        raise UserError(f"{where}.last is for a stage that takes 'low_res' alone, got {where}.takes {stage.takes}")


def _check_guidance(config: ConfigDict, stage: ConfigDict, where: str):
    scaled = [name for name in stage.guidance if name in SCALED]
    if len(set(stage.guidance)) < len(stage.guidance):
        raise _bad(f"{where}.guidance", "different names", stage.guidance)
    if len(scaled) > 1:
        raise UserError(f"{where}.guidance names {' and '.join(scaled)}, which share one scale; choose one")
    if stage.drop and not {"label", "text", *EMBEDDINGS} & set(stage.takes):
        raise UserError(
            f"{where}.drop is {stage.drop:g}, but {where}.takes has no 'label' or 'text' to withhold; set drop to 0"
        )
    if stage.drop_text and not (stage.drop and {"text", "text_embedding", "text_features"} & set(stage.takes)):
        raise UserError(
            f"{where}.drop_text is {stage.drop_text:g}; it needs {where}.drop above 0 and a caption in {where}.takes"
        )
    if stage.limit != 1 and "clip_denoised" not in stage.guidance:
        raise UserError(f"{where}.limit is {stage.limit:g}, but {where}.guidance has no 'clip_denoised'; leave it at 1")
    if stage.candidates > 1 and not is_prior(stage):
        raise UserError(f"{where}.candidates is {stage.candidates}, but {where} is no prior; leave it at 1")
    if "keep_known" in stage.guidance and "inpaint" not in stage.takes:
        raise UserError(f"{where}.guidance 'keep_known' needs 'inpaint' in {where}.takes; add it or leave it out")
    if "classifier_free" in scaled and not stage.drop:
        raise UserError(
            f"{where}.guidance 'classifier_free' needs a network that was trained with withheld conditions; "
            f"set {where}.drop to 0.1"
        )
    if bool({"classifier", "clip"} & {*scaled}) != bool(stage.classifier):
        raise UserError(
            f"{where}.classifier is {stage.classifier!r} and {where}.guidance is {stage.guidance}; name the section of "
            "the classifier and add 'classifier' to guidance (or of a CLIP, and 'clip'), or neither"
        )
    if not stage.classifier:
        return
    kind, is_kind = ("CLIP", is_clip) if "clip" in scaled else ("classifier", is_classifier)
    guide = config.get(stage.classifier, None)
    if not isinstance(guide, ConfigDict) or "net" not in guide or not is_kind(guide):
        there = [name for name in _sections(config) if is_kind(config[name])]
        hint = f"; there is {', '.join(there)}" if there else f"; its net.name is {kind.lower()!r}"
        raise UserError(f"{where}.classifier must name the section of a {kind}, got {stage.classifier!r}{hint}")
    if is_clip(guide) and stage.clip and config[stage.clip].text != guide.text:
        raise UserError(
            f"config.{stage.classifier}.text must equal config.{stage.clip}.text, as {where} reads a caption by both"
        )
    if is_clip(guide) and not guide.net.image.noised:
        raise UserError(f"config.{stage.classifier}.net.image.noised must be true for a CLIP that guides {where}")
    for field in ("shape", "schedule", *(("num_classes",) if stage.num_classes and kind == "classifier" else ())):
        if guide[field] != stage[field]:
            mine, its = stage[field], guide[field]
            if field == "schedule":
                mine, its = ({k: v for k, v in a.items() if v != b[k]} for a, b in ((mine, its), (its, mine)))
            raise UserError(
                f"{where}.{field} must equal that of its {kind}, config.{stage.classifier}.{field}; "
                f"got {_show(mine)} and {_show(its)}"
            )


def _check_diffusion(stage: ConfigDict, where: str):
    schedule, learned = stage.schedule, str(stage.variance).startswith("learned")
    if _is_continuous(schedule):
        for field, value, clash in (
            ("loss.name", stage.loss.name, ("vlb", "hybrid")),
            ("timesteps.name", stage.timesteps.name, ("loss_second_moment",)),
            ("predicts", stage.predicts, ("previous_x",)),
        ):
            if value in clash:
                raise UserError(
                    f"{where}.{field} {value!r} needs a schedule of discrete steps, but {where}.schedule "
                    f"({schedule.name!r}) is continuous; choose another"
                )
    if learned and stage.loss.name == "simple":
        raise UserError(
            f"{where}.variance {stage.variance!r} is not trained by {where}.loss.name 'simple'; "
            "use 'hybrid' or 'vlb', or a fixed variance"
        )
    if not learned and stage.loss.name == "hybrid":
        raise UserError(
            f"{where}.loss.name 'hybrid' trains a learned variance, but {where}.variance is "
            f"{stage.variance!r}; use 'learned_range', or the loss 'simple'"
        )
    if stage.variance == "analytic" and stage.net.name != "prior":
        raise UserError(f"{where}.variance 'analytic' is for a diffusion prior, got net.name {stage.net.name!r}")
    _check_steps(stage, f"{where}.steps", stage.steps)


def _check_betas(schedule: ConfigDict, where: str):
    from diffax.diffusion import schedules  # late, so that reading a config does not import jax

    if schedule.beta_start > schedule.beta_end:
        raise UserError(
            f"{where}.beta_start must not be above beta_end, got {schedule.beta_start} and {schedule.beta_end}"
        )
    try:
        schedules.build(schedule)
    except ValueError as error:
        raise UserError(f"{where}.steps, {schedule.steps} of {schedule.name!r}: {error}") from None


def _check_steps(stage: ConfigDict, where: str, steps: str):
    from diffax.diffusion import schedules

    schedule, train_steps = schedules.build(stage.schedule)
    try:
        schedules.build_steps(schedule, train_steps, steps)
    except ValueError as error:
        there = schedules.STEPS if train_steps else schedules.CONTINUOUS_STEPS
        why = "" if train_steps else f" for the continuous schedule {stage.schedule.name!r}"
        raise UserError(f"{where} must be {there}{why}, got {_show(steps)}: {error}") from None


def _check_train(stage: ConfigDict, where: str, device_count: int, process_count: int):
    train = stage.train
    if train.optimizer == "adam" and train.weight_decay:
        raise UserError(
            f"{where}.train.weight_decay is {train.weight_decay}, but the optimizer 'adam' has none; use 'adamw' or 0"
        )
    if len(set(train.ema)) < len(train.ema):
        raise _bad(f"{where}.train.ema", "different rates", train.ema)
    for count, what in ((device_count, "devices"), (process_count, "processes")):
        parts = count * train.accumulate
        if train.batch_size % parts:
            times = f" x {train.accumulate} accumulated parts" if train.accumulate > 1 else ""
            low = train.batch_size // parts * parts
            use = f"{low} or {low + parts}" if low else f"{parts}"
            raise UserError(
                f"global batch {train.batch_size} is not divisible by {count} {what}{times} "
                f"(use {use}); {where}.train.batch_size"
            )


# ---- as data -------------------------------------------------------------------------------------


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain data, the inverse of `from_dict`: tuples become lists, as in JSON."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(data: Mapping[str, Any]) -> ConfigDict:
    """A config from what `to_dict` gave; fields that an older file lacks take their defaults.

    Raises:
      UserError: a field is unknown or of the wrong type.
    """
    given = ConfigDict(_tuples(data))
    config = config_defaults("")
    with config.unlocked():
        del config.base
        for name in _sections(given):
            config[name] = stage_defaults()
    fields = _fields(given)
    for path, value in _walk(given, "config"):
        _check_known(path, value, fields)
        if not fields[path].has_type(value):
            raise _bad(path, fields[path].allowed, value)
        _set(config, path, value)
    return config


def complete_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's section as plain data, fields that an older checkpoint lacks at their defaults."""
    full = stage_defaults().to_dict()

    def fill(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **default,
            **{k: fill(v, default.get(k, {})) if isinstance(v, Mapping) else v for k, v in given.items()},
        }

    return json.loads(json.dumps(fill(section, full)))


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
