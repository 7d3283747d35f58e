"""Samples in files, that an interrupted run or several processes add to."""

import json
import pathlib
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffax.data import images
from diffax.errors import UserError
from diffax.training import reporting

PER_FILE = 1000


def sample_to_folder(
    sample: Callable[[int, int], np.ndarray],
    folder: pathlib.Path,
    num: int,
    *,
    about: Mapping[str, Any],
    labels: np.ndarray | None = None,
    per_file: int = PER_FILE,
    process_index: int = 0,
    process_count: int = 1,
) -> list[pathlib.Path]:
    """Makes pictures 0 to num - 1 and writes them as .npz files, such as `python -m diffax.evaluation` reads.

    Called again after an interruption, or for more pictures, it makes those that are missing. A file is there whole or
    not at all, so that at most one of them is lost. Several processes make every count-th file each, in one folder, and
    process 0 waits for the others.

    Args:
      sample: (first, count) -> pictures [count, H, W, C] in [-1, 1]; picture i must depend on i alone.
      folder: where `samples_FIRST.npz` go, and sampling.json with `about`.
      num: how many there shall be.
      about: all that the pictures depend on, such as seed, steps, guidance and training step; plain data.
      labels: [num] integers, written with the pictures.
      per_file: pictures in one file.
      process_index: of this process.
      process_count: how many there are.

    Returns:
      The files, in order; those of other processes may be missing yet, but to process 0.

    Raises:
      UserError: the folder holds samples of other settings.
      RunError: a picture is not finite, or cannot be written.
    """
    stated = json.loads(json.dumps({**about, "shard": per_file}))
    listing = folder / "sampling.json"
    if listing.exists():
        _check_same(listing, stated)
    if process_index == 0:
        images.write_atomically(listing, lambda file: file.write((json.dumps(stated, indent=2) + "\n").encode()))
    every = {
        folder / f"samples_{first:08d}.npz": (first, min(per_file, num - first)) for first in range(0, num, per_file)
    }
    for path in reporting.progress_bar([*every][process_index::process_count], "files of samples"):
        first, count = every[path]
        if not _holds(path, count):
            _write(path, sample(first, count), first, labels)
    if process_index == 0 and process_count > 1:
        for path in reporting.progress_bar(every, "files of all processes"):
            while not _holds(path, every[path][1]):
                time.sleep(0.5)
    return [*every]


def _write(path: pathlib.Path, made: np.ndarray, first: int, labels: np.ndarray | None) -> None:
    images.check_finite(made, first)
    arrays = {"arr_0": images.to_uint8(made)}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels[first : first + len(made)], np.int64)
    images.write_atomically(path, lambda file: np.savez(file, **arrays))


def _holds(path: pathlib.Path, count: int) -> bool:
    """Whether a file has that many pictures; only its header is read.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, _ = np.lib.format.read_array_header_1_0(member)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read samples ({error}); {path}; remove it and sample again") from error
    return shape[0] >= count


def _check_same(listing: pathlib.Path, stated: Mapping[str, Any]) -> None:
    """Raises UserError that names the first difference between what is stated and what the file says."""
    try:
        found = dict(json.loads(listing.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read what the samples are ({error}); {listing}; delete the folder") from None
    for name in {**found, **stated}:
        if found.get(name) != stated.get(name):
            raise UserError(
                f"the folder holds samples of {name} {found.get(name)!r}, not {stated.get(name)!r}; {listing.parent}; "
                "delete it or choose another"
            )
