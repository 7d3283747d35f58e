"""Numbers about sets of pictures against their definitions."""

import itertools

import numpy as np
import pytest

from diffax.evaluation import metrics


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


# ---- metrics of features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1000, 1])
def test_precision_and_recall_do_not_depend_on_the_blocks_they_are_computed_in(block, monkeypatch):
    real, made = features(70, 4, seed=0), features(50, 4, seed=1)
    whole = metrics.neighbour_radii(real, 3), metrics.precision_recall(real, made, k=3)
    monkeypatch.setattr(metrics, "_BLOCK", block)
    np.testing.assert_allclose(metrics.neighbour_radii(real, 3), whole[0], rtol=1e-9)
    assert metrics.precision_recall(real, made, k=3) == whole[1]


@pytest.mark.parametrize("block", [2**24, 7])
def test_moments_are_those_of_numpy_and_merge(block, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    # A mean that is large beside the spread: sums of squares alone would lose it in float32.
    x = (features(60, 5, seed=3) + 1e4).astype(np.float32)
    got = metrics.moments(x)
    np.testing.assert_allclose(got.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)
    together = metrics.merge(metrics.merge(metrics.moments(x[:7]), metrics.moments(x[7:9])), metrics.moments(x[9:]))
    assert together.count == 60
    np.testing.assert_allclose(together.mean, got.mean, rtol=1e-12)
    np.testing.assert_allclose(together.covariance, got.covariance, rtol=1e-8)


def test_inception_score_of_known_sets():
    sure = 1e3 * np.eye(10)[np.arange(50) % 10]
    np.testing.assert_allclose(metrics.inception_score(sure, splits=5), (10, 0), atol=1e-9)
    np.testing.assert_allclose(metrics.inception_score(np.zeros((50, 10)), splits=5), (1, 0), atol=1e-12)
    # Adding a number to all logits of a picture changes nothing.
    logits = np.random.default_rng(0).normal(size=(30, 4))
    shifted = logits + np.arange(30)[:, None] * 10
    np.testing.assert_allclose(metrics.inception_score(shifted, splits=3), metrics.inception_score(logits, splits=3))
    with pytest.raises(ValueError, match="3 pictures do not make 10 parts"):
        metrics.inception_score(logits[:3], splits=10)


def test_precision_and_recall_of_known_sets():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 3))
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)
    # Samples of one half of the real pictures are all good, and half of what there is.
    far = np.concatenate([real, real + 100])
    precision, recall = metrics.precision_recall(far, real)
    assert (precision, recall) == (1, 0.5)
    # Four copies of each: every radius is 0, and rounding must not make it less than a distance of 0.
    copies = np.tile(rng.normal(size=(50, 301)).astype(np.float32), (4, 1))
    np.testing.assert_array_equal(metrics.neighbour_radii(copies), np.zeros(200))
    assert metrics.precision_recall(copies, copies[::-1]) == (1, 1)
    with pytest.raises(ValueError, match="3 pictures have no neighbour 3"):
        metrics.neighbour_radii(real[:3])


def test_squared_mmd_is_the_definition_and_unbiased():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4)) + 1

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    want = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    want += np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    want -= 2 * np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(metrics.squared_mmd(x, y), want)
    same = [metrics.squared_mmd(*rng.normal(size=(2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    with pytest.raises(ValueError, match="subset_size 9 cannot be, of 6 and 5 pictures"):
        metrics.kid(x, y, subset_size=9)


def test_clip_score_is_a_hundred_times_the_cosine():
    image = np.array([[1.0, 0], [0, 2], [3, 3], [1, 0]])
    text = np.array([[5.0, 0], [1, 0], [0, 1], [-1, 0]], np.float32)
    np.testing.assert_allclose(metrics.clip_score(image, text), 100 * (1 + 0 + np.sqrt(0.5) - 1) / 4)
    with pytest.raises(ValueError, match="one caption for each picture"):
        metrics.clip_score(image, text[:2])
