"""The evaluation classifier of captioned shapes: what it learns, what it scores, what it refuses."""

import numpy as np
import pytest

from diffax import config as configs
from diffax.components import build, spec
from diffax.errors import UserError
from diffax.sampling.grids import held_out_examples
from examples.shapes import data as shapes
from examples.shapes import evaluation

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
    return build(spec("evaluation", NAME, steps=4), "evaluation").fit(section, (16, 16, 3))


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
    assert row["frechet_classifier"] == pytest.approx(0, abs=1e-2) and row["frechet_patches"] < 1e-2
    assert row["colour_of_classifier_on_real"] == fitted.accuracies["colour"]
    twice = real["image"].repeat(4, 1).repeat(4, 2)
    assert evaluation.Captions(2).fit(section, (64, 64, 3)).features(twice).shape == fitted.features(
        real["image"]
    ).shape[:1] + (2048,)


def test_captions_that_training_held_out(section, fitted):
    unseen = fitted.others(25)["held_out"]
    assert len(unseen) == 5 and all(any(pair in text for pair in HOLDOUT) for text in unseen)
    assert fitted.others(4) == {}
    assert evaluation.held_out_captions({**section, "data": {**section["data"], "holdout": ()}}, (16, 16, 3), 5) == []


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
