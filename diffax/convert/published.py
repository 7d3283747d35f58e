"""The files that were published, how each is recognised, and the way from a file to a workdir and back.

A file says nothing of its network. It is told by the number of its parameters, and then by the names and shapes of all
its arrays, which must be those that the network of a config would have.
"""

import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffax import checkpoint, images, stages
from diffax import config as configs
from diffax.convert import diffusers, glide, openai, weights
from diffax.convert.architecture import Architecture
from diffax.convert.table import Table, misfit, to_flax, to_torch
from diffax.errors import UserError


class Family(NamedTuple):
    """Files of one program.

    Attributes:
      mark: an array that they have, and those of the families further down do not.
      table: (network, shape, **options) -> the table.
      rename: {name: array} of an old file -> the same under today's names.
    """

    mark: str
    table: Callable[..., Table]
    rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


FAMILIES = {
    "glide": Family("transformer_proj.weight", glide.table),
    "openai": Family("input_blocks.0.0.weight", openai.table),
    "diffusers": Family("conv_in.weight", diffusers.table, diffusers.modern_names),
}


class Published(NamedTuple):
    """A file that was published.

    Attributes:
      file: its name.
      place: where it lies: the address of its folder, or the name of a model on the Hugging Face hub.
      family: key of `FAMILIES`.
      parameters: how many numbers it holds.
      config: which config is of it, with the variant; '' if there is none.
      section: which section of that.
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


IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021"
GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
GLIDE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
NEW = {"attention_order": "new"}
HO = {"flip_sin_to_cos": False}
UNET, UP = "diffusion_pytorch_model.safetensors", "up"
LSUN = functools.partial(
    openai.net_config,
    dict(
        in_channels=3, model_channels=128, out_channels=6, num_res_blocks=2, attention_resolutions=(16,),
        channel_mult=(1, 1, 2, 2, 4, 4),
    ),
    image_size=256,
)  # fmt: skip

# Parameters as counted in the networks that the programs build from the flags of their README files.
PUBLISHED = (
    Published("imagenet64_uncond_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64"),
    Published("imagenet64_uncond_vlb_100M_1500K.pt", IMPROVED, "openai", 121_063_942, "iddpm_imagenet_64:vlb"),
    Published("imagenet64_cond_270M_250K.pt", IMPROVED, "openai", 273_049_350, "iddpm_imagenet_64:cond"),
    Published("cifar10_uncond_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10"),
    Published("cifar10_uncond_vlb_50M_500K.pt", IMPROVED, "openai", 52_546_438, "iddpm_cifar10:vlb"),
    Published("upsample_cond_500K.pt", IMPROVED, "openai", 279_792_390, "iddpm_upsample_64_256", UP),
    Published("lsun_uncond_100M_1200K_bs128.pt", IMPROVED, "openai", 113_676_678, architecture=LSUN),
    Published("lsun_uncond_100M_2400K_bs64.pt", IMPROVED, "openai", 113_676_678, architecture=LSUN),
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
    Published(UNET, "google/ddpm-cifar10-32", "diffusers", 35_746_307, "ddpm_cifar10", options=HO),
    Published(UNET, "google/ddpm-cat-256", "diffusers", 113_673_219, "ddpm_lsun_256:cat", options=HO),
)
# Configs that put the sections of several of these together, besides those that name them.
SYSTEMS = ("glide",)


# ---- recognising -----------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A file of weights, and what it is.

    Attributes:
      path: the file.
      tensors: {name: Tensor}, not read yet.
      config: the config that its network is in, a plain dict.
      section: the section of that which it is.
      table: the map from the one to the other, which fits.
    """

    path: pathlib.Path
    tensors: Mapping[str, Any]
    config: dict[str, Any]
    section: str
    table: Table


def network(row: Published) -> tuple[Any, tuple[int, ...]]:
    """The network of a published file, and the shape of its pictures."""
    if row.architecture is not None:
        architecture = row.architecture()
        return architecture.build(), architecture.shape
    model = stages.build(_config(row.config), row.section)
    return model.net, model.shape


def table(row: Published) -> Table:
    """The map between the arrays of a published file and parameters."""
    return FAMILIES[row.family].table(*network(row), **row.options)


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
    rows = [row for row in PUBLISHED if row.parameters == size]
    rows = [row for row in rows if name in (row.name, row.place.rpartition("/")[2])] or rows
    found = [(row, known) for row, known in ((row, table(row)) for row in rows) if not misfit(shapes, known)]
    if not found:
        raise UserError(
            f"these {len(shapes)} arrays of {size:,} numbers are of no model that was published; pass --model=CONFIG, "
            "of the network that they were trained with"
        )
    if len(found) > 1:
        there = ", ".join(row.config or row.name for row, _ in found)
        raise UserError(f"these arrays could be of any of {there}; pass --model=NAME of one")
    return found[0]


def match(
    path: str | os.PathLike[str], *, model: str | None = None, which: str | None = None, attention_order: str = ""
) -> Match:
    """Reads which arrays a file holds, and finds their network.

    Args:
      path: a file (see `weights.read`), or the folder of a diffusers model.
      model: the config, or the published file, that it is; by default it is recognised.
      which: of several state dicts in the file, see `weights.read`.
      attention_order: of one of OpenAI's networks that was not published, 'legacy' or 'new', see `openai.table`.

    Raises:
      UserError: the file cannot be read, is not recognised, or does not fit the model.
    """
    path = pathlib.Path(path)
    if path.is_dir() and model is None:
        return _match_folder(path, which)
    file = _file_in(path)
    tensors = weights.read(file, which)
    family = next((name for name, f in FAMILIES.items() if f.mark in f.rename(tensors)), None)
    if family is None:
        raise UserError(f"these are weights of no known program; {file}; known are those listed by --list")
    tensors = FAMILIES[family].rename(tensors)
    try:
        row, known = _named(tensors, model, family, attention_order) if model else recognise(tensors, path.stem)
    except UserError as error:
        what, _, advice = str(error).partition("; ")
        raise UserError(f"{what}; {file}; {advice}") from None
    if not row.config:
        raise UserError(f"this is {row.file} of {row.family}, and no config is of it yet; {file}; pass --model=CONFIG")
    return Match(file, tensors, _config(row.config), row.section, known)


def _named(tensors: Mapping[str, Any], model: str, family: str, attention_order: str) -> tuple[Published, Table]:
    """The published file of that name or config, or else the section of a config, that arrays fit."""
    rows = [row for row in PUBLISHED if model in (row.file, row.name, row.place, row.config)]
    if not rows:
        options = {"diffusers": HO, "openai": {"attention_order": "legacy"}}.get(family, {})
        sections = configs.trained_sections(_config(model))
        rows = [Published("", "", family, 0, model, section, options) for section in sections]
    if attention_order and family == "openai":
        rows = [row._replace(options={"attention_order": attention_order}) for row in rows]
    shapes = weights.shapes(tensors)
    tried = [(row, known, misfit(shapes, known)) for row, known in ((row, table(row)) for row in rows)]
    row, known, complaint = min(tried, key=lambda t: len(t[2]))
    if complaint:
        raise UserError(
            f"the weights do not fit {model}: {complaint.replace('; ', ', ')}; pass the --model they are of"
        )
    return row, known


def _config(name: str) -> dict[str, Any]:
    config = configs.load(name)
    configs.validate(config)
    return configs.to_dict(config)


def _file_in(path: pathlib.Path) -> pathlib.Path:
    """The file of weights that a diffusers folder holds; a file is itself."""
    if not path.is_dir():
        return path
    for folder in (path, path / "unet"):
        for suffix in ("safetensors", "bin"):
            if (file := folder / f"diffusion_pytorch_model.{suffix}").exists():
                return file
    raise UserError(f"there is no diffusion_pytorch_model.safetensors or .bin; {path}; download it, or pass a file")


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


def _match_folder(path: pathlib.Path, which: str | None) -> Match:
    """A `UNet2DModel` of diffusers with its config.json, and the settings of its scheduler if they are there."""
    file = _file_in(path)
    config = configs.config_defaults(re.sub(r"[^\w.+-]", "_", path.resolve().name).lstrip("_.+-") or "diffusers")
    stage, model = config.base, _json(file.parent / "config.json")
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
    tensors = diffusers.modern_names(weights.read(file, which))
    if complaint := misfit(weights.shapes(tensors), found):
        raise UserError(f"the weights do not fit the config.json beside them: {complaint}; {file}; download both again")
    return Match(file, tensors, configs.to_dict(config), "base", found)


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
    """Whether `source` names files of weights and not a workdir: a file, a diffusers folder, or a list of them."""
    if isinstance(source, list | tuple):
        return all(map(is_weights, source))
    path = pathlib.Path(source)
    if path.is_dir():
        return any(path.glob("diffusion_pytorch_model.*")) or any(path.glob("unet/diffusion_pytorch_model.*"))
    return path.suffix in weights.SUFFIXES or (path.is_file() and path.suffix != ".py")


def load(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], config: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The parameters in files of weights.

    Args:
      files: one file, or several that make one system, such as a model and the classifier that guides it.
      config: the name of the config that the first one is of; by default it is recognised.

    Returns:
      (config, {section: parameters}, {section: training step}). Stages whose file is not given are left out of the
      config, and so is guidance by a classifier whose file is not given.

    Raises:
      UserError: a file cannot be read, is not recognised or fits nothing; two files are of one section.
    """
    files = files if isinstance(files, list | tuple) else [files]
    found = [match(file, model=os.fspath(config) if config and i == 0 else None) for i, file in enumerate(files)]
    for i, m in enumerate(found):
        if any(m.section == other.section for other in found[:i]):
            raise UserError(f"{m.path} is one more {m.section}; {files[0]}; pass one file for each part of a system")
    names = [m.section for m in found]
    whole = _holding(names, [m.config for m in found])
    if whole is None:
        raise UserError(f"no config has all of {', '.join(names)}; {files[0]}; load the files one by one")
    for m in found:
        _check_same_network(m, whole)
    params = {m.section: to_flax(m.tensors, m.table) for m in found}
    return only(whole, names), params, {m.section: training_step(m) for m in found}


def _holding(sections: Sequence[str], whole: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of some configs, or of `SYSTEMS`, that has all these sections."""
    for config in itertools.chain(whole, map(_config, SYSTEMS)):
        if {*sections} <= {*configs.trained_sections(config)}:
            return config
    return None


def _check_same_network(m: Match, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the section of a config has the network of that of the match."""
    for field in ("shape", "takes", "num_classes", "net", "schedule", "text"):
        if m.config[m.section][field] != config[m.section][field]:
            raise UserError(
                f"this is the {m.section} of {m.config['name']}, which differs from that of {config['name']} in "
                f"{field}; {m.path}; keep the two apart"
            )


def only(config: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """A config without the sections that are not named, and without guidance by a classifier among them."""
    left_out = {*configs.trained_sections(config)} - {*sections}
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


def training_step(m: Match) -> int:
    """How long a file was trained: as its name says ('ema_0.9999_540000.pt'), else as its config does."""
    said = re.search(r"(?:model|ema_[\d.]+_)(\d{6,})$", m.path.stem)
    return int(said[1]) if said else int(m.config[m.section]["train"]["steps"])


def save(m: Match, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes a file's parameters to a workdir, as training would have left them, and returns the workdir's config.

    What a published file holds counts as the average of the parameters, where the config has one: none of them says
    whether it does. More files may follow into the same workdir, such as that of the classifier.

    Args:
      m: what `match` found.
      workdir: a new folder, or one that this function wrote.

    Raises:
      UserError: the workdir has such a section already, or another system.
      RunError: it cannot be written.
    """
    workdir = pathlib.Path(workdir)
    config = _system(m, workdir)
    configs.validate(configs.from_dict(config))
    section = config[m.section]
    with checkpoint.lock(workdir), checkpoint.Checkpoints(workdir / m.section / "checkpoints", keep=1) as checkpoints:
        params = to_flax(m.tensors, m.table)
        decay = next((str(d) for d in section["train"]["ema"]), None)
        state, ema = ({}, {decay: params}) if decay else ({"params": params}, {})
        checkpoints.save(training_step(m), state, ema=ema, meta={"stage": section, "seed": config["seed"]})
        checkpoints.wait()
        text = json.dumps(config, indent=2) + "\n"
        images.write_atomically(workdir / "config.json", lambda file: file.write(text.encode()))
    return config


def _system(m: Match, workdir: pathlib.Path) -> dict[str, Any]:
    """The config of a workdir once `m` is in it."""
    if (workdir / m.section / "checkpoints").exists():
        raise UserError(f"there are parameters of {m.section} already; {workdir}; choose another workdir")
    if not (workdir / "config.json").exists():
        return only(m.config, [m.section])
    there = configs.to_dict(configs.from_dict(_json(workdir / "config.json")))
    present = list(configs.trained_sections(there))
    names = [n for n in (*(r.config for r in PUBLISHED), *SYSTEMS) if n.replace(":", "_") == there["name"]]
    systems = [_config(name) for name in dict.fromkeys(names)]
    # Only what this module wrote is written again: nothing that a user has set gets lost.
    mine = [system for system in systems if only(system, present) == there]
    system = _holding([*present, m.section], [*mine, m.config]) if mine else None
    if system is not None:
        _check_same_network(m, system)
        return only(system, [*present, m.section])
    raise UserError(
        f"the workdir holds {there['name']}, which has no {m.section} like this one, or was edited; {workdir}; "
        "choose another workdir"
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

    The names are those of openai/guided-diffusion, of openai/glide-text2im for networks that read text, and of
    diffusers' `UNet2DModel` for those of the DDPM paper.

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
    section = config[stage]
    average = decay or next((str(d) for d in section["train"]["ema"]), None)
    model = stages.build(config, stage)
    family, options = _family(section)
    known = [r for r in PUBLISHED if (r.config.replace(":", "_"), r.section) == (config["name"], stage)]
    if family == "openai":
        options = {
            "attention_order": attention_order or (known[0].options if known else {}).get("attention_order", "legacy")
        }
    try:
        names = FAMILIES[family].table(model.net, model.shape, **options)
    except ValueError as error:
        raise UserError(
            f"{stage} cannot be written under PyTorch's names: {error}; {workdir}; load it in diffax"
        ) from None
    folder = pathlib.Path(section["workdir"] or workdir) / stage / "checkpoints"
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        step, params, _ = checkpoints.restore_ema(decay=average, raw=average is None)
    about = {"format": "pt", "config": config["name"], "stage": stage, "step": str(step), "names": family}
    about |= {key: str(value) for key, value in options.items()}
    weights.write(path, to_torch(params, names), about)
    return step


def _family(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whose names a network bears: those of the program that has such a network."""
    if "text" in section["takes"]:
        return "glide", {}
    return ("diffusers", HO) if section["net"]["sinusoid"] == "ho" else ("openai", {})
