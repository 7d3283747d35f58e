"""Cascades: the noise between stages on networks that know the answer; and micro runs from the command to pictures."""

import dataclasses
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffax
from diffax import config as configs
from diffax import main
from diffax.data import images
from diffax.diffusion import process, schedules
from diffax.models import stages
from diffax.sampling import pipeline
from diffax.training import reporting
from tests import micro

# ---- networks that know the answer ----------------------------------------------------------------------------------

MEAN, STD, LENGTH = 0.4, 0.3, 150


class Knows:
    """Stands for a network: answers the noise that belongs to the x that `x_of(z, level, cond)` knows."""

    def __init__(self, x_of, conditions=()):
        self.conditioners = tuple((name, None) for name in conditions)
        self.unet = types.SimpleNamespace(channel_mult=(1,))
        self.x_of = x_of
        self.levels = schedules.discrete(schedules.cosine_betas(LENGTH))

    def apply(self, variables, z, time, cond):
        level = self.levels((time + 1) / LENGTH)
        return process.eps_from_x(self.x_of(z, level, cond), z, level)


def mean_of_gaussian(z, level, cond):
    """E[x | z] for x ~ N(MEAN, STD^2)."""
    alpha, sigma = process.expand(level.alpha, z), process.expand(level.sigma, z)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)


def what_it_sees(z, level, cond):
    """The smaller picture, pixels repeated, but for the last channel: a thousandth of the second clock."""
    x = jnp.repeat(jnp.repeat(cond["low_res"], 2, axis=1), 2, axis=2)
    return x.at[..., -1].set(process.expand(cond["low_res_time"], x[..., 0]) / 1000)


def toy(**low_res):
    """A Gaussian of 2x2 pixels, and a stage that shows what it was given."""
    config = configs.config_defaults("toy", stages=("base", "up"))
    for name, side in (("base", 2), ("up", 4)):
        config[name].shape = (side, side, 3)
        config[name].net.update(channel_mult=(1,), attention=())
        config[name].schedule.update(name="cosine", steps=LENGTH)
        config[name].update(variance="fixed_small", guidance=())
    config.up.takes = ("low_res",)
    config.up.low_res.update({"factor": 2, "noise": 1.0, "round": False} | low_res)
    configs.validate(config)
    base, up = stages.build_stages(configs.to_dict(config))
    up = dataclasses.replace(up, net=Knows(what_it_sees, ("low_res", "low_res_time")))
    return dataclasses.replace(base, net=Knows(mean_of_gaussian)), up


def toy_fn(*built):
    return pipeline.SampleFn(built, {s.name: np.zeros(1) for s in built}, {}, {s.name: 0 for s in built})


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("level", [0.2, 0.6])
def test_stopping_early_and_adding_noise_give_the_same_distribution(truncated, level):
    """CDM, section 3: both are draws of q(z_s), and the second clock says which s."""
    base, up = toy(level=level, truncated=truncated)
    made = toy_fn(base, up)(0, 2000, every_stage=True, batch_size=2048)
    at = up.schedule(np.array([level]))
    alpha, sigma = float(at.alpha[0]), float(at.sigma[0])
    seen, clock = made["up"][..., :2], made["up"][..., -1]
    np.testing.assert_allclose(seen.mean(), alpha * MEAN, atol=0.02)
    np.testing.assert_allclose(seen.std(), np.hypot(alpha * STD, sigma), atol=0.02)
    np.testing.assert_allclose(clock, at.time[0] / 1000, atol=1e-4)
    small = seen[:, ::2, ::2]
    np.testing.assert_allclose(seen, small.repeat(2, 1).repeat(2, 2), atol=1e-3)
    # pixels are independent of each other, as are those of the Gaussian
    np.testing.assert_allclose(np.corrcoef(small.reshape(2000, -1).T), np.eye(8), atol=0.1)
    spread = np.hypot(alpha * STD, sigma) if truncated else STD
    np.testing.assert_allclose(made["base"].std(), spread, atol=0.02)


def test_an_early_stop_on_few_steps_tells_the_level_that_it_reached():
    base, up = toy(level=0.5, truncated=True)
    base = dataclasses.replace(base, sampling=schedules.build_steps(base.schedule, LENGTH, "4"))
    reached = [t for t in np.append(base.sampling.s.time[:-1], -1) if (t + 1) / LENGTH >= 0.5][-1]
    made = toy_fn(base, up)(0, 4)
    assert reached > base.schedule(np.array([0.5])).time[0], "no step ends at that level"
    np.testing.assert_allclose(made[..., -1], reached / 1000, atol=1e-4)


def test_each_picture_has_its_own_level():
    base, up = toy(level=0.1)
    sample_fn = toy_fn(base, up)
    levels = [0.0, 0.3, 1.0, 0.1]
    made = sample_fn(0, level=levels, every_stage=True)
    time = up.schedule(np.array(levels)).time
    np.testing.assert_allclose(made["up"][..., -1], np.broadcast_to(time[:, None, None] / 1000, (4, 4, 4)), atol=1e-4)
    base_large = made["base"].repeat(2, 1).repeat(2, 2)[..., :2]
    np.testing.assert_allclose(made["up"][0, ..., :2], base_large[0], atol=1e-3)  # level 0: as it is
    assert all(np.abs(made["up"][i, ..., :2] - base_large[i]).max() > 0.1 for i in (1, 2, 3))
    # The config's level where none is given; the noise is that of the picture's key.
    np.testing.assert_allclose(sample_fn(0, 4)[3], made["up"][3], atol=1e-4)
    np.testing.assert_allclose(sample_fn(0, 4, level={"up": 0.3})[1], made["up"][1], atol=1e-4)


def test_a_smaller_picture_is_rounded_before_it_is_noised():
    _, up = toy(level=0.0, round=True)
    picture = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 3)).astype(np.float32)
    made = toy_fn(up)(0, image=picture)[:, ::2, ::2, :2]
    bytes_ = (made + 1) * 127.5
    np.testing.assert_allclose(bytes_, np.round(bytes_), atol=0.02)
    np.testing.assert_allclose(made, picture[..., :2], atol=0.5 / 127.5 + 1e-3)


@pytest.mark.parametrize("size", [(1, 7), (5, 9), (13, 4)])
@pytest.mark.parametrize("tile", [0, 5])
def test_a_picture_of_any_size_is_enlarged_tile_by_tile(size, tile):
    _, up = toy(level=0.0)
    picture = np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32)
    made = pipeline.enlarge(toy_fn(up), picture, tile=tile)
    assert made.shape == (2 * size[0], 2 * size[1], 3)
    np.testing.assert_allclose(made[..., :2], picture.repeat(2, 0).repeat(2, 1)[..., :2], atol=2e-3)


def test_a_picture_may_be_enlarged_by_several_stages():
    _, up = toy(level=0.0)
    twice = dataclasses.replace(up, name="up_again")
    picture = np.random.default_rng(0).uniform(-1, 1, (5, 9, 3)).astype(np.float32)
    made = pipeline.enlarge(toy_fn(up, twice), picture, tile=4)
    assert made.shape == (20, 36, 3)
    np.testing.assert_allclose(made[..., :2], picture.repeat(4, 0).repeat(4, 1)[..., :2], atol=4e-3)


def test_every_stage_must_be_able_to_halve_what_it_gets():
    """Four times larger, 3 x 4 pixels are 12 x 16, of which the second network cannot make eighths."""
    _, up = toy(level=0.0)
    again = dataclasses.replace(up, name="up_again", net=Knows(what_it_sees, ("low_res", "low_res_time")))
    again.net.unet.channel_mult = (1, 1, 1, 1)
    with pytest.raises(diffax.UserError, match="sides are multiples of 2"):
        toy_fn(up, again)(0, image=np.zeros((3, 4, 3)))
    assert toy_fn(up, again)(0, image=np.zeros((2, 4, 3))).shape == (1, 8, 16, 3)


# ---- training of a stage that enlarges -------------------------------------------------------------------------------

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
        for field in (
            f"shape={side},{side},3",
            "data.name=digits",
            "data.single=false",
            "data.label=label",
            "num_classes=10",
            "loss.weight=0.04",
        )
    ),
    "config.up.net.channel_mult=1,1,2",
    "config.eval.judge=svc",
    "config.eval.levels=0,0.5",
)
# The same enlarging alone, continuous, with blurred JPEG windows in training.
ALONE = (
    *(o.replace("config.base", "config.up") for o in SECTION),
    "config.up.shape=16,16,1",
    "config.up.variance=fixed_large",
    "config.up.loss.name=simple",
    "config.up.schedule.continuous=true",
    "config.up.low_res.factor=2",
    "config.up.low_res.blur=0.5",
    "config.up.low_res.jpeg=60,95",
    "config.up.low_res.crop=8",
)


def flags(workdir, *more, config="cascade_64:tiny", overrides=CASCADE):
    """Arguments of `diffax.main` for a micro run."""
    top = [o for o in micro.OVERRIDES if not o.startswith("config.base")]
    given = [f"--{o.removeprefix('--')}" for o in (*top, *overrides, *more)]
    return [f"--config={config}", f"--workdir={workdir}", *given]


def build_up(*overrides):
    c = configs.load("cascade_64:tiny", [*CASCADE, *overrides])
    configs.validate(c)
    return stages.build_stage(configs.to_dict(c), "up")


def batch_of(n):
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(rng.uniform(-1, 1, (n, 8, 8, 3)), 2, 1), 2, 2)
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.arange(n, dtype=jnp.int32) % 10}


def keys_of(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def test_the_loss_of_an_example_does_not_depend_on_its_batch():
    """Blurred, cut and noised; nor on where its smaller picture was made: here or by the data."""
    small_net = ("config.up.net.channel_mult=1", "config.up.net.attention=none")
    stage = build_up("config.up.low_res.blur=0.5", "config.up.low_res.crop=8", "config.up.net.dropout=0.5", *small_net)
    objective, batch = stages.objective(stage), batch_of(4)
    params = jax.tree.map(lambda a: a + 0.05, jax.jit(objective.init)(jax.random.key(0)))
    loss = jax.jit(lambda batch, keys, position: objective.loss(params, (), batch, keys, position, 4)[0])
    whole = loss(batch, keys_of(4), jnp.arange(4))
    chex.assert_tree_all_finite(whole)
    halves = [
        loss(jax.tree.map(lambda a, s=s: a[s], batch), keys_of(4)[s], jnp.arange(4)[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-4)
    given = batch | {"low_res": pipeline.smaller(batch["image"], 2)}
    np.testing.assert_allclose(loss(given, keys_of(4), jnp.arange(4)), whole, rtol=1e-4)
    changed = batch | {"low_res": -given["low_res"]}
    assert np.abs(loss(changed, keys_of(4), jnp.arange(4)) - whole).max() > 1e-4, "it is read"


def test_training_noises_smaller_pictures_to_every_level():
    """From none to the strongest, told by the second clock, whatever the level of the picture itself."""
    seen = {}

    class Watches:
        conditioners = (("label", None), ("low_res", None), ("low_res_time", None))

        def apply(self, variables, z, time, cond, *, dropout_keys):
            seen.update(cond, time=time)
            return jnp.zeros((*z.shape[:-1], 6))

    n, strongest = 2000, 0.5
    stage = build_up("config.up.low_res.noise=0.5", "config.up.low_res.round=false")
    watched = dataclasses.replace(stage, net=Watches())
    batch = {"image": jnp.full((n, 4, 4, 3), 0.5), "label": jnp.zeros(n, jnp.int32)}
    stages.objective(watched).loss({}, (), batch, keys_of(n), jnp.arange(n), n)
    levels = {float(t): i for i, t in enumerate(stage.schedule(np.arange(41) / 40).time)}
    step = np.array([levels[float(t)] for t in seen["low_res_time"]])
    assert set(step) == set(range(int(strongest * 40) + 1)), "clean and strongest included"
    middle = np.bincount(step)[1:-1]
    assert middle.min() > 0.6 * n / 20 and middle.max() < 1.5 * n / 20, "evenly"
    assert abs(np.corrcoef(seen["low_res_time"], seen["time"])[0, 1]) < 0.08
    for i in (0, 5, 20):
        at = stage.schedule(np.array([i / 40]))
        x = np.asarray(seen["low_res"])[step == i]
        np.testing.assert_allclose([x.mean(), x.std()], [0.5 * at.alpha[0], at.sigma[0]], atol=0.06)


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
def sample_fn(cascade):
    """The cascade with parameters moved off their start, where a network answers nothing to anything."""
    loaded = diffax.load(cascade)
    return dataclasses.replace(loaded, params=jax.tree.map(lambda a: np.asarray(a) + 0.02, loaded.params))


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
    saved = json.loads((cascade / "config.json").read_text())
    assert saved["stages"] == ["base", "up"] and saved["up"]["low_res"]["noise"] == 1


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
        assert {"bits_per_dim", "accuracy", "diversity", "frechet_judge", "frechet_patches"} <= set(row)
        assert np.isfinite(row["bits_per_dim"]) and 0 <= row["accuracy"] <= 1
    for name in ("up/enlargements.md", "evaluation.md"):
        table = (cascade / name).read_text()
        assert "| level |" in table and table in out
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
    assert main.run([*command, "--config.up.low_res.level=0.1"]) == 0
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
    assert (alone / "up" / "enlargements.md").read_text() in capfd.readouterr().out


BAD_COMMANDS = [
    (["--config.up.shape=24,24,3"], "config.up.low_res.factor 2 takes pictures of (12, 12, 3)"),
    (["--config.up.low_res.factor=4"], "config.base.shape is (8, 8, 3)"),
    (["--config.up.low_res.noise=0.2"], "config.up.low_res.level must be at most config.up.low_res.noise"),
    (["--config.up.low_res.noise=0", "--config.up.low_res.level=0", "--config.eval.levels=none"], "low_res.noise=1"),
    (["--config.base.low_res.blur=0.5"], "config.base.low_res is set"),
    (["--config.base.workdir=/nowhere"], "there is no checkpoint; /nowhere/base"),
    (["--config.up.workdir=/nowhere"], "there is no checkpoint; /nowhere/up"),
    (["--stage=down"], "unknown --stage=down"),
    (["--input=/nowhere/photo.png"], "there is no image; /nowhere/photo.png"),
    (["--input=/nowhere/samples.npz"], "there is no sample file; /nowhere/samples.npz"),
    (["--input={photo}", "--stage=base"], "base enlarges no picture"),
    (["--input={photo}", "--config.sample.tile=7"], "multiples of 2"),
    (["--input={odd}"], "multiples of 2"),
    (["--input={labels}"], "label 77 is out of range"),
    (["--input={text}"], "cannot read"),
    (["--config.up.low_res.truncated=true", "--config.up.low_res.level=0"], "a level above 0"),
    (["--config.up.low_res.truncated=true", "--config.up.schedule.steps=80"], "config.up.low_res.truncated needs"),
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


# ---- in Python -------------------------------------------------------------------------------------------------------


def test_a_call_makes_the_pictures_of_all_stages_or_of_the_last(sample_fn):
    assert sample_fn.takes == ("label",) and set(sample_fn.step) == {"base", "up"}
    made = sample_fn(0, label=[3, 7, 1], every_stage=True)
    chex.assert_shape((made["base"], made["up"]), [(3, 8, 8, 3), (3, 16, 16, 3)])
    assert list(made) == ["base", "up"]
    np.testing.assert_allclose(sample_fn(0, label=[3, 7, 1]), made["up"], atol=1e-4)
    more = sample_fn(0, label=[3, 2, 5, 6], every_stage=True)
    for name, pictures in made.items():
        np.testing.assert_allclose(more[name][0], pictures[0], atol=1e-4)
        assert not np.allclose(more[name][1], pictures[1], atol=1e-3), "both stages see the label"
    out, kept = sample_fn(0, label=[3, 7, 1], keep=2)
    chex.assert_shape((out, kept), [(3, 16, 16, 3), (3, 2, 16, 16, 3)])
    np.testing.assert_allclose(out, made["up"], atol=1e-4)
    np.testing.assert_allclose(kept[:, -1], out, atol=1e-5)


def test_a_later_stage_goes_on_from_pictures_that_were_made_before(sample_fn):
    """With the same key: the same noise on the smaller picture and in its own steps."""
    made = sample_fn(0, label=[3, 7, 1], every_stage=True)
    later = sample_fn.starting_at("up")(0, image=made["base"], label=[3, 7, 1])
    np.testing.assert_allclose(later, made["up"], atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_a_later_stage_enlarges_pictures_of_other_sizes(sample_fn, size):
    up = sample_fn.starting_at("up")
    assert set(up.takes) == {"label", "low_res"} and [s.name for s in up.stages] == ["up"]
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    made = up(0, image=image, label=[1, 2])
    chex.assert_shape(made, (2, 2 * size[0], 2 * size[1], 3))
    assert np.isfinite(made).all() and np.abs(made).max() <= 1 + 1e-5
    # one picture for all, as floats
    one = up(0, image=images.from_uint8(image[0]), label=[1, 2])
    np.testing.assert_allclose(one[0], made[0], atol=1e-4)
    assert not np.allclose(one[1], made[1], atol=1e-3)


def test_levels_labels_and_keys_share_one_program(sample_fn, monkeypatch):
    made, pure_of = [], stages.sample_fn

    def counted(*args, **kwargs):
        made.append(chex.assert_max_traces(pure_of(*args, **kwargs), n=1))
        return made[-1]

    monkeypatch.setattr(pipeline.stages, "sample_fn", counted)
    pipeline._compiled.cache_clear()
    chex.clear_trace_counter()
    own = sample_fn.stages[-1].low_res.level
    plain = sample_fn(0, label=[3, 7, 1])
    chex.assert_trees_all_close(sample_fn(0, label=[3, 7, 1], level=own), plain, atol=1e-5)
    other = sample_fn(0, label=[3, 7, 1], level=[own, 0.0, 1.0])
    chex.assert_trees_all_close(sample_fn(0, label=[3, 7, 1], level={"up": [own, 0.0, 1.0]}), other, atol=1e-5)
    np.testing.assert_allclose(other[0], plain[0], atol=1e-4)
    assert all(np.abs(other[i] - plain[i]).max() > 1e-3 for i in (1, 2))
    sample_fn(1, label=[0, 0, 0], level=0.5)
    assert len(made) == 1
    pipeline._compiled.cache_clear()


def test_sampling_may_stop_early_in_place_of_adding_noise(cascade):
    config = json.loads((cascade / "config.json").read_text())
    config["up"]["low_res"]["truncated"] = True
    truncated = diffax.load(cascade, config=config)
    made = truncated(0, label=[1, 2], every_stage=True)
    chex.assert_tree_all_finite(made)
    chex.assert_shape((made["base"], made["up"]), [(2, 8, 8, 3), (2, 16, 16, 3)])
    with pytest.raises(diffax.UserError, match="no stage takes a noised picture"):
        truncated(0, label=[1, 2], level=0.1)


@pytest.mark.parametrize(
    ("start", "kwargs", "message"),
    [
        ("up", {}, "condition 'low_res' is missing"),
        ("up", {"image": np.zeros((7, 8, 3))}, "sides are multiples of 2"),
        ("up", {"image": np.zeros((8, 8, 1))}, "pictures of 3 channels"),
        ("up", {"image": np.zeros((8, 8))}, "condition low_res"),
        ("up", {"image": np.full((8, 8, 3), 1.5)}, "outside"),
        ("up", {"image": np.full((8, 8, 3), np.nan)}, "outside"),
        ("up", {"image": np.zeros((3, 8, 8, 3))}, "3 values of low_res for 2 pictures|2 values of label"),
        ("up", {"image": np.zeros((8, 8, 3)), "level": 1.5}, "level is 1.5.*from 0 to 1"),
        ("up", {"image": np.zeros((8, 8, 3)), "level": -0.1}, "level is -0.1"),
        ("base", {"image": np.zeros((8, 8, 3))}, "condition 'low_res' is not taken"),
        ("base", {"level": 1.5}, "level is 1.5"),
        ("base", {"level": "much"}, "level is 'much'"),
        ("base", {"level": [0.1, 0.2, 0.3]}, "values of l"),
        ("base", {"level": {"base": 0.1}}, "no stage 'base' takes level"),
        ("base", {"guidance": 2.0}, "this model has no guidance"),
        ("base", {"keep": 2, "every_stage": True}, "keep"),
    ],
)
def test_bad_arguments_get_one_line(sample_fn, start, kwargs, message):
    with pytest.raises(diffax.UserError, match=message) as caught:
        sample_fn.starting_at(start)(0, label=[1, 2], **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_starts_and_pictures_get_one_line(sample_fn):
    for call, message in (
        (lambda: sample_fn.starting_at("down"), "unknown stage 'down'.*base, up"),
        (lambda: pipeline.enlarge(sample_fn, np.zeros((8, 8, 3)), label=1), "base enlarges no picture"),
        (lambda: pipeline.enlarge(sample_fn.starting_at("up"), np.zeros((2, 8, 8, 3)), label=1), "one picture"),
        (lambda: pipeline.enlarge(sample_fn.starting_at("up"), np.zeros((8, 8, 3))), "'label' is missing"),
    ):
        with pytest.raises(diffax.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
