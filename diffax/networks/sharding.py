"""Sharded parameters as Flax reads them inside a program. Which devices hold the parts is not known here."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax

AXIS = "data"  # the axis of devices


@flax.struct.dataclass
class Shard(nn.meta.AxisMetadata):
    """A device's part of a parameter; the layer that reads it through Flax gets the whole.

    So a parameter is gathered where it is used, and gathered again by a block that is computed again for the backward
    pass (remat), and need not be kept. Its gradient is that of the part, summed over the devices.

    Attributes:
      part: this device's.
      axis: along which the parts lie.
    """

    part: jax.Array
    axis: int = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The whole parameter."""
        return jax.lax.all_gather(self.part, AXIS, axis=self.axis, tiled=True)

    def replace_boxed(self, val: Any) -> "Shard":
        """A shard of another parameter, on the same axis."""
        return self.replace(part=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        """The shard after a transformation of Flax has added an axis to its part."""
        return self.replace(axis=self.axis + (index <= self.axis))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        """The shard after a transformation of Flax has removed an axis from its part."""
        return self.replace(axis=self.axis - (index < self.axis))


def is_shard(leaf: Any) -> bool:
    """Whether a leaf of parameters is a `Shard`; for `jax.tree.map(..., is_leaf=is_shard)`."""
    return isinstance(leaf, Shard)


def whole(params: Any) -> Any:
    """Parameters with every `Shard` among them gathered."""
    return nn.meta.unbox(params)


def tied(params: Any, to: Any) -> Any:
    """Within a loop: parameters whose `Shard`s wait for `to`, so that XLA gathers none of them before the loop."""
    if not any(map(is_shard, jax.tree.leaves(params, is_leaf=is_shard))):
        return params
    return jax.lax.optimization_barrier((params, to))[0]
