"""Comparing sets of pictures: reading them, statistics and their cache, the numbers, the command; samples in files;
CLIP scores; the numbers of papers by --mode=evaluate."""

import json
import os
import runpy
import sys
import threading
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from diffax import config as configs
from diffax import main
from diffax.components import spec
from diffax.conditions.text import read_prompts
from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.evaluation import clip_score, compare, features, metrics
from diffax.evaluation import pictures as pictures_of
from diffax.evaluation import reference as reference_of
from diffax.models.system import System
from diffax.sampling import files
from diffax.training import workdir as workdirs
from diffax.training.checkpoints import Checkpoints
from diffax.weights import inception as weights
from tests import micro

SIDE = 14
WIDTH = 6


def pictures(n, *, seed=0, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def write_folder(folder, made):
    for i, picture in enumerate(made):
        images.save_png(folder / f"{i // 4}" / f"{i:03d}.png", picture)
    return folder


def read_all(found, size=5):
    chunks = list(found.chunks(size))
    assert all(len(chunk) <= size for chunk in chunks)
    return np.concatenate(chunks)


def extract(batch):
    """Stands for the network: other numbers for every picture, whatever batch it is in."""
    flat = np.asarray(batch, np.float64).reshape(len(batch), -1) / 128 - 1
    mix = np.random.default_rng(1).normal(size=(flat.shape[1], 2 * WIDTH + 4)) / 10
    out = np.tanh(flat @ mix).astype(np.float32)
    return {"2048": out[:, :WIDTH], "spatial": out[:, WIDTH : 2 * WIDTH], "logits": 3 * out[:, 2 * WIDTH :]}


def measure(found):
    return features.inception_statistics(found, extract, batch_size=4)


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order(tmp_path):
    made = pictures(11)
    write_folder(tmp_path, made)
    for name in (".hidden.png", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.png").write_text("no picture")
    found = pictures_of.open_pictures(tmp_path)
    np.testing.assert_array_equal(read_all(found), made)
    assert (found.count, found.notes) == (11, [])
    few = pictures_of.open_pictures(tmp_path, limit=7)
    np.testing.assert_array_equal(read_all(few), made[:7])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_pictures_are_read_in_order(tmp_path, save):
    made = pictures(11)
    for i, (low, high) in enumerate([(0, 4), (4, 11)]):
        save(tmp_path / f"part_{i}.npz", arr_0=made[low:high], arr_1=np.arange(high - low))
    (tmp_path / f"part_0{pictures_of.MARK}1.npz").write_text("statistics are no pictures")
    found = pictures_of.open_pictures(tmp_path)
    assert found.count == 11
    for size in (1, 3, 100):
        np.testing.assert_array_equal(read_all(found, size), made)
    np.testing.assert_array_equal(read_all(pictures_of.open_pictures(tmp_path, limit=6)), made[:6])
    np.testing.assert_array_equal(read_all(pictures_of.open_pictures(tmp_path / "part_1.npz")), made[4:])
    path = images.save_npz(tmp_path / "one", made[:5], np.arange(5))
    np.testing.assert_array_equal(read_all(pictures_of.open_pictures(path)), made[:5])


def test_grey_and_transparent_pictures_are_told(tmp_path):
    made = pictures(3)
    Image.fromarray(made[0]).save(tmp_path / "0.png")
    Image.fromarray(made[1, ..., 0]).save(tmp_path / "1.png")
    clear = np.concatenate([made[2], np.zeros_like(made[2, ..., :1])], -1)
    Image.fromarray(clear).save(tmp_path / "2.png")
    found = pictures_of.open_pictures(tmp_path)
    got = read_all(found)
    np.testing.assert_array_equal(got[0], made[0])
    np.testing.assert_array_equal(got[1], np.repeat(made[1, ..., :1], 3, -1))
    assert (got[2] == 255).all()
    assert len(found.notes) == 1 and found.notes[0].startswith("2 of 3 pictures")
    np.savez(tmp_path / "grey.npz", arr_0=made[..., :1])
    grey = pictures_of.open_pictures(tmp_path / "grey.npz")
    np.testing.assert_array_equal(read_all(grey), np.repeat(made[..., :1], 3, -1))
    assert "grey" in grey.notes[0]


def test_what_cannot_be_read_is_one_clear_line(tmp_path):
    good = write_folder(tmp_path / "good", pictures(4))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32))
    np.savez(tmp_path / "other.npz", samples=pictures(4))
    np.savez(tmp_path / "empty.npz", arr_0=pictures(0))
    np.savez(tmp_path / "cut.npz", arr_0=pictures(40))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:2000])
    np.savez_compressed(tmp_path / "broken.npz", arr_0=pictures(40))
    broken = bytearray((tmp_path / "broken.npz").read_bytes())
    broken[2000:2100] = bytes(100)
    (tmp_path / "broken.npz").write_bytes(broken)
    (tmp_path / "none").mkdir()
    both = write_folder(tmp_path / "both", pictures(4))
    np.savez(both / "more.npz", arr_0=pictures(2))
    sizes = write_folder(tmp_path / "sizes", pictures(4))
    images.save_png(sizes / "9.png", pictures(1, side=9)[0])
    parts = tmp_path / "parts"
    images.save_npz(parts, pictures(4))
    images.save_npz(parts, pictures(4, side=9))
    damaged = write_folder(tmp_path / "damaged", pictures(4))
    (damaged / "0" / "001.png").write_bytes((damaged / "0" / "001.png").read_bytes()[:100])
    few = write_folder(tmp_path / "few", pictures(3))
    for path, match in {
        tmp_path / "gone": "no such folder",
        tmp_path / "none": "no image",
        good / "0" / "000.png": "neither a folder",
        tmp_path / "floats.npz": "arr_0 is float32",
        tmp_path / "other.npz": "KeyError",
        tmp_path / "empty.npz": r"arr_0 is uint8 \(0, ",
        tmp_path / "cut.npz": "BadZipFile",
        tmp_path / "broken.npz": "cannot read",
        both: "both .npz files .more.npz. and images .000.png.",
        sizes: "two sizes: 000.png is 14x14, 9.png 9x9",
        parts: "two sizes",
        damaged: "cannot read image.*001.png",
        few: "3 pictures.*at least 4",
    }.items():
        with pytest.raises(UserError, match=match) as error:
            features.statistics_of(path, measure, about={"features": "inception"}, cache=False)
        assert "\n" not in str(error.value) and str(error.value).count("; ") >= 2


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 50])
def test_inception_statistics_are_those_of_all_features_at_once(tmp_path, size):
    made = pictures(23)
    found = pictures_of.open_pictures(write_folder(tmp_path, made))
    got, want = features.inception_statistics(found, extract, batch_size=size), extract(made)
    np.testing.assert_allclose(got["features"], want["2048"], atol=1e-6)
    for suffix, name in (("", "2048"), ("_s", "spatial")):
        np.testing.assert_allclose(got["mu" + suffix], want[name].mean(0), atol=1e-6)
        np.testing.assert_allclose(got["sigma" + suffix], np.cov(want[name], rowvar=False), atol=1e-6)
    np.testing.assert_allclose(got["score"], metrics.inception_score(want["logits"], splits=10), rtol=1e-5)


def test_patch_statistics_are_those_of_all_patches_at_once(tmp_path):
    made = pictures(23)
    found = pictures_of.open_pictures(write_folder(tmp_path / "a", made))
    want = metrics.moments(metrics.patches(images.from_uint8(made)))
    for size in (1, 5, 50):
        got = features.patch_statistics(found, batch_size=size)
        np.testing.assert_allclose(got["mu"], want.mean, atol=1e-9)
        np.testing.assert_allclose(got["sigma"], want.covariance, atol=1e-9)
    tiny = pictures_of.open_pictures(write_folder(tmp_path / "tiny", pictures(4, side=6)))
    with pytest.raises(UserError, match="pictures of 6x6"):
        features.patch_statistics(tiny, batch_size=1)


def test_statistics_are_kept_and_never_stale(tmp_path, capsys):
    folder, calls = write_folder(tmp_path / "set", pictures(8)), []
    about = {"features": "inception", "weights": "abc"}

    def counted(found):
        calls.append(found.count)
        return measure(found)

    def get(about=about, **options):
        return features.statistics_of(folder, counted, about=about, **options)[0]

    first, again = get(), get()
    assert calls == [8] and set(first) == set(again)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    get({**about, "weights": "def"})
    get(limit=7)
    get(cache=False)
    assert calls == [8, 8, 7, 8]
    # Another picture of the same size and date.
    file = folder / "1" / "005.png"
    date = file.stat().st_mtime_ns
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    os.utime(file, ns=(date, date))
    changed = get()
    assert calls == [8, 8, 7, 8, 8] and not np.array_equal(changed["mu"], first["mu"])
    # The same bytes under another name are another order, for all one knows.
    (folder / "0" / "000.png").rename(folder / "9.png")
    get()
    assert len(calls) == 6
    kept = sorted(tmp_path.glob(f"set{pictures_of.MARK}*.npz"))
    assert len(kept) == 5
    for path in kept:
        path.write_bytes(path.read_bytes()[:3000])
    get()
    assert len(calls) == 7 and "is damaged and is made again" in capsys.readouterr().err
    get()
    assert len(calls) == 7


def test_a_set_that_cannot_have_files_beside_it_is_measured_all_the_same(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "set", pictures(8))

    def refuse(*_):
        raise RunError("cannot write; disk; free the space")

    monkeypatch.setattr(images, "write_atomically", refuse)
    found, _ = features.statistics_of(folder, measure, about={"features": "inception"})
    assert found["count"] == 8 and "not kept" in capsys.readouterr().err


def reference(path, *, width=features.POOL, **more):
    """A file such as ADM publishes, with moments that are nobody's."""
    moments = {"mu": np.arange(width) / width, "sigma": np.eye(width), "mu_s": np.ones(3), "sigma_s": np.eye(3)}
    np.savez(path, **(moments | more))
    return path


def test_a_reference_file_gives_its_moments_and_the_rest_of_its_pictures(tmp_path):
    made = pictures(9)
    about = {"features": "inception", "weights": "abc"}
    path = reference(tmp_path / "ref.npz", arr_0=made)
    found, _ = features.statistics_of(path, measure, about=about)
    np.testing.assert_array_equal(found["mu"], np.arange(features.POOL) / features.POOL)
    np.testing.assert_array_equal(found["mu_s"], np.ones(3))
    np.testing.assert_allclose(found["features"], extract(made)["2048"], atol=1e-6)
    assert found["count"] == 0  # of how many pictures those moments are, nobody says
    alone, _ = features.statistics_of(reference(tmp_path / "alone.npz"), measure, about=about)
    assert "features" not in alone and alone["count"] == 0
    with pytest.raises(UserError, match="other features .7 of them, not 2048"):
        features.statistics_of(reference(tmp_path / "short.npz", width=7), measure, about=about)
    with pytest.raises(UserError, match="other features .features inception"):
        features.statistics_of(path, measure, about={"features": "patches", "weights": ""})
    bad = reference(tmp_path / "bad.npz", sigma=np.eye(5))
    with pytest.raises(UserError, match=r"sigma is \(5, 5\)"):
        features.statistics_of(bad, measure, about=about)
    np.savez(tmp_path / "mu.npz", mu=np.zeros(features.POOL))
    with pytest.raises(UserError, match="sigma"):
        features.statistics_of(tmp_path / "mu.npz", measure, about=about)


def test_statistics_of_ours_serve_as_a_reference(tmp_path):
    about = {"features": "inception", "weights": "abc"}
    folder = write_folder(tmp_path / "set", pictures(8))
    measured, _ = features.statistics_of(folder, measure, about=about)
    (kept,) = tmp_path.glob(f"set{pictures_of.MARK}*.npz")
    again, _ = features.statistics_of(kept, None, about=about)
    assert int(again["count"]) == 8 and list(again["size"]) == [SIDE, SIDE]
    assert compare.compare(measured, again)[0]["fid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="other features .weights abc"):
        features.statistics_of(kept, None, about={**about, "weights": "def"})


# ---- numbers --------------------------------------------------------------------------------------------------------


def statistics(made):
    want = extract(made)
    pool, places = metrics.moments(want["2048"]), metrics.moments(want["spatial"])
    return {
        "mu": pool.mean, "sigma": pool.covariance, "mu_s": places.mean, "sigma_s": places.covariance,
        "features": want["2048"], "score": np.array([2.0, 0.5]), "count": np.array(len(made)),
        "size": np.array(made.shape[1:3]),
    }  # fmt: skip


def test_numbers_are_those_of_metrics():
    first, second = pictures(30), pictures(40, seed=1)
    made, real = statistics(first), statistics(second)
    got, notes = compare.compare(made, real)
    a, b = extract(first), extract(second)
    precision, recall = metrics.precision_recall(b["2048"], a["2048"])
    mean, deviation = metrics.kid(a["2048"], b["2048"], subset_size=30)
    want = {
        "fid": metrics.frechet_distance(a["2048"], b["2048"]),
        "sfid": metrics.frechet_distance(a["spatial"], b["spatial"]),
        "inception_score": 2.0, "inception_score_std": 0.5, "precision": precision, "recall": recall,
        "kid": mean, "kid_std": deviation, "kid_subset_size": 30,
    }  # fmt: skip
    assert list(got) == list(want) and got == pytest.approx(want) and not notes
    only, _ = compare.compare(made, real, only=["sfid"])
    assert only == {"sfid": got["sfid"]}


def test_what_numbers_are_worth_is_told():
    made, real = statistics(pictures(5)), statistics(pictures(40, seed=1))
    del real["features"], real["mu_s"]
    got, notes = compare.compare(made, real)
    assert set(got) == {"fid", "inception_score", "inception_score_std"}
    assert [note.split(": ")[0] for note in notes] == [
        "sfid is left out", "precision_recall is left out", "kid is left out",
        "A has 5 pictures, not more than the 6 features",
    ]  # fmt: skip
    with pytest.raises(UserError, match="kid cannot be had: B has no features"):
        compare.compare(made, real, only=["kid"])
    with pytest.raises(UserError, match="A has pictures of 14x14 and B of 9x9"):
        compare.compare(made, statistics(pictures(8, side=9)))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_compares_patches_without_any_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    first, second = pictures(10), pictures(12, seed=1)
    a, b = write_folder(tmp_path / "a", first), images.save_npz(tmp_path / "b", second)
    output = tmp_path / "found.json"
    argv = [str(a), str(b), "--features=patches", f"--output={output}", "--batch_size=3"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is there already
        with pytest.raises(SystemExit) as end:
            runpy.run_module("diffax.evaluation", run_name="__main__")
    assert end.value.code == 0
    found = json.loads(output.read_text())
    want = metrics.frechet_distance(*(metrics.patches(images.from_uint8(x)) for x in (first, second)))
    assert found["results"] == {"frechet_patches": pytest.approx(want)}
    assert (found["pictures"], found["reference_pictures"], found["features"]) == (10, 12, "patches")
    assert f"| frechet_patches | {want:.6g} |" in capsys.readouterr().out
    assert compare.run(argv + ["--num=8", "--no-cache"]) == 0
    assert json.loads(output.read_text())["pictures"] == 8


def test_the_command_prints_the_numbers_of_papers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda path: ({"of": path}, "f" * 64))
    monkeypatch.setattr(features, "inception_extractor", lambda params: extract if params == {"of": "w.pb"} else None)
    a, b = write_folder(tmp_path / "a", pictures(10)), write_folder(tmp_path / "b", pictures(12, seed=1))
    assert compare.run([str(a), str(b), "--inception=w.pb", f"--output={tmp_path / 'found.json'}"]) == 0
    out = capsys.readouterr()
    rows = [line.split(" | ")[0].strip("| ") for line in out.out.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid",
                        "kid_std", "kid_subset_size"]  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["weights"] == "f" * 64 and set(found["results"]) == set(rows[2:])
    assert found["results"]["fid"] > 0.01
    assert compare.run([str(a), str(a), "--inception=w.pb", "--only=fid,precision_recall"]) == 0
    assert "| precision | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["A"], "required: B, or --clip and --prompts"),
        (["A", "--clip=C"], "--clip and --prompts go together"),
        (["A", "--clip=C", "--prompts=P"], "there is no trained model; C has no folder"),
        (["A", "B", "--features=clip"], "unknown --features=clip"),
        (["A", "B", "--num=2"], "at least 1 and 4"),
        (["A", "B", "--num=x"], "invalid int"),
        (["A", "B", "--only=fid,fdd"], "no number 'fdd'"),
        (["A", "B", "--output=/nowhere/at/all.json"], "no such folder"),
        (["A", "B"], "no Inception weights"),
        (["A", "B", "--inception=/nowhere.pb"], "cannot read the Inception weights"),
        (["A", "B", "--features=patches"], "no such folder or file; A"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(argv, match, capsys, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    assert compare.run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffax: error: ") and error.count("\n") == 1 and match in error


# ---- samples in files -----------------------------------------------------------------------------------------------


def sampler(calls, *, stop=10**9):
    """Picture i is a function of i; a call that reaches `stop` is interrupted."""

    def sample(first, count):
        calls.append((first, count))
        if first + count > stop:
            raise KeyboardInterrupt
        values = np.sin(np.arange(first, first + count))
        return np.broadcast_to(values[:, None, None, None], (count, 6, 6, 3)).astype(np.float32)

    return sample


ABOUT = {"seed": 1, "guidance": 1.5, "steps": "ddim25", "training_step": {"base": 1000}}


def test_processes_share_the_files_and_the_first_waits(tmp_path):
    calls, where = ([], [], []), {"about": ABOUT, "per_file": 4, "process_count": 3}
    waiting = threading.Thread(target=files.sample_to_folder, args=(sampler(calls[0]), tmp_path, 18), kwargs=where)
    waiting.start()
    files.sample_to_folder(sampler(calls[1]), tmp_path, 18, process_index=1, **where)
    waiting.join(1.5)
    assert waiting.is_alive(), "process 2 has made nothing yet"
    files.sample_to_folder(sampler(calls[2]), tmp_path, 18, process_index=2, **where)
    waiting.join(60)
    assert not waiting.is_alive()
    assert calls == ([(0, 4), (12, 4)], [(4, 4), (16, 2)], [(8, 4)])
    np.testing.assert_array_equal(read_all(pictures_of.open_pictures(tmp_path)), images.to_uint8(sampler([])(0, 18)))


def test_samples_go_on_where_they_stopped(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        files.sample_to_folder(sampler(calls, stop=8), tmp_path, 11, about=ABOUT, per_file=4)
    paths = files.sample_to_folder(sampler(calls), tmp_path, 11, about=ABOUT, per_file=4)
    assert calls == [(0, 4), (4, 4), (8, 3), (8, 3)]
    made = read_all(pictures_of.open_pictures(tmp_path))
    np.testing.assert_array_equal(made, images.to_uint8(sampler([])(0, 11)))
    assert [file.name for file in paths] == [f"samples_{i:08d}.npz" for i in (0, 4, 8)]
    # More pictures, and fewer.
    del calls[:]
    files.sample_to_folder(sampler(calls), tmp_path, 15, about=ABOUT, per_file=4, labels=np.arange(15))
    assert calls == [(8, 4), (12, 3)]
    np.testing.assert_array_equal(read_all(pictures_of.open_pictures(tmp_path)), images.to_uint8(sampler([])(0, 15)))
    with np.load(tmp_path / "samples_00000012.npz") as file:
        np.testing.assert_array_equal(file["arr_1"], [12, 13, 14])
    assert len(files.sample_to_folder(sampler(calls), tmp_path, 6, about=ABOUT, per_file=4)) == 2 and len(calls) == 2


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    files.sample_to_folder(sampler([]), tmp_path, 4, about=ABOUT, per_file=4)
    for other, match in (({**ABOUT, "guidance": 2}, "guidance 1.5, not 2"), ({"seed": 1}, "guidance 1.5, not None")):
        with pytest.raises(UserError, match=f"holds samples of {match}"):
            files.sample_to_folder(sampler([]), tmp_path, 4, about=other, per_file=4)
    with pytest.raises(UserError, match="shard 4, not 5"):
        files.sample_to_folder(sampler([]), tmp_path, 4, about=ABOUT, per_file=5)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(UserError, match="cannot read what the samples are"):
        files.sample_to_folder(sampler([]), tmp_path, 4, about=ABOUT, per_file=4)


def test_a_sample_that_is_not_finite_is_not_written(tmp_path):
    def sample(first, count):
        return np.where(np.arange(first, first + count)[:, None, None, None] == 6, np.nan, np.zeros((count, 6, 6, 3)))

    with pytest.raises(RunError, match="sample 6 is not finite"):
        files.sample_to_folder(sample, tmp_path, 12, about=ABOUT, per_file=4)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["samples_00000000.npz"]


# ---- pictures and their captions ------------------------------------------------------------------------------------


def untrained(config, workdir):
    """A workdir with the initial parameters of a config's sections; returns the models and parameters."""
    system, params = System(config), {}
    for name in system.trained:
        model = system.model(name)
        params[name] = jax.jit(model.init)(jax.random.key(0))
        ema = {str(decay): params[name] for decay in config[name].train.ema}
        workdirs.write_config(config, name, workdir)
        meta = {"section": configs.to_dict(config)[name], "identity": {}, "seed": 0}
        with Checkpoints(workdir / name / "checkpoints") as checkpoints:
            checkpoints.save(6, {"params": params[name]}, ema=ema, meta=meta)
            checkpoints.wait()
    return system, params


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(a workdir with a small CLIP, the model, its parameters)."""
    workdir = tmp_path_factory.mktemp("clip")
    config = configs.new("small", stages=("clip",), model="clip")
    section = config.clip
    section.shape, section.noised = (SIDE, SIDE, 3), False
    section.tokenizer = spec("tokenizer", "demo", length=8)
    section.net.features = 6
    section.net.image.update(width=8, layers=1, heads=2, patch=7)
    section.net.text.update(width=8, layers=1, heads=2)
    configs.check(config)
    system, params = untrained(config, workdir)
    return workdir, system.model("clip"), params["clip"]


def test_the_clip_score_of_pictures_and_their_captions(clip, tmp_path, capsys):
    """Picture i against caption i, in turn, whatever the batches; wide pictures are cut to their middle."""
    workdir, model, params = clip
    made, prompts = pictures(7), ["a red circle", "a blue square", "two things"]
    wide = np.concatenate([pictures(7, seed=1)[:, :, :2], made, pictures(7, seed=2)[:, :, :2]], 2)
    a = write_folder(tmp_path / "a", wide)
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    floats = 2 * made.astype(np.float64) / 255 - 1
    network, ids = model.net, model.tokenizer(prompts)
    image, text, _ = jax.jit(network.apply)({"params": params}, floats.astype(np.float32), ids[np.arange(7) % 3])
    image, text = (np.asarray(x, np.float64) for x in (image, text))
    want = 100 * np.mean([i @ t / np.sqrt((i @ i) * (t @ t)) for i, t in zip(image, text, strict=True)])
    output = tmp_path / "found.json"
    argv = [str(a), f"--clip={workdir}", f"--prompts={tmp_path / 'prompts.txt'}", f"--output={output}"]
    assert compare.run([*argv, "--batch_size=4"]) == 0
    out = capsys.readouterr()
    assert "3 prompts in turn for 7 pictures" in out.err and out.out.startswith("|  | value |")
    found = json.loads(output.read_text())
    assert found["results"] == {"clip_score": pytest.approx(want, abs=1e-3)} and found["pictures"] == 7
    # with B beside it
    b = write_folder(tmp_path / "b", pictures(5, seed=3))
    argv[1:1] = [str(b), "--features=patches"]
    assert compare.run([*argv, "--batch_size=4"]) == 2 and "A has pictures of 14x18 and B of 14x14" in (
        capsys.readouterr().err
    )
    argv[0] = str(write_folder(tmp_path / "c", made))
    assert compare.run([*argv, "--batch_size=4"]) == 0
    patches = [metrics.patches(images.from_uint8(x)) for x in (made, pictures(5, seed=3))]
    assert json.loads(output.read_text())["results"] == {
        "frechet_patches": pytest.approx(metrics.frechet_distance(*patches)),
        "clip_score": pytest.approx(want, abs=1e-3),
    }


def test_captions_and_clips_that_are_not_there(clip, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for path, match in (
        (tmp_path / "empty.txt", "there are no prompts"),
        (tmp_path / "gone", "cannot read the prompt"),
    ):
        with pytest.raises(UserError, match=match):
            read_prompts(path)
    workdirs.write_config(configs.load("quickstart"), "base", tmp_path)
    with pytest.raises(
        UserError, match="no CLIP of clean pictures; .*; convert one: python -m diffax.weights ViT-B-16"
    ):
        clip_score.clip_scorer(tmp_path, batch_size=4)


# ---- the numbers of papers by --mode=evaluate -----------------------------------------------------------------------


@pytest.fixture
def known_weights(monkeypatch):
    """Weights that need no file; returns how many pictures the network has seen, set by set."""
    seen = []

    def measured(found, extract, batch_size):
        seen.append(found.count)
        return statistics_of_all(found, extract, batch_size=batch_size)

    statistics_of_all = features.inception_statistics
    monkeypatch.setattr(weights, "load", lambda path: ({"of": path}, "f" * 64))
    monkeypatch.setattr(features, "inception_extractor", lambda params: extract)
    monkeypatch.setattr(features, "inception_statistics", measured)
    return seen


def rows_of(tmp_path, reference, *, inception="w.pb", chosen=({},), side=SIDE):
    """What `compared` yields of 9 samples of a choice; and the choices that were sampled."""
    made = []

    def make(folder, choice):
        made.append(dict(choice))
        values = pictures(9, seed=10 + len(made), side=side)
        values = (values.astype(np.float32) + 0.5) / 127.5 - 1  # well inside what becomes that byte
        files.sample_to_folder(lambda first, count: values[first : first + count], folder, 9, about=choice)

    section = configs.to_dict(configs.load("quickstart"))["base"] | {"shape": [side, side, 3]}
    options = dict(reference=str(reference), section=section, inception=inception, batch_size=4)
    found = reference_of.compared(make, chosen, tmp_path / "run", **options)
    return found, made


def test_samples_of_every_choice_beside_one_reference(tmp_path, known_weights):
    reference = write_folder(tmp_path / "real", pictures(12))
    chosen = reference_of.choices({"guidance": [1.0, 3.0], "samplers": [], "steps": ["5"]})
    assert chosen == [{"guidance": 1.0, "steps": "5"}, {"guidance": 3.0, "steps": "5"}]
    assert reference_of.choices({"guidance": [], "samplers": [], "steps": []}) == [{}]
    found, made = rows_of(tmp_path, reference, chosen=chosen)
    (first, about), (second, _) = found
    assert made == chosen and known_weights == [12, 9, 9]
    assert about["weights"] == "f" * 64 and about["reference_pictures"] == 12
    for row, choice, seed in ((first, chosen[0], 11), (second, chosen[1], 12)):
        want, _ = compare.compare(statistics(pictures(9, seed=seed)), statistics(pictures(12)))
        assert {key: row[key] for key in choice} == choice and row["samples"] == 9
        for key in ("fid", "sfid", "precision", "recall", "kid"):
            assert row[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key
    assert (tmp_path / "run" / "evaluation" / "samples_guidance_3.0_steps_5" / "samples_00000000.npz").exists()


def test_without_the_fids_network_nothing_is_called_so(tmp_path, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    reference = write_folder(tmp_path / "real", pictures(12))
    found, _ = rows_of(tmp_path, reference, inception=None)
    ((row, about),) = found
    assert set(row) == {"samples", "frechet_patches"} and about["features"] == "patches"
    assert any("frechet_patches is no FID" in note for note in about["notes"])
    assert (tmp_path / "run" / "samples" / "sampling.json").exists()


def test_a_reference_of_another_size_is_refused_before_sampling(tmp_path, known_weights):
    reference = write_folder(tmp_path / "real", pictures(12, side=9))
    found, made = rows_of(tmp_path, reference)
    with pytest.raises(UserError, match="the reference has pictures of 9x9, and the model makes 14x14"):
        next(found)
    assert not made and not (tmp_path / "run").exists()


def test_evaluate_beside_the_training_data(tmp_path, known_weights, capsys):
    """The command, twice: what is there is neither sampled nor measured again."""
    workdir = tmp_path / "run"
    flags = micro.flags(workdir, "config.base.shape=12,12,1", "config.sample.num=8", "config.eval.steps=none")
    untrained(configs.load("quickstart", [flag for flag in flags if flag.startswith("--config.")]), workdir)
    flags = [*flags, "--mode=evaluate", "--reference=data", "--inception=w.pb"]
    assert main.run(flags) == 0, capsys.readouterr().err
    out = capsys.readouterr()
    assert out.out.startswith("| samples | fid | sfid | inception_score |") and "A has 8 pictures" not in out.err
    report = json.loads((workdir / "comparison.json").read_text())
    (row,) = report["rows"]
    assert row["samples"] == 8 and row["fid"] > 0 and report["reference"] == "data" and report["training_step"]
    count = report["reference_pictures"]
    assert count > 1000 and known_weights == [count, 8]
    before = (workdir / "samples" / "samples_00000000.npz").read_bytes()
    assert main.run(flags) == 0
    assert known_weights == [count, 8] and json.loads((workdir / "comparison.json").read_text()) == report
    assert (workdir / "samples" / "samples_00000000.npz").read_bytes() == before
    # more samples: the first ones stay
    assert main.run([*flags, "--config.sample.num=11"]) == 0
    with np.load(workdir / "samples" / "samples_00000000.npz") as file:
        assert len(file["arr_0"]) == 11
    assert known_weights == [count, 8, 11]
