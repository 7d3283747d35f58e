"""Files of checkpoints: which steps are there, removing, free space."""

import os
import pathlib
import re
import shutil
import time

TRASH = "_trash"
CORRUPT = "_corrupt"
UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp")


def steps(directory: pathlib.Path) -> list[int]:
    """The committed steps in a directory, ascending; damaged ones are among them."""
    if not directory.is_dir():
        return []
    names = (p.name for p in directory.iterdir() if p.name.isdecimal() and _has_files(p))
    return sorted(int(name) for name in names)


def clean(directory: pathlib.Path) -> list[int]:
    """Removes what interrupted saves and deletions left behind; the steps whose save was interrupted."""
    found = []
    for path in sorted(directory.iterdir()):
        if unfinished := UNFINISHED.match(path.name):
            remove(path)
            found.append(int(unfinished[1]))
        elif path.name.isdecimal() and not _has_files(path):
            remove(path)
    remove(directory / TRASH)
    return found


def quarantine(directory: pathlib.Path, step: int) -> str:
    """Moves a damaged step to `_corrupt/`, and returns its new name."""
    name, again = f"{CORRUPT}/{step}", 0
    while (directory / name).exists():
        again += 1
        name = f"{CORRUPT}/{step}.{again}"
    (directory / CORRUPT).mkdir(exist_ok=True)
    (directory / str(step)).rename(directory / name)
    return name


def remove(path: pathlib.Path, quiet: int = 0, patience: float = 2.0) -> None:
    """Removes a tree.

    Args:
      path: its root.
      quiet: where an aborted write may still add files: it must be gone in this many looks in a row.
      patience: seconds after which what is left stays.
    """
    end, gone = time.monotonic() + patience, 0
    while (path.exists() or gone < quiet) and time.monotonic() < end:
        gone = 0 if path.exists() else gone + 1
        shutil.rmtree(path, ignore_errors=True)
        if quiet:
            time.sleep(0.01)


def entries(path: pathlib.Path) -> list[str]:
    """Names in a directory, sorted; none without one."""
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else []


def free_bytes(path: pathlib.Path) -> int | None:
    """Free space, or None where the system does not say."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def megabytes(count: int) -> str:
    """A number of bytes, '2.7 MB' or '1.2 GB'."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _has_files(path: pathlib.Path) -> bool:
    return any(files for _, _, files in os.walk(path))
