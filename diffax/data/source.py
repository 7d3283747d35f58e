"""What every data set looks like from outside: a length and records by number, and how it is opened."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from diffax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to records; `source[i]` is the same record whenever it is read.

    Attributes:
      name: what to call the data in messages.
      size: number of records.
      read: record number -> {'image': uint8 [h, w, c], 'label': int32, 'caption': str, ...}, the
        keys but for the image as in `keys`; raises BadRecord for a record that cannot be read. A
        picture with several captions has a tuple of them.
      keys: names of what a record holds besides its image.
      class_names: name of every label, in order; empty when there are no labels.
      where: record number -> the name of the file or record, for messages.
    """

    name: str
    size: int
    read: Callable[[int], dict[str, Any]]
    keys: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    where: Callable[[int], str] = "record {}".format

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of {self.size}; {self.name}")
        return self.read(int(index))


class Data(Protocol):
    """What a component of kind 'data' makes: data that are not yet read.

    A shape is (height, width, channels) of the images that a model needs. Channels (1 or 3) are converted as the
    records are read; sizes only choose between prepared sizes, `batches` resizes.

    Attributes:
      has_held_out: whether there is a split that is never trained on.
    """

    has_held_out: bool

    def open(self, shape: Sequence[int]) -> Source:
        """The records to train on, their images uint8 [h, w, channels] of whatever size is stored."""

    def held_out(self, shape: Sequence[int]) -> Source:
        """The records that are never trained on; those to train on where there are no others."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """`Data` whose splits have names, which is all that most components return.

    Attributes:
      load: (shape, split) -> Source.
      split: the split that `open` loads.
      test: the split that `held_out` loads; '' if there is none.

    Raises:
      ValueError: no split is named.
    """

    load: Callable[[Sequence[int], str], Source]
    split: str = "train"
    test: str = ""

    def __post_init__(self):
        if not self.split:
            raise ValueError("split must be the name of a split, such as 'train', got ''")

    @property
    def has_held_out(self) -> bool:
        """Whether there is a split that is never trained on."""
        return bool(self.test)

    def open(self, shape: Sequence[int]) -> Source:
        """The split to train on."""
        return self._load(shape, self.split)

    def held_out(self, shape: Sequence[int]) -> Source:
        """The split that is never trained on, or the one to train on."""
        return self._load(shape, self.test or self.split)

    def _load(self, shape: Sequence[int], split: str) -> Source:
        if len(shape) != 3 or shape[2] not in (1, 3):
            raise UserError(
                f"images have 1 or 3 channels; shape={tuple(shape)}; use (height, width, 1) or (height, width, 3)"
            )
        return self.load(tuple(shape), split)


def can_caption(source: Source) -> bool:
    """Whether `captioned` can do it."""
    return "caption" in source.keys or ("label" in source.keys and bool(source.class_names))


def captioned(source: Source) -> Source:
    """The source if it has captions, else one whose captions are the names of the classes.

    A class is captioned by its name alone, with blanks for underscores; a record of no class (label -1) by ''.

    Raises:
      UserError: the data have neither captions nor named classes.
    """
    if "caption" in source.keys:
        return source
    if not can_caption(source):
        raise UserError(
            f"the data have neither captions nor named classes; {source.name}; "
            "take other data, or a system without text"
        )
    names = [name.replace("_", " ") for name in source.class_names]

    def read(index: int) -> dict[str, Any]:
        record = source.read(index)
        return record | {"caption": names[record["label"]] if record["label"] >= 0 else ""}

    return dataclasses.replace(source, read=read, keys=(*source.keys, "caption"))
