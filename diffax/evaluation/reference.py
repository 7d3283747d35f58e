"""Samples of a trained model beside real pictures: --mode=evaluate --reference."""

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffax.errors import UserError
from diffax.evaluation import compare, features
from diffax.evaluation.pictures import training_pictures
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
