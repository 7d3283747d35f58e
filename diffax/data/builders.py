"""TFDS builders that need no TensorFlow: written as array_record, images handed over as PNG.

Names carry the prefix `diffax_` because TFDS names are global. Records keep the order in which
they are generated, so record i of a split is the i-th example of the builder.
"""

import contextlib
import errno
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffax.data import archives, image_ops, shapes
from diffax.data.progress import progress
from diffax.errors import RunError, UserError


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: features from `columns`, sequential keys, no TFDS downloads."""

    VERSION = tfds.core.Version("1.0.0")
    description = ""
    channels = 3

    @property
    def side(self) -> int:
        return int(self.builder_config.name)

    def columns(self) -> dict:
        raise NotImplementedError

    def _info(self):
        image = tfds.features.Image(shape=(self.side, self.side, self.channels), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.description,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict({"image": image, **self.columns()}),
        )

    def _generate_examples(self, examples: Iterator[dict]):
        for number, example in enumerate(examples):
            if number % 500 == 0:
                progress(f"preparing {self.info.full_name}: {number:,}", last=False)
            yield number, example | {"image": image_ops.encode_png(example["image"])}

    # TFDS announces both on stdout, which belongs to the program.
    def _log_download_bytes(self):
        pass

    def _log_download_done(self):
        pass


def _configs(*names) -> list[tfds.core.BuilderConfig]:
    return [tfds.core.BuilderConfig(name=str(name), description=f"{name} pixels") for name in names]


class Digits(_Builder):
    """The 1,797 handwritten 8x8 digits of scikit-learn; 16 and 32 pixels by bicubic resize.

    A tenth of every class, the last in the original order, is the test split.
    """

    name = "diffax_digits"
    description = "The 8x8 handwritten digits of scikit-learn, 17 grey levels."
    BUILDER_CONFIGS = _configs(8, 16, 32)
    channels = 1

    def columns(self):
        return {"label": tfds.features.ClassLabel(num_classes=10)}

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
        rank = np.empty(len(labels), int)
        for digit in range(10):
            members = np.flatnonzero(labels == digit)
            rank[members] = np.arange(len(members)) * 10 // len(members)
        return {
            split: self._generate_examples(
                {"image": _enlarge_digit(images[i], self.side), "label": int(labels[i])} for i in np.flatnonzero(mask)
            )
            for split, mask in (("train", rank < 9), ("test", rank == 9))
        }


def _enlarge_digit(levels: np.ndarray, side: int) -> np.ndarray:
    """float [8, 8] in 0..16 -> uint8 [side, side, 1], rounded once after the resize."""
    image = Image.fromarray(levels.astype(np.float32) * (255 / 16))
    if side != 8:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).round().clip(0, 255).astype(np.uint8)[..., None]


class Shapes(_Builder):
    """Captioned scenes (see `shapes`): indices 0..19,999 to train, 1,000,000.. to test."""

    name = "diffax_shapes"
    VERSION = tfds.core.Version("1.1.0")  # the same pictures as 1.0.0; captions say where a single thing is
    description = "One or two coloured shapes with their attributes and a caption."
    BUILDER_CONFIGS = _configs(16, 32, 64, 128, 256)
    ranges = {"train": range(20_000), "test": range(1_000_000, 1_002_000)}

    def columns(self):
        names = {"label": shapes.SHAPES, **shapes.ATTRIBUTES}
        return {key: tfds.features.ClassLabel(names=values) for key, values in names.items()} | {
            "caption": tfds.features.Text()
        }

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(map(self._example, indices)) for split, indices in self.ranges.items()}

    def _example(self, index: int) -> dict:
        scene = shapes.scene(index)
        return {
            "image": shapes.draw(scene, self.side),
            "caption": scene.caption,
            "label": scene.things[0].shape,
            **scene.attributes,
        }


class Photos(_Builder):
    """Square crops of scikit-learn's two photographs; the label says which.

    Train crops lie in the left 384 columns, test crops in the right 256, so none overlap. A crop's
    side is drawn log-uniformly from what the region allows, at least 64 pixels.
    """

    name = "diffax_photos"
    description = "Crops of a temple and of a flower."
    BUILDER_CONFIGS = _configs(16, 32, 64, 128, 256)
    counts = {"train": 4096, "test": 512}

    def columns(self):
        return {"label": tfds.features.ClassLabel(names=["temple", "flower"])}

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        regions = {
            "train": [photo[:, :384] for photo in photos],
            "test": [photo[:, 384:] for photo in photos],
        }
        return {
            split: self._generate_examples(self._crops(regions[split], number, count))
            for number, (split, count) in enumerate(self.counts.items())
        }

    def _crops(self, photos: list[np.ndarray], seed: int, count: int) -> Iterator[dict]:
        for index in range(count):
            label = index % len(photos)
            window = _window(photos[label], self.side, np.random.default_rng((seed, index)))
            yield {"image": image_ops.center_crop(window, self.side, self.side), "label": label}


def _window(photo: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    """A square of a photo [h, w, 3], anywhere in it, its side at least max(least, 64)."""
    height, width = photo.shape[:2]
    low, high = np.log((max(least, 64), min(height, width)))
    side = round(np.exp(rng.uniform(low, high)))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return np.ascontiguousarray(photo[top : top + side, left : left + side])


class _Archived(_Builder, skip_registration=True):
    """A builder whose examples come from published archives, found or fetched by name."""

    files: dict[str, archives.Archive] = {}

    def __init__(self, *, archive_dir: str = "", **kwargs):
        super().__init__(**kwargs)
        self.archive_dir = os.path.expanduser(archive_dir) or os.path.join(self._data_dir_root, "downloads")

    def fetch(self) -> dict[str, str]:
        return {name: archives.fetch(archive, self.archive_dir) for name, archive in self.files.items()}

    def _split_generators(self, dl_manager):
        paths = self.fetch()
        return {
            split: self._generate_examples({"image": image, "label": label} for image, label in self.read(paths, split))
            for split in ("train", "test")
        }

    def read(self, paths: dict[str, str], split: str) -> Iterator[tuple[np.ndarray, int]]:
        raise NotImplementedError


class Cifar10(_Archived):
    """CIFAR-10 from its binary archive: 50,000 and 10,000 images of 32x32."""

    name = "diffax_cifar10"
    description = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009."
    BUILDER_CONFIGS = _configs(32)
    files = {"all": archives.CIFAR10}

    def columns(self):
        return {"label": tfds.features.ClassLabel(names=list(archives.CIFAR10_CLASSES))}

    def read(self, paths, split):
        return archives.read_cifar10(paths["all"], split)


class Mnist(_Archived):
    """MNIST from its four idx files: 60,000 and 10,000 images of 28x28."""

    name = "diffax_mnist"
    description = "LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits."
    BUILDER_CONFIGS = _configs(28)
    files = archives.MNIST
    channels = 1

    def columns(self):
        return {"label": tfds.features.ClassLabel(num_classes=10)}

    def read(self, paths, split):
        return archives.read_mnist(paths[f"{split}_images"], paths[f"{split}_labels"])


BUILDERS = {
    "digits": Digits,
    "shapes": Shapes,
    "photos": Photos,
    "cifar10": Cifar10,
    "mnist": Mnist,
}


def pick_config(builder: type[_Builder], side: int) -> str:
    """The smallest prepared size that is at least `side`, else the largest there is."""
    sizes = sorted(int(config.name) for config in builder.BUILDER_CONFIGS)
    return str(next((size for size in sizes if size >= side), sizes[-1]))


def prepare(name: str, *, side: int, data_dir: str = "", archive_dir: str = ""):
    """Writes a dataset's one config as array_record, unless that was done before.

    Two processes may call this at once: the second waits for the first. What a killed process left
    behind is removed.

    Args:
      name: a key of BUILDERS.
      side: the size wanted, in pixels.
      data_dir: where TFDS data lives; '' is TFDS's own default.
      archive_dir: where downloaded archives are looked for; '' is `data_dir`/downloads.

    Returns:
      The TFDS builder, ready for `as_data_source`.

    Raises:
      UserError: scikit-learn is missing, the folder cannot be written, an archive is damaged.
      RunError: the disk is full.
    """
    cls = BUILDERS[name]
    if name in ("digits", "photos") and importlib.util.find_spec("sklearn") is None:
        raise UserError(
            f"the data {name!r} needs scikit-learn, which is not installed; "
            f"data.name={name!r}; pip install 'diffax[demo]'"
        )
    kwargs = {"archive_dir": archive_dir} if issubclass(cls, _Archived) else {}
    root = os.path.expanduser(data_dir) or str(tfds.core.constants.DATA_DIR)

    def build():
        return cls(data_dir=root, config=pick_config(cls, side), file_format="array_record", **kwargs)

    try:
        builder = build()
        if _is_written(builder):
            return builder
        os.makedirs(os.path.dirname(builder.data_dir), exist_ok=True)
        with _locked(builder.data_dir + ".lock"):
            if not _is_written(builder):
                _remove_leftovers(builder.data_dir)
                _write(builder)
        return build()
    except OSError as error:
        kind = RunError if error.errno == errno.ENOSPC else UserError
        raise kind(
            f"cannot prepare {name!r} ({error.strerror or error}); {root}; "
            "set data.data_dir to a folder with room that can be written"
        ) from error


def _is_written(builder) -> bool:
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


def _write(builder):
    progress(f"preparing {builder.info.full_name} in {builder.data_dir}", last=True)
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(file_format="array_record")
    finally:
        tfds.enable_progress_bar()
    counts = ", ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
    progress(f"prepared {builder.info.full_name}: {counts}", last=True)


@contextlib.contextmanager
def _locked(path: str):
    """Holds an advisory lock that dies with the process."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(data_dir: str):
    """Deletes unfinished copies: under the lock they can only be a killed process's."""
    parent, version = os.path.split(data_dir)
    for name in os.listdir(parent):
        if name.startswith("incomplete.") and name.endswith(f"_{version}"):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
