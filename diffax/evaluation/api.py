"""Scoring a trained workdir: `rows = diffax.evaluate('runs/quickstart')`."""

import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffax import components
from diffax import config as configs
from diffax.data import plots
from diffax.errors import UserError
from diffax.evaluation import reference as references
from diffax.evaluation import report, scores
from diffax.evaluation.settings import evaluate as fields_of_eval
from diffax.models.system import System
from diffax.sampling import grids
from diffax.sampling.load import load_workdir, with_embedding_statistics
from diffax.sampling.sample_fn import SampleFn
from diffax.training import cpu_flags, processes
from diffax.training import workdir as workdirs

Row = dict[str, Any]
OnRow = Callable[[Row], None]


def evaluate(
    source: str | os.PathLike[str] | SampleFn,
    reference: str | os.PathLike[str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
    inception: str | None = None,
    prompts: Sequence[str] = (),
    on_row: OnRow | None = None,
    **settings: Any,
) -> list[Row]:
    """Scores a trained model as the `eval` section of its config says.

    Args:
      source: a workdir, into which reports and pictures are written; or a `SampleFn`, of which nothing is written.
      reference: real pictures or their statistics, as `python -m diffax.evaluation` reads them, or 'data', those of the
        training: `sample.num` samples are compared with them by the numbers of papers, and nothing else is scored.
      config: use this config in place of the workdir's.
      step: a training step, by default the newest intact one.
      decay: which average of the parameters, by default the first configured one.
      raw: the parameters in training instead of an average.
      inception: beside a reference: weights of the FID's network, or 'fetch'; without them the Frechet distance of
        patches is computed.
      prompts: beside a reference: captions of the samples, in turn.
      on_row: called with every row as soon as it is known.
      **settings: fields of `config.eval` in place of the config's, such as num=500, guidance=(1, 2) or
        classifier=spec("evaluation", "network").

    Returns:
      The rows: of the samples, and before them of each stage that enlarges, each classifier and each CLIP, which have a
      'section'. Entries that begin with '_' are pictures and curves.

    Raises:
      UserError: there is no trained model, the data do not fit it, or a setting is wrong.
    """
    cpu_flags.set_cpu_flags()
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    how = {"step": step, "decay": decay, "raw": raw}
    beside = {"inception": inception, "prompts": prompts, "about": {"ema": decay, "raw": raw}, "keep": keep}
    if not isinstance(source, str | os.PathLike):
        sample_fn = dataclasses.replace(source, config=with_settings(source.config, settings))
        if reference is None:
            for row in scores.scores(sample_fn, sample_fn.config["eval"]):
                keep(row)
        else:
            with tempfile.TemporaryDirectory() as folder:
                compared(sample_fn, reference, pathlib.Path(folder), **beside)
        return rows
    workdir = pathlib.Path(source)
    plain = with_settings(workdirs.read_config(workdir) if config is None else config, settings)
    whole = configs.from_dict(with_embedding_statistics(plain, workdir))
    if reference is None:
        _of_workdir(System(whole), workdir, how, keep)
    else:
        compared(load_workdir(whole, workdir, **how), reference, workdir, **beside)
    return rows


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain data, with other values of fields of its `eval`.

    Raises:
      UserError: there is no such field, or the value does not fit the models.
    """
    plain = configs.to_dict(config)
    if not settings:
        return plain
    made = components.complete(components.schema(fields_of_eval), {**plain["eval"], **settings}, "config.eval")
    plain["eval"] = configs.to_dict(made)
    configs.check(configs.from_dict(plain))
    return plain


def _of_workdir(system: System, workdir: pathlib.Path, how: Mapping[str, Any], keep: OnRow) -> None:
    """Scores everything that is trained in a workdir."""
    names = workdirs.class_names(system.config, workdir, system.trained)
    for row in _of_guides(system, workdir, names, how):
        keep(row)
    if any(len(model.shape) == 3 for model in system.generators):
        sample_fn = load_workdir(system.config, workdir, **how)
        for row in _of_enlargements(sample_fn, workdir):
            keep(row)
        if not sample_fn.enlarges:
            _of_samples(sample_fn, workdir, names, keep)


def compared(
    sample_fn: SampleFn,
    reference: str | os.PathLike[str],
    folder: pathlib.Path,
    *,
    inception: str | None,
    prompts: Sequence[str],
    about: Mapping[str, Any],
    keep: OnRow,
) -> None:
    """Compares `sample.num` samples of every choice with real pictures; writes comparison.json and comparison.md.

    Of several processes all make samples, and process 0 compares them.

    Args:
      sample_fn: the trained model.
      reference: see `evaluate`.
      folder: where samples, statistics and the report go.
      inception: see `evaluate`.
      prompts: see `evaluate`.
      about: what the parameters depend on besides the training step.
      keep: called with every row.

    Raises:
      UserError: the model makes no pictures from noise alone, or there is no such reference.
    """
    model, settings = sample_fn.models[-1], sample_fn.config["eval"]
    if sample_fn.enlarges or not sample_fn.makes_pictures:
        raise UserError(
            f"{model.name} does not make pictures from noise alone; --reference; score the samples of a whole system"
        )

    def make(where: pathlib.Path, choice: Mapping[str, Any]) -> None:
        references.sample_many(sample_fn, where, choice, prompts=prompts, about=about)

    chosen = references.choices(settings)
    if not _primary():  # it makes its share of the samples, which process 0 waits for
        for choice in chosen:
            make(references.samples_folder(folder, choice), choice)
        return
    how = {"section": sample_fn.config[model.name], "inception": inception, "batch_size": settings["batch_size"]}
    rows, found, notes = [], {}, []
    for row, found in references.compared(make, chosen, folder, reference=str(reference), **how):
        rows.append(row)
        notes += [note for note in found["notes"] if note not in notes]
        keep(row)
    for note in notes:
        print(f"diffax: note: {note}", file=sys.stderr)
    report.write_report(folder, rows, {**header(sample_fn), **found, "notes": notes}, name="comparison")


def _primary() -> bool:
    return processes.is_primary()


def _is_trained(config: Mapping[str, Any], name: str, workdir: pathlib.Path) -> bool:
    there = (workdirs.folder_of(config, name, workdir) / "checkpoints").exists()
    return not processes.agree(not there)


def _of_guides(system: System, workdir: pathlib.Path, names: list[str], how: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of classifiers and CLIPs: how well they classify held-out pictures."""
    for name in system.trained if system.config["eval"]["num"] else ():
        model = system.model(name)
        if hasattr(model, "sample") or not _is_trained(system.config, name, workdir):
            continue
        params, step = workdirs.load_params(system.config, name, workdir, **how)
        held_out = scores.guide_examples(system.config, model)
        found = scores.guide_scores(system.config, model, params, held_out, names)
        row = report.write_classifier_report(workdir / name, found, step) if _primary() else {}
        yield {"section": name, "pictures": len(held_out["image"]), **row}


def _of_enlargements(sample_fn: SampleFn, workdir: pathlib.Path) -> Iterator[Row]:
    """Rows of every stage that enlarges, on held-out pictures."""
    settings = sample_fn.config["eval"]
    for model in sample_fn.models if settings["num"] else ():
        alone = sample_fn.alone(model.name)
        if not alone.enlarges:
            continue
        rows = []
        for row in scores.enlargements(alone, settings):
            rows.append(row)
            if "_made" in row and _primary():
                level = f"_{row['level']:g}" if "level" in row else ""
                path = workdir / model.name / f"enlargements{level}.png"
                grids.draw_enlargements(path, row["_small"], row["_made"], row["_real"])
            yield {"section": model.name, **row}
        if _primary():
            report.write_report(workdir / model.name, rows, header(alone), name="enlargements")


def _of_samples(sample_fn: SampleFn, workdir: pathlib.Path, names: list[str], keep: OnRow) -> None:
    """Scores samples; writes the report, and pictures beside it."""
    rows = []
    for row in scores.scores(sample_fn, sample_fn.config["eval"], names):
        rows.append(row)
        if _primary():
            _draw(row, workdir / "evaluation", sample_fn.num_classes or 8)
        keep(row)
    if not _primary():
        return
    report.write_report(workdir, rows, header(sample_fn))
    for name, panels in report.curves(rows).items():
        plots.line_plots(workdir / f"{name}.png", panels)
    _draw_progress(sample_fn, workdir / "progressive.png")


def _draw(row: Row, folder: pathlib.Path, columns: int) -> None:
    of = "_".join(str(row[k]) for k in ("guidance", "level", "sampler", "steps") if k in row)
    if "_samples" in row:
        grids.draw_grid(folder / f"samples_{of}.png", row["_samples"], columns=columns, labels=row["_labels"])
    if "_curve" in row:
        panel = plots.Panel(
            "rate, bits per dimension", "distortion, RMSE of 0 to 255", {"rate-distortion": row["_curve"]}
        )
        plots.line_plots(folder / f"rate_distortion_{row['steps']}.png", [panel])


def _draw_progress(sample_fn: SampleFn, path: pathlib.Path) -> None:
    """A row for each of a few pictures: the model's estimates on the way (DDPM, figure 6)."""
    rows, moments = 8, 10
    given = grids.conditions_for(sample_fn, rows)
    _, kept = sample_fn(sample_fn.config["sample"]["seed"], rows, keep=moments, **given)
    grids.draw_grid(path, kept.reshape(rows * moments, *kept.shape[2:]), columns=moments)


def header(sample_fn: SampleFn) -> dict[str, Any]:
    """What a report is about."""
    return {"name": sample_fn.config["name"], "training_step": dict(sample_fn.step)}
