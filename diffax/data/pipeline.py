"""Batches by position: what global batch k holds depends on the seed and k alone.

Neither the number of hosts nor the number of reader threads nor where a run was resumed changes a
batch, so a checkpoint needs the step and no state of the reader.

Training goes on for ever: every epoch visits each record once in a new order (an epoch need not end with a batch).
Flips, crops, edits and one of a picture's captions are drawn from (seed, position). Otherwise the records come once, in
order, unflipped and centre-cropped, with their first captions, and the last batch may be short, or empty on the later
processes. A record that cannot be read is replaced by the next one that can, and named once.
"""

import dataclasses
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from diffax.components import RUNTIME, TRAINING, In
from diffax.data import image_ops
from diffax.data.source import Source, captioned
from diffax.errors import RunError, UserError

log = logging.getLogger("diffax.data")

# Rows; Grain needs a length where we mean "for ever".
_ENDLESS = 2**48

# (uint8 pixels [h, w, c], generator) -> (the pixels to learn, {name: another uint8 picture that goes with them})
Edit = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, Mapping[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Loader:
    """How a source is read; the fields of a config's `loader` group.

    Attributes:
      flip: mirror half of the pictures. That makes captions such as 'left of' wrong.
      crop: 'center', or 'random': windows of 80% to all of the smaller side.
      max_bad: unreadable records before the run fails.
      workers: reader threads; 0 chooses.
      shuffle_seed: of the order, besides the seed of the run.
      embeddings: folder of image embeddings, made by --mode=embed; '' if there are none.
    """

    flip: Annotated[bool, TRAINING] = False
    crop: Annotated[Literal["center", "random"], TRAINING] = "center"
    max_bad: Annotated[int, In(0), RUNTIME] = 100
    workers: Annotated[int, In(0, 1024), RUNTIME] = 0
    shuffle_seed: Annotated[int, In(0, 2**31 - 1), TRAINING] = 0
    embeddings: Annotated[str, RUNTIME] = ""


def as_array(values: Sequence[Any]) -> np.ndarray:
    """Values of a column as an array: int32 of whole numbers, float32 of others, objects of texts."""
    array = np.asarray(values, object if isinstance(values[0], str) else None)
    dtypes = {"i": np.int32, "u": np.int32, "f": np.float32, "b": np.bool_}
    return array.astype(dtypes.get(array.dtype.kind, object))


class Column(NamedTuple):
    """What a batch holds besides pictures.

    Attributes:
      key: of the records.
      convert: values of n >= 1 records -> array [n, ...].
    """

    key: str
    convert: Callable[[Sequence[Any]], np.ndarray] = as_array


def batches(
    source: Source,
    loader: Loader | Mapping[str, Any] | Any,
    *,
    shape: Sequence[int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    columns: Mapping[str, Column] = {},  # noqa: B006
    edit: Edit | None = None,
    train: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of global batch `start_step`, `start_step + 1`, ...

    Args:
      source: such as `Data.open` returns.
      loader: how to read it: a `Loader`, a mapping of some of its fields, or an object with these attributes.
      shape: (height, width, channels) of the images.
      batch_size: rows of the global batch, over all processes.
      seed: of order and augmentation.
      start_step: number of the first batch.
      process_index: of this process.
      process_count: of all.
      columns: what to yield besides, by its name in the batch; captions can be the names of classes.
      edit: changes every picture after flip and crop, and adds pictures; draws from (seed, position).
      train: whether to train on them.

    Yields:
      'image': float32 [batch_size / process_count, *shape] in [-1, 1]; 'index': int64, number of the record; every
      column; what `edit` adds, as float32 in [-1, 1].

    Raises:
      UserError: a batch that processes cannot share evenly, a key the data do not have, data that nothing captions.
      RunError: (while iterating) more than loader.max_bad records are unreadable.
    """
    settings = Loader(**loader) if isinstance(loader, Mapping) else loader
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size} is not divisible by {process_count} processes; train.batch_size; use a multiple"
        )
    source = _with_keys(source, [column.key for column in columns.values()])
    read = _reader(source, settings, shape=tuple(shape), seed=seed, edit=edit, train=train)
    rows, size = batch_size // process_count, _ENDLESS if train else len(source)

    def positions(step: int) -> range:
        first = step * batch_size + process_index * rows
        return range(min(first, size), min(first + rows, size))

    def collate(found: Sequence[_Row]) -> dict[str, np.ndarray]:
        # A batch without rows has the types and shapes of one with rows.
        batch = _collate(found or [read(0)], columns)
        return batch if found else {name: values[:0] for name, values in batch.items()}

    return _in_threads(read, positions, collate, range(start_step, -(-size // batch_size)), rows, settings.workers)


def examples(
    source: Source,
    loader: Loader | Mapping[str, Any] | Any,
    *,
    shape: Sequence[int],
    limit: int,
    columns: Mapping[str, Column] = {},  # noqa: B006
) -> dict[str, np.ndarray]:
    """The first `limit` records in order, as one batch: see `batches`."""
    size = min(limit, len(source))
    return next(batches(source, loader, shape=shape, batch_size=size, seed=0, columns=columns, train=False))


def _in_threads(
    read: Callable[[int], Any],
    positions: Callable[[int], range],
    collate: Callable[[list[Any]], Any],
    steps: range,
    rows: int,
    workers: int,
) -> Iterator[Any]:
    """What `collate` makes of the rows of each step, read ahead by threads."""
    import grain

    # Threads read a few rows at a time: single ones cost more in hand-overs than in decoding.
    chunk = math.gcd(rows, 16)
    parts = rows // chunk

    def load(job: int) -> list[Any]:
        step, part = divmod(job, parts)
        return [read(position) for position in positions(step)[part * chunk : (part + 1) * chunk]]

    threads = workers or min(16, 2 * (os.cpu_count() or 1))
    return iter(
        grain.MapDataset.range(steps.start * parts, steps.stop * parts)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(threads, max(threads, 2 * parts)))
        .batch(parts, batch_fn=lambda jobs: collate(list(itertools.chain(*jobs))))
    )


def _with_keys(source: Source, keys: Sequence[str]) -> Source:
    """The source, captioned if there is need.

    Raises:
      UserError: it has no such key.
    """
    source = captioned(source) if "caption" in keys else source
    for key in keys:
        if key not in source.keys:
            raise UserError(
                f"the data have no {key!r}, only {list(source.keys)}; {source.name}; "
                "take other data or leave the condition out"
            )
    return source


class _Row(NamedTuple):
    """A record, and the pictures by name that are made of its image."""

    record: Mapping[str, Any]
    pictures: Mapping[str, np.ndarray]


def _reader(
    source: Source, settings: Loader, *, shape: tuple[int, ...], seed: int, edit: Edit | None, train: bool
) -> Callable[[int], _Row]:
    """Position -> row."""
    if settings.crop not in ("center", "random"):
        raise UserError(f"unknown crop {settings.crop!r}; loader.crop; use 'center' or 'random'")
    readable = _Reader(source, settings.max_bad)
    order, augment, choose = _in_order, _center, _first
    if train:
        order, augment, choose = _shuffled(len(source), settings, seed), _random(settings, seed), _any(settings, seed)

    def read(position: int) -> _Row:
        record = readable(order(position))
        pixels, extra = augment(record["image"], shape[0], shape[1], position), {}
        if "caption" in record:
            record = record | {"caption": choose(record["caption"], position)}
        if edit:
            pixels, extra = edit(pixels, np.random.default_rng((seed, position, 1)))
        return _Row(record, {"image": pixels, **extra})

    return read


def _collate(rows: Sequence[_Row], columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    batch = {name: _floats([row.pictures[name] for row in rows]) for name in rows[0].pictures}
    batch["index"] = np.array([row.record["index"] for row in rows], np.int64)
    return batch | {name: convert([row.record[key] for row in rows]) for name, (key, convert) in columns.items()}


def _floats(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 pictures as one float32 array in [-1, 1]."""
    floats = np.empty((len(pictures), *pictures[0].shape), np.float32)
    for row, picture in zip(floats, pictures, strict=True):
        np.divide(picture, np.float32(127.5), out=row)
    floats -= 1
    return floats


def _in_order(position: int) -> int:
    return position


def _shuffled(size: int, settings: Loader, seed: int) -> Callable[[int], int]:
    """Position -> record: a permutation per epoch, computed without holding it."""
    import grain

    mixed = int(np.random.SeedSequence((seed, settings.shuffle_seed)).generate_state(1)[0])
    order = grain.MapDataset.range(size).seed(mixed % 2**31).shuffle().repeat(None)
    return order.__getitem__


def _center(pixels: np.ndarray, height: int, width: int, position: int) -> np.ndarray:
    del position
    return image_ops.center_crop(pixels, height, width)


def _first(captions: str | Sequence[str], position: int) -> str:
    del position
    return captions if isinstance(captions, str) else captions[0]


def _any(settings: Loader, seed: int) -> Callable[[str | Sequence[str], int], str]:
    def choose(captions: str | Sequence[str], position: int) -> str:
        if isinstance(captions, str):
            return captions
        rng = np.random.default_rng((seed, settings.shuffle_seed, position, 2))
        return captions[rng.integers(len(captions))]

    return choose


def _random(settings: Loader, seed: int) -> Callable[[np.ndarray, int, int, int], np.ndarray]:
    crop = image_ops.random_crop if settings.crop == "random" else None

    def augment(pixels: np.ndarray, height: int, width: int, position: int) -> np.ndarray:
        rng = np.random.default_rng((seed, settings.shuffle_seed, position))
        pixels = crop(pixels, height, width, rng) if crop else image_ops.center_crop(pixels, height, width)
        return pixels[:, ::-1] if settings.flip and rng.random() < 0.5 else pixels

    return augment


class _Reader:
    """Reads records and stands in for bad ones; remembers which were bad, across threads."""

    def __init__(self, source: Source, max_bad: int):
        self._source, self._max_bad = source, max_bad
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, number: int) -> dict[str, Any]:
        """The record of that number, or the first readable one after it, cyclically."""
        for offset in range(len(self._source)):
            index = (number + offset) % len(self._source)
            try:
                return self._source[index] | {"index": index}
            except image_ops.BadRecord as error:
                self._note(index, error)
        raise RunError(f"no record is readable; {self._source.name}; check the files")

    def _note(self, index: int, error: image_ops.BadRecord):
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            where = self._source.where(index)
            log.warning(
                "skipping %s: %s (%d bad so far, limit %d)",
                where,
                error,
                len(self._bad),
                self._max_bad,
            )
            if len(self._bad) > self._max_bad:
                raise RunError(
                    f"{len(self._bad)} unreadable records, limit "
                    f"loader.max_bad={self._max_bad}; {self._source.name}, the last "
                    f"{where} ({error}); repair or remove them, or raise the limit"
                )
