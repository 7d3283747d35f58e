"""Image embeddings of a data set, computed once by a job that can be interrupted, and read in place of its pictures.

A folder holds `embeddings.json`, which says what they are of, and files of a few thousand records each, an embedding
and its captions. A file is there whole or not at all.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffax.data.files import replacing
from diffax.data.pipeline import Column, Loader, batches
from diffax.data.source import Source, can_caption, captioned
from diffax.errors import UserError

LISTING = "embeddings.json"
SHARD = 4096


def write_embeddings(
    path: str | os.PathLike[str],
    source: Source,
    loader: Loader | Mapping[str, Any] | Any,
    *,
    shape: Sequence[int],
    embed: Callable[[np.ndarray], np.ndarray],
    clip: str,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    shard: int = SHARD,
) -> Iterator[tuple[int, int]]:
    """Embeds every record, unflipped and centre-cropped; files that are there already are passed over.

    Args:
      path: the folder.
      source: the data; all captions of a picture are kept.
      loader: how to read it, see `batches`.
      shape: (height, width, channels) of the pictures that `embed` gets.
      embed: pictures [n, *shape] in [-1, 1] -> [n, E] float32.
      clip: what identifies the network.
      batch_size: pictures at once.
      process_index: of this process, which makes every process_count-th file.
      process_count: of all.
      shard: records in a file.

    Yields:
      (files done by this process, all of its files), after each.

    Raises:
      UserError: the folder holds embeddings of other data, or by another network.
      RunError: a file cannot be written, or too many records are unreadable.
    """
    folder, named = pathlib.Path(path), can_caption(source)
    source = captioned(source) if named else source
    files = -(-len(source) // shard)
    about = {"data": source.name, "records": len(source), "shard": shard, "captions": named, "clip": clip}
    _agree(folder, about, {})
    if process_index == 0:
        _write(folder / LISTING, lambda name: pathlib.Path(name).write_text(json.dumps(about, indent=2) + "\n"))
    own = range(process_index, files, process_count)
    for done, number in enumerate(own, 1):
        file, first = folder / _name(number), number * shard
        if not file.exists():
            part = _slice(source, first, min(shard, len(source) - first))
            columns = {"captions": Column("captions")}
            stream = batches(part, loader, shape=shape, batch_size=batch_size, seed=0, columns=columns, train=False)
            rows = [row for batch in stream for row in _rows(embed(batch["image"]), batch["captions"], named)]
            _write(file, lambda name, rows=rows: _write_records(name, rows))
        yield done, len(own)


def embedded(path: str | os.PathLike[str], *, clip: str, size: int) -> Source:
    """What `write_embeddings` made: records of 'image_embedding' [size] and 'caption', whose pictures are one pixel.

    Raises:
      UserError: the folder lacks a file, or holds embeddings by another network.
    """
    import grain

    folder = pathlib.Path(path)
    about = _read(folder)
    _agree(folder, {"clip": clip}, about)
    files = [folder / _name(number) for number in range(-(-about["records"] // about["shard"]))]
    missing = [file for file in files if not file.exists()]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} files are missing; {folder}; go on with --mode=embed")
    try:
        records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        found = len(records)
    except Exception as error:  # whatever the C++ reader makes of damaged bytes
        raise UserError(
            f"cannot read embeddings ({error}); {folder}; remove the damaged file and embed again"
        ) from None
    if found != about["records"]:
        raise UserError(f"there are {found} embeddings of {about['records']} records; {folder}; embed again")

    def read(index: int) -> dict[str, Any]:
        record = bytes(records[index])
        row = {
            "image": np.zeros((1, 1, 3), np.uint8),
            "image_embedding": np.frombuffer(record[: 4 * size], np.float32),
        }
        if not about["captions"]:
            return row
        texts = json.loads(record[4 * size :])
        return row | {"caption": texts if isinstance(texts, str) else tuple(texts)}

    keys = ("image_embedding", *(("caption",) * about["captions"]))
    return Source(about["data"], found, read, keys, (), f"embedding {{}} of {folder}".format)


def with_embeddings(source: Source, embeddings: Source) -> Source:
    """The source, whose records also hold 'image_embedding'.

    Raises:
      UserError: they are of other data.
    """
    if (source.name, len(source)) != (embeddings.name, len(embeddings)):
        raise UserError(
            f"the embeddings are of {embeddings.name} with {len(embeddings)} records, the data are {source.name} with "
            f"{len(source)}; loader.embeddings; embed these data into another folder"
        )

    def read(index: int) -> dict[str, Any]:
        return source.read(index) | {"image_embedding": embeddings.read(index)["image_embedding"]}

    return dataclasses.replace(source, read=read, keys=(*source.keys, "image_embedding"))


def _name(number: int) -> str:
    return f"embeddings-{number:06d}.array_record"


def _slice(source: Source, first: int, count: int) -> Source:
    """Some of the records, all captions of each as one JSON text."""

    def read(index: int) -> dict[str, Any]:
        record = source.read(first + index)
        return record | {"captions": json.dumps(record.get("caption", ""))}

    where = source.where
    return dataclasses.replace(
        source, size=count, read=read, keys=(*source.keys, "captions"), where=lambda index: where(first + index)
    )


def _rows(embeddings: np.ndarray, captions: Sequence[str], named: bool) -> Iterator[bytes]:
    for embedding, text in zip(embeddings, captions, strict=True):
        yield np.asarray(embedding, np.float32).tobytes() + (text.encode() if named else b"")


def _write_records(name: str, rows: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, so that each is read alone.
    writer = ArrayRecordWriter(name, "group_size:1")
    try:
        for row in rows:
            writer.write(row)
    finally:
        writer.close()


def _write(path: pathlib.Path, write: Callable[[str], object]) -> None:
    """Writes a new file, which then takes the place of `path`."""
    with replacing(path) as temporary:
        try:
            write(str(temporary))
        except RuntimeError as error:  # of the C++ writer
            raise OSError(str(error)) from error


def _read(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / LISTING).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"there are no embeddings ({error}); loader.embeddings={str(folder)!r}; make them with --mode=embed"
        ) from None


def _agree(folder: pathlib.Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises UserError if the folder's embeddings, `found` or what its listing says, are not as expected."""
    if not found and (folder / LISTING).exists():
        found = _read(folder)
    for name, value in expected.items():
        if found and found.get(name) != value:
            raise UserError(
                f"the embeddings are of {name} {found.get(name)!r}, not {value!r}; {folder}; choose another folder, or "
                "embed again"
            )
