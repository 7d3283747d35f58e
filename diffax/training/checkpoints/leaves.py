"""Trees as checkpoints see them: arrays by name, on the host, and back on devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffax.training.checkpoints.lazy import is_lazy

Record = dict[str, Any]


def named(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by name: 'opt_state/0/mu/conv/kernel'.

    Raises:
      ValueError: a name in the tree is empty or has a '/'.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any("/" in part or not part for part in parts):
            raise ValueError(f'a name in the tree is empty or has a "/": {parts}')
        leaves["/".join(parts)] = leaf
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by name."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def shown(item: str, name: str) -> str:
    """The name of a leaf in messages: 'params.conv.kernel', 'ema.0.9999.conv.kernel'."""
    return (name if item == "state" else f"{item}/{name}").replace("/", ".")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """An array of plain numbers: typed PRNG keys become their uint32 data."""
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def check_width(item: str, name: str, array: Any) -> None:
    """Raises ValueError if jax would restore an array with fewer bits."""
    if array.dtype != (canonical := jax.dtypes.canonicalize_dtype(array.dtype)):
        raise ValueError(f"{shown(item, name)} is {array.dtype} and would come back as {canonical}; convert it first")


def to_host(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Host copies; an array of which other hosts hold a part stays as it is, and so does a lazy one."""
    for array in arrays.values():
        if isinstance(array, jax.Array) and _is_here(array):
            array.copy_to_host_async()
    return {
        name: np.asarray(array) if _is_here(array) and not is_lazy(array) else array for name, array in arrays.items()
    }


def _is_here(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def place(array: np.ndarray, where: jax.sharding.Sharding | None, record: Record) -> jax.Array:
    """An array that was read, on its devices; a typed PRNG key again if it was one."""
    if where is None or where.is_fully_addressable:
        placed = jax.device_put(array, where)
    else:
        placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    if "key_impl" in record:
        return jax.random.wrap_key_data(placed, impl=record["key_impl"])
    return placed
