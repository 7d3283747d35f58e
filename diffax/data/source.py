"""What every dataset looks like from outside: a length and records by number."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to records; `source[i]` is the same record whenever it is read.

    Attributes:
      name: what to call the data in messages.
      size: number of records.
      read: record number -> {'image': uint8 [h, w, c], 'label': int32, 'caption': str, ...}, the
        keys but for the image as in `keys`; raises BadRecord for a record that cannot be read.
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
