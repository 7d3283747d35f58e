"""Numbers about sets of pictures, computed on the host in float64 (leaf)."""

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
