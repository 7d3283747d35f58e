"""Conditioners that read what CLIP makes of captions and pictures, for the networks of DALL-E 2 (floor 0).

Ramesh et al. 2022, sections 2.1 and 2.2; karlo's released networks differ where it is said. An array of floats says
NaN where there is nothing: at the padding of a caption, or at every place of a condition that is withheld.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.layers import Style, dense, kernel_init, layer_norm
from diffax.networks.unet import Context

Array = jax.Array
NOTHING = float("nan")


class ClipSizes(NamedTuple):
    """The CLIP whose outputs a network reads, and how a decoder reads them; the values are karlo's (ViT-L/14).

    Attributes:
      size: of its embeddings.
      width: of the sequence that its text encoder makes.
      length: of that sequence, in tokens.
      tokens: that a decoder makes of an image embedding.
      sequence_width: of those, and of the text, as a decoder attends to them; a trained text transformer has its own.
    """

    size: int = 768
    width: int = 768
    length: int = 77
    tokens: int = 4
    sequence_width: int = 1536


def _expect(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape[1:] != shape:
        want = ", ".join(["B", *map(str, shape)])
        raise ValueError(f"{name!r} is {array.shape}, not ({want}); use the CLIP that the network was trained with")


class ClipEmbedding(nn.Module):
    """An embedding of CLIP's, projected to the clock, to tokens, or to both (DALL-E 2, section 2.1).

    Attributes:
      style: of the layers.
      size: of the embedding.
      features: size of the vector, 4 * channels of the U-Net; 0: no vector.
      tokens: how many; 0: no sequence.
      width: of a token.
      learned_null: whether a vector is learned that stands for a withheld embedding; else it is zero.
    """

    style: Style
    size: int
    features: int = 0
    tokens: int = 0
    width: int = 0
    learned_null: bool = False

    null = NOTHING

    @nn.compact
    def __call__(self, embedding: Array, z: Array) -> Context:
        """Projects embeddings.

        Args:
          embedding: [B, size]; NaN where it is withheld.
          z: ignored.

        Returns:
          The vector [B, features] float32 and the sequence [B, tokens, width].

        Raises:
          ValueError: another size.
        """
        del z
        _expect(self.name, embedding, (self.size,))
        null = self.param("null", nn.initializers.zeros, (self.size,)) if self.learned_null else 0.0
        embedding = jnp.where(jnp.isnan(embedding), null, embedding)
        vector = sequence = None
        if self.features:
            vector = dense(self.style._replace(dtype="float32"), self.features, name="vector")(embedding)
        if self.tokens:
            shape, init = (self.tokens, self.width), kernel_init(self.style)
            sequence = nn.DenseGeneral(shape, dtype=self.style.dtype, kernel_init=init, name="tokens")(embedding)
        return Context(vector=vector, sequence=sequence)

    def example(self, z: Array) -> Array:
        return jnp.zeros((z.shape[0], self.size))


class ClipFeatures(nn.Module):
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

    null = NOTHING

    @nn.compact
    def __call__(self, features: Array, z: Array) -> Context:
        """Projects features.

        Args:
          features: [B, length, size]; NaN at the padding, which nothing attends to.
          z: ignored.

        Returns:
          The sequence [B, length, width] and its mask [B, length].

        Raises:
          ValueError: another length or size.
        """
        del z
        _expect(self.name, features, (self.length, self.size))
        padded = jnp.isnan(features).any(-1)
        h = dense(self.style, self.width, name="proj")(jnp.where(padded[..., None], 0.0, features))
        if self.norm:
            h = layer_norm(self.style, name="norm")(h)
        return Context(sequence=h, mask=~padded)

    def example(self, z: Array) -> Array:
        return jnp.zeros((z.shape[0], self.length, self.size))


class Tokens(nn.Module):
    """A caption as embedded tokens, to be read by the network itself (the prior of DALL-E 2, section 2.2).

    Attributes:
      style: of the layers.
      width: of a token.
      vocab_size: token ids are 0 .. vocab_size - 1.
      length: tokens of a caption, padding included.
    """

    style: Style
    width: int
    vocab_size: int
    length: int

    null = -1  # at every position: the empty caption

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

    def example(self, z: Array) -> Array:
        return jnp.full((z.shape[0], self.length), self.null, jnp.int32)


class Similarity(nn.Module):
    """How well the picture to come fits its caption: the bucket of their embeddings' product (DALL-E 2, section 2.2).

    With buckets at quantiles of the training data, the better half of the fits are the upper half of the buckets.

    Attributes:
      style: of the layers.
      buckets: numbers are 0 .. buckets - 1.
      width: of the token.
    """

    style: Style
    buckets: int
    width: int

    @nn.compact
    def __call__(self, similarity: Array, z: Array) -> Context:
        """similarity: [B] integers, `buckets` where it is withheld. Returns the sequence [B, 1, width]."""
        del z
        table = nn.Embed(self.buckets + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        return Context(sequence=table(similarity)[:, None].astype(self.style.dtype))

    def example(self, z: Array) -> Array:
        return jnp.zeros(z.shape[:1], jnp.int32)

    @property
    def null(self) -> int:
        return self.buckets
