"""Weights of the FID's Inception network, in the two files in which they are published.

One is a PyTorch state dict, the other the TensorFlow graph that it was made from; both hold the same numbers. The graph
is read as data: nothing in it is run.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffax.data import archives
from diffax.errors import UserError
from diffax.networks import inception
from diffax.weights import files as weights
from diffax.weights.table import DENSE, SAME, Layout, Path, Table, kernel, make_table, param_shapes, to_flax

TORCH_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
TORCH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
GRAPH_NAME = "classify_image_graph_def.pb"
VARIABLE = "DIFFAX_INCEPTION"

# a parameter of a normalised convolution in a state dict, and in the graph
TORCH_LEAF = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
GRAPH_LEAF = {
    "kernel": "conv2d_params",
    "scale": "batchnorm/gamma",
    "bias": "batchnorm/beta",
    "mean": "batchnorm/moving_mean",
    "variance": "batchnorm/moving_variance",
}
# in a state dict, but of no use here
UNUSED = ("num_batches_tracked", "fc.bias")

MAX_BYTES = 2**30
MAX_NODES = 100_000
# numbers of fields and types in TensorFlow's .proto files
GRAPH_NODE, NODE_NAME, NODE_OP, NODE_ATTR, ATTR_KEY, ATTR_VALUE, VALUE_TENSOR = 1, 1, 2, 5, 1, 2, 8
TENSOR_TYPE, TENSOR_SHAPE, TENSOR_CONTENT, TENSOR_FLOATS, SHAPE_DIM, DIM_SIZE, TYPE_FLOAT = 1, 2, 4, 5, 2, 1, 1
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def table() -> Table:
    """The map between a state dict of pytorch-fid or torch-fidelity and the parameters of `inception.Inception`."""

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        if path[0] == "fc":
            return ["fc.weight"], DENSE
        *layer, leaf = path
        return [".".join((*layer, TORCH_LEAF[leaf]))], kernel(shape) if leaf == "kernel" else SAME

    return make_table(_shapes(), rename)


def graph_table() -> Table:
    """The map between the constants of the TensorFlow graph and the parameters of `inception.Inception`."""
    scopes = _scopes()

    def rename(path: Path, shape: tuple[int, ...]) -> tuple[list[str], Layout]:
        if path[0] == "fc":
            return ["softmax/weights"], SAME
        *layer, leaf = path
        return [f"{scopes[tuple(layer)]}/{GRAPH_LEAF[leaf]}"], SAME

    return make_table(_shapes(), rename)


def _shapes() -> dict[Path, tuple[int, ...]]:
    return param_shapes(lambda key: inception.Inception().init(key, jnp.zeros((1, 8, 8, 3)))["params"])


def _scopes() -> dict[Path, str]:
    """The scope in the graph of every normalised convolution.

    Names are counted there: mixed, mixed_1, ...; in a block, conv is a branch of a single convolution, and tower,
    tower_1, ... are the others in turn; convolutions side by side are in a scope of their own, mixed.
    """
    scopes: dict[Path, str] = {(name,): _counted("conv", i) for i, name in enumerate(inception.STEM)}
    for i, (block, branches) in enumerate(inception.BLOCKS.items()):
        towers = 0
        for branch, steps in branches.items():
            if list(map(type, steps)) == [inception.Conv]:
                scopes[block, branch] = f"{_counted('mixed', i)}/conv"
                continue
            scope, convs = f"{_counted('mixed', i)}/{_counted('tower', towers)}", 0
            for step in inception.named_steps(branch, steps):
                if callable(step):
                    continue
                towers += not convs
                if len(step) > 1:
                    scopes |= {(block, name): f"{scope}/mixed/{_counted('conv', j)}" for j, name in enumerate(step)}
                else:
                    scopes[block, *step] = f"{scope}/{_counted('conv', convs)}"
                convs += 1
    return scopes


def _counted(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


def from_torch(state_dict: Mapping[str, Any]) -> dict:
    """The parameters that a state dict holds; its unused entries are passed over.

    Raises:
      ValueError: arrays are missing, unexpected or of another shape.
    """
    return to_flax({key: value for key, value in state_dict.items() if not key.endswith(UNUSED)}, table())


def from_graph(data: bytes) -> dict:
    """The parameters in a serialised TensorFlow graph; its other nodes are passed over.

    Raises:
      ValueError: it is no such graph, or arrays are missing or of another shape.
    """
    want = graph_table()
    names = {key for entry in want for key in entry.keys}
    return to_flax({name: value for name, value in read_constants(data) if name in names}, want)


def load(path: str | os.PathLike[str]) -> tuple[dict, str]:
    """Reads either file.

    Args:
      path: a .pb with the graph; anything else is read as a state dict, by `diffax.weights.files`.

    Returns:
      The parameters, and the SHA-256 of the file.

    Raises:
      UserError: there is no such file, or it holds no weights of this network.
    """
    path = pathlib.Path(path).expanduser()
    try:
        if path.suffix != ".pb":
            params = from_torch(weights.read(path))
        elif path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES // 2**20} MB")
        else:
            params = from_graph(path.read_bytes())
        with path.open("rb") as file:
            return params, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the Inception weights ({error.strerror}); {path}; {_advice()}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"no weights of the FID's Inception network ({error}); {path}; {_advice()}") from None


def find(given: str | None = None) -> str:
    """The file to read: the one given, or that of the environment variable DIFFAX_INCEPTION.

    'fetch' stands for the published state dict, downloaded once into ~/.cache/diffax.

    Raises:
      UserError: neither is there, or it cannot be fetched.
    """
    path = given or os.environ.get(VARIABLE)
    if path == "fetch":
        published = archives.Archive(TORCH_URL, sha256=TORCH_SHA256)
        return archives.fetch(published, str(pathlib.Path.home() / ".cache" / "diffax"))
    if not path:
        raise UserError(f"no Inception weights; --inception; {_advice()}, or compare with --features=patches")
    return path


def _advice() -> str:
    return (
        f"fetch {TORCH_URL} (SHA-256 {TORCH_SHA256}) or ADM's {GRAPH_NAME} once, and pass --inception=FILE or set "
        f"{VARIABLE}; --inception=fetch downloads the former"
    )


# ---- the graph's wire format ----------------------------------------------------------------------------------------


def read_constants(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every constant of float32 in a serialised TensorFlow GraphDef.

    Args:
      data: the file.

    Yields:
      (name, float32 array) in the file's order.

    Raises:
      ValueError: the bytes are no GraphDef, or a value does not have the size that it promises.
    """
    nodes = 0
    for number, node in _fields(memoryview(data)):
        if number != GRAPH_NODE or not isinstance(node, memoryview):
            continue
        nodes += 1
        if nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} nodes")
        name, op, tensor = "", "", None
        for field, value in _fields(node):
            if field in (NODE_NAME, NODE_OP, NODE_ATTR) and not isinstance(value, memoryview):
                raise ValueError("no TensorFlow graph")
            if field == NODE_NAME:
                name = bytes(value).decode("utf-8", "replace")
            elif field == NODE_OP:
                op = bytes(value).decode("utf-8", "replace")
            elif field == NODE_ATTR:
                entry = dict(_fields(value))
                if entry.get(ATTR_KEY) == b"value" and isinstance(entry.get(ATTR_VALUE), memoryview):
                    tensor = dict(_fields(entry[ATTR_VALUE])).get(VALUE_TENSOR)
        if op == "Const" and isinstance(tensor, memoryview):
            value = _tensor(tensor, name)
            if value is not None:
                yield name, value
    if not nodes:
        raise ValueError("no TensorFlow graph")


def _tensor(message: memoryview, name: str) -> np.ndarray | None:
    """A TensorProto as an array; None where it is not of float32."""
    kind, shape, content, floats = 0, [], b"", []
    for field, value in _fields(message):
        if field == TENSOR_TYPE:
            kind = value
        elif field == TENSOR_SHAPE and isinstance(value, memoryview):
            dims = (dim for number, dim in _fields(value) if number == SHAPE_DIM and isinstance(dim, memoryview))
            shape = [dict(_fields(dim)).get(DIM_SIZE, 0) for dim in dims]
        elif field == TENSOR_CONTENT and isinstance(value, memoryview):
            content = value
        elif field == TENSOR_FLOATS and isinstance(value, memoryview):  # packed, or one at a time
            floats.append(value)
    if kind != TYPE_FLOAT:
        return None
    if not all(isinstance(n, int) for n in shape) or 4 * math.prod(shape) > MAX_BYTES:
        raise ValueError(f"{name!r} has the shape {shape}")
    content, size = content or b"".join(floats), 4 * math.prod(shape)
    if len(floats) and len(content) == 4:  # one number stands for all
        content *= size // 4
    if len(content) != size:
        raise ValueError(f"{name!r} holds {len(content)} bytes, not {size}")
    return np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a protocol buffer: integers, and the bytes of all else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(message, at)
        elif wire in (LENGTH, FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            if wire == LENGTH:
                size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("the file ends early, or is no TensorFlow graph")
        else:
            raise ValueError("no TensorFlow graph")
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("the file ends early, or is no TensorFlow graph")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("no TensorFlow graph")
