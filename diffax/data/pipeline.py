"""Batches by position: what global batch k holds depends on the seed and k alone.

Neither the number of hosts nor the number of reader threads nor where a run was resumed changes a
batch, so a checkpoint needs the step and no state of the reader.
"""

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from diffax.data import image_ops
from diffax.data.source import Source, captioned
from diffax.errors import RunError, UserError

log = logging.getLogger("diffax.data")

# Grain needs a length where we mean "for ever".
_ENDLESS = 2**48


def batches(
    source: Source,
    data: Mapping[str, Any],
    *,
    shape: Sequence[int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    keys: Sequence[str] | None = None,
    low_res: Mapping[str, Any] | None = None,
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
    train: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of global batch `start_step`, `start_step + 1`, ...

    Training goes on for ever: every epoch visits each record once in a new order (an epoch need
    not end with a batch), and flips and crops are drawn from (seed, position). Without `train` the
    records come once, in order, unflipped and centre-cropped, and the last batch may be short, or
    empty on the later processes.

    A record that cannot be read is replaced by the next one that can, and named once.

    Of a picture's captions one is drawn from (seed, position), without `train` the first is taken. Flips and crops do
    not know what a caption says: data.flip makes 'left of' wrong, data.crop='random' can cut off what is named.

    Args:
      source: from `load_source`.
      data: the `data` section of a stage: flip, crop, max_bad, workers (reader threads; 0 chooses)
        and shuffle_seed are read.
      shape: (height, width, channels) of the images wanted.
      batch_size: rows of the global batch, over all processes.
      seed: of order and augmentation.
      start_step: the first batch wanted.
      keys: which of `source.keys` to yield; by default 'label' where there are labels.
      low_res: the `low_res` section of a stage: also yield the picture `factor` times smaller, as a JPEG of a quality
        drawn from the range `jpeg` would show it; or made worse as `degrade` says, then of a window of `crop` pixels if
        there is one, as 'image' is too.
      tokenize: captions -> int32 [n, length] (see `diffax.conditions.tokenizer`): also yield them as 'text'. Data
        without captions are captioned by the names of their classes.

    Yields:
      'image': float32 [batch_size / process_count, *shape] in [-1, 1]; 'index': int64, the record
      read; the keys asked for, int32 (captions: str objects; 'image_embedding': float32); 'text': int32 [.., length].

    Raises:
      UserError: a batch that processes cannot share evenly, a key the data does not have, data that nothing captions.
      RunError: (while iterating) more than data.max_bad records are unreadable.
    """
    if keys is None:
        keys = tuple(key for key in ("label",) if key in source.keys)
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size} is not divisible by {process_count} processes; train.batch_size; use a multiple"
        )
    if tokenize:
        source = captioned(source)
    for key in keys:
        if key not in source.keys:
            raise UserError(
                f"the data has no {key!r}, only {list(source.keys)}; {source.name}; "
                "take other data or leave the condition out"
            )
    if data["crop"] not in ("center", "random"):
        raise UserError(f"unknown crop {data['crop']!r}; data.crop; use 'center' or 'random'")
    height, width, channels = shape = tuple(shape)
    degradation = image_ops.DEGRADATIONS.get(low_res.get("degrade")) if low_res else None
    if degradation and low_res["crop"]:
        shape = (low_res["crop"], low_res["crop"], channels)
    rows = batch_size // process_count
    order, augment, choose = _in_order, _center, _first
    if train:
        order, augment, choose = _shuffled(len(source), data, seed), _random(data, seed), _any(data, seed)
    reader = _Reader(source, data["max_bad"])
    # Threads read a few rows at a time: single ones cost more in hand-overs than in decoding.
    chunk = math.gcd(rows, 16)
    parts = rows // chunk

    def load(job: int) -> list[dict[str, Any]]:
        step, part = divmod(job, parts)
        first = step * batch_size + process_index * rows + part * chunk
        last = first + chunk if train else min(first + chunk, len(source))
        records = ((position, reader(order(position))) for position in range(first, last))
        return [edit(record, position) for position, record in records]

    def edit(record: dict[str, Any], position: int) -> dict[str, Any]:
        pixels = augment(record["image"], height, width, position)
        if "caption" in record:
            record = record | {"caption": choose(record["caption"], position)}
        if not low_res:
            return record | {"image": pixels}
        rng = np.random.default_rng((seed, position, 1))
        if degradation:
            # far more work than cutting a window, so that is cut before
            top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(pixels.shape, shape[:2], strict=False))
            pixels = pixels[top : top + shape[0], left : left + shape[1]]
            return record | {"image": pixels, "low_res": image_ops.degrade(pixels, low_res["factor"], rng, degradation)}
        low, high = low_res["jpeg"][0], low_res["jpeg"][-1]
        quality = int(rng.integers(low, high + 1))
        return record | {"image": pixels, "low_res": image_ops.smaller(pixels, low_res["factor"], jpeg_quality=quality)}

    end = _ENDLESS if train else -(-len(source) // batch_size)
    threads = data["workers"] or min(16, 2 * (os.cpu_count() or 1))
    return iter(
        grain.MapDataset.range(start_step * parts, end * parts)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(threads, max(threads, 2 * parts)))
        .batch(parts, batch_fn=lambda jobs: _collate(list(itertools.chain(*jobs)), shape, keys, tokenize))
    )


def examples(
    source: Source,
    data: Mapping[str, Any],
    *,
    shape: Sequence[int],
    limit: int,
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The first `limit` records in order, as one batch: see `batches`. With `tokenize` also their captions, as str."""
    size, keys = min(limit, len(source)), None
    if tokenize:
        source = captioned(source)
        keys = tuple(key for key in ("label", "caption") if key in source.keys)
    stream = batches(source, data, shape=shape, batch_size=size, seed=0, keys=keys, tokenize=tokenize, train=False)
    return next(stream)


def _in_order(position: int) -> int:
    return position


def _shuffled(size: int, data, seed: int):
    """Position -> record: a permutation per epoch, computed without holding it."""
    mixed = int(np.random.SeedSequence((seed, data["shuffle_seed"])).generate_state(1)[0])
    order = grain.MapDataset.range(size).seed(mixed % 2**31).shuffle().repeat(None)
    return order.__getitem__


def _center(pixels, height: int, width: int, position: int) -> np.ndarray:
    del position
    return image_ops.center_crop(pixels, height, width)


def _first(captions: str | Sequence[str], position: int) -> str:
    del position
    return captions if isinstance(captions, str) else captions[0]


def _any(data, seed: int):
    def choose(captions: str | Sequence[str], position: int) -> str:
        if isinstance(captions, str):
            return captions
        return captions[np.random.default_rng((seed, data["shuffle_seed"], position, 2)).integers(len(captions))]

    return choose


def _random(data, seed: int):
    flip, crop = data["flip"], data["crop"] == "random"

    def augment(pixels, height: int, width: int, position: int) -> np.ndarray:
        rng = np.random.default_rng((seed, data["shuffle_seed"], position))
        if crop:
            pixels = image_ops.random_crop(pixels, height, width, rng)
        else:
            pixels = image_ops.center_crop(pixels, height, width)
        return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels

    return augment


class _Reader:
    """Reads records and stands in for bad ones; remembers which were bad, across threads."""

    def __init__(self, source: Source, max_bad: int):
        self._source, self._max_bad = source, max_bad
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, wanted: int) -> dict[str, Any]:
        """The record `wanted`, or the first readable one after it, cyclically."""
        for offset in range(len(self._source)):
            index = (wanted + offset) % len(self._source)
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
                    f"data.max_bad={self._max_bad}; {self._source.name}, the last "
                    f"{where} ({error}); repair or remove them, or raise the limit"
                )


# Of what a batch holds besides its pictures; the others are whole numbers.
KINDS = {"caption": object, "captions": object, "image_embedding": np.float32}


def _collate(records: Sequence[dict[str, Any]], shape, keys, tokenize) -> dict[str, np.ndarray]:
    batch = {"image": _floats([record["image"] for record in records], shape)}
    batch["index"] = np.array([record["index"] for record in records], np.int64)
    if records and "low_res" in records[0]:
        small = [record["low_res"] for record in records]
        batch["low_res"] = _floats(small, small[0].shape)
    if tokenize:
        batch["text"] = tokenize([record["caption"] for record in records])
    for key in keys:
        values = [record[key] for record in records]
        batch[key] = np.array(values, KINDS.get(key, np.int32))
    return batch


def _floats(pictures: Sequence[np.ndarray], shape) -> np.ndarray:
    """uint8 pictures as one float32 array in [-1, 1]."""
    floats = np.empty((len(pictures), *shape), np.float32)
    for row, picture in zip(floats, pictures, strict=True):
        np.divide(picture, np.float32(127.5), out=row)
    floats -= 1
    return floats
