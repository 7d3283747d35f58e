"""Edits of the conditions on their way to a network in training (floor 2). Pure; each example has its own key."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffax.process import expand

Array = jax.Array


def drop(cond: Mapping[str, Array], keys: Array, *, rate: float, null: Mapping[str, Array]) -> dict[str, Array]:
    """Withholds the conditions of a share of the examples (classifier-free guidance, algorithm 1, line 3).

    All conditions that `null` names are withheld together, the others stay.

    Args:
      cond: conditions, [B, ...] each.
      keys: [B] typed PRNG keys.
      rate: probability that an example is trained without them (the paper's p_uncond).
      null: what stands for a withheld condition, one example's worth.

    Returns:
      The conditions, with the null value in place of those withheld.
    """
    withheld = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return {
        k: jnp.where(expand(withheld, v), jnp.asarray(null[k], v.dtype), v) if k in null else v for k, v in cond.items()
    }
