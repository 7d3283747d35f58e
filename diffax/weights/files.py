"""Files of weights, read and written without PyTorch.

`read` knows the two formats of `torch.save` and safetensors. A file of `torch.save` is a pickle beside raw numbers, see
`pickles`. Of a TorchScript program the tensors are read, and the code is not. Numbers are read when `np.asarray` wants
an array, one array at a time.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffax.errors import UserError
from diffax.weights.tensors import MAX_TENSORS, Refused, Tensor, count, explained, shapes
from diffax.weights.torch_formats import read_legacy, read_zip

__all__ = ["SUFFIXES", "Tensor", "count", "read", "shapes", "write"]

SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".safetensors")
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


def read(path: str | os.PathLike[str], which: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file: a .pt or .pth of `torch.save` (either format), or .safetensors.

    It may lie deeper in the file, beside an optimizer's state and other things. Of several, the one under a name with
    'ema' is taken, else under one with 'state_dict', else with 'model'. A 'module.' before all names is taken away.

    Args:
      path: the file; its content, not its suffix, decides the format.
      which: the place of the state dict in the file, such as 'ema' or 'model.generator'.

    Returns:
      {name: Tensor}; no numbers are read yet.

    Raises:
      UserError: the file is missing, damaged, of another kind, needs anything but tensors and plain containers, or
        holds no state dict, or several and none of these names.
    """
    path = pathlib.Path(path)
    with explained(path):
        found = _state_dicts(_contents(path))
        tensors = _choose(found, which)
        if all(name.startswith("module.") for name in tensors):
            return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        return tensors


def _contents(path: pathlib.Path) -> Any:
    """Whatever the file holds, tensors unread."""
    if path.is_dir():
        raise Refused("this is a folder; pass a file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise Refused("the file is empty")
    # first, as the length of a header may begin with any byte, that of a pickle or of a web page too
    braced = len(start) > 8 and start[8:9] == b"{"
    if braced and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    text = start.lstrip().lower()
    if text.startswith(b"<"):
        raise Refused("this is a web page, perhaps an error message; download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise Refused("this is a Git LFS pointer, not the file it stands for; run git lfs pull")
    if start.startswith(b"PK\x03\x04"):
        return read_zip(path)
    if start.startswith(b"\x80"):
        return read_legacy(path)
    if braced:
        return _read_safetensors(path)
    raise Refused(f"this is none of {', '.join(SUFFIXES)}, it begins with {start[:8]!r}; pass another file")


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
        raise Refused("it holds no state dict; save model.state_dict() in it")
    if which is not None:
        if which not in found:
            raise Refused(f"it holds no state dict {which!r}; choose one of {there}")
        return found[which]
    for word in ("ema", "state_dict", "model"):
        named = [place for place in found if word in place.lower()]
        if len(named) == 1:
            return found[named[0]]
    if len(found) > 1:
        raise Refused(f"it holds {len(found)} state dicts; choose one of {there} with --ema=NAME")
    return next(iter(found.values()))


# ---- safetensors -----------------------------------------------------------------------------------------------------


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
        with explained(path), package.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    tensors = {}
    with package.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        if len(names) > MAX_TENSORS:
            raise Refused(f"it has {len(names)} arrays, limit {MAX_TENSORS}")
        for name in names:
            part = file.get_slice(name)
            if part.get_dtype() not in _SAFETENSORS:
                raise Refused(f"{name} is {part.get_dtype()}; save it in one of {', '.join(_SAFETENSORS)}")
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
