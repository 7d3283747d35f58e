"""A trained section back to PyTorch's names."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffax.errors import UserError
from diffax.training import workdir as workdirs
from diffax.weights import catalogue, files
from diffax.weights.families import FAMILIES, HO, finishing, system_of, table_of
from diffax.weights.table import Table, to_torch


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
    config = workdirs.read_config(workdir)
    stage = _chosen(config, stage, workdir)
    family, options = family_of(config[stage])
    owners = _owners(config, stage, family, workdir)
    if family == "openai":
        options = {"attention_order": attention_order or _published_order(config["name"], stage)}
    names = _names(family, config, stage, options, workdir)
    found = {part: workdirs.load_params(config, name, workdir, decay=decay) for part, name in owners.items()}
    step = next(iter(found.values()))[1]
    # what was measured on the data is no part of the network
    trees = {part: {k: v for k, v in params.items() if k != "statistics"} for part, (params, _) in found.items()}
    params = trees if len(trees) > 1 else next(iter(trees.values()))
    about = {"format": "pt", "config": config["name"], "stage": stage, "step": str(step), "names": family}
    about |= {key: str(value) for key, value in options.items()}
    files.write(path, to_torch(params, names), about)
    return step


def _chosen(config: Mapping[str, Any], stage: str | None, workdir: pathlib.Path) -> str:
    """The section to write."""
    sections = system_of(config).trained
    if stage not in sections and (stage or len(sections) > 1):
        what = "no such" if stage else "more than one"
        raise UserError(f"there is {what} stage; {workdir}; pass --stage of {', '.join(sections)}")
    return stage or sections[0]


def _published_order(name: str, stage: str) -> str:
    """The attention order of the published file of a config."""
    rows = [r for r in catalogue.PUBLISHED if (r.config.replace(":", "_"), r.section) == (name, stage)]
    return (rows[0].options if rows else {}).get("attention_order", "legacy")


def _names(
    family: str, config: Mapping[str, Any], stage: str, options: Mapping[str, Any], workdir: pathlib.Path
) -> Table:
    try:
        return table_of(family, config, stage, **options)
    except ValueError as error:
        raise UserError(
            f"{stage} cannot be written under PyTorch's names: {error}; {workdir}; load it in diffax"
        ) from None


def _owners(config: Mapping[str, Any], stage: str, family: str, workdir: pathlib.Path) -> dict[str, str]:
    """{part of the file of a stage: the section that has its parameters}, see `Family.parts`; one is the stage itself.

    Raises:
      UserError: the upsampler of karlo, if one of its two networks is missing.
    """
    if family != "karlo-upsampler":
        return {"": stage}
    for name in config["stages"]:
        if finishing(config[name]) == stage:
            raise UserError(
                f"{stage} is in one file with {name}, whose last step it takes; {workdir}; pass --stage={name}"
            )
    parts = FAMILIES[family].parts
    owners = {part: owner_of(config[stage]) if owner_of else stage for part, owner_of in parts.items()}
    if not all(owners.values()):
        raise UserError(
            f"karlo's file of an upsampler holds a network for the last step too, and {stage} has none; {workdir}; "
            "load it in diffax"
        )
    folders = {name: workdirs.folder_of(config, name, workdir) / "checkpoints" for name in owners.values()}
    missing = [name for name, folder in folders.items() if not folder.exists()]
    if missing:
        raise UserError(
            f"karlo's file of an upsampler holds {' and '.join(owners.values())}, and there are no parameters of "
            f"{' and '.join(missing)}; {workdir}; train it, or convert its file into this workdir"
        )
    return owners


def family_of(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whose names a network bears: those of the program that has such a network."""
    net, conditions = section["net"], section.get("conditions", {}).values()
    if net["name"] == "clip":
        return "noised-clip" if section["noised"] else "openai-clip", {}
    if any("clip" in condition for condition in conditions):
        return "karlo", {}
    names = {condition["name"] for condition in conditions}
    if "text" in names:
        return "glide", {}
    if net["name"] == "unet" and not net["mid_attention"] and "low_res" in names:
        return "karlo-upsampler", {}
    return ("diffusers", HO) if net.get("sinusoid") == "ho" else ("openai", {})
