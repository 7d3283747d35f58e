"""The priors of DALL-E 2: transformers that make an image embedding of CLIP's from a caption.

Ramesh et al. 2022, section 2.2. `Prior` denoises embeddings, and stands where a U-Net does; `CodePrior` makes one,
written as a row of codes, code by code. Their conditions come as the sequence of a `Context`.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.components import RUNTIME, WIRED, In, component
from diffax.networks.context import Context
from diffax.networks.layers import Style, TransformerBlock, causal, dense, layer_norm, rematerialized, sinusoid

Array = jax.Array


def _visible(context: Context) -> Array:
    """[B, S] bool: the mask of the context's sequence, all true where it has none."""
    return jnp.ones(context.sequence.shape[:2], bool) if context.mask is None else context.mask


class _Transformer(nn.Module):
    """What both priors share.

    Attributes:
      width: of the tokens.
      layers: number of blocks.
      heads: attention heads of each.
      norm_eps, kernel_init, dtype: see `layers.Style`.
      remat: what is computed again for the backward pass, see `layers.rematerialized`.
      final_norm: whether the tokens are normalised after the last block.
    """

    width: Annotated[int, In(1, 2**16)] = 2048
    layers: Annotated[int, In(1, 256)] = 24
    heads: Annotated[int, In(1, 1024)] = 32
    norm_eps: Annotated[float, In(0, 1, above=True)] = 1e-5
    kernel_init: Literal["torch", "ho"] = "torch"
    dtype: Annotated[Literal["float32", "bfloat16"], RUNTIME] = "float32"
    remat: Annotated[Literal["none", "blocks"], RUNTIME] = "none"
    final_norm: bool = True

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError if it cannot make what has this shape."""
        if len(shape) != 1:
            raise ValueError(f"a prior makes a vector; shape is {tuple(shape)}, not one number")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, {self.width}, got {self.heads}")

    @property
    def vector_width(self) -> int:
        """Size of the tokens, and of a vector that is added to them."""
        return self.width

    @property
    def style(self) -> Style:
        return Style(norm_eps=self.norm_eps, kernel_init=self.kernel_init, dtype=self.dtype)

    def parameter(self, name: str, *shape: int) -> Array:
        """A learned position or token; deviation of karlo's code."""
        return self.param(name, nn.initializers.normal(0.01), shape)

    def read(self, h: Array, mask: Array, sequence: Array | None = None, at: Array | None = None) -> Array:
        """All blocks and the last norm: [B, T, width] -> [B, T, width] float32; see `TransformerBlock`."""
        block = rematerialized(TransformerBlock, self.remat)
        h = h.astype(self.dtype)
        for i in range(self.layers):
            h = block(self.style, self.heads, name=f"block_{i}")(h, mask, sequence, at)
        if not self.final_norm:
            return h.astype(jnp.float32)
        return layer_norm(self.style._replace(dtype="float32"), name="norm_out")(h)


@component("network", "prior")
class Prior(_Transformer):
    """The diffusion prior: a causal transformer whose last token is the answer (DALL-E 2, section 2.2).

    Its tokens are the conditions (the caption, then the text embedding), the timestep embedding, z, and a learned
    query. It is trained to predict the clean embedding.

    Attributes:
      out_channels: size of the result, that of the embedding.
    """

    out_channels: Annotated[int, WIRED] = 768

    @nn.compact
    def __call__(self, z: Array, time: Array, context: Context, *, dropout_keys: Array | None = None) -> Array:
        """Reads the embedding z at noise level `time`.

        Args:
          z: [B, D].
          time: [B] float32, as the schedule numbers it.
          context: its sequence [B, S, width], with or without a mask.
          dropout_keys: ignored; it has no dropout.

        Returns:
          [B, out_channels] float32.
        """
        del dropout_keys
        head = self.style._replace(dtype="float32")
        embedded = dense(head, self.width, name="time_0")(sinusoid(time, self.width))
        embedded = dense(head, self.width, name="time_1")(nn.silu(embedded))
        query = jnp.broadcast_to(self.parameter("query", self.width), embedded.shape)
        own = jnp.stack([embedded, dense(head, self.width, name="proj_in")(z), query], 1)
        h = jnp.concatenate([context.sequence, own], 1)
        batch, tokens, _ = h.shape
        visible = jnp.concatenate([_visible(context), jnp.ones((batch, 3), bool)], 1)
        # a padded place sees itself, so that a caption dropped leaves no query without a key
        mask = causal(tokens) & visible[:, None] | jnp.eye(tokens, dtype=bool)
        h = self.read(h + self.parameter("position", tokens, self.width), mask)
        return dense(head, self.out_channels, name="proj_out")(h[:, -1])


@component("network", "code_prior")
class CodePrior(_Transformer):
    """The autoregressive prior: p(code n | those before, context) (DALL-E 2, section 2.2).

    The context's sequence (the encoded caption, the text embedding, the similarity wanted) comes first among the keys
    of every attention layer, its vector is added to every token. No code was published: the paper leaves open how the
    caption enters.

    Attributes:
      out_channels: codes are 0 .. out_channels - 1.
    """

    width: Annotated[int, In(1, 2**16)] = 1664
    layers: Annotated[int, In(1, 256)] = 24
    heads: Annotated[int, In(1, 1024)] = 26
    out_channels: Annotated[int, WIRED] = 1024

    @nn.compact
    def __call__(
        self,
        codes: Array,
        time: Array | None,
        context: Context,
        *,
        dropout_keys: Array | None = None,
        at: Array | None = None,
    ) -> Array:
        """The logits of every code given those before it; or, with `at`, of one.

        Args:
          codes: [B, N] integers, of which the last does not matter. With `at`: [B, N] too, of which code at - 1 alone
            is read; earlier ones are in the collection 'cache', which a call without `at` has to fill.
          time: ignored; a code has no noise.
          context: its sequence [B, S, E], with or without a mask, and its vector [B, width] or None. With `at`, the
            sequence itself is in the cache.
          dropout_keys: ignored; it has no dropout.
          at: number of the code that is wanted, 1 .. N - 1; may be traced.

        Returns:
          [B, N, out_channels] float32, or [B, 1, out_channels].
        """
        del time, dropout_keys
        batch, length = codes.shape
        # one id more, for the start; a cast, since the example that initialises a network is of floats
        start = jnp.full((batch, 1), self.out_channels)
        before = jnp.concatenate([start, codes[:, :-1].astype(jnp.int32)], 1)
        position = self.parameter("position", length, self.width)
        visible = jnp.broadcast_to(_visible(context)[:, None], (batch, length, context.sequence.shape[1]))
        mask = jnp.concatenate([visible, jnp.broadcast_to(causal(length), (batch, length, length))], 2)
        if at is not None:
            before, mask = (jax.lax.dynamic_slice_in_dim(a, at, 1, axis=1) for a in (before, mask))
            position = jax.lax.dynamic_slice_in_dim(position, at, 1)
        embed = nn.Embed(self.out_channels + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="token")
        h = embed(before) + position
        if context.vector is not None:
            h = h + context.vector[:, None]
        if at is None:
            h = self.read(h, mask, context.sequence)
        else:
            h = self.read(h, mask, at=context.sequence.shape[1] + at)
        return dense(self.style._replace(dtype="float32"), self.out_channels, name="logits")(h)


def sample_codes(
    prior: CodePrior,
    params: Mapping,
    context: Context,
    keys: Array,
    *,
    dropped: Context | None = None,
    scale: Array | float = 1.0,
    temperature: float = 1.0,
) -> Array:
    """Draws rows of codes, code by code, as one `lax.scan`; keys and values of earlier codes are remembered.

    Args:
      prior: the network.
      params: its parameters.
      context: the encoded conditions, of B rows.
      keys: [B] typed PRNG keys; row i depends on keys[i] alone.
      dropped: the context with its conditions dropped, for classifier-free guidance: the logits are
        dropped + scale (given - dropped).
      scale: of that, scalar or [B]; may be traced.
      temperature: divides the logits; 0 takes the most probable code.

    Returns:
      [B, N] int32.
    """
    if dropped is not None:
        context = jax.tree.map(lambda *pair: jnp.concatenate(pair), context, dropped)
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (-1, 1))

    def choose_code(logits: Array, n: Array) -> Array:
        logits = logits[:, 0]
        if dropped is not None:
            given, without = jnp.split(logits, 2)
            logits = without + scale * (given - without)
        if not temperature:
            return jnp.argmax(logits, -1).astype(jnp.int32)

        def draw(key, row):
            return jax.random.categorical(jax.random.fold_in(key, n), row / temperature)

        return jax.vmap(draw)(keys, logits).astype(jnp.int32)

    def logits_of(codes: Array, cache: Mapping, at: Array | None = None) -> tuple[Array, Mapping]:
        rows = codes if dropped is None else jnp.concatenate([codes, codes])
        logits, state = prior.apply({"params": params, **cache}, rows, None, context, at=at, mutable=["cache"])
        return logits, state

    def step(carry, n):
        codes, cache = carry
        logits, cache = logits_of(codes, cache, n)
        return (codes.at[:, n].set(choose_code(logits, n)), cache), None

    length = nn.meta.unbox(params["position"]).shape[0]
    codes = jnp.zeros((len(keys), length), jnp.int32)
    logits, cache = logits_of(codes, {})  # of the first code alone; what the cache holds of others is overwritten
    codes = codes.at[:, 0].set(choose_code(logits, jnp.int32(0)))
    (codes, _), _ = jax.lax.scan(step, (codes, cache), jnp.arange(1, length))
    return codes
