"""Of several samples the one that fits its caption best (DALL-E 2, section 2.2)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffax.models import base

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class BestOf:
    """A generator of embeddings that makes `count` of each and keeps the nearest to the caption's embedding.

    All else is the generator's own.

    Attributes:
      generator: it has the condition 'text_embedding'.
      count: at least 2.
    """

    generator: Any
    count: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "generator":
            raise AttributeError(name)
        return getattr(self.generator, name)

    def resampled(self, choice: base.Sampling) -> "BestOf":
        """With another sampling grid or sampler."""
        return dataclasses.replace(self, generator=self.generator.resampled(choice))

    def with_frozen(self, params: Any) -> "BestOf":
        """With null values that frozen models make."""
        return dataclasses.replace(self, generator=self.generator.with_frozen(params))

    def sample(self, params, keys, given, *, scale=None, **how):
        """See `base.Generator.sample`."""
        repeat = functools.partial(jnp.repeat, repeats=self.count, axis=0)
        every = jax.vmap(lambda key: jax.random.split(key, self.count))(keys).reshape(-1)
        scale = scale if scale is None or not jnp.ndim(scale) else repeat(scale)
        out = self.generator.sample(params, every, jax.tree.map(repeat, given), scale=scale, **how)
        condition = self.generator.conditions["text_embedding"]
        return nearest(out, condition.in_sampling(given["text_embedding"], keys, params))


def nearest(embeddings: Array, wanted: Array) -> Array:
    """[B, E]: of several embeddings [B * N, E] of each caption the one whose product with `wanted` is the largest."""
    candidates = embeddings.reshape(len(wanted), -1, wanted.shape[-1])
    best = jnp.argmax(jnp.einsum("bne,be->bn", candidates, wanted, precision="highest"), axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]


def best_of(generator: Any, count: int) -> Any:
    """The generator, or for a count above 1 the best of its samples.

    Raises:
      ValueError: there is no caption's embedding to compare with.
    """
    if count == 1:
        return generator
    if "text_embedding" not in generator.conditions or generator.output != "image_embedding":
        raise ValueError("candidates must be 1 without the condition 'text_embedding' to compare an embedding with")
    return BestOf(generator, count)
