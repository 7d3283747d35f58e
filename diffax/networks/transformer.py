"""The text transformer of GLIDE, trained with the U-Net that it conditions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.context import Context
from diffax.networks.layers import Style, TransformerBlock, dense, layer_norm, rematerialized

Array = jax.Array


class Text(nn.Module):
    """A caption, read by a transformer without a mask (GLIDE, section 3.1; released code).

    The condition is one array of token ids, and -1 is padding: so the mask cannot contradict the tokens, and a caption
    is dropped by -1 at every position. Padding takes part in attention, here and in the U-Net; in the last position,
    mostly padding, the vector is read.

    Attributes:
      style: compute dtype, initialiser of the kernels and eps of the norms.
      features: size of the vector, 4 * channels of the U-Net.
      width: of the transformer.
      layers: number of its blocks.
      heads: attention heads of each.
      vocab_size: token ids are 0 .. vocab_size - 1.
      length: tokens of a caption, padding included.
      final_norm: whether the output is normalised.
      padding_embedding: whether a padded position is an embedding of its own, or that of the last token (GPT-2's end of
        text, which GLIDE pads with) in its place.
      remat: what is computed again for the backward pass, see `layers.rematerialized`.
    """

    style: Style
    features: int
    width: int = 512
    layers: int = 16
    heads: int = 8
    vocab_size: int = 50257
    length: int = 128
    final_norm: bool = True
    padding_embedding: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, text: Array, z: Array) -> Context:
        """Reads captions.

        Args:
          text: [B, length] integers; -1 is padding. A token out of range gives NaN.
          z: ignored, as what a caption says depends neither on z nor on the timestep.

        Returns:
          The vector [B, features] float32, a projection of the last position, and the sequence [B, length, width].

        Raises:
          ValueError: captions of another length.
        """
        del z
        if text.shape[1:] != (self.length,):
            raise ValueError(f"'text' is {text.shape}, not (B, {self.length}); cut captions or pad them with -1")

        def positional(name: str) -> Array:
            return self.param(name, nn.initializers.normal(0.01), (self.length, self.width))

        # N(0, 1), the default of the released code's layer
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="token")
        padded = text < 0
        h = embed(jnp.where(padded, self.vocab_size - 1, text)) + positional("position")
        if self.padding_embedding:
            h = jnp.where(padded[..., None], positional("padding"), h)
        h = h.astype(self.style.dtype)
        block = rematerialized(TransformerBlock, self.remat)
        for i in range(self.layers):
            h = block(self.style, self.heads, name=f"block_{i}")(h)
        if self.final_norm:
            h = layer_norm(self.style, name="norm_out")(h)
        head = self.style._replace(dtype="float32")
        # zero: at first a caption says nothing, where at random it would be noise to the U-Net, which would unlearn it
        return Context(vector=dense(head, self.features, zero=True, name="proj")(h[:, -1]), sequence=h)
