"""A network and the encoders of its conditions, as one module."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from diffax.networks.context import Context, merge

Array = jax.Array


class Conditioned(nn.Module):
    """A network and the encoders that feed it.

    Attributes:
      net: the network, whose parameters are called 'net'.
      encoders: pairs (name of the condition, module); a module's parameters bear that name. Planes are concatenated to
        z in this order (GLIDE: 'inpaint' before 'low_res'), and so are sequences.
    """

    # otherwise the parameters of an encoder would be called encoders_0_1
    preserve_adopted_names: ClassVar[bool] = True

    net: nn.Module
    encoders: tuple[tuple[str, nn.Module], ...] = ()

    @nn.compact
    def __call__(
        self, z: Array, time: Array | None, conditions: Mapping[str, Any], *, dropout_keys: Array | None = None
    ) -> Array:
        """Computes the output at z, noise level `time`, under conditions.

        Args:
          z: [B, H, W, C] float32; of a prior, [B, D], or codes [B, N].
          time: [B] float32.
          conditions: one input for each encoder, and no more; or in its place what `encode` made of it.
          dropout_keys: [B] typed PRNG keys; None: no dropout.

        Returns:
          What the network returns.

        Raises:
          ValueError: a condition is missing or unknown.
        """
        names = [name for name, _ in self.encoders]
        for name in names:
            if name not in conditions:
                raise ValueError(f"condition {name!r} is missing; this network has {names}")
        contexts = self.encode(conditions, z)
        return self.net(z, time, merge([contexts[name] for name in names]), dropout_keys=dropout_keys)

    def encode(self, conditions: Mapping[str, Any], z: Array) -> dict[str, Context]:
        """The contexts of some conditions: to be called once where the network runs at many noise levels.

        `network.apply({'params': params}, conditions, z, method='encode')`; what is encoded already stays as it is.

        Args:
          conditions: inputs by name.
          z: [B, ...], whose shape alone matters.

        Returns:
          {name: context}, for `__call__`.

        Raises:
          ValueError: a condition is unknown.
        """
        modules = dict(self.encoders)
        for name in conditions:
            if name not in modules:
                raise ValueError(f"condition {name!r} is unknown; this network has {[*modules]}")
        return {name: c if isinstance(c, Context) else modules[name](c, z) for name, c in conditions.items()}
