"""Numbers about pictures and sets of them, computed on the host in float64 (leaf)."""

import numpy as np


def spread(pictures: np.ndarray, labels: np.ndarray) -> float:
    """How different the pictures of one class are: the RMS distance between two of them, averaged over the classes.

    Args:
      pictures: [N, H, W, C].
      labels: [N] integers; classes with a single picture are passed over.

    Returns:
      The root of the mean squared distance per pixel and channel; NaN if no class has two pictures.
    """
    flat, labels = np.asarray(pictures, np.float64).reshape(len(pictures), -1), np.asarray(labels)
    # The mean squared distance of two draws is twice their variance.
    squared = [2 * flat[labels == k].var(axis=0, ddof=1).mean() for k in np.unique(labels) if np.sum(labels == k) > 1]
    return float(np.sqrt(np.mean(squared))) if squared else float("nan")


def psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], [N, H, W, C]: the mean over pictures."""
    error = (np.asarray(pictures, np.float64) - truth) ** 2
    return float(np.mean(10 * np.log10(4 / np.maximum(error.reshape(len(error), -1).mean(1), 1e-12))))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (Heusel et al. 2017, equation 6).

    The distance of the normal distributions with their means and covariances. It is the FID only on features of the
    Inception network of that paper.

    Args:
      first: [N, D]; second: [M, D]; N and M at least 2.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    between = first.mean(0) - second.mean(0)
    s1, s2 = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0)).sum()
    return float(between @ between + np.trace(s1) + np.trace(s2) - 2 * cross)


def patches(pictures: np.ndarray, side: int = 6) -> np.ndarray:
    """[N, H, W, C] -> [M, side * side * C], the squares of a grid: features of sharpness and texture, not of content.

    Their Frechet distance compares mean and covariance of neighbouring pixels, which blur and noise change.
    """
    n, height, width, channels = pictures.shape
    rows, columns = height // side, width // side
    cut = pictures[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return cut.swapaxes(2, 3).reshape(n * rows * columns, side * side * channels)
