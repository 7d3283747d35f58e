"""Data sets that are prepared from a recipe, through TFDS but without TensorFlow: array_record files of PNGs.

Record i of a split is the i-th example of the recipe. A data set of your own needs a `Recipe` and a component that
returns `built(recipe, ...)`.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffax.data import image_ops
from diffax.data.prepared import read_prepared
from diffax.data.progress import progress
from diffax.data.source import Source, Splits
from diffax.errors import RunError, UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """How to make a data set.

    Attributes:
      name: of letters, digits and '_'; TFDS, where names are global, knows it as 'diffax_NAME'.
      description: one sentence.
      sizes: sides in pixels that it can be prepared at, each in a folder of its own.
      classes: {column: names of its classes, or how many there are}.
      examples: (side, folder of downloaded archives) -> {split: its records}, each with 'image', uint8 [side, side,
        channels], and every column.
      channels: 1 or 3.
      has_captions: whether a record also holds a 'caption'.
      version: to be raised when records change.
      needs: a package that `examples` imports, and how to install it, if diffax does not depend on it.
    """

    name: str
    description: str
    sizes: Sequence[int]
    classes: Mapping[str, Sequence[str] | int]
    examples: Callable[[int, str], Mapping[str, Iterable[dict[str, Any]]]]
    channels: int = 3
    has_captions: bool = False
    version: str = "1.0.0"
    needs: tuple[str, str] | None = None

    def pick_size(self, side: int) -> int:
        """The smallest size that is at least `side`, else the largest there is."""
        return min((size for size in self.sizes if size >= side), default=max(self.sizes))


def built(
    recipe: Recipe, *, split: str = "train", data_dir: str = "", archive_dir: str = "", label: str = "label"
) -> Splits:
    """The data of a recipe, prepared when they are opened for the first time.

    Args:
      recipe: has a split 'test', which is held out.
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      data_dir: where TFDS data lie; '' is TFDS's own default.
      archive_dir: where downloaded archives are looked for; '' is `data_dir`/downloads.
      label: the column of classes that is the label.

    Raises:
      ValueError: `data_dir` is no local folder.
    """
    if "://" in data_dir:
        raise ValueError(f"data_dir must be a local folder, got {data_dir!r}")

    def load(shape: Sequence[int], split: str) -> Source:
        builder = prepare(recipe, side=max(shape[:2]), data_dir=data_dir, archive_dir=archive_dir)
        return read_prepared(builder, split, shape[2], label)

    return Splits(load, split, "test")


def prepare(recipe: Recipe, *, side: int, data_dir: str = "", archive_dir: str = ""):
    """Writes a data set at one size as array_record, unless that was done before.

    Two processes may call this at once: the second waits for the first. What a killed process left
    behind is removed.

    Args:
      recipe: how to make it.
      side: the size needed, in pixels.
      data_dir: where TFDS data lie; '' is TFDS's own default.
      archive_dir: where downloaded archives are looked for; '' is `data_dir`/downloads.

    Returns:
      The TFDS builder, ready for `as_data_source`.

    Raises:
      UserError: a package is missing, the folder cannot be written, an archive is damaged.
      RunError: the disk is full.
    """
    if recipe.needs and importlib.util.find_spec(recipe.needs[0]) is None:
        package, install = recipe.needs
        raise UserError(f"the data {recipe.name!r} need the package {package}; data.name={recipe.name!r}; {install}")
    import tensorflow_datasets as tfds

    root = os.path.expanduser(data_dir) or str(tfds.core.constants.DATA_DIR)
    archive_dir = os.path.expanduser(archive_dir) or os.path.join(root, "downloads")

    def build():
        config = str(recipe.pick_size(side))
        return _builder_class(recipe)(data_dir=root, config=config, file_format="array_record", archive_dir=archive_dir)

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
            f"cannot prepare {recipe.name!r} ({error.strerror or error}); {root}; "
            "set data.data_dir to a folder with room that can be written"
        ) from error


@functools.cache
def _builder_class(recipe: Recipe) -> type:
    """The TFDS builder of a recipe, which gets its features, its sequential keys and no downloads of TFDS."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = f"diffax_{recipe.name}"
        VERSION = tfds.core.Version(recipe.version)
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=str(size), description=f"{size} pixels") for size in recipe.sizes
        ]

        def __init__(self, *, archive_dir: str, **kwargs):
            super().__init__(**kwargs)
            self._archive_dir = archive_dir

        def _info(self):
            side = int(self.builder_config.name)
            image = tfds.features.Image(shape=(side, side, recipe.channels), encoding_format="png")
            features = {"image": image} | {key: label(names) for key, names in recipe.classes.items()}
            if recipe.has_captions:
                features["caption"] = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=recipe.description,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            made = recipe.examples(int(self.builder_config.name), self._archive_dir)
            return {split: self._generate_examples(examples) for split, examples in made.items()}

        def _generate_examples(self, examples):
            for number, example in enumerate(examples):
                if number % 500 == 0:
                    progress(f"preparing {self.info.full_name}: {number:,}", last=False)
                yield number, example | {"image": image_ops.encode_png(example["image"])}

        # TFDS announces both on stdout, which belongs to the program.
        def _log_download_bytes(self):
            pass

        def _log_download_done(self):
            pass

    def label(names: Sequence[str] | int):
        if isinstance(names, int):
            return tfds.features.ClassLabel(num_classes=names)
        return tfds.features.ClassLabel(names=list(names))

    return Builder


def _is_written(builder) -> bool:
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


def _write(builder):
    import tensorflow_datasets as tfds

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
    """Holds an advisory lock that dies with the process; on Windows, which has none, two processes may collide."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(data_dir: str):
    """Deletes unfinished copies: under the lock they can only be a killed process's."""
    parent, version = os.path.split(data_dir)
    for name in os.listdir(parent):
        if name.startswith("incomplete.") and name.endswith(f"_{version}"):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
