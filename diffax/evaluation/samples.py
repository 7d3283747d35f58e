"""Samples in folders, beside real pictures."""

import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffax import components
from diffax.components import RUNTIME, build
from diffax.data import images
from diffax.data.pipeline import batches
from diffax.errors import UserError
from diffax.evaluation import compare, features
from diffax.evaluation.pictures import Pictures, size_of
from diffax.sampling import grids
from diffax.sampling.files import sample_to_folder
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes
from diffax.weights.inception import VARIABLE as INCEPTION

Choice = Mapping[str, Any]


def choices(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of a call of a `SampleFn`: every combination of `config.eval`'s guidance, samplers and steps.

    The config's own where it has none.
    """
    kinds = {"guidance": settings["guidance"], "sampler": settings["samplers"], "steps": settings["steps"]}
    kinds = {name: values for name, values in kinds.items() if values}
    return [dict(zip(kinds, chosen, strict=True)) for chosen in itertools.product(*kinds.values())]


def samples_folder(workdir: pathlib.Path, choice: Choice) -> pathlib.Path:
    """Where the samples of a choice are, see `choices`."""
    name = "_".join(f"{key}_{value}" for key, value in choice.items())
    return workdir / "evaluation" / f"samples_{name}" if name else workdir / "samples"


def sample_many(
    sample_fn: SampleFn,
    folder: pathlib.Path,
    choice: Choice,
    prompts: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
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

    about = {"seed": c["seed"], "training_step": dict(sample_fn.step), **(about or {})}
    about |= {"stages": sampling_fields(sample_fn), "prompts": list(prompts), **choice}
    mine = {"process_index": processes.process_index(), "process_count": processes.process_count()}
    return sample_to_folder(sample, folder, num, about=about, labels=given.get("label"), **mine)


def sampling_fields(sample_fn: SampleFn) -> dict[str, dict[str, Any]]:
    """{stage: the fields of its section that sampling depends on and training does not, such as steps and guidance}."""
    found = {}
    for model in sample_fn.models:
        section = sample_fn.config[model.name]
        fields = components.schema(components.find("model", section["name"]))
        chosen = [name for name, field in fields.items() if RUNTIME in field.marks]
        found[model.name] = {name: section[name] for name in (*chosen, "conditions") if name in section}
    return found


def training_pictures(section: Mapping[str, Any], shape: Sequence[int], source: pathlib.Path) -> Pictures:
    """All pictures that a section is trained on, in order, in one size, never flipped nor cropped at random.

    Args:
      section: the section.
      shape: (H, W, C) of the pictures.
      source: what to call them; their statistics are kept beside it.
    """
    shape = tuple(shape)
    opened = build(section["data"], "data").open(shape)

    def chunks(size: int) -> Iterator[np.ndarray]:
        for batch in batches(opened, section["loader"], shape=shape, batch_size=size, seed=0, train=False):
            pictures = images.to_uint8(batch["image"], nearest=True)
            yield np.broadcast_to(pictures, (*pictures.shape[:3], 3))

    return Pictures(source, len(opened), (), chunks, [])


class Reference(NamedTuple):
    """Real pictures, measured.

    Attributes:
      statistics: of them.
      measure: pictures -> statistics, as they were made.
      about: what these depend on.
      notes: on them.
    """

    statistics: features.Statistics
    measure: features.Measure
    about: Mapping[str, Any]
    notes: Sequence[str]


def read_reference(
    reference: str | os.PathLike[str],
    model: Any,
    section: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    inception: str | None,
    batch_size: int,
) -> Reference:
    """Measures real pictures by the numbers of papers, or by another where their network is missing.

    Args:
      reference: real pictures or their statistics, see `features.statistics_of`; or 'data', those of the training.
      model: that makes the samples to be compared with them.
      section: of the model.
      workdir: where the statistics of the training data go.
      inception: weights of the FID's network, see `weights.inception.find`; where there are none, the Frechet distance
        of patches is computed, under that name.
      batch_size: pictures at once, in the network.

    Raises:
      UserError: there is no such reference, or it is of pictures of another size.
    """
    kind = "inception" if inception or os.environ.get(INCEPTION) else "patches"
    about, measure = features.measurement(kind, inception, batch_size=batch_size)
    if reference == "data":
        pictures = training_pictures(section, model.shape, workdir / "training_data")
        real, notes = features.statistics_of_pictures(pictures, measure, about=about)
    else:
        real, notes = features.statistics_of(reference, measure, about=about)
    if "size" in real and tuple(real["size"]) != tuple(model.shape[:2]):
        raise UserError(
            f"the reference has pictures of {size_of(real['size'])}, and the model makes {size_of(model.shape)}; "
            f"{reference}; resize them"
        )
    if kind != "inception":
        notes = [*notes, f"no Inception weights (--inception, {INCEPTION}): frechet_patches is no FID"]
    return Reference(real, measure, about, notes)


def compared(
    make: Callable[[pathlib.Path, Choice], Any], choice: Choice, workdir: pathlib.Path, reference: Reference
) -> tuple[dict[str, Any], list[str]]:
    """Compares the samples of a choice with real pictures.

    Args:
      make: (folder, choice) makes the samples of a choice in a folder, those that are missing there.
      choice: see `choices`.
      workdir: where samples and their statistics go.
      reference: see `read_reference`.

    Returns:
      A row, of the choice, the number of samples and the numbers of `compare.compare`; and notes on it.
    """
    folder, about = samples_folder(workdir, choice), reference.about
    make(folder, choice)
    made, notes = features.statistics_of(folder, reference.measure, about=about)
    results, more = compare.compare(made, reference.statistics, features=about["features"])
    return {**choice, "samples": int(made["count"]), **results}, [*notes, *more]
