"""Bijective maps between PyTorch's named arrays and Flax parameters.

A table is a list of entries, one for each Flax parameter, and each says which PyTorch arrays hold its numbers and in
what layout. Everything here is numpy on the host; nothing imports torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

Path = tuple[str, ...]


class Layout(NamedTuple):
    """How arrays are turned: `to_flax(*torch arrays) -> array` and `to_torch(array) -> arrays`."""

    to_flax: Callable[..., np.ndarray]
    to_torch: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Entry(NamedTuple):
    """One Flax parameter and its PyTorch counterpart.

    Attributes:
      keys: names of the PyTorch arrays (more than one where Flax keeps them stacked).
      shapes: the shapes of those.
      path: where the parameter is in the tree of parameters.
      shape: its shape there.
      layout: the way from the one to the other and back.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    path: Path
    shape: tuple[int, ...]
    layout: Layout


Table = list[Entry]

SAME = Layout(lambda w: w, lambda w: (w,))
# conv: out, in, height, width <-> height, width, in, out
CONV = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: (w.transpose(3, 2, 0, 1),))
# linear: out, in <-> in, out
DENSE = Layout(lambda w: w.T, lambda w: (w.T,))
# a linear layer that PyTorch stores as a convolution over one axis or two
DENSE_1D = Layout(lambda w: w[..., 0].T, lambda w: (w.T[..., None],))
DENSE_2D = Layout(lambda w: w[..., 0, 0].T, lambda w: (w.T[..., None, None],))


def kernel(shape: Sequence[int]) -> Layout:
    """The layout of a kernel with `shape` in Flax: a convolution's, or a linear layer's."""
    return CONV if len(shape) == 4 else DENSE


def make_table(
    shapes: Mapping[Path, tuple[int, ...]], rename: Callable[[Path, tuple[int, ...]], tuple[Sequence[str], Layout]]
) -> Table:
    """A table from `rename(path, shape) -> (PyTorch names, layout)` over all Flax parameters."""
    table = []
    for path, shape in shapes.items():
        keys, layout = rename(path, shape)
        blank = np.broadcast_to(np.float32(0), shape)
        torch_shapes = tuple(w.shape for w in layout.to_torch(blank))
        table.append(Entry(tuple(keys), torch_shapes, path, shape, layout))
    return table


def param_shapes(init: Callable[[jax.Array], Mapping]) -> dict[Path, tuple[int, ...]]:
    """{path: shape} of the parameters that `init(key)` would make, such as `model.init`."""
    flat = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def to_flax(state_dict: Mapping[str, Any], table: Table) -> dict:
    """The Flax parameters that `state_dict` holds.

    Args:
      state_dict: {PyTorch name: array}; half precision becomes float32.
      table: one of `openai.table`, `glide.table`, `diffusers.table`.

    Returns:
      The tree of float32 arrays to call `network.apply({'params': tree}, ...)` with.

    Raises:
      ValueError: arrays are missing, unexpected or of another shape; all three are listed.
    """
    complaint = misfit({key: np.shape(value) for key, value in state_dict.items()}, table)
    if complaint:
        raise ValueError(
            f"the weights do not fit this network; {complaint}; give the options that the weights were trained with"
        )
    # one array at a time: those of a file are read here
    return traverse_util.unflatten_dict({entry.path: parameter(state_dict, entry) for entry in table})


def parameter(state_dict: Mapping[str, Any], entry: Entry) -> np.ndarray:
    """One float32 Flax parameter out of the arrays that hold it."""
    arrays = [np.asarray(state_dict[key]).astype(np.float32, copy=False) for key in entry.keys]
    return np.asarray(entry.layout.to_flax(*arrays), order="C")


def torch_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """{PyTorch name: shape} of the arrays that a table reads."""
    return {key: shape for entry in table for key, shape in zip(entry.keys, entry.shapes, strict=True)}


def misfit(shapes: Mapping[str, tuple[int, ...]], table: Table) -> str:
    """What keeps arrays of these names and shapes from being those of a table; '' if nothing does."""
    want, have = torch_shapes(table), {key: tuple(shape) for key, shape in shapes.items()}
    complaints = [
        _list("missing", [key for key in want if key not in have]),
        _list("unexpected", [key for key in have if key not in want]),
        _list(
            "of another shape",
            [f"{key} is {have[key]}, not {want[key]}" for key in want if key in have and have[key] != want[key]],
        ),
    ]
    return "; ".join(filter(None, complaints))


def to_torch(params: Mapping, table: Table) -> dict[str, np.ndarray]:
    """{PyTorch name: array} of Flax parameters (or of gradients, or an average of them).

    Raises:
      ValueError: parameters are missing, unexpected or of another shape.
    """
    flat = traverse_util.flatten_dict(dict(params))
    want = {entry.path: entry.shape for entry in table}
    complaints = [
        _list("missing", ["/".join(path) for path in want if path not in flat]),
        _list("unexpected", ["/".join(path) for path in flat if path not in want]),
        _list(
            "of another shape",
            [
                f"{'/'.join(path)} is {np.shape(flat[path])}, not {shape}"
                for path, shape in want.items()
                if path in flat and np.shape(flat[path]) != shape
            ],
        ),
    ]
    if any(complaints):
        raise ValueError(
            "the parameters do not fit the table; "
            + "; ".join(filter(None, complaints))
            + "; make the table from the same options"
        )
    state_dict = {}
    for entry in table:
        arrays = entry.layout.to_torch(np.asarray(flat[entry.path]))
        state_dict.update(zip(entry.keys, (np.asarray(a, order="C") for a in arrays), strict=True))
    return state_dict


def _list(what: str, items: list[str], most: int = 5) -> str:
    """'3 missing: a, b, c', cut after `most`; empty if there are none."""
    if not items:
        return ""
    tail = ", ..." if len(items) > most else ""
    return f"{len(items)} {what}: {', '.join(items[:most])}{tail}"
