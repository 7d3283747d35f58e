"""Cascades from the command line: training, stages as jobs of their own, enlarging, scores, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from diffax import main
from diffax.data import images
from diffax.training import reporting
from tests import micro

SECTION = [
    *(o for o in micro.OVERRIDES if o.startswith("config.base")),
    "config.base.train.save_every=6",
    "config.base.net.attention=none",
    "config.base.net.resample=conv",  # fewer blocks to compile
]
# 8 to 16 pixels, and in colour, so that photos can be enlarged.
CASCADE = (
    *SECTION,
    *(o.replace("config.base", "config.up") for o in SECTION),
    *(
        f"config.{name}.{field}"
        for name, side in (("base", 8), ("up", 16))
        for field in (f"shape={side},{side},3", "data=digits", "conditions.label.num_classes=10", "loss.weight=0.04")
    ),
    "config.up.net.channel_mult=1,1,2",
    "config.eval.classifier=svc",
    "config.eval.levels=0,0.5",
)
# The same enlarging alone, continuous, with blurred JPEG windows in training.
ALONE = (
    *(o.replace("config.base", "config.up") for o in SECTION),
    "config.up.shape=16,16,1",
    "config.up.variance=fixed_large",
    "config.up.loss=simple",
    "config.up.schedule.continuous=true",
    "config.up.conditions.low_res.factor=2",
    "config.up.conditions.low_res.blur=0.5",
    "config.up.conditions.low_res.jpeg=60,95",
    "config.up.conditions.low_res.crop=8",
)


def flags(workdir, *more, config="cascade_64:tiny", overrides=CASCADE):
    """Arguments of `diffax.main` for a micro run."""
    top = [o for o in micro.OVERRIDES if not o.startswith("config.base")]
    given = [f"--{o.removeprefix('--')}" for o in (*top, *overrides, *more)]
    return [f"--config={config}", f"--workdir={workdir}", *given]


# ---- from the command line to pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """Two stages, trained by one command."""
    workdir = tmp_path_factory.mktemp("runs") / "cascade"
    assert main.run(flags(workdir, "config.sample.save=true")) == 0
    return workdir


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The same two stages, each trained by a job of its own in a workdir of its own."""
    root = tmp_path_factory.mktemp("apart")
    for name in ("base", "up"):
        assert main.run(flags(root / name, f"--stage={name}")) == 0
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A stage that enlarges, without one before it."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    assert main.run(flags(workdir, config="iddpm_upsample_64_256:tiny", overrides=ALONE)) == 0
    return workdir


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A small photo of odd size, larger than a tile."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    images.save_png(path, np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8))
    return path


def test_one_command_trains_all_stages(cascade):
    for name in ("base", "up"):
        rows = reporting.read_metrics(cascade / name / "metrics.jsonl")
        assert rows[-1]["step"] == 6 and all(np.isfinite(row["loss"]) for row in rows)
        assert Image.open(cascade / name / "samples" / "00000006.png").size[0] > 100
    assert Image.open(cascade / "samples.png").size[0] > 100
    saved = json.loads((cascade / "up" / "config.json").read_text())
    assert saved["stages"] == ["base", "up"] and saved["up"]["conditions"]["low_res"]["noise"] == 1


def test_samples_of_every_stage_are_saved(cascade):
    for name, side in (("base", 8), ("up", 16)):
        pictures, labels = images.load_npz(cascade / name / f"samples_12x{side}x{side}x3.npz")
        assert pictures.shape == (12, side, side, 3)
        np.testing.assert_array_equal(labels, np.arange(12) % 10)


def test_stages_are_jobs_of_their_own(cascade, apart, tmp_path):
    """Trained apart and put together by their workdirs: the same picture as of one job."""
    for name in ("base", "up"):
        assert not (apart / name / "samples.png").exists()
        assert {p.name for p in (apart / name).iterdir() if p.is_dir()} <= {name, "compiled"}
    where = [f"--config.{name}.workdir={apart / name}" for name in ("base", "up")]
    assert main.run([*flags(tmp_path), *where, "--mode=sample"]) == 0
    assert (tmp_path / "samples.png").read_bytes() == (cascade / "samples.png").read_bytes()


def test_a_stage_is_not_trained_where_another_workdir_holds_it(apart, tmp_path, capfd):
    more = [f"--config.base.workdir={apart / 'base'}", f"--config.up.workdir={apart / 'up'}"]
    assert main.run([*flags(tmp_path / "run"), *more[1:], "--stage=up"]) == 2
    assert "up is trained elsewhere" in capfd.readouterr().err
    assert main.run([*flags(tmp_path / "run"), *more]) == 0, "nothing to train, all to sample"
    assert (tmp_path / "run" / "samples.png").exists() and not (tmp_path / "run" / "base").exists()


def test_evaluate_scores_stages_and_levels(cascade, capfd):
    assert main.run([f"--workdir={cascade}", "--mode=evaluate"]) == 0
    out = capfd.readouterr().out
    rows = json.loads((cascade / "up" / "enlargements.json").read_text())["rows"]
    assert [(row["method"], row.get("level")) for row in rows] == [("bicubic", None), ("up", 0), ("up", 0.5)]
    assert all(np.isfinite([row["psnr"], row["frechet_patches"]]).all() and row["pictures"] == 20 for row in rows)
    assert rows[0]["psnr"] > 15, "bicubic is no noise"
    report = json.loads((cascade / "evaluation.json").read_text())
    assert [row["level"] for row in report["rows"]] == [0, 0.5]
    for row in report["rows"]:
        assert {"bits_per_dim", "accuracy", "diversity", "frechet_classifier", "frechet_patches"} <= set(row)
        assert np.isfinite(row["bits_per_dim"]) and 0 <= row["accuracy"] <= 1
    for name in ("up/enlargements.md", "evaluation.md"):
        table = (cascade / name).read_text()
        assert "| level |" in table and table.strip() in out
    for picture in ("up/enlargements_0.png", "up/enlargements_0.5.png", "best_level.png", "progressive.png"):
        assert Image.open(cascade / picture).size[0] > 100


def test_saved_samples_are_enlarged(cascade, tmp_path):
    """As they were in the cascade, with the labels that they were drawn for; others with theirs."""
    path, kept = cascade / "base" / "samples_12x8x8x3.npz", cascade / "up" / "samples_12x16x16x3.npz"
    command = [f"--workdir={cascade}", "--mode=sample", "--stage=up", "--config.sample.save=true"]
    small, labels = images.load_npz(path)
    in_one_go, _ = images.load_npz(kept)
    kept.unlink()
    assert main.run([*command, f"--input={path}", f"--output={tmp_path / 'twelve.png'}"]) == 0
    again, its_labels = images.load_npz(kept)
    assert np.abs(again.astype(int) - in_one_go).max() <= 1
    np.testing.assert_array_equal(its_labels, labels)
    images.save_npz(tmp_path, small[:5], (labels[:5] + 1) % 10)
    assert main.run([*command, f"--input={tmp_path / 'samples_5x8x8x3.npz'}", f"--output={tmp_path / 'five.png'}"]) == 0
    _, its_labels = images.load_npz(cascade / "up" / "samples_5x16x16x3.npz")
    np.testing.assert_array_equal(its_labels, (labels[:5] + 1) % 10)
    assert Image.open(tmp_path / "five.png").size[0] < Image.open(tmp_path / "twelve.png").size[0]


@pytest.mark.parametrize("which", ["cascade", pytest.param("alone", marks=pytest.mark.slow)])
def test_a_photo_is_enlarged(which, photo, request):
    """By the last stage, which the one that is trained alone also is; a model of grey pictures makes it grey."""
    workdir, mode = request.getfixturevalue(which), {"cascade": "RGB", "alone": "L"}[which]
    before = (workdir / "samples.png").read_bytes()
    assert main.run([f"--workdir={workdir}", "--mode=sample", f"--input={photo}"]) == 0
    result = Image.open(workdir / "enlarged_result.png")
    assert result.size == (26, 22) and result.mode == mode
    # input, bicubic and result below each other
    width, height = Image.open(workdir / "enlarged.png").size
    assert width < 100 and height > 3 * 22
    assert (workdir / "samples.png").read_bytes() == before


def test_noise_in_sampling_is_chosen_after_training(cascade, tmp_path):
    out = tmp_path / "samples.png"
    command = [f"--workdir={cascade}", "--mode=sample", "--config.sample.save=false", f"--output={out}"]
    assert main.run([*command, "--config.up.conditions.low_res.level=0.1"]) == 0
    assert Image.open(out).size == Image.open(cascade / "samples.png").size


def test_a_stage_alone_ends_with_enlarged_held_out_pictures(alone):
    # input, bicubic, made and real: four rows of at most eight, captioned
    width, height = Image.open(alone / "samples.png").size
    assert width == 8 * (48 + 2) + 2 and height > 4 * 48
    assert Image.open(alone / "up" / "samples" / "00000006.png").size == (width, height)


def test_a_stage_alone_is_scored_on_pictures_made_smaller(alone, capfd):
    assert main.run([f"--workdir={alone}", "--mode=evaluate"]) == 0
    rows = json.loads((alone / "up" / "enlargements.json").read_text())["rows"]
    assert [(row["method"], "level" in row) for row in rows] == [("bicubic", False), ("up", False)]
    assert not (alone / "evaluation.json").exists(), "it makes no picture of nothing"
    assert (alone / "up" / "enlargements.png").exists()
    assert (alone / "up" / "enlargements.md").read_text().strip() in capfd.readouterr().out


BAD_COMMANDS = [
    (["--config.up.shape=24,24,3"], "config.up.conditions.low_res.factor 2 takes pictures of (12, 12, 3)"),
    (["--config.up.conditions.low_res.factor=4"], "config.base.shape is (8, 8, 3)"),
    (["--config.up.conditions.low_res.noise=0.2"], "level must be at most noise, 0.2"),
    (
        [
            "--config.up.conditions.low_res.noise=0",
            "--config.up.conditions.low_res.level=0",
            "--config.eval.levels=none",
        ],
        "conditions.low_res.noise=1",
    ),
    (["--config.base.conditions.low_res.blur=0.5"], "unknown condition config.base.conditions.low_res"),
    (["--config.base.workdir=/nowhere"], "there is no checkpoint; /nowhere/base"),
    (["--config.up.workdir=/nowhere"], "there is no checkpoint; /nowhere/up"),
    (["--stage=down"], "down"),
    (["--input=/nowhere/photo.png"], "there is no image; /nowhere/photo.png"),
    (["--input=/nowhere/samples.npz"], "there is no sample file; /nowhere/samples.npz"),
    (["--input={photo}", "--stage=base"], "base enlarges no picture"),
    (["--input={photo}", "--config.sample.tile=7"], "multiples of 2"),
    (["--input={odd}"], "multiples of 2"),
    (["--input={labels}"], "label 77 is out of range"),
    (["--input={text}"], "cannot read"),
    (["--config.up.conditions.low_res.truncated=true", "--config.up.conditions.low_res.level=0"], "a level above 0"),
    (["--config.up.conditions.low_res.truncated=true", "--config.up.schedule.num_timesteps=80"], "truncated needs"),
]


@pytest.mark.parametrize(("more", "message"), BAD_COMMANDS)
def test_bad_input_gets_one_line(cascade, photo, tmp_path, capfd, more, message):
    np.savez(tmp_path / "odd.npz", arr_0=np.zeros((2, 7, 8, 3), np.uint8))
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([1, 77]))
    (tmp_path / "text.png").write_text("no picture")
    files = {
        "photo": photo,
        "odd": tmp_path / "odd.npz",
        "labels": tmp_path / "labels.npz",
        "text": tmp_path / "text.png",
    }
    command = [f"--workdir={cascade}", "--mode=sample", f"--output={tmp_path / 'out.png'}"]
    assert main.run([*command, *(m.format(**files) for m in more)]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("diffax: error: ") and err.count("\n") == 1 and message in err, err
    assert not out and not (tmp_path / "out.png").exists()
