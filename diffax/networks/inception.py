"""The Inception network of the FID, in the form that was published for it in December 2015.

It differs from the Inception-v3 that was published later, with other weights: averages leave the padding out, the last
block pools by the maximum, there are 1008 logits, and pictures are enlarged as TensorFlow 1 did it. Parameters bear the
names under which the network is published for PyTorch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SIDE = 299
NORM_EPS = 1e-3
LOGITS = 1008
# The features that the sFID compares: the first channels of the first branch of its block, 17x17 pixels (ADM, code).
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


class Conv(NamedTuple):
    """A convolution: its channels, the size of its kernel, its stride, and whether its edges are padded."""

    features: int
    height: int = 1
    width: int = 1
    stride: int = 1
    pad: bool = True


def average_pool(x: Array) -> Array:
    """Means of 3x3 pixels, of those that there are at the edges."""
    # how many there are in numpy: XLA takes a second for each such constant
    at = [np.arange(size) for size in x.shape[1:3]]
    rows, columns = (np.float32(1) + (i > 0) + (i < i[-1]) for i in at)
    return nn.pool(x, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME") / np.outer(rows, columns)[:, :, None]


def max_pool(x: Array) -> Array:
    """Maxima of 3x3 pixels."""
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def halve(x: Array) -> Array:
    """Maxima of 3x3 pixels, every other one."""
    return nn.max_pool(x, (3, 3), (2, 2))


# What is done in turn: a pool, a convolution, or convolutions side by side.
Step = Callable[[Array], Array] | Conv | list[Conv]
Branches = Mapping[str, Sequence[Step]]


def _block_35(pool: int) -> Branches:
    return {
        "branch1x1": [Conv(64)],
        "branch5x5": [Conv(48), Conv(64, 5, 5)],
        "branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3)],
        "branch_pool": [average_pool, Conv(pool)],
    }


def _block_17(width: int) -> Branches:
    row, column = Conv(width, 1, 7), Conv(width, 7, 1)
    return {
        "branch1x1": [Conv(192)],
        "branch7x7": [Conv(width), row, Conv(192, 7, 1)],
        "branch7x7dbl": [Conv(width), column, row, column, Conv(192, 1, 7)],
        "branch_pool": [average_pool, Conv(192)],
    }


def _block_8(pool: Callable[[Array], Array]) -> Branches:
    cross = [Conv(384, 1, 3), Conv(384, 3, 1)]
    return {
        "branch1x1": [Conv(320)],
        "branch3x3": [Conv(384), cross],
        "branch3x3dbl": [Conv(448), Conv(384, 3, 3), cross],
        "branch_pool": [pool, Conv(192)],
    }


STEM: Mapping[str, Conv] = {
    "Conv2d_1a_3x3": Conv(32, 3, 3, 2, pad=False),
    "Conv2d_2a_3x3": Conv(32, 3, 3, pad=False),
    "Conv2d_2b_3x3": Conv(64, 3, 3),
    "Conv2d_3b_1x1": Conv(80),
    "Conv2d_4a_3x3": Conv(192, 3, 3, pad=False),
}
BLOCKS: Mapping[str, Branches] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": {
        "branch3x3": [Conv(384, 3, 3, 2, pad=False)],
        "branch3x3dbl": [Conv(64), Conv(96, 3, 3), Conv(96, 3, 3, 2, pad=False)],
        "branch_pool": [halve],
    },
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": {
        "branch3x3": [Conv(192), Conv(320, 3, 3, 2, pad=False)],
        "branch7x7x3": [Conv(192), Conv(192, 1, 7), Conv(192, 7, 1), Conv(192, 3, 3, 2, pad=False)],
        "branch_pool": [halve],
    },
    "Mixed_7b": _block_8(average_pool),
    "Mixed_7c": _block_8(max_pool),
}
# After these layers the mean of all pixels is a feature too, named by its size.
MEANS = {"Conv2d_2b_3x3": "64", "Conv2d_4a_3x3": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}


def named_steps(branch: str, steps: Sequence[Step]) -> Iterator[Callable[[Array], Array] | dict[str, Conv]]:
    """The steps of a branch, convolutions by their names: a lone one has that of the branch, others are numbered."""
    number = 0
    alone = sum(not callable(step) for step in steps) == 1
    for step in steps:
        if callable(step):
            yield step
            continue
        number += 1
        name = branch if alone else f"{branch}_{number}"
        yield {name: step} if isinstance(step, Conv) else {name + "ab"[i]: conv for i, conv in enumerate(step)}


class NormedConv(nn.Module):
    """ReLU of a convolution without bias, normalised by the statistics of the training set."""

    conv: Conv

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features]."""
        c = self.conv
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (c.height, c.width, x.shape[-1], c.features))
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, bias = self.param("scale", ones, (c.features,)), self.param("bias", zeros, (c.features,))
        mean, variance = self.param("mean", zeros, (c.features,)), self.param("variance", ones, (c.features,))
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (c.stride, c.stride),
            "SAME" if c.pad else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu((y - mean) * (scale * jax.lax.rsqrt(variance + NORM_EPS)) + bias)


class Block(nn.Module):
    """Branches side by side; their channels in turn."""

    branches: Branches

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', C']."""
        done = []
        for branch, steps in self.branches.items():
            y = x
            for step in named_steps(branch, steps):
                if callable(step):
                    y = step(y)
                else:
                    y = jnp.concatenate([NormedConv(conv, name=name)(y) for name, conv in step.items()], -1)
            done.append(y)
        return jnp.concatenate(done, -1)


def resize(images: Array, side: int = SIDE) -> Array:
    """Bilinear interpolation as in TensorFlow 1: pixel i of the result is at i * size / side, and nothing is averaged.

    Args:
      images: [B, H, W, C] float32.
      side: height and width of the result.

    Returns:
      [B, side, side, C] float32.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        at = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = np.minimum(np.floor(at).astype(np.int32), size - 1)
        weight = (at - low).reshape(-1, *(1 for _ in images.shape[axis + 1 :]))
        first, second = (jnp.take(images, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
        images = first + (second - first) * weight
    return images


class Inception(nn.Module):
    """Features of pictures (Szegedy et al. 2016), for the FID and its kin (Heusel et al. 2017)."""

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """Computes the features.

        Args:
          images: [B, H, W, 3], any numbers in [0, 255]; any size, which is changed to 299x299.

        Returns:
          float32: '64', '192', '768' and '2048', means over all pixels of some layers, [B, 64] to [B, 2048];
          'spatial' [B, 2023], 7 channels of 17x17 pixels; 'logits' [B, 1008], without a bias.
        """
        found = {}
        x = (resize(images.astype(jnp.float32)) - 128) / 128
        for name, conv in STEM.items():
            x = NormedConv(conv, name=name)(x)
            if name in MEANS:
                x = halve(x)
                found[MEANS[name]] = x.mean((1, 2))
        for name, branches in BLOCKS.items():
            x = Block(branches, name=name)(x)
            if name == SPATIAL_BLOCK:
                found["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
            if name in MEANS:
                found[MEANS[name]] = x.mean((1, 2))
        head = nn.Dense(LOGITS, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
        return found | {"logits": head(found["2048"])}
