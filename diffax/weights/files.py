"""Files of weights, read and written without PyTorch.

`read` knows the two formats of `torch.save` and safetensors. A file of `torch.save` is a pickle beside raw numbers, and
a pickle may call any function; here it is taken apart by a reader that knows nothing but tensors and plain containers,
so nothing that a file asks for is executed. Of a TorchScript program the tensors are read, and the code is not. Numbers
are read when `np.asarray` asks for an array, one array at a time.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from diffax.errors import UserError

SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors")

# A pickle of 800 tensors has some 100 kB; it is held in memory, and scanned before it is run.
_MAX_PICKLE = 2**23
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MAX_DEPTH = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_AGAIN = "download it again"

_STORAGES = {
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
_SAFETENSORS = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# What a pickle of tensors in plain containers consists of.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND "
    "APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "MEMOIZE".split()
)


class _Refused(Exception):
    """Why a file cannot be read: '<what>' or '<what>; <what to do>'."""


class _Sealed:
    """What a pickle may hold but not change."""

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("it changes an object that is no container")


@dataclasses.dataclass(frozen=True)
class Tensor(_Sealed):
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


def read(path: str | os.PathLike[str], which: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file: a .pt or .pth of `torch.save` (either format), or .safetensors.

    It may lie deeper in the file, beside an optimizer's state and other things. Of several, the one under a name with
    'ema' is taken, else under one with 'state_dict', else with 'model'. A 'module.' before all names is taken away.

    Args:
      path: the file; its content, not its suffix, tells the format.
      which: the place of the state dict in the file, such as 'ema' or 'model.generator'.

    Returns:
      {name: Tensor}; no numbers are read yet.

    Raises:
      UserError: the file is missing, damaged, of another kind, asks for anything but tensors and plain containers, or
        holds no state dict, or several and none of these names.
    """
    path = pathlib.Path(path)
    with _explained(path):
        found = _state_dicts(_contents(path))
        tensors = _choose(found, which)
        if all(name.startswith("module.") for name in tensors):
            return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        return tensors


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever a file can cause into a UserError that names it."""
    try:
        yield
    except _Refused as error:
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


def _contents(path: pathlib.Path) -> Any:
    """Whatever the file holds, tensors unread."""
    if path.is_dir():
        raise _Refused("this is a folder; pass a file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise _Refused("the file is empty")
    # first, as the length of a header may begin with any byte, that of a pickle or of a web page too
    braced = len(start) > 8 and start[8:9] == b"{"
    if braced and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    text = start.lstrip().lower()
    if text.startswith(b"<"):
        raise _Refused("this is a web page, perhaps an error message; download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise _Refused("this is a Git LFS pointer, not the file it stands for; run git lfs pull")
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if start.startswith(b"\x80"):
        return _read_legacy(path)
    if braced:
        return _read_safetensors(path)
    raise _Refused(f"this is none of {', '.join(SUFFIXES)}, it begins with {start[:8]!r}; pass another file")


# ---- the state dict among what a file holds --------------------------------------------------------------------------


def _state_dicts(contents: Any) -> dict[str, dict[str, Tensor]]:
    """{place: state dict} of every mapping of names to tensors; the place of the outermost is ''.

    Of a file that is a list of tensors the names are '0', '1', ...
    """
    if isinstance(contents, list | tuple) and contents and all(isinstance(item, Tensor) for item in contents):
        contents = {str(i): item for i, item in enumerate(contents)}
    found: dict[str, dict[str, Tensor]] = {}
    seen = set()

    def visit(value: Any, place: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping) or id(value) in seen or len(place) > 8:
            return
        seen.add(id(value))
        if not all(isinstance(key, str) for key in value):
            return  # an optimizer numbers its parameters
        if value and all(isinstance(item, Tensor) for item in value.values()):
            found[".".join(place)] = dict(value)
        for key, item in value.items():
            visit(item, (*place, key))

    visit(contents, ())
    return found


def _choose(found: Mapping[str, dict[str, Tensor]], which: str | None) -> dict[str, Tensor]:
    """One of several state dicts, by the rule of `read`."""
    there = ", ".join(repr(place) for place in [*found][:8])
    if not found:
        raise _Refused("it holds no state dict; save model.state_dict() in it")
    if which is not None:
        if which not in found:
            raise _Refused(f"it holds no state dict {which!r}; choose one of {there}")
        return found[which]
    for word in ("ema", "state_dict", "model"):
        named = [place for place in found if word in place.lower()]
        if len(named) == 1:
            return found[named[0]]
    if len(found) > 1:
        raise _Refused(f"it holds {len(found)} state dicts; choose one of {there} with --ema=NAME")
    return next(iter(found.values()))


# ---- pickles ---------------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """Numbers in a file: `load(first, count)` reads a part of them."""

    dtype: np.dtype
    size: int
    load: Callable[[int, int], np.ndarray]


class _Dict(dict):
    """Stands for OrderedDict; the attributes that PyTorch hangs on it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Name(_Sealed):
    """What stands for a name that a pickle refers to."""

    name: str
    call: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise _Refused(f"it calls {self.name}, which is no function")
        return self.call(*args)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
    """A view of a storage, checked to lie inside it; further arguments say how it was trained."""
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor has no storage")
    sizes = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**62 for n in sizes) or len(shape) != len(strides):
        raise _Refused("a tensor has no valid shape")
    if len(shape) > _MAX_DIMENSIONS:
        raise _Refused(f"a tensor has {len(shape)} dimensions, limit {_MAX_DIMENSIONS}")
    shape, count = tuple(shape), math.prod(shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if count else 0
    # A view may not have more numbers than its storage: strides of 0 would make terabytes out of one.
    if offset + span > storage.size or count > storage.size:
        raise _Refused(f"a tensor of shape {shape} does not lie inside its storage of {storage.size} numbers")

    def load() -> np.ndarray:
        flat = storage.load(offset, span)
        steps = [stride * flat.itemsize for stride in strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, steps)).reshape(shape)

    return Tensor(shape, storage.dtype, load)


def _rebuild_parameter(data, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise _Refused("a parameter is no tensor")
    return data


def _ordered_dict(*args: Any) -> _Dict:
    if args:
        raise _Refused("an OrderedDict is made of something")
    return _Dict()


_NAMES = {
    ("collections", "OrderedDict"): _Name("OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Name("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name("_rebuild_parameter", _rebuild_parameter),
    **{("torch", name): _Name(name) for name in _STORAGES},
}


class _Module(dict):
    """Stands for every class of a TorchScript program: the attributes of an object by name, and none of its code."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise _Refused("an object of it has no attributes")
        self.update(state)


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_NAMES`; storages are made by `make_storage(name, key, size)`."""

    def __init__(self, data: bytes, make_storage: Callable[[str, str, int], _Storage]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._make_storage = make_storage

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _NAMES:
            raise _Refused(
                f"it asks for {module}.{name}, and only tensors and plain containers are allowed; save a file with "
                "model.state_dict() alone"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise _Refused("it refers to something that is no storage")
        kind, key, size = pid[1], pid[2], pid[4]
        known = isinstance(kind, _Name) and kind.name in _STORAGES
        if not known or not isinstance(key, str) or not key.isdecimal() or type(size) is not int or size < 0:
            raise _Refused("it refers to a storage that is not valid")
        return self._make_storage(kind.name, key, size)


class _ScriptUnpickler(_Unpickler):
    """Knows the classes of a TorchScript program besides."""

    def find_class(self, module: str, name: str) -> Any:
        return _Module if module.split(".")[0] == "__torch__" else super().find_class(module, name)


def _no_storage(*_: Any) -> NoReturn:
    raise _Refused("it refers to a storage where none can be")


def _pickle_end(data: bytes, start: int, known: Set[str] = _OPCODES) -> int:
    """Where the pickle at `start` ends; raises _Refused if it is made of anything but plain data and tensors."""
    file = io.BytesIO(data)
    file.seek(start)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name not in known:
                raise _Refused(f"it holds the pickle instruction {opcode.name}; save its state_dict() alone")
            # The unpickler makes a table as long as the highest number.
            if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > len(data):
                raise _Refused("its pickle numbers more objects than it has")
    except ValueError as error:
        why = " or larger than any" if len(data) == _MAX_PICKLE else ""
        raise _Refused(f"its pickle is cut short{why}") from error
    return file.tell()


def _load_span(
    path: pathlib.Path, dtype: np.dtype, start: int, first: int, count: int, check: Callable[[], None] | None = None
) -> np.ndarray:
    """`count` numbers from the `first` on, of a storage at byte `start`; `check` looks at the whole of it."""
    raw = np.empty(count * dtype.itemsize, np.uint8)
    with _explained(path):
        if check is not None:
            check()
        with path.open("rb") as file:
            file.seek(start + first * dtype.itemsize)
            if file.readinto(raw) != raw.size:
                raise _Refused("the file is cut short")
    return raw != 0 if dtype == np.bool_ else raw.view(dtype)


def _check_crc(path: pathlib.Path, start: int, size: int, crc: int) -> None:
    """Raises _Refused unless the checksum of the `size` bytes from `start` on is `crc`."""
    found = 0
    with path.open("rb") as file:
        file.seek(start)
        while size and (chunk := file.read(min(size, 2**20))):
            found, size = zlib.crc32(chunk, found), size - len(chunk)
    if size or found != crc:
        raise _Refused("the file is damaged (an array has another checksum)")


# ---- the three formats -----------------------------------------------------------------------------------------------


def _read_zip(path: pathlib.Path) -> Any:
    """What `torch.save` writes since PyTorch 1.6: a pickle and one member for each storage, none compressed.

    `torch.jit.save` adds the program's code, and its pickle holds objects of the classes in there.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise _Refused("the file is cut short or damaged (its table of contents is missing)") from None
    with archive:
        script = any(map(_is_code, archive.namelist()))
        members = _check_members(archive, path.stat().st_size)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"this is a zip archive with {len(pickles)} pickles of PyTorch, not one; pass another file")
        prefix = pickles[0].removesuffix("data.pkl")
        order = archive.read(prefix + "byteorder") if prefix + "byteorder" in members else b"little"
        if order != b"little":
            raise _Refused("it comes from a big-endian machine; save it on another one")
        if members[pickles[0]].file_size >= _MAX_PICKLE:
            raise _Refused("its pickle is larger than any state dict's; save model.state_dict() alone")
        data = archive.read(pickles[0])

    @functools.cache
    def make_storage(kind: str, key: str, size: int) -> _Storage:
        member, dtype = members.get(f"{prefix}data/{key}"), np.dtype(_STORAGES[kind])
        if member is None:
            raise _Refused(f"storage {key} is missing")
        if member.file_size != size * dtype.itemsize:
            raise _Refused(f"storage {key} has {member.file_size} bytes, not {size} numbers of {dtype}")
        start = _member_start(path, member)
        check = functools.cache(functools.partial(_check_crc, path, start, member.file_size, member.CRC))
        return _Storage(dtype, size, functools.partial(_load_span, path, dtype, start, check=check))

    _pickle_end(data, 0, _OPCODES | {"NEWOBJ"} if script else _OPCODES)
    contents = (_ScriptUnpickler if script else _Unpickler)(data, make_storage).load()
    return _script_tensors(contents) if isinstance(contents, _Module) else contents


def _is_code(member: str) -> bool:
    return member.split("/")[1:2] == ["code"]


def _script_tensors(program: _Module) -> dict[str, Tensor]:
    """{'layer.weight': Tensor} of the parameters and buffers of a TorchScript program."""
    found, seen = {}, set()

    def visit(module: _Module, names: tuple[str, ...]) -> None:
        if id(module) in seen or len(names) > _MAX_DEPTH:
            return
        seen.add(id(module))
        for name, item in module.items():
            if isinstance(item, Tensor):
                found[".".join((*names, name))] = item
            elif isinstance(item, _Module):
                visit(item, (*names, name))

    visit(program, ())
    return found


def _check_members(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """The members that are read, by name; raises _Refused unless they are stored as they are, and fit into the file."""
    infos = archive.infolist()
    if len(infos) > _MAX_TENSORS:
        raise _Refused(f"it has {len(infos)} members, limit {_MAX_TENSORS}")
    repeated = [name for name, n in collections.Counter(info.filename for info in infos).items() if n > 1]
    if repeated:
        raise _Refused(f"member {repeated[0]!r} is there twice")
    infos = [info for info in infos if not _is_code(info.filename)]
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise _Refused(f"member {info.filename!r} is compressed or encrypted, which PyTorch never does")
    if sum(info.file_size for info in infos) > file_size:
        raise _Refused("its members are larger than the file")
    return {info.filename: info for info in infos}


def _member_start(path: pathlib.Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise _Refused(f"member {member.filename!r} is not where the table of contents says")
        name, extra = struct.unpack("<HH", header[26:30])
        if file.read(name) != member.orig_filename.encode():
            raise _Refused(f"member {member.filename!r} is not where the table of contents says")
        start = file.tell() + extra
        if start + member.file_size > os.fstat(file.fileno()).st_size:
            raise _Refused("the file is cut short")
    return start


def _read_legacy(path: pathlib.Path) -> Any:
    """What `torch.save` wrote before PyTorch 1.6: five pickles, then the storages one after the other."""
    with path.open("rb") as file:
        data = file.read(_MAX_PICKLE)
    ends = [0]
    for i in range(5):
        ends.append(_pickle_end(data, ends[-1]))
        if i == 0 and _Unpickler(data, _no_storage).load() != _LEGACY_MAGIC:
            raise _Refused("this is a pickle, but none of PyTorch; pass another file")
    parts = [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    if _Unpickler(parts[1], _no_storage).load() != 1001:
        raise _Refused("it has an unknown version; load it with PyTorch and save it anew")
    system = _Unpickler(parts[2], _no_storage).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("it comes from a big-endian machine; save it on another one")

    kinds: dict[str, tuple[str, int]] = {}  # what the pickle says of each storage
    starts: dict[str, int] = {}  # filled below: they lie behind the pickle that refers to them

    @functools.cache
    def make_storage(kind: str, key: str, size: int) -> _Storage:
        if kinds.setdefault(key, (kind, size)) != (kind, size):
            raise _Refused(f"storage {key} is described in two ways")
        dtype = np.dtype(_STORAGES[kind])

        def load(first: int, count: int) -> np.ndarray:
            return _load_span(path, dtype, starts[key], first, count)

        return _Storage(dtype, size, load)

    contents = _Unpickler(parts[3], make_storage).load()
    keys = _Unpickler(parts[4], _no_storage).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*kinds}:
        raise _Refused("its list of storages does not fit its tensors")
    position = ends[-1]
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        for key in keys:
            kind, size = kinds[key]
            file.seek(position)
            count = file.read(8)
            if len(count) < 8 or int.from_bytes(count, "little") != size:
                raise _Refused(f"storage {key} has not {size} numbers, or the file is cut short")
            starts[key] = position + 8
            position = starts[key] + size * np.dtype(_STORAGES[kind]).itemsize
    if position > length:
        raise _Refused("the file is cut short")
    return contents


def _safetensors(path: pathlib.Path):
    """The package, or a UserError that says how to get it."""
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(f".safetensors needs the package safetensors; {path}; pip install 'diffax[weights]'") from None
    return safetensors


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """A file of the safetensors format, which holds one flat state dict."""
    package = _safetensors(path)

    def load(name: str) -> np.ndarray:
        # Opened anew each time: an open file keeps the pages that were read in memory.
        with _explained(path), package.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    tensors = {}
    with package.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        if len(names) > _MAX_TENSORS:
            raise _Refused(f"it has {len(names)} arrays, limit {_MAX_TENSORS}")
        for name in names:
            part = file.get_slice(name)
            if part.get_dtype() not in _SAFETENSORS:
                raise _Refused(f"{name} is {part.get_dtype()}; save it in one of {', '.join(_SAFETENSORS)}")
            dtype = np.dtype(_SAFETENSORS[part.get_dtype()])
            tensors[name] = Tensor(tuple(part.get_shape()), dtype, functools.partial(load, name))
    return tensors


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Writes a state dict as .safetensors, whole or not at all.

    Args:
      path: the file.
      arrays: {name: array}.
      about: text for the file's header, by name.

    Raises:
      UserError: the package safetensors is not installed, or `path` cannot be written.
    """
    path = pathlib.Path(path)
    package = _safetensors(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        package.numpy.save_file(dict(arrays), temporary, metadata=dict(about))
        temporary.replace(path)
    except (OSError, package.SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write the weights: {error}; {path}; choose another place") from error


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape}, of arrays or of tensors that are not read."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def count(sizes: Sequence[Sequence[int]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(math.prod(size) for size in sizes)
