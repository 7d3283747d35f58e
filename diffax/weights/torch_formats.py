"""The two formats of `torch.save`: a zip archive, and before PyTorch 1.6 a row of pickles."""

import collections
import functools
import os
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from diffax.weights.pickles import (
    MAX_PICKLE,
    OPCODES,
    STORAGES,
    Module,
    ScriptUnpickler,
    Storage,
    Unpickler,
    no_storage,
    pickle_end,
)
from diffax.weights.tensors import MAX_TENSORS, Refused, Tensor, check_crc, load_span

_MAX_DEPTH = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_zip(path: pathlib.Path) -> Any:
    """What `torch.save` writes since PyTorch 1.6: a pickle and one member for each storage, none compressed.

    `torch.jit.save` adds the program's code, and its pickle holds objects of the classes in there.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise Refused("the file is cut short or damaged (its table of contents is missing)") from None
    with archive:
        script = any(map(_is_code, archive.namelist()))
        members = _check_members(archive, path.stat().st_size)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"this is a zip archive with {len(pickles)} pickles of PyTorch, not one; pass another file")
        prefix = pickles[0].removesuffix("data.pkl")
        order = archive.read(prefix + "byteorder") if prefix + "byteorder" in members else b"little"
        if order != b"little":
            raise Refused("it comes from a big-endian machine; save it on another one")
        if members[pickles[0]].file_size >= MAX_PICKLE:
            raise Refused("its pickle is larger than any state dict's; save model.state_dict() alone")
        data = archive.read(pickles[0])

    @functools.cache
    def make_storage(kind: str, key: str, size: int) -> Storage:
        member, dtype = members.get(f"{prefix}data/{key}"), np.dtype(STORAGES[kind])
        if member is None:
            raise Refused(f"storage {key} is missing")
        if member.file_size != size * dtype.itemsize:
            raise Refused(f"storage {key} has {member.file_size} bytes, not {size} numbers of {dtype}")
        start = _member_start(path, member)
        check = functools.cache(functools.partial(check_crc, path, start, member.file_size, member.CRC))
        return Storage(dtype, size, functools.partial(load_span, path, dtype, start, check=check))

    pickle_end(data, 0, OPCODES | {"NEWOBJ"} if script else OPCODES)
    contents = (ScriptUnpickler if script else Unpickler)(data, make_storage).load()
    return _script_tensors(contents) if isinstance(contents, Module) else contents


def _is_code(member: str) -> bool:
    return member.split("/")[1:2] == ["code"]


def _script_tensors(program: Module) -> dict[str, Tensor]:
    """{'layer.weight': Tensor} of the parameters and buffers of a TorchScript program."""
    found, seen = {}, set()

    def visit(module: Module, names: tuple[str, ...]) -> None:
        if id(module) in seen or len(names) > _MAX_DEPTH:
            return
        seen.add(id(module))
        for name, item in module.items():
            if isinstance(item, Tensor):
                found[".".join((*names, name))] = item
            elif isinstance(item, Module):
                visit(item, (*names, name))

    visit(program, ())
    return found


def _check_members(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """The members that are read, by name; raises Refused unless they are stored as they are, and fit into the file."""
    infos = archive.infolist()
    if len(infos) > MAX_TENSORS:
        raise Refused(f"it has {len(infos)} members, limit {MAX_TENSORS}")
    repeated = [name for name, n in collections.Counter(info.filename for info in infos).items() if n > 1]
    if repeated:
        raise Refused(f"member {repeated[0]!r} is there twice")
    infos = [info for info in infos if not _is_code(info.filename)]
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise Refused(f"member {info.filename!r} is compressed or encrypted, which PyTorch never does")
    if sum(info.file_size for info in infos) > file_size:
        raise Refused("its members are larger than the file")
    return {info.filename: info for info in infos}


def _member_start(path: pathlib.Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise Refused(f"member {member.filename!r} is not where the table of contents says")
        name, extra = struct.unpack("<HH", header[26:30])
        if file.read(name) != member.orig_filename.encode():
            raise Refused(f"member {member.filename!r} is not where the table of contents says")
        start = file.tell() + extra
        if start + member.file_size > os.fstat(file.fileno()).st_size:
            raise Refused("the file is cut short")
    return start


def read_legacy(path: pathlib.Path) -> Any:
    """What `torch.save` wrote before PyTorch 1.6: five pickles, then the storages one after the other."""
    with path.open("rb") as file:
        data = file.read(MAX_PICKLE)
    ends = [0]
    for i in range(5):
        ends.append(pickle_end(data, ends[-1]))
        if i == 0 and Unpickler(data, no_storage).load() != _LEGACY_MAGIC:
            raise Refused("this is a pickle, but none of PyTorch; pass another file")
    parts = [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    if Unpickler(parts[1], no_storage).load() != 1001:
        raise Refused("it has an unknown version; load it with PyTorch and save it anew")
    system = Unpickler(parts[2], no_storage).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it comes from a big-endian machine; save it on another one")

    kinds: dict[str, tuple[str, int]] = {}  # what the pickle says of each storage
    starts: dict[str, int] = {}  # filled below: they lie behind the pickle that refers to them

    @functools.cache
    def make_storage(kind: str, key: str, size: int) -> Storage:
        if kinds.setdefault(key, (kind, size)) != (kind, size):
            raise Refused(f"storage {key} is described in two ways")
        dtype = np.dtype(STORAGES[kind])

        def load(first: int, count: int) -> np.ndarray:
            return load_span(path, dtype, starts[key], first, count)

        return Storage(dtype, size, load)

    contents = Unpickler(parts[3], make_storage).load()
    keys = Unpickler(parts[4], no_storage).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*kinds}:
        raise Refused("its list of storages does not fit its tensors")
    position = ends[-1]
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        for key in keys:
            kind, size = kinds[key]
            file.seek(position)
            count = file.read(8)
            if len(count) < 8 or int.from_bytes(count, "little") != size:
                raise Refused(f"storage {key} has not {size} numbers, or the file is cut short")
            starts[key] = position + 8
            position = starts[key] + size * np.dtype(STORAGES[kind]).itemsize
    if position > length:
        raise Refused("the file is cut short")
    return contents
