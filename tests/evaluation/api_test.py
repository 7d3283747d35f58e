"""`diffax.evaluate`: rows of a workdir and of a loaded model, what is written, and what is refused."""

import json

import numpy as np
import pytest

import diffax
from diffax import config as configs
from diffax.data import images
from tests.evaluation import digits
from tests.models import systems
from tests.sampling import untrained

FEW = dict(num=12, batch_size=8, bpd_num=0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A cascade, trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    config = digits.of(systems.cascade()).config
    for name in ("base", "up"):
        config[name].train.update(num_train_steps=2, sample_every=0, ema=(0.9,))
    config.sample.update(num=8, batch_size=8)
    diffax.train(config, workdir=folder)
    return folder


def test_rows_of_a_workdir_and_what_is_written(workdir):
    seen = []
    rows = diffax.evaluate(workdir, on_row=seen.append, levels=(0.25, 0.5), **FEW)
    assert [row is other for row, other in zip(rows, seen, strict=True)] == [True] * len(rows)
    of_up, whole = [row for row in rows if "section" in row], [row for row in rows if "section" not in row]
    assert [row["method"] for row in of_up] == ["bicubic", "up", "up"] and {row["section"] for row in of_up} == {"up"}
    assert [row["level"] for row in whole] == [0.25, 0.5]
    report = json.loads((workdir / "evaluation.json").read_text())
    assert [row["frechet_patches"] for row in report["rows"]] == [row["frechet_patches"] for row in whole]
    assert report["training_step"] == {"base": 2, "up": 2}
    for name in (
        "evaluation.md",
        "best_level.png",
        "progressive.png",
        "up/enlargements.md",
        "up/enlargements_0.25.png",
    ):
        assert (workdir / name).exists(), name
    again = diffax.evaluate(diffax.load(workdir), levels=(0.25,), **FEW)
    assert [row["frechet_patches"] for row in again] == [pytest.approx(whole[0]["frechet_patches"], rel=1e-4)]


def test_samples_beside_real_pictures(workdir, tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFAX_INCEPTION", raising=False)
    rng = np.random.default_rng(0)
    for i in range(6):
        images.save_png(tmp_path / f"{i}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (row,) = diffax.evaluate(workdir, tmp_path)
    assert row["samples"] == 8 and row["frechet_patches"] > 0
    report = json.loads((workdir / "comparison.json").read_text())
    assert report["rows"] == [row] and report["reference_pictures"] == 6
    assert any("is no FID" in note for note in report["notes"])
    (other,) = diffax.evaluate(diffax.load(workdir), tmp_path)
    assert other["frechet_patches"] == pytest.approx(row["frechet_patches"], rel=1e-4)
    two = diffax.evaluate(workdir, tmp_path, steps=("2", "4"))
    assert [row["steps"] for row in two] == ["2", "4"]


def test_wrong_use_is_refused_before_anything_is_computed(workdir, tmp_path):
    for how, match in (
        (dict(nums=3), "unknown field config.eval.nums; did you mean config.eval.num"),
        (dict(num=-1), "config.eval.num must be a whole number in"),
        (dict(guidance=(2.0,)), "no stage has guidance with a scale"),
    ):
        with pytest.raises(diffax.UserError, match=match):
            diffax.evaluate(workdir, **how)
    with pytest.raises(diffax.UserError, match="there is no trained model"):
        diffax.evaluate(tmp_path)
    with pytest.raises(diffax.UserError, match="does not make pictures from noise alone"):
        diffax.evaluate(untrained.sample_fn(systems.cascade()).alone("up"), "data")
    assert configs.to_dict(configs.new("a"))["eval"]["num"] == 1000
