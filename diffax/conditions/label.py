"""A class label, embedded and added to the timestep embedding (Improved DDPM, ADM)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, component
from diffax.conditions.base import Condition, Offer, one_each
from diffax.errors import UserError
from diffax.networks.context import Context

Array = jax.Array


class LabelEncoder(nn.Module):
    """One vector a class.

    Attributes:
      num_labels: labels are 0 .. num_labels - 1.
      features: size of the vector.
    """

    num_labels: int
    features: int

    @nn.compact
    def __call__(self, label: Array, z: Array) -> Context:
        """label: [B] integers. A label out of range gives NaN."""
        del z
        # torch.nn.Embedding starts as N(0, 1)
        init = nn.initializers.normal(1.0)
        return Context(vector=nn.Embed(self.num_labels, self.features, embedding_init=init, name="embed")(label))


@component("condition", "label")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Condition):
    """A class: an integer from 0. Where conditions are dropped, one label more stands for none.

    Attributes:
      num_classes: how many.
    """

    num_classes: Annotated[int, In(1, 10**7)] = 1000

    @property
    def can_drop(self) -> bool:
        return True

    @property
    def encoded_once(self) -> bool:
        return False  # an embedding costs nothing

    def encoder(self, net: nn.Module) -> nn.Module:
        return LabelEncoder(self.num_classes + self.droppable, net.vector_width, name=self.name)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.int32)

    def null(self, params: Mapping[str, Any]) -> np.ndarray:
        return np.int32(self.num_classes)

    def check_data(self, source: Any) -> None:
        if self.name not in source.keys:
            raise UserError(
                f"the condition {self.name!r} needs labels, and the data have none; {source.name}; sort the pictures "
                "into one folder for each class"
            )
        count = len(source.class_names or ())
        if self.name == "label" and count > self.num_classes:
            raise UserError(
                f"the data have {count} classes, but num_classes={self.num_classes}; {source.name}; use "
                f"num_classes={count}"
            )

    def from_user(self, value: Any, n: int) -> np.ndarray:
        try:
            array = np.asarray(value)
            wrong = not np.issubdtype(array.dtype, np.integer) or array.ndim > 1
        except ValueError:
            wrong = True
        if wrong:
            raise UserError(f"{self.argument} is {value!r}; sample_fn; pass an integer, or a list of them")
        for v in np.ravel(array):
            if not 0 <= v < self.num_classes:
                raise UserError(
                    f"{self.argument} {v} is out of range; sample_fn; labels are 0 to {self.num_classes - 1}"
                )
        return one_each(self.argument, array.astype(np.int32), n, 0)

    def choose(self, n: int, offer: Offer) -> np.ndarray:
        """0, 1, ..., num_classes - 1, 0, 1, ... : [n]."""
        return np.arange(n, dtype=np.int32) % self.num_classes

    def captions(self, value: Any, class_names: Sequence[str]) -> list[str]:
        return [class_names[i] if i < len(class_names) else str(i) for i in np.ravel(value)]
