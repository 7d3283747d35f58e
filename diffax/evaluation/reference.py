"""Samples of a trained model beside real pictures: --mode=evaluate --reference."""

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffax import components
from diffax.components import RUNTIME
from diffax.errors import UserError
from diffax.evaluation import compare, features
from diffax.evaluation.pictures import training_pictures
from diffax.sampling import grids
from diffax.sampling.files import sample_to_folder
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes
from diffax.weights.inception import VARIABLE as INCEPTION


def samples_folder(workdir: pathlib.Path, choice: Mapping[str, Any]) -> pathlib.Path:
    """Where the samples of a choice are, see `choices`."""
    name = "_".join(f"{key}_{value}" for key, value in choice.items())
    return workdir / "evaluation" / f"samples_{name}" if name else workdir / "samples"


def choices(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of a call of a `SampleFn`: every combination of the config's `eval` guidance, samplers and steps."""
    kinds = {"guidance": settings["guidance"], "sampler": settings["samplers"], "steps": settings["steps"]}
    kinds = {name: values for name, values in kinds.items() if values}
    return [dict(zip(kinds, chosen, strict=True)) for chosen in itertools.product(*kinds.values())]


def sample_many(
    sample_fn: SampleFn,
    folder: pathlib.Path,
    choice: Mapping[str, Any] = {},  # noqa: B006
    *,
    prompts: Sequence[str] = (),
    about: Mapping[str, Any] = {},  # noqa: B006
) -> list[pathlib.Path]:
    """Samples as `config.sample` says into files of a folder; makes those that are missing.

    Args:
      sample_fn: the trained model.
      folder: of the files.
      choice: arguments of a call in place of the config's, such as steps.
      prompts: of the pictures, in turn; empty for those of the config.
      about: what the parameters depend on besides the training step.

    Returns:
      The files, in order.
    """
    c = sample_fn.config["sample"]
    num = max(c["num"], len(prompts))
    given = grids.conditions_for(sample_fn, num, prompts)

    def sample(first: int, count: int) -> np.ndarray:
        some = {name: values[first : first + count] for name, values in given.items()}
        return sample_fn(c["seed"], count, first=first, batch_size=c["batch_size"], **some, **choice)

    stated = {"seed": c["seed"], "training_step": dict(sample_fn.step), **about}
    stated |= {"stages": sampling_fields(sample_fn), "prompts": list(prompts), **choice}
    mine = {"process_index": processes.process_index(), "process_count": processes.process_count()}
    return sample_to_folder(sample, folder, num, about=stated, labels=given.get("label"), **mine)


def sampling_fields(sample_fn: SampleFn) -> dict[str, dict[str, Any]]:
    """{stage: the fields of its section that sampling depends on and training does not, such as steps and guidance}."""
    found = {}
    for model in sample_fn.models:
        section = sample_fn.config[model.name]
        fields = components.schema(components.find("model", section["name"]))
        chosen = [name for name, field in fields.items() if RUNTIME in field.marks]
        found[model.name] = {name: section[name] for name in (*chosen, "conditions") if name in section}
    return found


def compared(
    make: Callable[[pathlib.Path, Mapping[str, Any]], Any],
    chosen: Sequence[Mapping[str, Any]],
    workdir: pathlib.Path,
    *,
    reference: str,
    section: Mapping[str, Any],
    inception: str | None,
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Compares samples with real pictures by the numbers of papers, or by another where their network is missing.

    Args:
      make: (folder, choice) makes the samples of a choice in a folder, those that are missing there.
      chosen: see `choices`.
      workdir: where samples and statistics go.
      reference: real pictures or their statistics, see `features.statistics_of`; or 'data', those of the training.
      section: of the stage that makes the pictures.
      inception: weights of the FID's network, see `weights.inception.find`; where there are none, the Frechet distance
        of patches is computed, under that name.
      batch_size: pictures at once, in the network.

    Yields:
      (row, what it is about): the row has the choice, the number of samples and the numbers of `compare.compare`.

    Raises:
      UserError: there is no such reference, or it is of other pictures; raised before anything is sampled if it can be.
    """
    kind = "inception" if inception or os.environ.get(INCEPTION) else "patches"
    about, measure = features.measurement(kind, inception, batch_size=batch_size)
    if reference == "data":
        pictures = training_pictures(section, workdir / "training_data")
        real, notes = features.statistics_of_pictures(pictures, measure, about=about)
    else:
        real, notes = features.statistics_of(reference, measure, about=about)
    if "size" in real and tuple(real["size"]) != tuple(section["shape"][:2]):
        size, made = ("x".join(map(str, side)) for side in (real["size"], section["shape"][:2]))
        raise UserError(f"the reference has pictures of {size}, and the model makes {made}; {reference}; resize them")
    if kind != "inception":
        notes = [*notes, f"no Inception weights (--inception, {INCEPTION}): frechet_patches is no FID"]
    for choice in chosen:
        folder = samples_folder(workdir, choice)
        make(folder, choice)
        made, more = features.statistics_of(folder, measure, about=about)
        results, last = compare.compare(made, real, features=kind)
        about_row = {"reference": reference, **about, "reference_pictures": int(real["count"]) or None}
        yield {**choice, "samples": int(made["count"]), **results}, {**about_row, "notes": [*notes, *more, *last]}
