"""What every dataset looks like from outside: a length and records by number."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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


def mix(sources: Sequence[Source], weights: Sequence[int]) -> Source:
    """Sources in rounds that hold `weights[k]` records of source k each, spread over the round.

    It ends with the round in which every record was there once, so that a source with more weight than its size would
    give it comes again from its start. Records hold an image, and a caption if all sources have or can be given one:
    what labels mean differs.

    Args:
      sources: not empty ones.
      weights: whole numbers above 0.
    """
    captions = all(map(can_caption, sources))
    if captions:
        sources = [captioned(source) for source in sources]
    keys = ("image", *(("caption",) * captions))
    places = sorted(((j + 0.5) / weight, k, j) for k, weight in enumerate(weights) for j in range(weight))
    rounds = max(-(-len(source) // weight) for source, weight in zip(sources, weights, strict=True))

    def locate(index: int) -> tuple[Source, int]:
        number, place = divmod(index, len(places))
        _, k, j = places[place]
        return sources[k], (number * weights[k] + j) % len(sources[k])

    def read(index: int) -> dict[str, Any]:
        source, number = locate(index)
        record = source.read(number)
        return {key: record[key] for key in keys}

    def where(index: int) -> str:
        source, number = locate(index)
        return f"{source.where(number)} of {source.name}"

    parts = ", ".join(f"{weight} {source.name}" for source, weight in zip(sources, weights, strict=True))
    return Source(f"mix of {parts}", rounds * len(places), read, keys[1:], (), where)
