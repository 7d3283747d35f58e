"""Reports of scores: tables, and curves of one score against another."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffax.data import plots
from diffax.data.files import write_atomically
from diffax.training import reporting

Row = Mapping[str, Any]


def numbers(row: Row) -> dict[str, Any]:
    """What of a row is no picture."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    kept = [numbers(row) for row in rows]
    names = list(dict.fromkeys(name for row in kept for name in row))

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [names, ["---"] * len(names)] + [[show(row.get(name)) for name in names] for row in kept]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: pathlib.Path, rows: Sequence[Row], header: Row, *, name: str = "evaluation") -> str:
    """Writes NAME.json and NAME.md; returns the table."""
    text = json.dumps({**header, "rows": [numbers(row) for row in rows]}, indent=2) + "\n"
    write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))
    shown = table(rows)
    write_atomically(folder / f"{name}.md", lambda file: file.write((shown + "\n").encode()))
    return shown


def write_classifier_report(folder: pathlib.Path, found: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
    """Writes accuracy.png and a row of held_out.jsonl, with means also by quarter of the noise range.

    Args:
      folder: of the section.
      found: see `scores.guide_accuracy`.
      step: the training step.

    Returns:
      The row, least noise first.
    """
    row = {name: round(float(v.mean()), 4) for name, v in found.items() if name != "u"}
    for q, part in enumerate(np.array_split(np.arange(len(found["u"])), 4)):
        row |= {f"{name}_q{q}": round(float(found[name][part].mean()), 4) for name in found if "top" in name}
    reporting.append_row(folder / "held_out.jsonl", step, row)
    curves = {name: (found["u"], found[name]) for name in found if "top" in name}
    plots.line_plots(folder / "accuracy.png", [plots.Panel("noise level u", "held-out accuracy", curves)])
    return row


# ---- curves ---------------------------------------------------------------------------------------------------------


def curves(rows: Sequence[Row]) -> dict[str, list[plots.Panel]]:
    """{name of a picture: its panels}, of those that the rows have something to show in."""
    found = {"trade_off": trade_off(rows), "best_level": best_level(rows), "accuracy": accuracy(rows)}
    return {name: panels for name, panels in found.items() if panels}


def trade_off(rows: Sequence[Row]) -> list[plots.Panel]:
    """Accuracy and diversity against the guidance scale, and against each other; one curve for each sampler and steps.

    Empty where fewer than two scales were scored.
    """
    of: dict[str, list[Row]] = {}
    for row in rows:
        if "guidance" in row and "diversity" in row:
            of.setdefault(f"{row['sampler']}, {row['steps']} steps", []).append(row)
    if max((len(its) for its in of.values()), default=0) < 2:
        return []

    def panel(x: str, y: str, xlabel: str, ylabel: str, notes: Any = None) -> plots.Panel:
        drawn = {name: ([r[x] for r in its], [r[y] for r in its]) for name, its in of.items()}
        return plots.Panel(xlabel, ylabel, drawn, notes)

    scale, share, diversity = "guidance scale", "accuracy", "diversity (real pictures: 1)"
    notes = [f"{row['guidance']:g}" for row in next(iter(of.values()))]
    return [
        panel("guidance", "accuracy", scale, share),
        panel("guidance", "diversity", scale, diversity),
        panel("diversity", "accuracy", diversity, share, notes),
    ]


def best_level(rows: Sequence[Row]) -> list[plots.Panel]:
    """Frechet distances against the noise on the smaller picture (CDM, section 3); empty for fewer than two levels."""
    of = [row for row in rows if "level" in row and "samples" in row]
    x = [row["level"] for row in of]
    if len(set(x)) < 2 or len(set(x)) < len(x):
        return []
    names = [name for name in ("frechet_classifier", "frechet_patches") if name in of[0]]
    return [plots.Panel("noise level u of the smaller picture", n, {n: (x, [r[n] for r in of])}) for n in names]


def accuracy(rows: Sequence[Row]) -> list[plots.Panel]:
    """Accuracies of captions against the guidance scale; empty where fewer than two scales were scored."""
    of = [row for row in rows if "guidance" in row and "accuracy" in row and "diversity" not in row]
    if len(of) < 2:
        return []
    x = [row["guidance"] for row in of]
    names = [n for n in of[0] if n in ("accuracy", "whole") or n.endswith("_accuracy")]
    shares = {name: (x, [row[name] for row in of]) for name in names}
    panels = [plots.Panel("guidance scale", "share of the captions", shares)]
    if "frechet_classifier" in of[0]:
        distance = {"frechet_classifier": (x, [row["frechet_classifier"] for row in of])}
        panels.append(plots.Panel("guidance scale", "frechet_classifier", distance))
    return panels
