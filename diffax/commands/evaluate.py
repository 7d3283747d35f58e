"""--mode=evaluate: scores of a trained workdir, or of its samples beside --reference; tables, plots and pictures."""

import sys
from typing import Any

from diffax.commands import Job
from diffax.commands.trained import prompts_of
from diffax.evaluation import api
from diffax.training import processes


def run(job: Job) -> None:
    """Scores the workdir; writes evaluation.json, evaluation.md and pictures, with --reference comparison.*."""
    args = job.args
    which = api.Which(args.step, args.ema, args.raw)
    prompts = prompts_of(job) if args.reference is not None else ()
    how = {"reference": args.reference, "inception": args.inception, "prompts": prompts, "on_row": show_row}
    for report in api.reports(job.config, job.workdir, which=which, **how):
        if processes.is_primary():
            show(report)


def show(report: api.Report) -> None:
    """Prints the table of a report, and where its files are."""
    for note in dict.fromkeys(report.notes):
        print(f"diffax: note: {note}", file=sys.stderr)
    if report.table:
        print(report.table)
    for path in report.files:
        print(f"{'report' if path.suffix == '.md' else 'plot'}: {path}")


def show_row(row: dict[str, Any]) -> None:
    """Prints the numbers of a row as soon as it is known."""
    if processes.is_primary():
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(shown, file=sys.stderr, flush=True)
