"""--mode=evaluate: scores a trained workdir; with --reference, compares its samples with real pictures."""

import sys
from typing import Any

from diffax.commands import Job
from diffax.commands.trained import prompts_of
from diffax.evaluation import api, report
from diffax.training import processes


def run(job: Job) -> None:
    """Scores a trained workdir; writes evaluation.json, evaluation.md and pictures; with --reference comparison.*.

    Several processes share what is costly, and each has the numbers; process 0 writes them.
    """
    args = job.args
    how = {"config": job.config, "step": args.step, "decay": args.ema, "raw": args.raw, "on_row": _print_row}
    if args.reference is not None:
        how |= {"reference": args.reference, "inception": args.inception, "prompts": prompts_of(job)}
    rows = api.evaluate(job.workdir, **how)
    if not processes.is_primary():
        return
    of_stages = [row for row in rows if "section" in row]
    for name in dict.fromkeys(row["section"] for row in of_stages if "method" in row):
        its = [row for row in of_stages if row["section"] == name and "method" in row]
        print(report.table([{key: value for key, value in row.items() if key != "section"} for row in its]))
    if samples := [row for row in rows if "section" not in row]:
        print(report.table(samples))
        for name in report.curves(samples):
            print(f"plot: {job.workdir / f'{name}.png'}")
        print(f"report: {job.workdir / ('evaluation' if args.reference is None else 'comparison')}.md")


def _print_row(row: dict[str, Any]) -> None:
    """Prints the numbers of a row as soon as it is known."""
    if not processes.is_primary():
        return
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in report.numbers(row).items()}
    if "section" in row and "method" not in row:  # a classifier or a CLIP
        what = f"{shown.pop('section')} on {shown.pop('pictures')} held-out pictures: {shown}"
        print(what, file=sys.stderr, flush=True)
    else:
        print(shown, file=sys.stderr, flush=True)
