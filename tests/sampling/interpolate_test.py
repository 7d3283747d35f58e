"""Pictures between two pictures: ends, shared noise, bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.sampling.interpolate import interpolate
from tests.models import micro

WEIGHTS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def model():
    label = micro.conditions(label=dict(num_classes=micro.CLASSES))
    made = micro.model(conditions=label, steps="")
    params = jax.jit(made.init)(jax.random.key(0))
    return made, {"base": jax.tree.map(lambda a: a + 0.02, params)}


def run(model, depth, weights=WEIGHTS):
    of, params = model
    first, second = jnp.full(of.shape, -0.7), jnp.full(of.shape, 0.6)
    given = {"label": jnp.zeros(len(weights), jnp.int32)}
    walk = jax.jit(
        lambda params, weights: interpolate(
            of, params, first, second, jax.random.key(3), given, weights=weights, depth=depth
        )
    )
    return np.asarray(walk(params, jnp.asarray(weights)))


def test_shallow_interpolation_returns_its_ends(model):
    out = run(model, 1 / 40)
    chex.assert_shape(out, (3, 8, 8, 3))
    np.testing.assert_allclose(out[0].mean(), -0.7, atol=0.05)
    np.testing.assert_allclose(out[2].mean(), 0.6, atol=0.05)
    assert out[0].mean() < out[1].mean() < out[2].mean()


def test_the_noise_is_shared_by_all_weights(model):
    out = run(model, 0.5, weights=(0.3, 0.3, 0.3))
    np.testing.assert_allclose(out[0], out[1], atol=1e-6)
    chex.assert_tree_all_finite(out)


def test_bad_arguments(model):
    of, params = model
    picture = jnp.zeros(of.shape)
    for depth in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share of the steps must be"):
            interpolate(of, params, picture, picture, jax.random.key(0), weights=jnp.zeros(1), depth=depth)
    with pytest.raises(ValueError, match="model's shape"):
        interpolate(of, params, picture[1:], picture, jax.random.key(0), weights=jnp.zeros(1), depth=0.5)
