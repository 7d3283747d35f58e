"""What a frozen CLIP makes of pictures and captions (DALL-E 2, sections 2.1 and 2.2; karlo's released networks)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, Section, component
from diffax.conditions.base import Condition, Offer, one_each
from diffax.conditions.text import Captioned
from diffax.conditions.tokenizers import LazyTokenizer
from diffax.errors import UserError
from diffax.networks.context import Context
from diffax.networks.layers import Style, dense, kernel_init, layer_norm

Array = jax.Array
A_CLIP = Section(needs="embed_text", what="a CLIP")


def _expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape[1:] != shape:
        want = ", ".join(["B", *map(str, shape)])
        raise ValueError(f"{name!r} is {array.shape}, not ({want}); use the CLIP that the network was trained with")


# ---- encoders -------------------------------------------------------------------------------------------------------


class EmbeddingEncoder(nn.Module):
    """An embedding, projected to a vector, to tokens, or to both (DALL-E 2, section 2.1).

    Attributes:
      style: of the layers.
      size: of the embedding.
      features: size of the vector, added to the timestep embedding; 0: no vector.
      tokens: how many; 0: no sequence.
      width: of a token.
      learned_null: whether the input says of each embedding if it is present, and a learned one stands for it if not.
    """

    style: Style
    size: int
    features: int = 0
    tokens: int = 0
    width: int = 0
    learned_null: bool = False

    @nn.compact
    def __call__(self, embedding: Array | Mapping[str, Array], z: Array) -> Context:
        """Projects embeddings.

        Args:
          embedding: [B, size]; with a learned null {'embedding': [B, size], 'present': [B] bool}.
          z: ignored.

        Returns:
          The vector [B, features] float32 and the sequence [B, tokens, width].

        Raises:
          ValueError: another size.
        """
        del z
        if self.learned_null:
            _expect(self.name, embedding["embedding"], (self.size,))
            null = self.param("null", nn.initializers.zeros, (self.size,))
            embedding = jnp.where(embedding["present"][:, None], embedding["embedding"], null)
        _expect(self.name, embedding, (self.size,))
        vector = sequence = None
        if self.features:
            vector = dense(self.style._replace(dtype="float32"), self.features, name="vector")(embedding)
        if self.tokens:
            shape, init = (self.tokens, self.width), kernel_init(self.style)
            sequence = nn.DenseGeneral(shape, dtype=self.style.dtype, kernel_init=init, name="tokens")(embedding)
        return Context(vector=vector, sequence=sequence)


class FeaturesEncoder(nn.Module):
    """The sequence that CLIP's text encoder makes of a caption, projected (karlo's prior and decoder).

    Attributes:
      style: of the layers.
      length: tokens of a caption, padding included.
      size: width of the features.
      width: of the projection.
      norm: whether that is normalised.
    """

    style: Style
    length: int
    size: int
    width: int
    norm: bool = False

    @nn.compact
    def __call__(self, text: Mapping[str, Array], z: Array) -> Context:
        """Projects {'features': [B, length, size], 'mask': [B, length] bool}; returns the sequence and its mask.

        Raises:
          ValueError: another length or size.
        """
        del z
        _expect(self.name, text["features"], (self.length, self.size))
        h = jnp.where(text["mask"][..., None], text["features"], 0.0)  # at the padding nothing counts
        h = dense(self.style, self.width, name="proj")(h)
        if self.norm:
            h = layer_norm(self.style, name="norm")(h)
        return Context(sequence=h, mask=text["mask"])


# ---- conditions -----------------------------------------------------------------------------------------------------


@component("condition", "image_embedding")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEmbedding(Condition):
    """The CLIP embedding of the picture itself, which a decoder inverts (DALL-E 2, section 2.1).

    Attributes:
      clip: section of the CLIP.
      tokens: extra tokens of context that are made of it.
      width: of those tokens; that of the other sequences that the network attends to.
    """

    clip: Annotated[Any, A_CLIP] = "clip"
    tokens: Annotated[int, In(1, 256)] = 4
    width: Annotated[int, In(1, 2**16)] = 1536

    @property
    def sections(self) -> tuple[str, ...]:
        return (self.clip.name,)

    @property
    def can_drop(self) -> bool:
        return True

    @property
    def encoded_once(self) -> bool:
        return True

    @property
    def smallest(self) -> tuple[int, int]:
        return self.clip.shape[:2]

    def check(self, model: Any) -> None:
        if self.clip.noised:
            name = self.clip.name
            raise ValueError(f"the CLIP {name} must be one of clean pictures; set config.{name}.noised to false")
        height, width, channels = self.clip.shape
        if len(self.shape) == 3 and (self.shape[0] * width != self.shape[1] * height or self.shape[2] != channels):
            raise ValueError(
                f"shape must have the proportions and channels of the CLIP {self.clip.name}, {self.clip.shape}, for "
                f"the condition {self.name!r}, got {self.shape}"
            )

    def encoder(self, net: nn.Module) -> nn.Module:
        return EmbeddingEncoder(
            style=getattr(net, "style", Style()),
            size=self.clip.features,
            features=net.vector_width,
            tokens=self.tokens,
            width=self.width,
            learned_null=True,
            name=self.name,
        )

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "embedding": jax.ShapeDtypeStruct((self.clip.features,), jnp.float32),
            "present": jax.ShapeDtypeStruct((), jnp.bool_),
        }

    def null(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"embedding": np.zeros(self.clip.features, np.float32), "present": np.zeros((), bool)}

    def columns(self) -> dict[str, tuple[str, Any]]:
        return {}  # made of the picture, or read beside it

    def check_data(self, source: Any) -> None:
        del source

    def prepare(self, params: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Any]:
        found = self.clip.image_embedding(params, batch)
        return {self.name: {"embedding": found, "present": jnp.ones(len(found), bool)}}

    def from_user(self, value: Any, n: int) -> dict[str, np.ndarray]:
        if value is None:
            if not self.droppable:
                raise UserError(f"training never dropped {self.name!r}; sample_fn({self.argument}=None); pass one")
            return jax.tree.map(lambda a: one_each(self.argument, a, n, a.ndim), self.null({}))
        array, size = np.asarray(value), self.clip.features
        if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or array.shape[-1] != size:
            raise UserError(
                f"{self.argument} is {array.shape}; sample_fn; pass [{size}] or [n, {size}], as sample_fn.embed gives"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{self.argument} is not finite; sample_fn; pass what sample_fn.embed(image) gives")
        rows = one_each(self.argument, array.astype(np.float32), n, 1)
        return {"embedding": rows, "present": np.ones(n, bool)}

    def count(self, value: Any) -> int | None:
        return len(value) if np.ndim(value) == 2 else None

    def made(self, out: Array, given: Any, reached: Any) -> dict[str, Array]:
        return {"embedding": out, "present": jnp.ones(len(out), bool)}

    def choose(self, n: int, offer: Offer) -> np.ndarray:
        """Embeddings of held-out pictures, in turn."""
        image = offer.held_out(n)["image"]
        return offer.embed(image)[np.arange(n) % len(image)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfCaption(Captioned):
    """What CLIP's text encoder makes of a caption.

    Attributes:
      clip: section of the CLIP.
    """

    clip: Annotated[Any, A_CLIP] = "clip"

    @property
    def sections(self) -> tuple[str, ...]:
        return (self.clip.name,)

    @property
    def ids(self) -> LazyTokenizer:
        return self.clip.tokenizer

    def embed(self, params: Mapping[str, Any], ids: Array) -> Any:
        """The encoder's input, of ids [B, L]."""
        raise NotImplementedError

    def null(self, params: Mapping[str, Any]) -> Any:
        if self.clip.name not in params:  # the CLIP is yet to be loaded
            return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), self.example())
        return jax.tree.map(lambda a: a[0], self.embed(params, jnp.asarray(self.ids.empty)[None]))

    def prepare(self, params: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Any]:
        return {self.name: self.embed(params, batch[self.name])}

    def in_sampling(self, given: Array, keys: Array, params: Mapping[str, Any]) -> Any:
        return self.embed(params, given)


@component("condition", "text_embedding")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEmbedding(OfCaption):
    """The CLIP embedding of the caption (the prior of DALL-E 2, section 2.2; karlo's decoder).

    Attributes:
      clip: section of the CLIP.
      enters: as a vector, added to the timestep embedding, or as one more token.
      width: of that token; 0: that of the network's own.
    """

    enters: Literal["vector", "token"] = "vector"
    width: Annotated[int, In(0, 2**16)] = 0

    def encoder(self, net: nn.Module) -> nn.Module:
        how = {"features": net.vector_width}
        if self.enters == "token":
            how = {"tokens": 1, "width": self.width or net.vector_width}
        style = getattr(net, "style", Style())
        return EmbeddingEncoder(style=style, size=self.clip.features, **how, name=self.name)

    def example(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.clip.features,), jnp.float32)

    def embed(self, params: Mapping[str, Any], ids: Array) -> Array:
        return self.clip.embed_text(params[self.clip.name], ids).embedding


@component("condition", "text_features")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeatures(OfCaption):
    """The sequence that CLIP's text encoder makes of the caption (karlo's prior and decoder).

    Attributes:
      clip: section of the CLIP.
      width: of the projection; 0: that of the network's own tokens.
      norm: whether the projection is normalised.
    """

    width: Annotated[int, In(0, 2**16)] = 0
    norm: bool = False

    def encoder(self, net: nn.Module) -> nn.Module:
        return FeaturesEncoder(
            style=getattr(net, "style", Style()),
            length=self.ids.length,
            size=self.clip.text_width,
            width=self.width or net.vector_width,
            norm=self.norm,
            name=self.name,
        )

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "features": jax.ShapeDtypeStruct((self.ids.length, self.clip.text_width), jnp.float32),
            "mask": jax.ShapeDtypeStruct((self.ids.length,), jnp.bool_),
        }

    def embed(self, params: Mapping[str, Any], ids: Array) -> dict[str, Array]:
        found = self.clip.embed_text(params[self.clip.name], ids)
        return {"features": found.features, "mask": found.mask}
