"""The evaluation classifier of captioned shapes: what it learns, what it scores, what it refuses."""

import dataclasses

import numpy as np
import pytest

from diffax import config as configs
from diffax.components import build, spec
from diffax.errors import UserError
from diffax.evaluation import scores
from diffax.sampling.grids import held_out_examples
from examples.shapes import data as shapes
from examples.shapes import evaluation
from tests.sampling import untrained

NAME = "examples.shapes.evaluation:captions"
HOLDOUT = ("red circle", "blue ring")


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """A data set of hundreds, not thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "RANGES", {"train": range(600), "test": range(10**6, 10**6 + 90)})
        yield str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def section(small):
    made = configs.to_dict(configs.section("diffusion"))
    data = spec("data", evaluation.DATA, single=True, holdout=HOLDOUT, data_dir=small)
    return made | {"data": configs.to_dict(data)}


@pytest.fixture(scope="module")
def fitted(section):
    made = build(spec("evaluation", NAME, steps=4), "evaluation").fit(section, (16, 16, 3))
    return dataclasses.replace(made, features=lambda pictures: made.features(pictures)[:, :64])  # soon compared


def test_captions_are_scored_by_what_they_say():
    seen = {"shape": ["circle", "ring"], "colour": ["red", "blue"], "size": ["small", "small"],
            "place": ["top left", "none"]}  # fmt: skip
    seen = {name: np.array(of) for name, of in seen.items()}
    prompts = ["a red circle", "a large blue ring"]
    assert evaluation.caption_scores(seen, prompts) == dict(accuracy=1, whole=0.5, shape=1, colour=1, size=0)
    assert evaluation.caption_scores(seen, prompts[::-1])["accuracy"] == 0
    placed = evaluation.caption_scores(seen, ["a red circle at the top left", "a red ring at the top left"])
    assert placed == dict(accuracy=0.5, whole=0.5, shape=1, colour=0.5, place=0.5)


def test_rows_of_real_pictures(section, fitted):
    assert [*fitted.accuracies] == [*evaluation.FIRST] and 0 <= fitted.accuracy <= min(fitted.accuracies.values())
    real = held_out_examples(section, (16, 16, 3), 20, evaluation.CAPTION)
    row = fitted.score(real["image"], list(real["caption"]), real)
    assert set(fitted.shares) < set(row) and row["whole"] <= row["accuracy"]
    assert row["frechet_classifier"] == pytest.approx(0, abs=1e-2)
    assert row["colour_of_classifier_on_real"] == fitted.accuracies["colour"]


def test_large_pictures_are_looked_at_small(section):
    large = evaluation.Captions(2).fit(section, (64, 64, 3))
    pictures = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    seen = [
        large.features(pictures.repeat(2, 1).repeat(2, 2)),
        large.features(pictures.repeat(2, 1).repeat(2, 2) * 0.5),
    ]
    assert seen[0].shape == (3, 2048) and np.abs(seen[0] - seen[1]).max() > 1e-3
    assert {name: of.shape for name, of in large.read(np.zeros((3, 64, 64, 3))).items()} == dict.fromkeys(
        evaluation.FIRST, (3,)
    )


def test_captions_that_training_held_out(section, fitted):
    unseen = fitted.others(25)["held_out"]
    assert len(unseen) == 5 and all(any(pair in text for pair in HOLDOUT) for text in unseen)
    assert fitted.others(9) == {}
    assert evaluation.held_out_captions({**section, "data": {**section["data"], "holdout": ()}}, (16, 16, 3), 5) == []


def test_evaluation_uses_it(section, fitted, monkeypatch):
    whole = untrained.glide(inpaint=False)
    config = {**whole.config, "base": {**whole.config["base"], "data": section["data"]}}
    monkeypatch.setattr(evaluation.Captions, "fit", lambda self, section, shape: fitted)
    settings = configs.to_dict(configs.new("scores", stages=()))["eval"]
    settings |= dict(num=10, batch_size=10, bpd_num=0, guidance=(1.0, 3.0), classifier={"name": NAME, "steps": 4})
    rows = [*scores.scores(dataclasses.replace(whole, config=config), settings)]
    assert [row["guidance"] for row in rows] == [1, 3]
    for row in rows:
        assert row["samples"] == 10 and row["held_out_samples"] == 2
        assert all(0 <= row[name] <= 1 for name in ("accuracy", "whole", "held_out_accuracy"))


def test_other_data_are_refused():
    component = build(spec("evaluation", NAME), "evaluation")
    assert component.argument == "prompt" and component.steps == 2000
    with pytest.raises(UserError, match="'captions' reads the data examples.shapes.data:shapes, not 'digits'"):
        component.fit(configs.to_dict(configs.section("diffusion")), (16, 16, 3))


@pytest.mark.parametrize("name", ["dalle2:tiny", "karlo:tiny", "glide_base_64:tiny"])
def test_configs_name_it(name):
    assert configs.load(name).eval.classifier.name == NAME


@pytest.mark.slow
def test_it_reads_colours_soon(section):
    assert evaluation.captions(steps=50).fit(section, (16, 16, 3)).accuracies["colour"] > 0.3
