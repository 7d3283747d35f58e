"""Data from published archives, downloaded once: CIFAR-10 and MNIST."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import numpy as np

from diffax.components import RUNTIME, TRAINING, component
from diffax.data import archives
from diffax.data.builders import Recipe, built
from diffax.data.source import Data


@component("data", "cifar10")
def cifar10(
    *,
    path: Annotated[str, RUNTIME] = "",
    split: Annotated[str, TRAINING] = "train",
    data_dir: Annotated[str, RUNTIME] = "",
) -> Data:
    """CIFAR-10 from its binary archive: 50,000 and 10,000 images of 32x32.

    Args:
      path: the folder of the downloaded archive; '' is `data_dir`/downloads.
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      data_dir: where TFDS data lie; '' is TFDS's own default.
    """
    return built(CIFAR10, split=split, data_dir=data_dir, archive_dir=path)


def _cifar10(side: int, archive_dir: str) -> dict[str, Iterator[dict[str, Any]]]:
    del side
    path = archives.fetch(archives.CIFAR10, archive_dir)
    return {split: _labelled(archives.read_cifar10(path, split)) for split in ("train", "test")}


CIFAR10 = Recipe(
    "cifar10",
    "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.",
    (32,),
    {"label": archives.CIFAR10_CLASSES},
    _cifar10,
)


@component("data", "mnist")
def mnist(
    *,
    path: Annotated[str, RUNTIME] = "",
    split: Annotated[str, TRAINING] = "train",
    data_dir: Annotated[str, RUNTIME] = "",
) -> Data:
    """MNIST from its four idx files: 60,000 and 10,000 images of 28x28.

    Args:
      path: the folder of the downloaded files; '' is `data_dir`/downloads.
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      data_dir: where TFDS data lie; '' is TFDS's own default.
    """
    return built(MNIST, split=split, data_dir=data_dir, archive_dir=path)


def _mnist(side: int, archive_dir: str) -> dict[str, Iterator[dict[str, Any]]]:
    del side
    paths = {name: archives.fetch(archive, archive_dir) for name, archive in archives.MNIST.items()}
    return {
        split: _labelled(archives.read_mnist(paths[f"{split}_images"], paths[f"{split}_labels"]))
        for split in ("train", "test")
    }


MNIST = Recipe(
    "mnist",
    "LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits.",
    (28,),
    {"label": 10},
    _mnist,
    channels=1,
)


def _labelled(pairs: Iterable[tuple[np.ndarray, int]]) -> Iterator[dict[str, Any]]:
    return ({"image": image, "label": label} for image, label in pairs)
