"""Scoring a trained model from Python: `rows = diffax.evaluate("runs/quickstart", num=500, guidance=(1, 2))`."""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diffax import components
from diffax import config as configs
from diffax.errors import UserError
from diffax.evaluation import report, samples, scores
from diffax.evaluation.settings import evaluate as fields_of_eval
from diffax.models.system import System
from diffax.sampling import grids, load
from diffax.sampling.sample_fn import SampleFn
from diffax.training import cpu_flags, processes
from diffax.training import workdir as workdirs

Path = str | os.PathLike[str]
Row = dict[str, Any]
OnRow = Callable[[Row], None]


class Which(NamedTuple):
    """Which parameters of a workdir are scored, see `sampling.load.load`."""

    step: int | None = None
    decay: str | None = None
    raw: bool = False


class Report(NamedTuple):
    """What was scored together.

    Attributes:
      name: 'evaluation', 'comparison', 'enlargements' or 'held_out'.
      stage: that the rows are about; '' of a whole system.
      rows: of numbers.
      table: of the rows in Markdown; '' if none was written.
      files: that were written, but for the tables.
      notes: on what the numbers are worth.
    """

    name: str
    stage: str
    rows: Sequence[Row]
    table: str = ""
    files: Sequence[pathlib.Path] = ()
    notes: Sequence[str] = ()


def evaluate(
    source: Path | SampleFn,
    reference: Path | None = None,
    *,
    workdir: Path | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
    inception: str | None = None,
    prompts: Sequence[str] = (),
    on_row: OnRow | None = None,
    **settings: Any,
) -> list[Row]:
    """Scores a trained model.

    Without a reference: bits per dimension, what an evaluation classifier recognises, Frechet distances to held-out
    pictures; of stages that enlarge, their PSNR; of classifiers and CLIPs, their held-out accuracy. With a reference:
    FID, sFID, IS, precision, recall and KID of `sample.num` samples.

    Args:
      source: a workdir that training wrote to, or a loaded model.
      reference: real pictures or their statistics, as of `python -m diffax.evaluation`; or 'data', those of the
        training.
      workdir: where reports, pictures and samples are written; by default `source`, and nowhere of a loaded model.
      step: a training step, by default the newest intact one; of a workdir.
      decay: which average of the parameters, by default the first configured one; of a workdir.
      raw: the parameters in training instead of an average; of a workdir.
      inception: weights of the FID's network, or 'fetch'; without them the Frechet distance of patches is computed.
      prompts: captions of the samples that are compared with the reference, in turn.
      on_row: called with every row of numbers as soon as it is known.
      **settings: fields of `config.eval` in place of the config's, such as num=500, guidance=(1, 2) or
        classifier=spec("evaluation", "network").

    Returns:
      Rows: 'report' says of what ('evaluation', 'comparison', 'enlargements' or 'held_out'), 'stage' of which stage
      where it is one alone; the rest are numbers and the choices that they belong to.

    Raises:
      UserError: there is no trained model, or a setting that is wrong.
    """
    cpu_flags.set_cpu_flags()
    if isinstance(source, SampleFn):
        config, folder = with_settings(source.config, settings), None if workdir is None else pathlib.Path(workdir)
        sample_fn = dataclasses.replace(source, config=config)
        if reference is None:
            made = generator_reports(sample_fn, folder, on_row=on_row)
        else:
            made = [compared(sample_fn, reference, folder, inception=inception, prompts=prompts, on_row=on_row)]
    else:
        config = load.with_embedding_statistics(configs.to_dict(workdirs.read_config(source)), source)
        how = {"which": Which(step, decay, raw), "reference": reference, "inception": inception, "prompts": prompts}
        made = reports(with_settings(config, settings), source, output=workdir, on_row=on_row, **how)
    return [_named(of) | row for of in made for row in of.rows]


def _named(of: Report) -> Row:
    return {"report": of.name} | ({"stage": of.stage} if of.stage else {})


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain data, with other fields of its `eval`.

    Raises:
      UserError: there is no such field, or it does not fit the models.
    """
    plain = configs.to_dict(config)
    if not settings:
        return plain
    made = components.complete(components.schema(fields_of_eval), {**plain["eval"], **settings}, "config.eval")
    plain["eval"] = configs.to_dict(made)
    configs.check(configs.from_dict(plain))
    return plain


def reports(
    config: Mapping[str, Any],
    workdir: Path,
    *,
    which: Which,
    reference: Path | None = None,
    inception: str | None = None,
    prompts: Sequence[str] = (),
    output: Path | None = None,
    on_row: OnRow | None = None,
) -> Iterator[Report]:
    """Scores a trained workdir part by part, and writes what it finds; see `evaluate`.

    Several processes share what is costly, and each has the rows; process 0 writes them.

    Args:
      config: checked, as plain data.
      workdir: that training wrote to.
      which: parameters.
      reference: see `evaluate`.
      inception: see `evaluate`.
      prompts: see `evaluate`.
      output: where reports go; by default the workdir.
      on_row: see `evaluate`.
    """
    system, folder = System(configs.from_dict(config)), pathlib.Path(workdir if output is None else output)
    pictures = any(len(model.shape) == 3 for model in system.generators)
    loaded = functools.partial(load.load_workdir, config, workdir, **which._asdict())
    if reference is not None:
        about = {"ema": which.decay, "raw": which.raw}
        how = {"inception": inception, "prompts": prompts, "about": about, "on_row": on_row}
        yield compared(loaded(), reference, folder, **how)
        return
    for model in (system.model(name) for name in system.trained):
        if config["eval"]["num"] and hasattr(model, "terms") and workdirs.are_trained(config, workdir, [model.name]):
            yield guide_report(config, model, workdir, folder, which, on_row)
    if pictures:
        yield from generator_reports(loaded(), folder, workdirs.class_names(config, workdir, system.trained), on_row)


def guide_report(
    config: Mapping[str, Any],
    model: Any,
    workdir: Path,
    folder: pathlib.Path,
    which: Which,
    on_row: OnRow | None = None,
) -> Report:
    """The held-out accuracy of a noised classifier or a CLIP of a workdir."""
    params, step = workdirs.load_params(config, model.name, workdir, **which._asdict())
    held_out = scores.held_out_for(config[model.name], model, config["eval"]["num"])
    names = workdirs.class_names(config, workdir, [model.name])
    found = scores.guide_scores(config, model, params, held_out, names)
    row = report.classifier_row(found) | {"pictures": len(held_out["image"])}
    if on_row:
        on_row(row)
    if processes.is_primary():
        report.write_classifier_report(folder / model.name, found, step)
    return Report("held_out", model.name, [row])


def generator_reports(
    sample_fn: SampleFn,
    folder: pathlib.Path | None,
    class_names: Sequence[str] = (),
    on_row: OnRow | None = None,
) -> Iterator[Report]:
    """Scores the stages that enlarge, and the system whose first stage they are not.

    Args:
      sample_fn: the trained model.
      folder: where reports go; None: nowhere.
      class_names: of the labels.
      on_row: see `evaluate`.
    """
    header = {"name": sample_fn.config["name"], "training_step": dict(sample_fn.step)}
    for name in [model.name for model in sample_fn.models] if sample_fn.config["eval"]["num"] else ():
        alone = sample_fn.alone(name)
        if alone.enlarges and alone.makes_pictures:
            where = None if folder is None else folder / name
            rows = _drawn(scores.enlargements(alone), where, report.draw_enlargement, on_row)
            about = header | {"training_step": dict(alone.step)}
            yield _report("enlargements", name, rows, where, about)
    if sample_fn.enlarges:
        return
    where = None if folder is None else folder / "evaluation"
    rows = _drawn(scores.scores(sample_fn, class_names=class_names), where, report.draw_row, on_row)
    yield _report("evaluation", "", rows, folder, header, functools.partial(_plots, sample_fn, rows))


def _plots(sample_fn: SampleFn, rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    progress = folder / "progressive.png"
    draw_progress(sample_fn, progress)
    return [*report.draw_plots(folder, rows), progress]


def draw_progress(sample_fn: SampleFn, path: pathlib.Path) -> None:
    """Draws a row for each of a few pictures: estimates of it on the way (DDPM, figure 6)."""
    rows, moments = 8, 10
    given = grids.conditions_for(sample_fn, rows)
    _, kept = sample_fn(sample_fn.config["sample"]["seed"], rows, keep=moments, **given)
    grids.draw_grid(path, kept.reshape(rows * moments, *kept.shape[2:]), columns=moments)


def _drawn(rows: Iterator[Row], folder: pathlib.Path | None, draw: Callable, on_row: OnRow | None) -> list[Row]:
    """The rows, each drawn and shown as soon as it is known."""
    found = []
    for row in rows:
        found.append(row)
        if on_row:
            on_row(report.numbers(row))
        if folder is not None and processes.is_primary():
            draw(folder, row)
    return found


def _report(
    name: str,
    stage: str,
    rows: Sequence[Row],
    folder: pathlib.Path | None,
    header: Mapping[str, Any],
    draw: Callable[[pathlib.Path], list[pathlib.Path]] = lambda folder: [],
    notes: Sequence[str] = (),
) -> Report:
    """A report, written if there is a folder."""
    plain = [report.numbers(row) for row in rows]
    if folder is None or not processes.is_primary():
        return Report(name, stage, plain, notes=notes)
    table = report.write_report(folder, rows, header, name=name)
    return Report(name, stage, plain, table, [*draw(folder), folder / f"{name}.md"], notes)


# ---- beside a reference ---------------------------------------------------------------------------------------------


def compared(
    sample_fn: SampleFn,
    reference: Path,
    folder: pathlib.Path | None,
    *,
    inception: str | None = None,
    prompts: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    on_row: OnRow | None = None,
) -> Report:
    """Compares `sample.num` samples with real pictures, for every choice of `config.eval`.

    Of several processes all make samples, and process 0 compares them.

    Args:
      sample_fn: the trained model.
      reference: see `evaluate`.
      folder: where samples, statistics and the report go; None: samples are thrown away.
      inception: see `evaluate`.
      prompts: see `evaluate`.
      about: what the parameters depend on besides the training step.
      on_row: see `evaluate`.

    Raises:
      UserError: the model makes no pictures from noise alone, or there is no such reference.
    """
    model = sample_fn.models[-1]
    if sample_fn.enlarges or not sample_fn.makes_pictures:
        raise UserError(
            f"{model.name} does not make pictures from noise alone; --reference; score the samples of a whole system"
        )
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            how = {"inception": inception, "prompts": prompts, "about": about, "on_row": on_row}
            return compared(sample_fn, reference, pathlib.Path(temporary), **how)._replace(table="", files=())

    def make(where: pathlib.Path, choice: samples.Choice) -> None:
        samples.sample_many(sample_fn, where, choice, prompts, about)

    settings = sample_fn.config["eval"]
    if not processes.is_primary():  # it makes its share of the samples, which process 0 waits for
        for choice in samples.choices(settings):
            make(samples.samples_folder(folder, choice), choice)
        return Report("comparison", "", [])
    how = {"inception": inception, "batch_size": settings["batch_size"]}
    real = samples.read_reference(reference, model, sample_fn.config[model.name], folder, **how)
    rows, notes = [], list(real.notes)
    for choice in samples.choices(settings):
        row, more = samples.compared(make, choice, folder, real)
        rows, notes = [*rows, row], [*notes, *more]
        if on_row:
            on_row(row)
    header = {"name": sample_fn.config["name"], "training_step": dict(sample_fn.step), "reference": str(reference)}
    header |= {**real.about, "reference_pictures": int(real.statistics["count"]) or None, "notes": notes}
    return _report("comparison", "", rows, folder, header, notes=notes)
