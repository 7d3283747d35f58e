"""Pickles of `torch.save`, taken apart by a reader that knows tensors and plain containers alone.

A pickle may call any function. Here it is scanned before it is run, and every name in it stands for one of a few
objects of this file: nothing that a file names is executed.
"""

import dataclasses
import io
import math
import pickle
import pickletools
from collections.abc import Callable, Set
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from diffax.weights.tensors import Refused, Sealed, Tensor

# A pickle of 800 tensors has some 100 kB; it is held in memory, and scanned before it is run.
MAX_PICKLE = 2**23
_MAX_DIMENSIONS = 16

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What a pickle of tensors in plain containers consists of.
OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND "
    "APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "MEMOIZE".split()
)


class Storage(NamedTuple):
    """Numbers in a file: `load(first, count)` reads a part of them."""

    dtype: np.dtype
    size: int
    load: Callable[[int, int], np.ndarray]


class _Dict(dict):
    """Stands for OrderedDict; the attributes that PyTorch hangs on it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Name(Sealed):
    """What stands for a name that a pickle refers to."""

    name: str
    call: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise Refused(f"it calls {self.name}, which is no function")
        return self.call(*args)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
    """A view of a storage, checked to lie inside it; further arguments say how it was trained."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor has no storage")
    sizes = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in sizes) or len(shape) != len(strides):
        raise Refused("a tensor has no valid shape")
    if len(shape) > _MAX_DIMENSIONS:
        raise Refused(f"a tensor has {len(shape)} dimensions, limit {_MAX_DIMENSIONS}")
    shape, count = tuple(shape), math.prod(shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0
    # A view may not have more numbers than its storage: strides of 0 would make terabytes out of one.
    if offset + span > storage.size or count > storage.size:
        raise Refused(f"a tensor of shape {shape} does not lie inside its storage of {storage.size} numbers")

    def load() -> np.ndarray:
        flat = storage.load(offset, span)
        steps = [stride * flat.itemsize for stride in strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, steps)).reshape(shape)

    return Tensor(shape, storage.dtype, load)


def _rebuild_parameter(data, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter is no tensor")
    return data


def _ordered_dict(*args: Any) -> _Dict:
    if args:
        raise Refused("an OrderedDict is made of something")
    return _Dict()


_NAMES = {
    ("collections", "OrderedDict"): _Name("OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Name("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name("_rebuild_parameter", _rebuild_parameter),
    **{("torch", name): _Name(name) for name in STORAGES},
}


class Module(dict):
    """Stands for every class of a TorchScript program: the attributes of an object by name, and none of its code."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused("an object of it has no attributes")
        self.update(state)


class Unpickler(pickle.Unpickler):
    """Knows the names of `_NAMES`; storages are made by `make_storage(name, key, size)`."""

    def __init__(self, data: bytes, make_storage: Callable[[str, str, int], Storage]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._make_storage = make_storage

    def find_class(self, module: str, name: str) -> _Name:
        """A name that is allowed; raises Refused for another."""
        if (module, name) not in _NAMES:
            raise Refused(
                f"it needs {module}.{name}, and only tensors and plain containers are allowed; save a file with "
                "model.state_dict() alone"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a pickle refers to; raises Refused for anything else."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise Refused("it refers to something that is no storage")
        kind, key, size = pid[1], pid[2], pid[4]
        known = isinstance(kind, _Name) and kind.name in STORAGES
        if not known or not isinstance(key, str) or not key.isdecimal() or type(size) is not int or size < 0:
            raise Refused("it refers to a storage that is not valid")
        return self._make_storage(kind.name, key, size)


class ScriptUnpickler(Unpickler):
    """Knows the classes of a TorchScript program besides."""

    def find_class(self, module: str, name: str) -> Any:
        """A module of the program, or a name that is allowed."""
        return Module if module.split(".")[0] == "__torch__" else super().find_class(module, name)


def no_storage(*_: Any) -> NoReturn:
    """Refuses a storage."""
    raise Refused("it refers to a storage where none can be")


def pickle_end(data: bytes, start: int, known: Set[str] = OPCODES) -> int:
    """Where the pickle at `start` ends; raises Refused if it is made of anything but plain data and tensors."""
    file = io.BytesIO(data)
    file.seek(start)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name not in known:
                raise Refused(f"it holds the pickle instruction {opcode.name}; save its state_dict() alone")
            # The unpickler makes a table as long as the highest number.
            if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > len(data):
                raise Refused("its pickle numbers more objects than it has")
    except ValueError as error:
        why = " or larger than any" if len(data) == MAX_PICKLE else ""
        raise Refused(f"its pickle is cut short{why}") from error
    return file.tell()
