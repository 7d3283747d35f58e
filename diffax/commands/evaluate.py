"""--mode=evaluate: scores a trained workdir; with --reference, compares its samples with real pictures."""

import sys
from typing import Any

from diffax.commands import Job
from diffax.commands.sample import sample_many
from diffax.commands.trained import load_trained, prompts_of
from diffax.errors import UserError
from diffax.evaluation import api, reference, report
from diffax.training import processes


def run(job: Job) -> None:
    """Scores a trained workdir; writes evaluation.json, evaluation.md and pictures.

    Several processes share what is costly, and each has the numbers; process 0 writes them.
    """
    if job.args.reference is not None:
        compare_samples(job)
        return
    args = job.args
    rows = api.evaluate(job.workdir, config=job.config, step=args.step, decay=args.ema, raw=args.raw, on_row=_print_row)
    if not processes.is_primary():
        return
    of_stages = [row for row in rows if "section" in row]
    for name in dict.fromkeys(row["section"] for row in of_stages if "method" in row):
        print(report.table([row for row in of_stages if row["section"] == name and "method" in row]))
    if samples := [row for row in rows if "section" not in row]:
        print(report.table(samples))
        for name in report.curves(samples):
            print(f"plot: {job.workdir / f'{name}.png'}")
        print(f"report: {job.workdir / 'evaluation.md'}")


def _print_row(row: dict[str, Any]) -> None:
    """Prints the numbers of a row as soon as it is known."""
    if processes.is_primary():
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in report.numbers(row).items()}
        print(shown, file=sys.stderr, flush=True)


def compare_samples(job: Job) -> None:
    """Compares `sample.num` samples with --reference; writes comparison.json and comparison.md."""
    sample_fn, prompts, settings = load_trained(job), prompts_of(job), job.config["eval"]
    if sample_fn.enlarges or not sample_fn.makes_pictures:
        raise UserError(
            f"{sample_fn.models[-1].name} does not make pictures from noise alone; --reference; score the samples of a "
            "whole system"
        )
    chosen = reference.choices(settings)
    if not processes.is_primary():  # it makes its share of the samples, which process 0 waits for
        for choice in chosen:
            sample_many(job, sample_fn, prompts, reference.samples_folder(job.workdir, choice), choice)
        return
    rows, about = [], {}
    for row, found in reference.compared(
        lambda folder, choice: sample_many(job, sample_fn, prompts, folder, choice),
        chosen,
        job.workdir,
        reference=job.args.reference,
        section=job.config[sample_fn.models[-1].name],
        inception=job.args.inception,
        batch_size=settings["batch_size"],
    ):
        _print_row(row)
        rows.append(row)
        about = found
    for note in about["notes"]:
        print(f"diffax: note: {note}", file=sys.stderr)
    print(report.write_report(job.workdir, rows, {**api.header(sample_fn), **about}, name="comparison"))
    print(f"report: {job.workdir / 'comparison.md'}")
