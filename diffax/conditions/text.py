"""Captions: read by a transformer that is trained with the network (GLIDE), or as tokens (unCLIP's prior)."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import TRAINING, In, Of, component
from diffax.conditions.base import Condition, Offer, one_each
from diffax.conditions.tokenizers import LazyTokenizer
from diffax.errors import UserError
from diffax.networks.context import Context
from diffax.networks.layers import Style
from diffax.networks.transformer import Text as TextTransformer

Array = jax.Array


class TokenTable(nn.Module):
    """One vector a token (the prior of DALL-E 2, section 2.2).

    Attributes:
      style: of the layers.
      width: of a token's vector.
      vocab_size: token ids are 0 .. vocab_size - 1.
      length: tokens of a caption, padding included.
    """

    style: Style
    width: int
    vocab_size: int
    length: int

    @nn.compact
    def __call__(self, text: Array, z: Array) -> Context:
        """Embeds captions.

        Args:
          text: [B, length] integers; -1 is padding, which nothing attends to. A token out of range gives NaN.
          z: ignored.

        Returns:
          The sequence [B, length, width] and its mask [B, length].

        Raises:
          ValueError: captions of another length.
        """
        del z
        if text.shape[1:] != (self.length,):
            raise ValueError(f"'text' is {text.shape}, not (B, {self.length}); cut captions or pad them with -1")
        table = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="token")
        padded = text < 0
        return Context(sequence=table(jnp.where(padded, 0, text)).astype(self.style.dtype), mask=~padded)


def as_texts(argument: str, value: Any) -> tuple[list[str], bool]:
    """(texts, whether there is one for all) of a prompt or a list of prompts.

    Raises:
      UserError: it is neither, or an empty list.
    """
    if isinstance(value, str):
        return [value], True
    try:
        texts = list(value)
    except TypeError:
        texts = [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{argument} is {value!r}; sample_fn; pass a text, or a list of texts")
    if not texts:
        raise UserError(f"there are no prompts; sample_fn({argument}=[]); give at least one")
    return texts, False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captioned(Condition):
    """What conditions that come from a caption share: an argument `prompt`, given to devices as token ids."""

    @property
    def argument(self) -> str:
        return "prompt"

    @property
    def can_drop(self) -> bool:
        return True

    @property
    def encoded_once(self) -> bool:
        return True

    @property
    def ids(self) -> LazyTokenizer:
        """The tokenizer that reads the captions."""
        raise NotImplementedError

    def given_example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.ids.length,), jnp.int32)

    def check_data(self, source: Any) -> None:
        if not (set(source.keys) & {"caption"} or source.class_names):
            raise UserError(
                f"the condition {self.name!r} needs captions, and the data have none; {source.name}; see the data "
                "'captions'"
            )

    def columns(self) -> dict[str, tuple[str, Any]]:
        return {self.name: ("caption", self.ids)}

    def from_user(self, value: Any, n: int) -> np.ndarray:
        texts, one = as_texts(self.argument, value)
        ids = self.ids(texts)
        return one_each(self.argument, ids[0] if one else ids, n, 1)

    def count(self, value: Any) -> int | None:
        return None if isinstance(value, str) or not hasattr(value, "__len__") else len(value)

    def choose(self, n: int, offer: Offer) -> list[str]:
        prompts = list(offer.prompts) or list(offer.held_out(n)["caption"])
        return [prompts[i % len(prompts)] for i in range(n)]

    def captions(self, value: Any, class_names: Sequence[str]) -> list[str]:
        return [value] if isinstance(value, str) else list(value)


@component("condition", "text")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Captioned):
    """A caption, read by a transformer that is trained with the network (GLIDE, section 3.1).

    Attributes:
      tokenizer: caption -> ids.
      width: of the transformer.
      layers: number of its blocks.
      heads: attention heads of each.
      vocab_size: rows of the token table; 0: as many as the tokenizer has ids.
      final_norm: whether the output is normalised.
      padding_embedding: whether a padded position has an embedding of its own.
      rate: factor of the learning rate of the transformer, all but the projection of its output. At a rate at which a
        small U-Net learns in minutes, a transformer beside it first loses the difference between tokens.
    """

    tokenizer: Annotated[LazyTokenizer, Of("tokenizer", "glide")]
    width: Annotated[int, In(1, 2**16)] = 512
    layers: Annotated[int, In(1, 256)] = 16
    heads: Annotated[int, In(1, 1024)] = 8
    vocab_size: Annotated[int, In(0, 10**7)] = 0
    final_norm: bool = True
    padding_embedding: bool = True
    rate: Annotated[float, In(0, 10), TRAINING] = 1.0

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, {self.width}, got {self.heads}")
        if self.vocab_size and self.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size must be 0 or at least {self.tokenizer.vocab_size}, the tokenizer's, got {self.vocab_size}"
            )

    @property
    def ids(self) -> LazyTokenizer:
        return self.tokenizer

    @property
    def rates(self) -> Mapping[str, float]:
        return {} if self.rate == 1 else {"(?!proj/)": self.rate}

    def encoder(self, net: nn.Module) -> nn.Module:
        return TextTransformer(
            style=getattr(net, "style", Style()),
            features=net.vector_width,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            vocab_size=self.vocab_size or self.tokenizer.vocab_size,
            length=self.tokenizer.length,
            final_norm=self.final_norm,
            padding_embedding=self.padding_embedding,
            remat=getattr(net, "remat", "none"),
            name=self.name,
        )

    def example(self) -> jax.ShapeDtypeStruct:
        return self.given_example()

    def null(self, params: Mapping[str, Any]) -> np.ndarray:
        return np.full(self.tokenizer.length, -1, np.int32)


@component("condition", "tokens")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Captioned):
    """A caption as embedded tokens that the network itself attends to (the prior of DALL-E 2, section 2.2).

    Attributes:
      tokenizer: caption -> ids.
      vocab_size: rows of the token table; 0: as many as the tokenizer has ids.
    """

    tokenizer: Annotated[LazyTokenizer, Of("tokenizer", "clip")]
    vocab_size: Annotated[int, In(0, 10**7)] = 0

    @property
    def ids(self) -> LazyTokenizer:
        return self.tokenizer

    def encoder(self, net: nn.Module) -> nn.Module:
        return TokenTable(
            style=getattr(net, "style", Style()),
            width=net.vector_width,
            vocab_size=self.vocab_size or self.tokenizer.vocab_size,
            length=self.tokenizer.length,
            name=self.name,
        )

    def example(self) -> jax.ShapeDtypeStruct:
        return self.given_example()

    def null(self, params: Mapping[str, Any]) -> np.ndarray:
        return np.full(self.tokenizer.length, -1, np.int32)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      UserError: it cannot be read, or there are none.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts ({error}); --prompts={path}; one a line, UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"there are no prompts; --prompts={path}; write one a line")
    return prompts
