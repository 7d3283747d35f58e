"""Arrays that lie in a file and are read when they are needed."""

import contextlib
import dataclasses
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from diffax.errors import UserError

MAX_TENSORS = 100_000
_AGAIN = "download it again"


class Refused(Exception):
    """Why a file cannot be read: '<what>' or '<what>; <what to do>'."""


class Sealed:
    """What a pickle may hold but not change."""

    def __setstate__(self, state: Any) -> NoReturn:
        raise Refused("it changes an object that is no container")


@dataclasses.dataclass(frozen=True)
class Tensor(Sealed):
    """An array in a file; `np.asarray(tensor)` reads it, each time anew.

    Attributes:
      shape: its shape.
      dtype: its dtype; bfloat16 is that of ml_dtypes.
      load: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever a file can cause into a UserError that names it."""
    try:
        yield
    except Refused as error:
        what, _, advice = str(error).partition("; ")
        raise UserError(f"cannot read the weights: {what}; {path}; {advice or _AGAIN}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the weights: {error.strerror or error}; {path}; pass another file") from error
    except Exception as error:
        # The unpickler raises nearly anything, SystemError included, over bytes that are no pickle.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read the weights: the file is damaged ({reason}); {path}; {_AGAIN}") from error


def load_span(
    path: pathlib.Path, dtype: np.dtype, start: int, first: int, count: int, check: Callable[[], None] | None = None
) -> np.ndarray:
    """`count` numbers from the `first` on, of a storage at byte `start`; `check` looks at the whole of it."""
    raw = np.empty(count * dtype.itemsize, np.uint8)
    with explained(path):
        if check is not None:
            check()
        with path.open("rb") as file:
            file.seek(start + first * dtype.itemsize)
            if file.readinto(raw) != raw.size:
                raise Refused("the file is cut short")
    return raw != 0 if dtype == np.bool_ else raw.view(dtype)


def check_crc(path: pathlib.Path, start: int, size: int, crc: int) -> None:
    """Raises Refused unless the checksum of the `size` bytes from `start` on is `crc`."""
    found = 0
    with path.open("rb") as file:
        file.seek(start)
        while size and (chunk := file.read(min(size, 2**20))):
            found, size = zlib.crc32(chunk, found), size - len(chunk)
    if size or found != crc:
        raise Refused("the file is damaged (an array has another checksum)")


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape}, of arrays or of tensors that are not read."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def count(sizes: Sequence[Sequence[int]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(math.prod(size) for size in sizes)
