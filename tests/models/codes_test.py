"""Embeddings scaled, in principal components, and as codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.models import codes


def embeddings(count=3000, size=10, seed=0):
    """Of unit length, their spectrum falling."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((count, size)) * 0.7 ** np.arange(size) @ np.linalg.qr(rng.standard_normal((size, size)))[0]
    e += 0.3
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def test_components_lose_the_variance_of_those_left_out():
    e = embeddings()
    variances = np.linalg.eigvalsh(np.cov(e.T, bias=True))[::-1]
    for count in (1, 4, 10):
        components = codes.fit_components(e, count)
        coordinates = np.asarray(codes.project(e.astype(np.float32), components), np.float64)
        np.testing.assert_allclose(coordinates.var(0), variances[:count], rtol=1e-4)
        np.testing.assert_allclose(components.directions.T @ components.directions, np.eye(count), atol=1e-6)
        lost = np.mean(np.sum((np.asarray(codes.reconstruct(coordinates, components)) - e) ** 2, 1))
        np.testing.assert_allclose(lost, variances[count:].sum(), rtol=1e-3, atol=1e-10)
    few = codes.reconstruct(coordinates[:, :4], components)
    np.testing.assert_allclose(few, codes.reconstruct(coordinates[:, :4], codes.fit_components(e, 4)), atol=1e-6)
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"embeddings of size 10 have no {count} components"):
            codes.fit_components(e, count)


def test_buckets_hold_equally_many_and_centres_are_their_own():
    values = np.random.default_rng(1).standard_normal((3001, 4)) ** 3
    buckets = codes.fit_buckets(values, 16)
    found = np.asarray(jax.jit(codes.encode)(jnp.asarray(values, jnp.float32), buckets))
    assert found.dtype == np.int32
    for column in found.T:
        counts = np.bincount(column, minlength=16)
        assert counts.size == 16 and counts.min() >= 187 and counts.max() <= 188
    every = np.broadcast_to(np.arange(16)[:, None], (16, 4))
    np.testing.assert_array_equal(codes.encode(codes.decode(every, buckets), buckets), every)
    for column, code in ((0, 3), (2, 15)):
        mean = values[found[:, column] == code, column].mean()
        np.testing.assert_allclose(codes.decode(every, buckets)[code, column], mean, rtol=1e-5)
    # a value on an edge belongs above, values outside of the range to the outermost
    np.testing.assert_array_equal(codes.encode(buckets.edges[:, 4], buckets), np.full(4, 5))
    np.testing.assert_array_equal(codes.encode(np.full(4, 1e9, np.float32), buckets), np.full(4, 15))
    np.testing.assert_array_equal(codes.encode(np.full((2, 4), -1e9, np.float32), buckets), np.zeros((2, 4)))
    assert np.isnan(codes.decode(np.full(4, 16), buckets)).all()
    with pytest.raises(ValueError, match="15 values are too few for 16 buckets"):
        codes.fit_buckets(values[:15], 16)


def test_the_error_of_codes_falls_with_their_number():
    e = embeddings().astype(np.float32)
    components = codes.fit_components(e, 10)
    coordinates = codes.project(e, components)
    errors = []
    for count in (4, 16, 64, 256):
        buckets = codes.fit_buckets(coordinates, count)
        back = codes.reconstruct(codes.decode(codes.encode(coordinates, buckets), buckets), components)
        errors.append(float(np.mean(np.sum((back - e) ** 2, 1)) / np.sum(e.var(0))))
    assert all(after < before / 3 for before, after in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 2e-3


def test_scale():
    e = embeddings()
    scale = codes.fit_scale(e)
    x = codes.scaled(e, scale)
    np.testing.assert_allclose(x.mean(0), np.zeros(10), atol=1e-6)
    np.testing.assert_allclose(x.std(0), np.ones(10), rtol=1e-6)
    np.testing.assert_allclose(codes.unscaled(x, scale), e, rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 2 dimensions are constant"):
        codes.fit_scale(np.array([[0.0, 1.0], [0.0, 2.0]]))
