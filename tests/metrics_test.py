"""Numbers about sets of pictures against their definitions."""

import itertools

import numpy as np
import pytest

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


def features(n, d, *, seed, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 5), (50, 60, 12), (400, 400, 1), (8, 30, 12)])
def test_frechet_distance_is_the_formula(n, m, d):
    """Also where there are fewer pictures than features, and the covariance has no inverse."""
    linalg = pytest.importorskip("scipy.linalg")
    first, second = features(n, d, seed=0), features(m, d, seed=1, scale=1.5, shift=0.5)
    s1, s2 = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (first, second))
    root = linalg.sqrtm(s1 @ s2).real
    want = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(s1 + s2 - 2 * root)
    np.testing.assert_allclose(metrics.frechet_distance(first, second), want, rtol=1e-4)
    np.testing.assert_allclose(metrics.frechet_distance(second, first), want, rtol=1e-4)


def test_frechet_distance_of_known_sets():
    x = features(100, 6, seed=2)
    np.testing.assert_allclose(metrics.frechet_distance(x, x), 0, atol=1e-6)
    np.testing.assert_allclose(metrics.frechet_distance(x, x[::-1].astype(np.float32)), 0, atol=1e-4)
    np.testing.assert_allclose(metrics.frechet_distance(x, x + 2), 6 * 4, rtol=1e-9)
    # Twice the spread: sqrt(S1 S2) = 2 S.
    trace = np.trace(np.cov(x, rowvar=False))
    np.testing.assert_allclose(metrics.frechet_distance(x, 2 * x - x.mean(0)), trace, rtol=1e-9)


def test_psnr_of_known_errors():
    truth = np.zeros((2, 4, 4, 3))
    # An error of a tenth of the range of 2: 20 dB; of a hundredth: 40 dB. The mean is that of the pictures.
    made = truth + np.array([0.2, 0.02]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(metrics.psnr(made[:1], truth[:1]), 20)
    np.testing.assert_allclose(metrics.psnr(made, truth), 30)
    np.testing.assert_allclose(metrics.psnr(-made.astype(np.float32), truth.astype(np.float32)), 30, rtol=1e-6)
    assert np.isfinite(metrics.psnr(truth, truth)) and metrics.psnr(truth, truth) > 100


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 12, 18, 3), 3 * 2 * 3), ((2, 13, 11, 1), 2 * 2 * 1), ((5, 6, 6, 3), 5)]
)
def test_patches_are_the_squares_of_a_grid(shape, count):
    pictures = np.random.default_rng(0).normal(size=shape)
    got = metrics.patches(pictures)
    assert got.shape == (count, 36 * shape[-1])
    rows, columns = shape[1] // 6, shape[2] // 6
    squares = [
        picture[6 * y : 6 * y + 6, 6 * x : 6 * x + 6].ravel()
        for picture in pictures
        for y in range(rows)
        for x in range(columns)
    ]
    np.testing.assert_array_equal(got, squares)


def test_patches_tell_blurred_pictures_from_sharp_ones():
    rng = np.random.default_rng(0)
    sharp, others = (np.sign(rng.normal(size=(200, 12, 12, 1))) for _ in range(2))
    blurred = (sharp + np.roll(sharp, 1, axis=1) + np.roll(sharp, 1, axis=2)) / 3
    distances = [metrics.frechet_distance(metrics.patches(x), metrics.patches(others)) for x in (sharp, blurred)]
    assert distances[0] < distances[1] / 3, distances
