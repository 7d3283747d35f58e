"""One run in a workdir at a time."""

import contextlib
import errno
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

from diffax.errors import UserError
from diffax.training import processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# Windows locks bytes, which nobody else can read then: one that lies far behind the text of the file.
_LOCKED_BYTE = 2**30


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds `workdir`, or the folder of one section, for this run; the system releases it when the process ends.

    Of several processes of one run only the first takes the lock.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    if not processes.is_primary():
        yield
        return
    with _open(workdir) as file:
        try:
            _take(file)
        except OSError as error:
            raise _refusal(workdir, file, error) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            _release(file)


def _open(workdir: str | os.PathLike[str]) -> TextIO:
    path = pathlib.Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write to workdir ({error.strerror}); {workdir}; choose another --workdir") from error


def _take(file: TextIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _release(file: TextIO) -> None:
    """Releases what closing the file would release later on Windows."""
    if fcntl is None:
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _refusal(workdir: str | os.PathLike[str], file: TextIO, error: OSError) -> UserError:
    if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
        return UserError(
            f"cannot lock workdir ({error.strerror}); {workdir}; choose a --workdir on another file system"
        )
    file.seek(0)
    holder = file.read().strip() or "another run"
    return UserError(f"workdir is in use by {holder}; {workdir}; wait for it or choose another --workdir")
