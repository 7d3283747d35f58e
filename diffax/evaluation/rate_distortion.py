"""Progressive lossy compression (DDPM, section 4.3)."""

from typing import NamedTuple

import numpy as np

from diffax.diffusion import losses


class RateDistortion(NamedTuple):
    """The progressive code averaged over pictures, noisiest step first.

    Attributes:
      rate: [N] bits per dimension received before each step.
      distortion: [N] root mean squared error of the estimate of x at that moment, on the scale of 0 to 255.
    """

    rate: np.ndarray
    distortion: np.ndarray


def rate_distortion(bound: losses.BitsPerDim) -> RateDistortion:
    """The rate-distortion curve of the progressive code that the bound describes (DDPM, algorithms 3 and 4).

    The receiver knows z_t after the prior and the KL terms of all earlier steps, and estimates x from it.

    Args:
      bound: of B pictures, along N steps.

    Returns:
      The curve.
    """
    terms, prior = np.asarray(bound.terms, np.float64), np.asarray(bound.prior, np.float64)
    received = prior[:, None] + np.cumsum(terms, axis=1) - terms
    rmse = np.sqrt(np.asarray(bound.x_mse, np.float64))
    return RateDistortion(received.mean(0), 127.5 * rmse.mean(0))
