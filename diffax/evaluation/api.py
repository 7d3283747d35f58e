"""Scoring a trained workdir: `rows = diffax.evaluate('runs/quickstart')`."""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffax import config as configs
from diffax.data import plots
from diffax.evaluation import report, scores
from diffax.models.system import System
from diffax.sampling import grids
from diffax.sampling.load import load_workdir
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes
from diffax.training import workdir as workdirs

Row = dict[str, Any]
OnRow = Callable[[Row], None]


def evaluate(
    source: str | os.PathLike[str] | SampleFn,
    *,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
    on_row: OnRow | None = None,
) -> list[Row]:
    """Scores a trained model as the `eval` section of its config says.

    Args:
      source: a workdir, into which reports and pictures are written; or a `SampleFn`, of which nothing is written.
      config: use this config in place of the workdir's.
      step: a training step, by default the newest intact one.
      decay: which average of the parameters, by default the first configured one.
      raw: the parameters in training instead of an average.
      on_row: called with every row as soon as it is known.

    Returns:
      The rows: of the samples, and before them of each stage that enlarges, each classifier and each CLIP, which have a
      'section'. Entries that begin with '_' are pictures and curves.

    Raises:
      UserError: there is no trained model, or the data do not fit it.
    """
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    if not isinstance(source, str | os.PathLike):
        for row in scores.scores(source, source.config["eval"]):
            keep(row)
        return rows
    workdir = pathlib.Path(source)
    whole = configs.from_dict(configs.to_dict(workdirs.read_config(workdir) if config is None else config))
    how = {"step": step, "decay": decay, "raw": raw}
    system = System(whole)
    names = workdirs.class_names(whole, workdir, system.trained)
    for row in _of_guides(system, workdir, names, how):
        keep(row)
    if any(len(model.shape) == 3 for model in system.generators):
        sample_fn = load_workdir(whole, workdir, **how)
        for row in _of_enlargements(sample_fn, workdir):
            keep(row)
        if not sample_fn.enlarges:
            _of_samples(sample_fn, workdir, names, keep)
    return rows


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
                level = f"_{row['level']}" if "level" in row else ""
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
