"""What the options of a published model mean here: a section of a config."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import flax.linen as nn

from diffax import components
from diffax import config as configs
from diffax.components import In, spec


@dataclasses.dataclass(frozen=True)
class Ids:
    """The sizes of a tokenizer whose vocabulary is not needed.

    Attributes:
      length: ids of a caption.
      vocab_size: ids are 0 .. vocab_size - 1.
    """

    length: Annotated[int, In(1, 4096)] = 77
    vocab_size: Annotated[int, In(1, 10**7)] = 49408


IDS = f"{__name__}:{Ids.__name__}"  # in a config


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """The sizes of a CLIP whose parameters are not needed.

    Attributes:
      features: size of its embeddings.
      text_width: width of the sequence that its text encoder makes.
      tokenizer: of its captions.
      shape: (H, W, C) of its pictures.
      name: of its section.
    """

    features: int
    text_width: int
    tokenizer: Ids
    shape: tuple[int, ...] = (1, 1, 3)
    name: str = "clip"

    noised = False  # its pictures are clean

    def embed_text(self, params: Any, ids: Any) -> NoReturn:
        """Not possible without parameters."""
        raise NotImplementedError("only the sizes of this CLIP are known")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A published model as a section of a config.

    Attributes:
      section: of a model ('diffusion', 'classifier' or 'clip'); what the options leave open is at its defaults.
      out_channels: of the network's output.
      attention_order: of the checkpoint, 'legacy' or 'new', see `openai.table`.
      clip: of a model that reads captions or pictures by a CLIP: the CLIP's sizes.
    """

    section: Any
    out_channels: int = 0
    attention_order: str = "legacy"
    clip: ClipSizes | None = None

    @property
    def net(self) -> Any:
        """The section of the network."""
        return self.section.net

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of the pictures; (D,) of embeddings."""
        return tuple(self.section.shape)

    @property
    def conditions(self) -> Any:
        """The sections of the conditions, by name."""
        return self.section.get("conditions", {})

    def model(self) -> Any:
        """The model.

        Raises:
          ValueError: its options do not fit together.
        """
        made = components.build(
            self.section, "model", path=self.section["name"], refer=lambda name, path: self.clip, name="base", number=0
        )
        network = getattr(made.net, "net", None)
        if network is None or getattr(network, "out_channels", None) in (None, self.out_channels):
            return made
        return dataclasses.replace(made, net=made.net.clone(net=network.clone(out_channels=self.out_channels)))

    def build(self) -> nn.Module:
        """The network and the encoders of its conditions."""
        return self.model().net


def image_model(
    net: Mapping[str, Any],
    *,
    shape: Sequence[int],
    out_channels: int,
    conditions: Mapping[str, Mapping[str, Any]],
    attention_order: str = "legacy",
    clip: ClipSizes | None = None,
) -> Architecture:
    """The architecture of a diffusion model of pictures.

    Args:
      net: the section of its network.
      shape: (H, W, C) of its pictures.
      out_channels: of its output; above C the variance is learned.
      conditions: their sections by name, in the order of their channels.
      attention_order: see `Architecture`.
      clip: see `Architecture`.
    """
    learned = {"variance": "learned_range", "loss": spec("loss", "hybrid")} if out_channels > shape[-1] else {}
    made = components.each("condition", **conditions)
    section = configs.section("diffusion", shape=tuple(shape), net=net, conditions=made, **learned)
    return Architecture(section, out_channels, attention_order, clip)


def refuse(model: str, option: str, value: Any, why: str) -> NoReturn:
    """Raises the ValueError for an option that has no counterpart here."""
    raise ValueError(f"{model} with {option}={value!r} cannot be converted; {why}")
