"""Arrays that are made when they are written."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that `Checkpoints.save` makes twice, when its turn comes, and then drops.

    It is made once for its digest and once for the disk, so that a tree of them, which may be larger than the memory,
    needs that of one array.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      make: makes it; the same array each time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.make().astype(dtype or self.dtype, copy=False)


def is_lazy(leaf: Any) -> bool:
    """Whether a leaf is a `LazyArray`."""
    return isinstance(leaf, LazyArray)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes what `NumpyHandler` would, one array after the other; that would make all of them at once."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await super()._background_serialize([np.asarray(value)], [info], [arg])


def item_handlers() -> dict[str, Any]:
    """What writes the items of a step that has lazy arrays: Orbax's own handlers, and one for these."""
    known = [(kind, ocp.type_handlers.get_type_handler(kind)) for kind in ocp.type_handlers.supported_types()]
    registry = ocp.type_handlers.create_type_handler_registry(*known, (LazyArray, _LazyHandler()))
    trees = {item: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for item in ("state", "ema")}
    return {item: ocp.JsonCheckpointHandler() for item in ("meta", "digests")} | trees
