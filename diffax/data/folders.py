"""Folders of images as they are, with labels from sub-folders or captions from text files."""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np

from diffax.components import RUNTIME, TRAINING, component
from diffax.data import image_ops
from diffax.data.source import Data, Source, Splits
from diffax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SPLITS = ("train", "test", "val", "valid", "validation")
# No text encoder takes more than a few hundred tokens; a file can be any size.
MAX_CAPTION = 4096
MAX_CAPTIONS = 64


@component("data", "folder")
def folder(*, path: Annotated[str, RUNTIME] = "", split: Annotated[str, TRAINING] = "train") -> Data:
    """Images below a folder, their classes the names of its sub-folders.

    Args:
      path: of the folder.
      split: one of its sub-folders, if these are called train, test or val; else 'train'.
    """
    _check_path(path)
    return Splits(lambda shape, split: read_folder(path, split, shape[2]), split)


@component("data", "captions")
def captions(*, path: Annotated[str, RUNTIME] = "", split: Annotated[str, TRAINING] = "train") -> Data:
    """Images with captions, from `metadata.jsonl` or from a text file beside every image.

    Args:
      path: of the folder.
      split: one of its sub-folders, if these are called train, test or val; else 'train'.
    """
    _check_path(path)
    return Splits(lambda shape, split: read_captions(path, split, shape[2]), split)


def _check_path(path: str) -> None:
    if not path:
        raise ValueError("path must name the folder of the images, got ''")


def read_folder(path: str, split: str, channels: int) -> Source:
    """Images below a folder, in the order of their relative names.

    The first sub-folder on the way to an image is its class; classes are numbered in the order of
    their sorted names. If any image lies in the folder itself, there are no labels. A folder that
    holds nothing but sub-folders called train, test, val, ... is read from the one of `split`.

    Raises:
      UserError: no such folder or split, or no image in it.
    """
    root = _split_folder(_existing(path), split)
    files = _images(root)
    classes = tuple(sorted({file.split("/", 1)[0] for file in files if "/" in file}))
    labels = None
    if all("/" in file for file in files):
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[file.split("/", 1)[0]] for file in files], np.int32)

    def read(index: int) -> dict[str, Any]:
        record = {"image": image_ops.decode(_bytes(root, files[index]), channels=channels)}
        return record if labels is None else record | {"label": labels[index]}

    return Source(
        root,
        len(files),
        read,
        () if labels is None else ("label",),
        () if labels is None else classes,
        lambda i: _shown(files[i]),
    )


def read_captions(path: str, split: str, channels: int) -> Source:
    """Images with one or more captions each, from `metadata.jsonl` or from a text file beside every image.

    A line of `metadata.jsonl` is {"file_name": "img/1.png", "text": "..."}, where "text" ("caption" will do) can also
    be a list of captions; otherwise img/1.png is captioned by every line of img/1.txt that is not blank.

    Raises:
      UserError: no such folder or split, no image, a line that is not as above, a name that leads
        out of the folder, an image without its text.
    """
    root = _split_folder(_existing(path), split)
    listing = os.path.join(root, "metadata.jsonl")
    if os.path.exists(listing):
        files, texts = _read_listing(listing)

        def caption(index: int) -> str | tuple[str, ...]:
            return texts[index]
    else:
        files = _images(root)
        texts = [os.path.splitext(file)[0] + ".txt" for file in files]
        missing = [text for text in texts if not os.path.exists(os.path.join(root, text))]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} images have no caption, first "
                f"{_shown(missing[0])}; {root}; add the files or a metadata.jsonl"
            )

        def caption(index: int) -> str | tuple[str, ...]:
            data = _bytes(root, texts[index], 4 * MAX_CAPTION * MAX_CAPTIONS)
            return _clean(data.decode("utf-8-sig", "replace").splitlines())

    def read(index: int) -> dict[str, Any]:
        pixels = image_ops.decode(_bytes(root, files[index]), channels=channels)
        return {"image": pixels, "caption": caption(index)}

    return Source(root, len(files), read, ("caption",), (), lambda i: _shown(files[i]))


def _clean(texts: Sequence[str]) -> str | tuple[str, ...]:
    """The captions that are not blank, at most MAX_CAPTIONS: one alone, '' if there is none, else a tuple."""
    clean = tuple(filter(None, map(clean_caption, texts[:MAX_CAPTIONS])))
    return clean if len(clean) > 1 else "".join(clean)


def clean_caption(text: str) -> str:
    """One line in Unicode NFC without control characters, at most MAX_CAPTION characters.

    Lone surrogates, which no UTF-8 can hold, become U+FFFD.
    """
    text = text[:MAX_CAPTION].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return unicodedata.normalize("NFC", " ".join(text.split()))[:MAX_CAPTION]


def _existing(path: str) -> str:
    root = os.path.expanduser(path)
    if not path:
        raise UserError("no folder given; data.path; set it to the folder of images")
    if not os.path.isdir(root):
        raise UserError(f"no such folder; data.path={path!r}; check the path")
    return root


def _split_folder(root: str, split: str) -> str:
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if folders and set(folders) <= set(SPLITS):
        if split not in folders:
            raise UserError(f"no split {split!r}, there is {', '.join(folders)}; {root}; data.split")
        return os.path.join(root, split)
    if split != "train":
        raise UserError(
            f"no split {split!r}: the folder has no sub-folders called train, test or "
            f"val; {root}; use data.split='train', or sort the images into them"
        )
    return root


def _images(root: str) -> list[str]:
    files = sorted(_walk(root, "", set()))
    if not files:
        raise UserError(f"no image ({', '.join(SUFFIXES)}); {root}; check data.path")
    return files


def _walk(root: str, below: str, seen: set[str]) -> Iterator[str]:
    """Relative names of images with '/' between folders; a folder linked twice counts once."""
    here = os.path.realpath(os.path.join(root, below))
    if here in seen:
        return
    seen.add(here)
    for entry in sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _walk(root, name, seen)
        elif name.lower().endswith(SUFFIXES):
            yield name


def _read_listing(path: str) -> tuple[list[str], list[str | tuple[str, ...]]]:
    files, texts = [], []
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            file, text = _parse_line(line, f"{path}:{number}")
            files.append(file)
            texts.append(text)
    if not files:
        raise UserError(f'no image listed; {path}; add lines {{"file_name": ..., "text": ...}}')
    if not any(os.path.exists(os.path.join(os.path.dirname(path), file)) for file in files[:100]):
        raise UserError(f"no such image {_shown(files[0])}; {path}:1; file names are relative to this file")
    return files, texts


def _parse_line(line: str, where: str) -> tuple[str, str | tuple[str, ...]]:
    try:
        row = json.loads(line)
        file, texts = row["file_name"], row["text"] if "text" in row else row["caption"]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(file, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f'not an image and its caption; {where}; write {{"file_name": "1.png", "text": "..."}}'
        ) from None
    if os.path.isabs(file) or ".." in file.replace("\\", "/").split("/") or "\0" in file:
        raise UserError(f"file name {_shown(file)} leads out of the folder; {where}; use a name relative to it")
    return file, _clean(texts)


def _bytes(root: str, name: str, limit: int = 2**30) -> bytes:
    try:
        with open(os.path.join(root, name), "rb") as file:
            return file.read(limit)
    except (OSError, ValueError) as error:
        raise image_ops.BadRecord(getattr(error, "strerror", None) or str(error)) from None


def _shown(name: str) -> str:
    """A file name fit for one line of a terminal, whatever bytes it holds."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
