"""Numbers about sets of pictures against their definitions."""

import itertools

import numpy as np

from diffax import metrics


def test_spread_is_the_rms_distance_of_two_pictures_of_a_class():
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(12, 3, 2, 1)) * rng.uniform(0.5, 2, size=(12, 1, 1, 1))
    labels = np.array([0] * 5 + [1] * 6 + [2])
    per_class = [
        np.mean([np.mean((pictures[i] - pictures[j]) ** 2) for i, j in itertools.combinations(np.flatnonzero(m), 2)])
        for m in (labels == 0, labels == 1)
    ]
    np.testing.assert_allclose(metrics.spread(pictures, labels), np.sqrt(np.mean(per_class)))
    assert metrics.spread(np.repeat(pictures[:1], 4, 0), np.zeros(4)) == 0
    assert np.isnan(metrics.spread(pictures[:2], np.array([0, 1])))
