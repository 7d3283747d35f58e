"""Numbers about pictures and sets of them, computed on the host in float64 (leaf)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Numbers in a block of distances: 128 MB.
_BLOCK = 2**24


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


class Moments(NamedTuple):
    """Mean and covariance of a set of features.

    Attributes:
      count: how many there are; 0 where it is not known.
      mean: [D] float64.
      covariance: [D, D] float64, of count - 1 degrees of freedom.
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """The moments of features [N, D], N at least 2; they are widened to float64 in parts."""
    features = np.asarray(features)
    count, width = features.shape
    mean = features.mean(0, dtype=np.float64)
    squares = np.zeros((width, width))
    for rows in _rows(count, width):
        centred = features[rows].astype(np.float64) - mean
        squares += centred.T @ centred
    return Moments(count, mean, squares / (count - 1))


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two sets together (Chan, Golub and LeVeque 1979)."""
    n, m = first.count, second.count
    between = second.mean - first.mean
    squares = (n - 1) * first.covariance + (m - 1) * second.covariance + np.outer(between, between) * (n * m / (n + m))
    return Moments(n + m, first.mean + between * (m / (n + m)), squares / (n + m - 1))


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6), by two symmetric problems."""
    between = first.mean - second.mean
    s1, s2 = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0)).sum()
    return float(between @ between + np.trace(s1) + np.trace(s2) - 2 * cross)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features (Heusel et al. 2017, equation 6).

    The distance of the normal distributions with their means and covariances. It is the FID only on features of the
    Inception network of that paper, and the sFID on its spatial ones.

    Args:
      first: [N, D]; second: [M, D]; N and M at least 2.
    """
    return frechet_of_moments(moments(first), moments(second))


def inception_score(logits: np.ndarray, *, splits: int | None = None, split_size: int = 5000) -> tuple[float, float]:
    """exp E KL(p(y | x) || p(y)) (Salimans et al. 2016), its mean and standard deviation over parts of the set.

    Parts are consecutive. Papers take 50,000 pictures, of which 10 parts and parts of 5000 are the same thing.

    Args:
      logits: [N, classes], of the Inception network without its bias.
      splits: number of parts, equal but for rounding; by default parts have `split_size`, the last one what is left.
      split_size: pictures in a part, as in ADM's evaluation.

    Returns:
      The mean, and the deviation among the parts.
    """
    count = len(logits)
    if splits is None:
        edges = [*range(0, count, split_size), count]
    else:
        edges = [i * count // splits for i in range(splits + 1)]
    if count == 0 or any(low >= high for low, high in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"{count} pictures do not make {splits} parts")
    scores = []
    for low, high in zip(edges, edges[1:], strict=False):
        part = np.asarray(logits[low:high], np.float64)
        part = part - part.max(1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
        p = np.exp(log_p)
        # A class that is nowhere has probability 0 throughout, and 0 log 0 is 0.
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


class PrecisionRecall(NamedTuple):
    """The share of samples that are near real pictures, and of real pictures that are near samples."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, made: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): near is within the k-th neighbour's distance.

    Args:
      real: features [N, D]; made: features [M, D]; N and M above k. ADM takes N = 10,000 and M = 50,000.
      k: which neighbour of a picture, itself not counted, sets the radius around it.
    """
    return PrecisionRecall(
        precision=float(within(made, real, neighbour_radii(real, k)).mean()),
        recall=float(within(real, made, neighbour_radii(made, k)).mean()),
    )


def neighbour_radii(features: np.ndarray, k: int = 3) -> np.ndarray:
    """[N, D] -> [N] float64: the squared distance from each to its k-th neighbour, itself not counted."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures have no neighbour {k}")
    parts = [np.partition(block, k, axis=1)[:, k] for _, block in _squared_distances(features, features)]
    return np.concatenate(parts)


def within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """[N] bool: whether each of points [N, D] is in a ball around any of centres [M, D] with squared radii [M]."""
    return np.concatenate([(block <= radii).any(1) for _, block in _squared_distances(points, centres)])


def _squared_distances(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the [N, M] squared distances, some at a time: |a|^2 + |b|^2 - 2 ab.

    What is left of equal features by rounding is 0: sets with many copies of a picture have radii of 0.
    """
    second = np.asarray(second, np.float64)
    norms = np.square(second).sum(1)
    for rows in _rows(len(first), len(second)):
        part = np.asarray(first[rows], np.float64)
        scale = np.square(part).sum(1)[:, None] + norms
        distances = scale - 2 * part @ second.T
        yield rows, np.where(distances > 1e-12 * scale, distances, 0)


def _rows(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows, each so small that a block of `width` columns fits in memory."""
    size = max(1, _BLOCK // width)
    return (slice(low, min(low + size, count)) for low in range(0, count, size))


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of the squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018).

    Args:
      first: [N, D]; second: [M, D]; N and M at least 2.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    n, m, width = len(first), len(second), first.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / width + 1) ** 3

    def others(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(others(first) + others(second) - 2 * kernel(first, second).sum() / (n * m))


def kid(
    first: np.ndarray, second: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception distance (Binkowski et al. 2018): mean and deviation of the squared MMD over random subsets.

    Args:
      first: features [N, D]; second: features [M, D].
      subsets: how many are drawn.
      subset_size: pictures of either set in one, at most N and M.
      seed: of the draws, which are those of torch-fidelity.
    """
    if not 2 <= subset_size <= min(len(first), len(second)):
        raise ValueError(f"subset_size {subset_size} cannot be, of {len(first)} and {len(second)} pictures")
    draws = np.random.RandomState(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        return features[draws.choice(len(features), subset_size, replace=False)]

    found = [squared_mmd(subset(first), subset(second)) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


def clip_score(image: np.ndarray, text: np.ndarray) -> float:
    """CLIP score: 100 E cos(image, text), over pairs of CLIP embeddings of pictures [N, D] and their captions [N, D].

    As in GLIDE (Nichol et al. 2021), which takes the published ViT-B/16: scores of other CLIPs are not comparable.
    """
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    if image.shape != text.shape:
        raise ValueError(f"there are {image.shape} and {text.shape} embeddings; give one caption for each picture")
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    return float(100 * np.mean((image * text).sum(1) / norms))


def patches(pictures: np.ndarray, side: int = 6) -> np.ndarray:
    """[N, H, W, C] -> [M, side * side * C], the squares of a grid: features of sharpness and texture, not of content.

    Their Frechet distance compares mean and covariance of neighbouring pixels, which blur and noise change.
    """
    n, height, width, channels = pictures.shape
    rows, columns = height // side, width // side
    cut = pictures[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return cut.swapaxes(2, 3).reshape(n * rows * columns, side * side * channels)
