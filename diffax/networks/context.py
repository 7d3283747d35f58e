"""What a network reads besides z and the timestep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Context(NamedTuple):
    """Everything that a network reads besides z and the timestep.

    Attributes:
      vector: [B, 4 * channels], added to the timestep embedding; or None.
      sequence: [B, S, D], attended to by every attention block (text); or None.
      planes: [B, H, W, K], concatenated to z after its channels; or None.
      mask: [B, S] bool, which places of the sequence there are; None: all.
    """

    vector: Array | None = None
    sequence: Array | None = None
    planes: Array | None = None
    mask: Array | None = None


def merge(contexts: list[Context]) -> Context:
    """One context out of several: vectors are summed, sequences and planes concatenated."""

    def gather(field: str) -> list[Array]:
        return [part for part in (getattr(c, field) for c in contexts) if part is not None]

    vectors, sequences, planes, mask = gather("vector"), gather("sequence"), gather("planes"), None
    if gather("mask"):
        read = [c for c in contexts if c.sequence is not None]
        mask = [jnp.ones(c.sequence.shape[:2], bool) if c.mask is None else c.mask for c in read]
        mask = jnp.concatenate(mask, 1)
    return Context(
        mask=mask,
        vector=sum(vectors) if vectors else None,
        sequence=jnp.concatenate(sequences, 1) if sequences else None,
        planes=jnp.concatenate(planes, -1) if planes else None,
    )
