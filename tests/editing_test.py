"""Compression and interpolation, on models that are known exactly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import editing, losses, stages
from tests.stages_test import build


def test_rate_distortion_adds_up():
    rng = np.random.default_rng(0)
    terms, x_mse = rng.uniform(0, 1, (3, 5)), rng.uniform(0, 0.1, (3, 5))
    bound = losses.BitsPerDim(terms.sum(1) + 0.1, np.full(3, 0.1), terms, x_mse, x_mse)
    curve = editing.rate_distortion(bound)
    np.testing.assert_allclose(curve.rate[0], 0.1)
    np.testing.assert_allclose(curve.rate[-1] + terms[:, -1].mean(), np.mean(bound.total))
    np.testing.assert_allclose(curve.distortion[2], 127.5 * np.sqrt(x_mse[:, 2]).mean())
    assert np.all(np.diff(curve.rate) > 0)


@pytest.fixture(scope="module")
def model():
    stage = build("config.base.steps=")
    params = jax.jit(stages.objective(stage).init)(jax.random.key(0))
    return stage, jax.tree.map(lambda a: a + 0.02, params)


def run(model, depth, weights=(0.0, 0.5, 1.0)):
    stage, params = model
    first, second = jnp.full(stage.shape, -0.7), jnp.full(stage.shape, 0.6)
    label = jnp.zeros(len(weights), jnp.int32)
    walk = jax.jit(
        lambda params, weights: editing.interpolate(
            stage, params, first, second, jax.random.key(3), weights=weights, depth=depth, label=label
        )
    )
    return np.asarray(walk(params, jnp.asarray(weights)))


def test_shallow_interpolation_returns_its_ends(model):
    out = run(model, 1 / 40)
    chex.assert_shape(out, (3, 8, 8, 1))
    np.testing.assert_allclose(out[0].mean(), -0.7, atol=0.05)
    np.testing.assert_allclose(out[2].mean(), 0.6, atol=0.05)
    assert out[0].mean() < out[1].mean() < out[2].mean()


def test_the_noise_is_shared_by_all_weights(model):
    out = run(model, 0.5, weights=(0.3, 0.3, 0.3))
    np.testing.assert_allclose(out[0], out[1], atol=1e-6)
    chex.assert_tree_all_finite(out)


def test_bad_arguments(model):
    stage, params = model
    picture = jnp.zeros(stage.shape)
    for depth in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share of the steps must be"):
            editing.interpolate(stage, params, picture, picture, jax.random.key(0), weights=jnp.zeros(1), depth=depth)
    with pytest.raises(ValueError, match="stage's shape"):
        editing.interpolate(stage, params, picture[1:], picture, jax.random.key(0), weights=jnp.zeros(1), depth=0.5)
