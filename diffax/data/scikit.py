"""The small data of scikit-learn, which need no download: handwritten digits and crops of two photographs."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image

from diffax.components import RUNTIME, TRAINING, component
from diffax.data import image_ops
from diffax.data.builders import Recipe, built
from diffax.data.source import Data


@component("data", "digits")
def digits(*, split: Annotated[str, TRAINING] = "train", data_dir: Annotated[str, RUNTIME] = "") -> Data:
    """The 1,797 handwritten 8x8 digits of scikit-learn; 16 and 32 pixels by bicubic resize.

    A tenth of every class, the last in the original order, is the test split.

    Args:
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      data_dir: where TFDS data lie; '' is TFDS's own default.
    """
    return built(DIGITS, split=split, data_dir=data_dir)


def _digits(side: int, archive_dir: str) -> dict[str, Iterator[dict[str, Any]]]:
    from sklearn.datasets import load_digits

    del archive_dir
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    rank = np.empty(len(labels), int)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        rank[members] = np.arange(len(members)) * 10 // len(members)

    def some(mask: np.ndarray) -> Iterator[dict[str, Any]]:
        for i in np.flatnonzero(mask):
            yield {"image": _enlarge_digit(images[i], side), "label": int(labels[i])}

    return {"train": some(rank < 9), "test": some(rank == 9)}


def _enlarge_digit(levels: np.ndarray, side: int) -> np.ndarray:
    """Float [8, 8] in 0..16 -> uint8 [side, side, 1], rounded once after the resize."""
    image = Image.fromarray(levels.astype(np.float32) * (255 / 16))
    if side != 8:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).round().clip(0, 255).astype(np.uint8)[..., None]


_SCIKIT_LEARN = ("sklearn", "pip install 'diffax[demo]'")
DIGITS = Recipe(
    "digits",
    "The 8x8 handwritten digits of scikit-learn, 17 grey levels.",
    (8, 16, 32),
    {"label": 10},
    _digits,
    channels=1,
    needs=_SCIKIT_LEARN,
)


@component("data", "photos")
def photos(*, split: Annotated[str, TRAINING] = "train", data_dir: Annotated[str, RUNTIME] = "") -> Data:
    """Square crops of scikit-learn's two photographs; the label says which.

    Train crops lie in the left 384 columns, test crops in the right 256, so none overlap. A crop's
    side is drawn log-uniformly from what the region allows, at least 64 pixels.

    Args:
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      data_dir: where TFDS data lie; '' is TFDS's own default.
    """
    return built(PHOTOS, split=split, data_dir=data_dir)


CROPS = {"train": 4096, "test": 512}


def _photos(side: int, archive_dir: str) -> dict[str, Iterator[dict[str, Any]]]:
    from sklearn.datasets import load_sample_images

    del archive_dir
    whole = load_sample_images().images
    regions = {"train": [photo[:, :384] for photo in whole], "test": [photo[:, 384:] for photo in whole]}
    return {split: _crops(regions[split], side, seed, CROPS[split]) for seed, split in enumerate(CROPS)}


def _crops(regions: Sequence[np.ndarray], side: int, seed: int, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        label = index % len(regions)
        window = _window(regions[label], side, np.random.default_rng((seed, index)))
        yield {"image": image_ops.center_crop(window, side, side), "label": label}


def _window(photo: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    """A square of a photo [h, w, 3], anywhere in it, its side at least max(least, 64)."""
    height, width = photo.shape[:2]
    low, high = np.log((max(least, 64), min(height, width)))
    side = round(np.exp(rng.uniform(low, high)))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return np.ascontiguousarray(photo[top : top + side, left : left + side])


PHOTOS = Recipe(
    "photos",
    "Crops of a temple and of a flower.",
    (16, 32, 64, 128, 256),
    {"label": ("temple", "flower")},
    _photos,
    needs=_SCIKIT_LEARN,
)
