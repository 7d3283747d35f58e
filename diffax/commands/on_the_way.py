"""What is shown while a section trains: samples of a generator, held-out accuracy of a classifier or a CLIP."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffax import components
from diffax.commands.sample import write_samples
from diffax.commands.trained import are_trained
from diffax.evaluation import report, scores
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes
from diffax.training import workdir as workdirs

Params = Any
OnSample = Callable[[int, SampleFn], None]
Show = Callable[[Params, int], None]  # see `training.loop.fit`


def on_sample(
    config: Mapping[str, Any], model: Any, workdir: pathlib.Path, class_names: Sequence[str], user: OnSample | None
) -> Show | None:
    """What `training.loop.fit` calls every `train.sample_every` steps; None where there is nothing to show.

    Args:
      config: the whole config.
      model: what is trained.
      workdir: where.
      class_names: of the data.
      user: called in place of drawing samples.
    """
    if not hasattr(model, "sample"):
        return _accuracy(config, model, workdir, class_names)
    others = [other for other in model.sections if other != model.name]
    if (user is None and len(model.shape) != 3) or not are_trained(config, workdir, others):
        return None
    params = {other: workdirs.load_params(config, other, workdir)[0] for other in others}
    return _samples(config, model, workdir / model.name, params, user or _drawing(config, workdir, class_names))


def _samples(
    config: Mapping[str, Any], model: Any, folder: pathlib.Path, others: Mapping[str, Params], show: OnSample
) -> Show | None:
    """`show` as (averaged parameters, step) -> None."""
    statistics = workdirs.read_statistics(folder)
    if model.statistics_example() is not None and not statistics:
        return None  # they are measured when it is trained

    def call(params: Params, step: int) -> None:
        own = {**params, "statistics": statistics} if statistics else params
        show(step, SampleFn((model,), {**others, model.name: own}, config, {model.name: step}))

    return call


def _drawing(config: Mapping[str, Any], workdir: pathlib.Path, class_names: Sequence[str]) -> OnSample:
    """Draws a grid of samples; of a model that enlarges, enlargements of held-out pictures."""
    held_out: dict[str, Any] = {}

    def draw(step: int, sample_fn: SampleFn) -> None:
        model = sample_fn.models[0]
        path = workdir / model.name / "samples" / f"{step:08d}.png"
        if not sample_fn.enlarges:
            write_samples(sample_fn, config, path, class_names)
            return
        if not held_out:
            columns = grids.columns_there(config[model.name], model.data_shape)
            held_out.update(grids.held_out_examples(config[model.name], model.data_shape, 8, columns))
        given = grids.arguments_of(sample_fn, held_out)
        made = grids.sample_together(sample_fn, 0, len(given["image"]), given)
        if processes.is_primary():
            real = grids.smaller(held_out["image"], held_out["image"].shape[1] // made.shape[1])
            grids.draw_enlargements(path, given["image"], made, real)

    return draw


def _accuracy(config: Mapping[str, Any], model: Any, workdir: pathlib.Path, class_names: Sequence[str]) -> Show | None:
    """Writes the held-out accuracy of a classifier or a CLIP; None without held-out data."""
    section = config[model.name]
    data = components.build(section["data"], "data", path=f"config.{model.name}.data")
    if not config["eval"]["num"] or not data.has_held_out:
        return None
    held_out = scores.guide_examples(config, model)

    def score(params: Params, step: int) -> None:
        found: dict[str, np.ndarray] = scores.guide_scores(config, model, params, held_out, class_names)
        if processes.is_primary():
            report.write_classifier_report(workdir / model.name, found, step)

    return score
