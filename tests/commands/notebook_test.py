"""The notebook of launch/: a valid file without outputs, and cells that run from top to bottom."""

import ast
import itertools
import json
import pathlib
import re
import subprocess
import sys
import warnings

import chex
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import diffax
from diffax.data import images
from tests import micro

matplotlib.use("Agg")

PATH = pathlib.Path(__file__).parents[2] / "launch" / "diffax_colab.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))

# What stands in place of the settings cell's values.
SETTINGS = {
    # The config's schedule is continuous; and labels should matter to the model a little.
    "OVERRIDES": [
        *(f"--{o}" for o in micro.OVERRIDES if "schedule" not in o),
        "--config.base.train.num_train_steps=60",
        "--config.base.train.save_every=60",
        "--config.base.train.warmup_steps=0",
        "--config.base.train.learning_rate=0.01",
    ],
    "SCALES": [1.0, 2.0, 4.0],
    "ANCESTRAL_STEPS": 4,
    "SOLVER_STEPS": [3, 2],
    "SWEEP_PICTURES": 20,
}


def code_cells() -> dict[str, str]:
    """{id: Python source} of the code cells, without magics and shell commands."""
    return {
        cell["id"]: re.sub(r"(?m)^[%!].*$", "", "".join(cell["source"]))
        for cell in NOTEBOOK["cells"]
        if cell["cell_type"] == "code"
    }


def test_is_a_notebook_of_format_4():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert NOTEBOOK["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert NOTEBOOK["metadata"]["language_info"] == {"name": "python"}
    assert "colab" in NOTEBOOK["metadata"]
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[A-Za-z0-9_-]{1,64}", i) for i in ids)
    for cell in NOTEBOOK["cells"]:
        extra = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | extra
        assert all(isinstance(line, str) and line.count("\n") <= 1 for line in cell["source"])


def test_stores_no_outputs_and_every_cell_parses():
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for name, source in code_cells().items():
        ast.parse(source, filename=name)


def test_names_no_host():
    assert "://" not in PATH.read_text(encoding="utf-8")


# ---- installing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffax", None)  # importing it fails


def test_installing_asks_for_the_address(not_installed):
    with pytest.raises(ImportError, match="set REPOSITORY above") as caught:
        exec(code_cells()["install"], {})
    assert "\n" not in str(caught.value)


def test_installing_clones_and_installs(not_installed, monkeypatch, tmp_path):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append((command, check)))
    monkeypatch.setattr("site.main", lambda: sys.modules.update(diffax=diffax))
    exec(code_cells()["install"].replace('REPOSITORY = ""', 'REPOSITORY = "somewhere"'), namespace := {})
    assert ran == [
        (["git", "clone", "--depth=1", "somewhere", "diffax_repository"], True),
        ([sys.executable, "-m", "pip", "install", "-q", "-e", "./diffax_repository[demo]"], True),
    ]
    assert namespace["diffax"] is diffax


# ---- running --------------------------------------------------------------------------------------------------------


def run_cells():
    """{cell: (the namespace after it, what it showed)}, of all cells in turn; their warnings are errors."""
    shown, after = [], {}
    namespace = {"__name__": "notebook", "display": shown.append}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="notebook")
        for name, source in code_cells().items():
            exec(compile(source, name, "exec"), namespace)
            if name == "settings":
                assert set(namespace) >= set(SETTINGS)
                namespace.update(SETTINGS)
            after[name] = dict(namespace), list(shown)
            shown.clear()
    return after


def grid_size(rows, columns):
    """(width, height) of a labelled grid of micro pictures."""
    count = rows * columns
    height, width, _ = images.grid(np.zeros((count, 8, 8, 1), np.uint8), columns, ["0"] * count).shape
    return width, height


def check_pictures(pictures, count):
    chex.assert_shape(pictures, (count, 8, 8, 1))
    assert np.isfinite(pictures).all() and np.abs(pictures).max() <= 1 + 1e-5


def check_rows_differ(rows, count):
    for row in rows:
        check_pictures(row, count)
    assert all(np.abs(row - before).max() > 1e-3 for before, row in itertools.pairwise(rows))


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    after = run_cells()

    sample_fn = after["load"][0]["sample_fn"]
    assert sample_fn.config["name"] == "cfg_imagenet_64_tiny" and sample_fn.step == {"base": 60}
    assert [step for step, _ in after["load"][0]["losses"]] == [*range(2, 61, 2)]
    exec(code_cells()["load"], again := dict(after["settings"][0]))
    assert not again["losses"], "what is trained is not trained again"

    grids = {"sample": [(2, 10)], "guidance": [(3, 3), (1, 3)], "steps": [(3, 10)], "pure": [(1, 4)]}
    for cell, sizes in grids.items():
        shown = after[cell][1]
        assert [picture.size for picture in shown] == [grid_size(*size) for size in sizes], cell
        assert all(np.asarray(picture).std() > 10 for picture in shown), cell
    check_pictures(after["sample"][0]["pictures"], 20)

    guided = after["guidance"][0]
    check_rows_differ(guided["rows"], 3)
    expected = [row[i] for i, row in enumerate(guided["rows"])]
    np.testing.assert_allclose(guided["diagonal"], expected, atol=1e-4)

    check_rows_differ(after["steps"][0]["rows"], 10)

    swept, (figure,) = after["sweep"]
    assert len(swept["accuracy"]) == len(swept["diversity"]) == 3
    assert all(0 <= share <= 1 for share in swept["accuracy"])
    assert all(np.isfinite(distance) and distance > 0 for distance in swept["diversity"])
    assert isinstance(figure, Figure)
    for axes, name in zip(figure.axes, ("accuracy", "diversity"), strict=True):
        np.testing.assert_array_equal(axes.lines[-1].get_xydata().T, [SETTINGS["SCALES"], swept[name]])

    pure = after["pure"][0]
    check_pictures(pure["again"], 4)
    np.testing.assert_allclose(pure["again"], pure["pictures"], atol=1e-5)
    assert pure["exported"].platforms == ("cpu",)


def test_a_failed_training_ends_the_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"CONFIG": "nothing", "WORKDIR": "runs/demo", "OVERRIDES": [], "diffax": diffax}
    with pytest.raises(diffax.UserError, match="there is no config"):
        exec(code_cells()["load"], settings)
