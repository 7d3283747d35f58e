"""Curves follow the numbers that they show."""

import numpy as np
import pytest

from diffax.data import images, plots
from diffax.errors import UserError


def test_loss_curve_is_drawn_and_follows_the_data(tmp_path):
    rows = [{"step": i, "loss": 1 / i, "gap": None if i % 2 else 3.0, "minus": -i} for i in range(1, 200)]
    path = tmp_path / "new" / "loss.png"
    plots.loss_curve(path, rows, ["loss"])
    picture = images.read_image(path)
    assert picture.shape == (450, 800, 3)
    blue = (picture[..., 2].astype(int) - picture[..., 0]) > 100
    heights = [np.flatnonzero(column).mean() for column in blue[60:400, 120:780].T if column.any()]
    assert len(heights) > 500 and heights[0] < heights[-1] - 100  # Rows count downwards.
    before = path.read_bytes()
    plots.loss_curve(path, rows, ["loss", "gap", "minus", "absent"])
    assert path.read_bytes() != before
    plots.loss_curve(path, rows[:1], ["loss"])
    with pytest.raises(UserError, match="no metrics to draw among absent"):
        plots.loss_curve(path, rows, ["absent"])


def test_panels_lie_side_by_side_and_hold_their_curves(tmp_path):
    curves = {"up": ([1, 2, 3], [1, 2, 3]), "down": ([1, 2, 3], [3, 2, 1])}
    panels = [plots.Panel("x", "y", curves, notes=["a", "b", "c"]), plots.Panel("x", "z", {"up": curves["up"]})]
    plots.line_plots(tmp_path / "plot.png", panels)
    picture = images.read_image(tmp_path / "plot.png").astype(int)
    assert picture.shape == (450, 1000, 3)
    orange = (picture[..., 0] - picture[..., 2]) > 100
    assert orange[:, :500].any() and not orange[:, 500:].any(), "the second curve is in the first panel alone"
