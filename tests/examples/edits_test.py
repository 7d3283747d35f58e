"""The scores of edits: what is seen without a network, and every section on micro models."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import diffax
from diffax.data import images
from examples.shapes import data as shapes
from examples.shapes import edits, evaluation
from tests.sampling import untrained


def scenes(count: int) -> list[shapes.Scene]:
    """Single things of clear places that change one from the next."""
    return [s for s in map(shapes.scene, range(0, 3000, 3)) if s.place != "none"][:count]


def drawn(of: list[shapes.Scene], size: int = 32) -> np.ndarray:
    return images.from_uint8(np.stack([shapes.draw(s, size) for s in of]))


def test_things_are_found_by_their_colour():
    of = scenes(60)
    pictures = drawn(of)
    assert edits.background(pictures).tolist() == [s.background for s in of]
    truth = 32 * np.array([[s.things[0].y, s.things[0].x] for s in of]) - 0.5
    found = edits._centres(edits.foreground(pictures))
    lower = np.array([s.things[0].shape == "triangle" for s in of])  # its middle lies lower than its centre
    assert np.abs(found - truth)[~lower].max() < 0.6 and np.abs(found - truth)[lower].max() < 2.5
    known = edits.outside_the_thing(pictures)
    behind = edits.edge_colour(pictures)[:, None, None]
    np.testing.assert_allclose(np.where(known[..., None], pictures - behind, 0), 0, atol=0.01)
    assert 0.2 < known.mean() < 0.9
    assert edits.border_step(pictures, known) < 0.5
    worse = np.where(known[..., None], pictures, 1.0)
    assert edits.border_step(worse, known) > 20
    assert edits.changed_pixels(worse, pictures, known) == 0
    worse[3][known[3]] += np.float32(1e-7)
    assert edits.changed_pixels(worse, pictures, known) == known[3].sum()


def test_distances_of_things():
    plain = np.full((2, 16, 16, 3), -1.0)
    plain[:, 2:6, 2:6] = 1
    shifted = np.roll(plain, (3, 4), (1, 2))
    assert edits.moved(plain, plain) == (0, 1)
    assert edits.moved(plain, shifted) == (pytest.approx(5), 0)
    distance, overlap = edits.moved(plain, np.stack([shifted[0], np.full((16, 16, 3), -1.0)]))
    assert (distance, overlap) == (pytest.approx(5), 0)
    assert edits._centres(edits.foreground(plain)).tolist() == [[3.5, 3.5]] * 2


def test_captions_with_another_attribute():
    section = {"data": {"holdout": ("red circle", "blue ring")}}
    bench = edits.Bench({}, None, section, edits.parser().parse_args([]))
    of = {name: np.array([s.attributes[name] for s in scenes(200)]) for name in edits.SAID} | {"image": np.zeros(200)}
    for names in (("colour", "shape"), ("shape",), ("place",)):
        for i, changed in enumerate(edits.another(bench, of, *names)):
            own = edits.record(of, i)
            said = shapes.described(edits.caption(own, **changed))
            assert {k: v for k, v in said.items() if k in edits.SAID} == {**own, **changed}
            assert all(own[name] != said[name] for name in names)
            assert names == ("place",) or f"{said['colour']} {said['shape']}" not in section["data"]["holdout"]


def test_paths_go_one_way():
    def path(text):
        return np.array([c == "a" for c in text]), np.array([c == "b" for c in text])

    read = {text: edits.one_way(*path(text)) for text in ("aabb", "a.bb", "ab", "abab", "aaaa", "bbbb", "a.a.b")}
    assert [text for text, smooth in read.items() if smooth] == ["aabb", "a.bb", "ab"]


def test_where_a_curve_reaches_a_level():
    assert edits.at_level([0.2, 0.6, 0.5, 0.9], [10, 6, 4, 2], 0.5) == pytest.approx(7)
    assert edits.at_level([0.2, 0.6], [10, 6], 0.1) == 10
    assert edits.at_level([0.2, 0.6], [10, 6], 0.6) == 6


# ---- the sections ---------------------------------------------------------------------------------------------------


class Known:
    """It knows the pictures it was shown, and takes all others for a small red circle at the top left."""

    accuracies = dict.fromkeys(edits.SAID, 1.0)

    def __init__(self):
        self.known = {}

    def learn(self, of):
        for i, picture in enumerate(of["image"]):
            self.known[picture.tobytes()] = edits.record(of, i)
        return of

    def read(self, pictures):
        other = {"shape": "circle", "colour": "red", "size": "small", "place": "top left"}
        seen = [self.known.get(np.ascontiguousarray(picture).tobytes(), other) for picture in pictures]
        return {name: np.array([of[name] for of in seen]) for name in edits.SAID}

    def features(self, pictures):
        return np.asarray(pictures).mean((1, 2))


def of_shapes(sample_fn, *names):
    """A system, as if it was trained on single shapes."""
    config, data = dict(sample_fn.config), {"name": evaluation.DATA, "split": "train", "single": True, "holdout": ()}
    for name in names:
        config[name] = {**config[name], "data": {**data, "label": "label", "data_dir": ""}}
    return dataclasses.replace(sample_fn, config=config)


@pytest.fixture(scope="module")
def systems():
    return {
        "glide": of_shapes(untrained.glide(inpaint=False), "base"),
        "inpaint": of_shapes(untrained.glide(), "base"),
        "unclip": of_shapes(untrained.unclip(), "prior", "decoder"),
    }


@pytest.fixture
def run(systems, monkeypatch, tmp_path):
    """(sections, flags) -> {section: rows}; files are in tmp_path."""
    classifier, real = Known(), edits.things
    monkeypatch.setattr(diffax, "load", systems.__getitem__)
    monkeypatch.setattr(evaluation.Captions, "fit", lambda self, section, shape: classifier)
    monkeypatch.setattr(
        edits, "things", lambda bench, num, *split: classifier.learn(real(bench, min(num, 400), *split))
    )

    def call(what, *more):
        flags = ["--num=8", "--each=2", "--batch=4", "--steps=40", "--points=3", "--etas=1", "--strengths=0.5"]
        flags += ["--weights=0,0.5", "--guidance=1,2", f"--out={tmp_path}", f"--what={what}", *more]
        assert edits.run(flags) == 0
        names = what.split(",")
        assert all(Image.open(tmp_path / f"{name}.png").size[0] > 50 for name in names)
        return {name: json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in names}

    return call


@pytest.mark.slow
def test_scores_of_glide(run, tmp_path, capsys):
    found = run("inpaint,image_to_image", "--glide=glide", "--inpaint=inpaint")
    rows = {row["pictures"]: row for row in found["inpaint"]}
    assert [rows[name]["method"] for name in rows] == ["", "trained to fill", "replacement"]
    assert all(row["known pixels changed"] == 0 and row["count"] == 8 for row in rows.values())
    assert rows["untouched"]["all"] == 0 and rows["untouched"]["still the old"] == 1
    assert rows["glide"]["still the old"] < 1
    (row,) = found["image_to_image"]
    assert row["strength"] == 0.5 and 0 <= row["overlap"] <= 1
    printed = capsys.readouterr().out
    assert all(f"\n## {name}\n\n| " in printed for name in found)
    assert (tmp_path / "image_to_image_plot.png").exists()


def test_scores_of_unclip(run, tmp_path):
    found = run("reconstruct,variations,interpolate,diff,prior,diversity", "--unclip=unclip")
    own, other, real = found["reconstruct"]
    assert own["psnr"] > other["psnr"] and real["shape"] == real["background"] == 1
    assert [row["variations"] for row in found["variations"]] == ["DDIM, eta 1", "new noise", "(the originals)"]
    *path, last = found["interpolate"]
    assert [row["weight"] for row in path] == [0, 0.5, 1] and 0 <= last["colour of the second"] <= 1
    assert [(row["changed"], row["weight"]) for row in found["diff"]] == [(n, w) for n in edits.SAID for w in (0, 0.5)]
    names = ["caption alone", "text embedding", "diffusion prior", "(real pictures)"]
    assert [row["embedding"] for row in found["prior"]] == names
    assert found["prior"][-1]["accuracy"] == 1
    real, *rest = found["diversity"]
    assert real["whole"] == 1 and real["distance"] > 0
    *rest, reached = rest
    assert [(row["system"], row["guidance"]) for row in rest] == [("unclip", 1), ("unclip", 2)]
    assert reached["accuracy"] == max(row["accuracy"] for row in rest)
    assert (tmp_path / "diversity_plot.png").exists() and (tmp_path / "interpolate_plot.png").exists()


def test_bad_commands_get_one_line(capsys):
    for flags, words in (
        (["--what=inpant"], "unknown section 'inpant'"),
        (["--what=diff", "--glide=x"], "diff needs a system; --what; pass --unclip"),
        (["--what=diff", "--unclip=/no/such/folder"], "there is no trained model"),
    ):
        assert edits.run(flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line, line
