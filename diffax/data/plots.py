"""Curves as PNG files: of a training's metrics, and of results side by side."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffax.data.files import write_atomically
from diffax.errors import UserError


def loss_curve(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Draws metrics against the step as a PNG: faint as logged, bold smoothed.

    The axis is logarithmic where every shown value is positive.

    Args:
      path: file to write.
      rows: rows of metrics.jsonl; null and absent values are passed over.
      keys: metrics to draw.

    Raises:
      UserError: no row has a value for any of `keys`.
    """
    rows = list(rows)
    curves = {}
    for key in keys:
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            curves[key] = np.array(points, np.float64).T
    if not curves:
        raise UserError(f"no metrics to draw among {', '.join(keys)}; {path}; train longer or log more often")
    figure, (axes,) = _figure(("step", next(iter(curves)) if len(curves) == 1 else "value"))
    logarithmic = all((values > 0).all() for _, values in curves.values())
    for key, (steps, values) in curves.items():
        smooth = _smooth(np.log(values) if logarithmic else values)
        (line,) = axes.plot(steps, np.exp(smooth) if logarithmic else smooth, label=key, linewidth=2)
        axes.plot(
            steps, values, color=line.get_color(), alpha=0.25, linewidth=1, marker="." if len(steps) < 50 else None
        )
    axes.set_yscale("log" if logarithmic else "linear")
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


class Panel(NamedTuple):
    """One coordinate system of `line_plots`.

    Attributes:
      xlabel: what x is, with its unit; ylabel: what y is.
      curves: {name: (x [N], y [N])}; several have a legend.
      notes: N texts to write beside the points of every curve, or None.
    """

    xlabel: str
    ylabel: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    notes: Sequence[str] | None = None


def line_plots(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Draws panels side by side as a PNG; points are marked where a curve has few."""
    figure, all_axes = _figure(*((panel.xlabel, panel.ylabel) for panel in panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        for name, (x, y) in panel.curves.items():
            axes.plot(x, y, linewidth=2, marker="o" if len(x) < 30 else None, label=name)
            for point in zip(panel.notes or (), x, y, strict=False):
                axes.annotate(point[0], point[1:], xytext=(4, 4), textcoords="offset points", fontsize=8)
        if len(panel.curves) > 1:
            axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _figure(*labels: tuple[str, str]):
    """(figure, [axes for each pair of labels]) that need no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if len(labels) == 1 else 5 * len(labels), 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (xlabel, ylabel) in zip(all_axes, labels, strict=True):
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3, which="both")
    return figure, all_axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; the ends use what there is."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
