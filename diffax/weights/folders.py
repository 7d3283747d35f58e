"""Folders of models: of diffusers and of transformers."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diffax import config as configs
from diffax.components import each, spec
from diffax.errors import UserError
from diffax.weights import diffusers, files
from diffax.weights.table import Table, misfit

MODEL = "model.safetensors"
# The folders of a system of diffusers that hold a part each; of the encoders, only if both are there.
PARTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
ENCODERS = ("text_encoder", "image_encoder")

SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    variance_type="fixed_small",
    clip_sample=True,
    clip_sample_range=1.0,
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    thresholding=False,
)
BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
PREDICTS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
VARIANCES = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}


# ---- which files there are -------------------------------------------------------------------------------------------


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights in the folder of a model of diffusers, or of transformers; the better one first."""
    wanted = ("diffusion_pytorch_model.*", "unet/diffusion_pytorch_model.*", MODEL, "pytorch_model.bin")
    found = [file for pattern in wanted for file in sorted(folder.glob(pattern), reverse=True)]
    return [file for file in found if file.suffix in (".safetensors", ".bin")]


def parts_in(path: Any) -> list[pathlib.Path]:
    """The folders of the models in the folder of a system of diffusers; anything else is itself."""
    path = pathlib.Path(path)
    if not path.is_dir() or files_in(path):
        return [path]
    there = [path / name for name in (*PARTS, *ENCODERS) if files_in(path / name)]
    if {path / name for name in ENCODERS} <= {*there}:
        return there
    return [folder for folder in there if folder.name not in ENCODERS] or [path]


def file_in(path: pathlib.Path) -> pathlib.Path:
    """The file of weights that a folder holds; a file is itself.

    Raises:
      UserError: the folder holds none.
    """
    if not path.is_dir():
        return path
    if found := files_in(path):
        return found[0]
    raise UserError(
        f"there is no diffusion_pytorch_model.safetensors or .bin, and no {MODEL}; {path}; download it, or pass a file"
    )


def is_weights(source: Any) -> bool:
    """Whether `source` names files of weights and not a workdir: a file, a folder that holds one, or a list of them."""
    if isinstance(source, list | tuple):
        return all(map(is_weights, source))
    path = pathlib.Path(source)
    if path.is_dir():
        return any(map(files_in, parts_in(path)))
    return path.suffix in files.SUFFIXES or (path.is_file() and path.suffix != ".py")


# ---- a model with its settings ---------------------------------------------------------------------------------------


def read(path: pathlib.Path, file: pathlib.Path, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], Table]:
    """A `UNet2DModel` of diffusers with its config.json, and the settings of its scheduler if they are there.

    Args:
      path: the folder.
      file: of the weights in it.
      tensors: {name: array} of that.

    Returns:
      A config of the one section 'base', a plain dict, and the map between the arrays and its parameters.

    Raises:
      UserError: it is another model, has an option that is not supported, or its files do not fit each other.
    """
    options = read_json(file.parent / "config.json")
    if options.get("_class_name", diffusers.MODEL) != diffusers.MODEL:
        raise UserError(f"this is a {options['_class_name']}; {file.parent}; only a {diffusers.MODEL} can be converted")
    scheduler = file.parent / "scheduler_config.json"
    if not scheduler.exists():
        scheduler = path / "scheduler" / "scheduler_config.json"
    config = configs.new(config_name(path.resolve().name) or "diffusers")
    try:
        architecture = diffusers.net_config(options)
        config.base = architecture.section
        _set_scheduler(config.base, read_json(scheduler) if scheduler.exists() else {})
        configs.check(config)
        known = diffusers.table(architecture.model(), flip_sin_to_cos=options.get("flip_sin_to_cos", True))
    except ValueError as error:
        raise UserError(f"{error}; {file.parent}; convert another model") from error
    if complaint := misfit(files.shapes(tensors), known):
        raise UserError(f"the weights do not fit the config.json beside them: {complaint}; {file}; download both again")
    return configs.to_dict(config), known


def _set_scheduler(section: Any, settings: Mapping[str, Any]) -> None:
    """Sets a section's schedule and variance as a scheduler_config.json says, by default as DDPMScheduler does."""
    c = {**SCHEDULER, **{key: settings[key] for key in SCHEDULER if key in settings}}
    for key, known in (("beta_schedule", BETAS), ("prediction_type", PREDICTS), ("variance_type", VARIANCES)):
        if c[key] not in known:
            raise ValueError(f"the scheduler has {key}={c[key]!r}, supported are {', '.join(known)}")
    for key in ("trained_betas", "rescale_betas_zero_snr", "thresholding"):
        if c[key]:
            raise ValueError(f"the scheduler has {key}={c[key]!r}, which is not supported")
    name = BETAS[c["beta_schedule"]]
    betas = {} if name == "cosine" else {"beta_start": c["beta_start"], "beta_end": c["beta_end"]}
    section.schedule = spec("schedule", name, num_timesteps=c["num_train_timesteps"], **betas)
    section.predicts, section.variance = PREDICTS[c["prediction_type"]], VARIANCES[c["variance_type"]]
    section.loss = spec("loss", "hybrid" if section.variance == "learned_range" else "simple")
    clipping = spec("guidance", "clip_denoised", clip_range=float(c["clip_sample_range"]))
    section.guidance = each("guidance", **({"clip_denoised": clipping} if c["clip_sample"] else {}))


def config_name(text: str) -> str:
    """A text as the name of a config: '' if nothing is left of it."""
    return re.sub(r"[^\w.+-]", "_", text).lstrip("_.+-")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The settings in a file beside the weights.

    Raises:
      UserError: there is no such file, or it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name} ({error}); {path.parent}; it must lie beside the weights") from error
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no settings; {path.parent}; it must lie beside the weights")
    return found
