"""Judges tell real pictures they have not seen, and say how well."""

import chex
import numpy as np
import pytest

from diffax import config as configs
from diffax import data
from diffax.evaluation import judges


def section(spec: str, *overrides: str) -> dict:
    config = configs.load(spec, overrides)
    configs.validate(config)
    return configs.to_dict(config)["base"]


def test_svc_knows_digits():
    of = section("quickstart", "config.base.shape=8,8,1")
    judge = judges.svc(of)
    test = data.examples(data.held_out(of["data"], shape=of["shape"]), of["data"], shape=of["shape"], limit=1000)
    assert judge.accuracy > 0.9
    np.testing.assert_allclose(np.mean(judge.classify(test["image"]) == test["label"]), judge.accuracy)
    chex.assert_shape(judge.features(test["image"]), (len(test["image"]), 64))
    noise = np.random.default_rng(0).uniform(-1, 1, test["image"].shape)
    assert np.mean(judge.classify(noise) == test["label"]) < 0.3


@pytest.mark.slow
def test_network_knows_the_colour_of_a_shape_wherever_it_stands():
    of = section("cfg_imagenet_128:tiny")
    judge = judges.network(of, steps=60)
    test = data.examples(data.held_out(of["data"], shape=of["shape"]), of["data"], shape=of["shape"], limit=70)
    assert judge.accuracy > 0.5, "of eight colours"
    assert np.mean(judge.classify(test["image"]) == test["label"]) > 0.4
    features = judge.features(test["image"])
    assert features.shape[0] == 70 and np.isfinite(features).all() and features.std() > 0


def test_a_column_of_the_data_can_be_the_label():
    of = section("cfg_imagenet_128:tiny")
    source = data.load_source(of["data"], shape=of["shape"])
    assert source.class_names[:2] == ("red", "orange") and "label" in source.keys
    assert source[5]["label"] == source[5]["colour"]
    with pytest.raises(configs.UserError, match="no column 'color' of classes.*colour"):
        data.load_source({**of["data"], "label": "color"}, shape=of["shape"])
