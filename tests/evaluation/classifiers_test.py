"""Evaluation classifiers recognise real pictures they have not seen, and say how well."""

import chex
import numpy as np
import pytest

from diffax import config as configs
from diffax.components import build, spec
from diffax.errors import UserError
from diffax.evaluation import classifiers
from diffax.sampling.grids import held_out_examples

DIGITS = (8, 8, 1)


def digits():
    return configs.to_dict(configs.section("diffusion"))


def shapes():
    data = spec("data", "examples.shapes.data:shapes", single=True, label="colour")
    return configs.to_dict(configs.section("diffusion")) | {"data": configs.to_dict(data)}


def test_svc_knows_digits():
    component = build(spec("evaluation", "svc"), "evaluation")
    assert component.argument == "label" and [*component.columns] == ["label"]
    fitted = component.fit(digits(), DIGITS)
    test = held_out_examples(digits(), DIGITS, 1000, component.columns)
    assert fitted.accuracy > 0.9
    np.testing.assert_allclose(np.mean(fitted.classify(test["image"]) == test["label"]), fitted.accuracy)
    chex.assert_shape(fitted.features(test["image"]), (len(test["image"]), 64))
    noise = np.random.default_rng(0).uniform(-1, 1, test["image"].shape)
    assert np.mean(fitted.classify(noise) == test["label"]) < 0.3


def test_scores_of_real_pictures_are_those_of_perfect_samples():
    component = build(spec("evaluation", "svc"), "evaluation")
    fitted = component.fit(digits(), DIGITS)
    real = held_out_examples(digits(), DIGITS, 200, component.columns)
    row = fitted.score(real["image"], real["label"], real)
    assert [*row] == ["accuracy", "diversity", "frechet_classifier", "accuracy_of_classifier_on_real"]
    assert row["accuracy"] > 0.9 and row["diversity"] == pytest.approx(1)
    assert row["frechet_classifier"] == pytest.approx(0, abs=1e-3) and fitted.others(10) == {}
    wrong = fitted.score(real["image"], (real["label"] + 1) % 10, real)
    assert wrong["accuracy"] < 0.1


def test_a_network_learns_several_columns_at_once():
    section = shapes()
    reader = classifiers.train_reader(section, (8, 8, 3), {"colour": 8, "size": 2}, steps=3, channels=8, batch_size=8)
    found = reader.classify(np.zeros((5, 8, 8, 3), np.float32))
    assert set(found) == {"colour", "size"} and found["colour"].shape == (5,)
    assert found["size"].max() < 2
    features = reader.features(np.zeros((5, 8, 8, 3), np.float32))
    assert features.shape[0] == 5 and np.isfinite(features).all()


@pytest.mark.slow
def test_network_knows_the_colour_of_a_shape_wherever_it_stands():
    section, shape = shapes(), (16, 16, 3)
    component = build(spec("evaluation", "network", steps=60), "evaluation")
    fitted = component.fit(section, shape)
    test = held_out_examples(section, shape, 70, component.columns)
    assert fitted.accuracy > 0.5, "of eight colours"
    assert np.mean(fitted.classify(test["image"]) == test["label"]) > 0.4
    features = fitted.features(test["image"])
    assert features.shape[0] == 70 and np.isfinite(features).all() and features.std() > 0


def test_data_without_what_is_classified_are_refused():
    section = shapes()
    with pytest.raises(UserError, match="no 'texture'"):
        classifiers.train_reader(section, (8, 8, 3), {"texture": 3}, steps=1, channels=8, batch_size=4)
    with pytest.raises(UserError, match="nothing says how many classes"):
        classifiers._num_classes(section, "label")
