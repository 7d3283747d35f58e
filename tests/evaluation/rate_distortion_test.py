"""Rate and distortion of the progressive code."""

import numpy as np

from diffax.diffusion import losses
from diffax.evaluation.rate_distortion import rate_distortion


def test_rate_distortion_adds_up():
    rng = np.random.default_rng(0)
    terms, x_mse = rng.uniform(0, 1, (3, 5)), rng.uniform(0, 0.1, (3, 5))
    bound = losses.BitsPerDim(terms.sum(1) + 0.1, np.full(3, 0.1), terms, x_mse, x_mse)
    curve = rate_distortion(bound)
    np.testing.assert_allclose(curve.rate[0], 0.1)
    np.testing.assert_allclose(curve.rate[-1] + terms[:, -1].mean(), np.mean(bound.total))
    np.testing.assert_allclose(curve.distortion[2], 127.5 * np.sqrt(x_mse[:, 2]).mean())
    assert np.all(np.diff(curve.rate) > 0)
