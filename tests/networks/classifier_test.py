"""Laws of the noised classifier."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import components
from diffax.errors import UserError
from tests.networks.common import NET, SHAPE, TIME, drawn, images


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_classifier(pool):
    net = NET | dict(name="classifier", pool=pool, head_channels=8, groups=8)
    network = components.build(net, "network", num_classes=10)
    apply, params = jax.jit(network.apply), drawn(network, jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    logits = apply(params, images(), TIME)
    chex.assert_shape(logits, (2, 10))
    got = apply(params, jnp.stack([images()[0], images(seed=1)[1]]), TIME)
    np.testing.assert_allclose(got[0], logits[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[1], logits[1], atol=1e-3)


def test_classifier_options():
    with pytest.raises(UserError, match="network.pool must be one of .* got 'max'"):
        components.build(NET | {"name": "classifier", "pool": "max"}, "network", num_classes=10)
