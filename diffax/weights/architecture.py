"""What a published model's options mean here."""

from typing import Any, NamedTuple, NoReturn

import flax.linen as nn

from diffax import networks
from diffax.networks import clip


class Architecture(NamedTuple):
    """The arguments of `diffax.networks.build`, and the order of the checkpoint's attention.

    Attributes:
      net: fields of the network by name.
      shape: (H, W, C) of the images.
      takes: conditions that the network reads.
      num_classes: number of labels, if any.
      out_channels: channels of the output, or logits.
      attention_order: 'legacy' or 'new', see `openai.table`.
    """

    net: dict[str, Any]
    shape: tuple[int, int, int]
    takes: tuple[str, ...]
    num_classes: int
    out_channels: int
    attention_order: str = "legacy"

    def build(self) -> nn.Module:
        """The network."""
        if self.net["name"] == "clip":
            return clip.build({key: value for key, value in self.net.items() if key != "name"}, self.shape)
        return networks.build(
            self.net, shape=self.shape, takes=self.takes, num_classes=self.num_classes, out_channels=self.out_channels
        )


def refuse(model: str, option: str, value: Any, why: str) -> NoReturn:
    """Raises the ValueError for an option that has no counterpart here."""
    raise ValueError(f"{model} with {option}={value!r} cannot be converted; {why}")
