"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from diffax.errors import RunError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, whose file takes the place of `path` at the end; makes missing folders.

    Raises:
      RunError: it cannot be written; an older file at `path` stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(
                f"cannot write {path.name}: {error.strerror or error}; {path.parent}; "
                "free the space or choose another folder"
            ) from error
        raise


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a new file that then takes `path`: readers see all of it or nothing.

    Raises:
      RunError: it cannot be written; an older file at `path` stays.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)
