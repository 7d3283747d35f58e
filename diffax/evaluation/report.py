"""Tables and plots of what was scored."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffax.data import files
from diffax.data.plots import Panel, line_plots
from diffax.sampling import grids
from diffax.training import reporting

Row = Mapping[str, Any]


def numbers(row: Row) -> dict[str, Any]:
    """A row without the arrays that its pictures are drawn from."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def write_report(
    workdir: pathlib.Path, rows: Sequence[Row], header: Mapping[str, Any], *, name: str = "evaluation"
) -> str:
    """Writes NAME.json and NAME.md into a folder.

    Args:
      workdir: the folder.
      rows: see `scores`; names that begin with '_' are left out.
      header: what the rows are about, for NAME.json.
      name: of the files.

    Returns:
      The table, in Markdown.
    """
    kept = [numbers(row) for row in rows]
    text = json.dumps({**header, "rows": kept}, indent=2) + "\n"
    files.write_atomically(workdir / f"{name}.json", lambda f: f.write(text.encode()))
    names = list(dict.fromkeys(k for row in kept for k in row))
    lines = [names, ["---"] * len(names)] + [[_shown(row.get(k)) for k in names] for row in kept]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    files.write_atomically(workdir / f"{name}.md", lambda f: f.write((table + "\n").encode()))
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def classifier_row(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the noise levels of what `scores.guide_scores` found, and by quarter of them, least noise first."""
    row = {name: round(float(v.mean()), 4) for name, v in found.items() if name != "u"}
    for q, part in enumerate(np.array_split(np.arange(len(found["u"])), 4)):
        row |= {f"{name}_q{q}": round(float(found[name][part].mean()), 4) for name in found if "top" in name}
    return row


def write_classifier_report(folder: pathlib.Path, found: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
    """Writes accuracy.png (against the noise level) and `classifier_row` into held_out.jsonl; returns that row."""
    row = classifier_row(found)
    reporting.append_row(folder / "held_out.jsonl", step, row)
    curves = {name: (found["u"], found[name]) for name in found if "top" in name}
    line_plots(folder / "accuracy.png", [Panel("noise level u", "held-out accuracy", curves)])
    return row


# ---- pictures of rows -----------------------------------------------------------------------------------------------


def draw_row(folder: pathlib.Path, row: Row) -> None:
    """Draws the samples and the rate-distortion curve of a row of `scores`."""
    if "_samples" in row:
        of = "_".join(str(row[k]) for k in ("guidance", "level", "sampler", "steps") if k in row)
        path = folder / f"samples_{of}.png"
        grids.draw_grid(path, row["_samples"], columns=row["_columns"], labels=row["_labels"])
    if "_curve" in row:
        panel = Panel("rate, bits per dimension", "distortion, RMSE of 0 to 255", {"rate-distortion": row["_curve"]})
        line_plots(folder / f"rate_distortion_{row['steps']}.png", [panel])


def draw_enlargement(folder: pathlib.Path, row: Row) -> None:
    """Draws the pictures of a row of `enlargements`."""
    if "_made" in row:
        level = f"_{row['level']}" if "level" in row else ""
        grids.draw_enlargements(folder / f"enlargements{level}.png", row["_small"], row["_made"], row["_real"])


def draw_plots(folder: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
    """Draws what the rows of `scores` say together; returns the files."""
    drawn = []
    for name, panels in {"trade_off": trade_off, "best_level": best_level, "shares": shares}.items():
        if found := panels(rows):
            drawn.append(folder / f"{name}.png")
            line_plots(drawn[-1], found)
    return drawn


def trade_off(rows: Sequence[Row]) -> list[Panel]:
    """Accuracy and diversity against the guidance scale, and against each other; one curve for each sampler and steps.

    Empty where fewer than two scales were scored.
    """
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if "guidance" in row and "diversity" in row:
            curves.setdefault(f"{row['sampler']}, {row['steps']} steps", []).append(row)
    if max((len(of) for of in curves.values()), default=0) < 2:
        return []

    def panel(x: str, y: str, xlabel: str, ylabel: str, notes=None) -> Panel:
        drawn = {name: ([r[x] for r in of], [r[y] for r in of]) for name, of in curves.items()}
        return Panel(xlabel, ylabel, drawn, notes)

    scale, accuracy, diversity = "guidance scale", "accuracy", "diversity (real pictures: 1)"
    notes = [f"{row['guidance']:g}" for row in next(iter(curves.values()))]
    return [
        panel("guidance", "accuracy", scale, accuracy),
        panel("guidance", "diversity", scale, diversity),
        panel("diversity", "accuracy", diversity, accuracy, notes),
    ]


def best_level(rows: Sequence[Row]) -> list[Panel]:
    """Frechet distances against the noise on the smaller picture (CDM, section 3); empty for fewer than two levels."""
    of = [row for row in rows if "level" in row and "samples" in row]
    x = [row["level"] for row in of]
    if len(set(x)) < 2 or len(set(x)) < len(x):
        return []
    names = [name for name in ("frechet_classifier", "frechet_patches") if name in of[0]]
    return [Panel("noise level u of the smaller picture", n, {n: (x, [r[n] for r in of])}) for n in names]


def shares(rows: Sequence[Row]) -> list[Panel]:
    """The shares that an evaluation classifier gives for drawing, and its Frechet distance, against the guidance scale.

    Empty where fewer than two scales were scored.
    """
    of = [row for row in rows if "guidance" in row and row.get("_shares")]
    if len(of) < 2:
        return []
    x = [row["guidance"] for row in of]
    panels = [Panel("guidance scale", "share of the samples", {n: (x, [r[n] for r in of]) for n in of[0]["_shares"]})]
    if "frechet_classifier" in of[0]:
        distance = {"frechet_classifier": (x, [row["frechet_classifier"] for row in of])}
        panels.append(Panel("guidance scale", "frechet_classifier", distance))
    return panels
