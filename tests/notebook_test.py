"""The notebook of launch/: a valid file without outputs, and cells that run from top to bottom."""

import ast
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
from diffax import images, main
from tests import micro

matplotlib.use("Agg")

PATH = pathlib.Path(__file__).parent.parent / "launch" / "diffax_colab.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))

# What stands in place of the settings cell's values.
SETTINGS = {
    "OVERRIDES": [f"--{o}" for o in micro.OVERRIDES if "schedule.steps" not in o],  # the config's is continuous
    "SCALES": [1.0, 2.0, 4.0],
    "ANCESTRAL_STEPS": 4,
    "SOLVER_STEPS": [3, 2],
    "SWEEP_PICTURES": 20,
    "SWEEP_STEPS": 2,
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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{cell: (the namespace after it, what it showed)} of all cells in turn, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    shown, after = [], {}
    namespace = {"__name__": "notebook", "display": shown.append}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.filterwarnings("error", module="notebook")
        for name, source in code_cells().items():
            exec(compile(source, name, "exec"), namespace)
            if name == "settings":
                assert set(namespace) >= set(SETTINGS)
                namespace.update(SETTINGS)
            after[name] = dict(namespace), list(shown)
            shown.clear()
    return after, folder


def grid_size(rows, columns):
    """(width, height) of a labelled grid of micro pictures."""
    height, width, _ = images.grid(np.zeros((rows * columns, 8, 8, 1), np.uint8), columns, ["0"] * rows * columns).shape
    return width, height


def check_pictures(pictures, count):
    chex.assert_shape(pictures, (count, 8, 8, 1))
    assert np.isfinite(pictures).all() and np.abs(pictures).max() <= 1 + 1e-5


def test_trains_into_the_workdir_and_loads_it(executed):
    after, folder = executed
    sample_fn = after["load"][0]["sample_fn"]
    assert sample_fn.config["name"] == "cfg_imagenet_64_tiny" and sample_fn.step == {"base": 6}
    assert (folder / "runs" / "demo" / "samples.png").exists()


@pytest.mark.parametrize(
    ("cell", "grids"), [("sample", [(2, 10)]), ("guidance", [(3, 3), (1, 3)]), ("steps", [(3, 10)]), ("pure", [(1, 4)])]
)
def test_shows_grids(executed, cell, grids):
    shown = executed[0][cell][1]
    assert [picture.size for picture in shown] == [grid_size(*grid) for grid in grids]
    assert all(np.asarray(picture).std() > 10 for picture in shown)


def test_guidance_changes_the_pictures_and_a_scale_each_gives_the_diagonal(executed):
    namespace = executed[0]["guidance"][0]
    rows, diagonal = np.stack(namespace["rows"]), namespace["diagonal"]
    check_pictures(diagonal, 3)
    check_pictures(rows.reshape(-1, 8, 8, 1), 9)
    np.testing.assert_allclose(rows[np.arange(3), np.arange(3)], diagonal, atol=1e-4)
    assert all(np.abs(row - rows[0]).max() > 1e-3 for row in rows[1:])


def test_fewer_steps_give_other_pictures(executed):
    rows = executed[0]["steps"][0]["rows"]
    for row in rows:
        check_pictures(row, 10)
    assert all(np.abs(row - rows[0]).max() > 1e-3 for row in rows[1:])


def test_the_sweep_plots_shares_and_positive_distances(executed):
    namespace, (figure,) = executed[0]["sweep"]
    accuracy, diversity = namespace["accuracy"], namespace["diversity"]
    assert len(accuracy) == len(diversity) == 3
    assert all(0 <= share <= 1 for share in accuracy)
    assert all(np.isfinite(distance) and distance > 0 for distance in diversity)
    assert isinstance(figure, Figure)
    for axes, values in zip(figure.axes, (accuracy, diversity), strict=True):
        np.testing.assert_array_equal(axes.lines[-1].get_xydata().T, [SETTINGS["SCALES"], values])


def test_the_exported_function_gives_the_same_pictures(executed):
    namespace = executed[0]["pure"][0]
    check_pictures(namespace["again"], 4)
    np.testing.assert_allclose(namespace["again"], namespace["pictures"], atol=1e-5)
    assert namespace["exported"].platforms == ("cpu",)


def test_a_trained_workdir_is_not_trained_again(executed, monkeypatch):
    after, folder = executed
    monkeypatch.chdir(folder)
    monkeypatch.delattr(main, "run")
    exec(code_cells()["load"], dict(after["settings"][0]))


def test_a_failed_training_ends_the_cell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    settings = {"CONFIG": "nothing", "WORKDIR": "runs/demo", "OVERRIDES": [], "diffax": diffax}
    with pytest.raises(RuntimeError, match="status 2"):
        exec(code_cells()["load"], settings)
    assert "there is no config" in capfd.readouterr().err
