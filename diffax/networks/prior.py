"""The priors of DALL-E 2: transformers that make an image embedding of CLIP's from a caption (floor 0).

Ramesh et al. 2022, section 2.2. `Prior` denoises embeddings, and stands where a U-Net does; `CodePrior` makes one,
written as a row of codes, code by code. What they are told comes as the sequence of a `Context`.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.layers import Style, TransformerBlock, causal, dense, layer_norm, rematerialized, sinusoid
from diffax.networks.unet import Context

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

    width: int = 2048
    layers: int = 24
    heads: int = 32
    norm_eps: float = 1e-5
    kernel_init: str = "torch"
    dtype: str = "float32"
    remat: str = "none"
    final_norm: bool = True

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


class Prior(_Transformer):
    """The diffusion prior: a causal transformer whose last token is the answer (DALL-E 2, section 2.2).

    Its tokens are what it is told (the caption, then the text embedding), the clock, z, and a learned query. It is
    trained to predict the clean embedding.

    Attributes:
      features: size of the result, that of the embedding.
    """

    features: int = 768

    @nn.compact
    def __call__(self, z: Array, time: Array, context: Context, *, dropout_keys: Array | None = None) -> Array:
        """Reads the embedding z at noise level `time`.

        Args:
          z: [B, D].
          time: [B] float32, the clock as the schedule numbers it.
          context: its sequence [B, S, width], with or without a mask.
          dropout_keys: ignored; it has no dropout.

        Returns:
          [B, features] float32.
        """
        del dropout_keys
        head = self.style._replace(dtype="float32")
        clock = dense(head, self.width, name="time_0")(sinusoid(time, self.width))
        clock = dense(head, self.width, name="time_1")(nn.silu(clock))
        query = jnp.broadcast_to(self.parameter("query", self.width), clock.shape)
        own = jnp.stack([clock, dense(head, self.width, name="proj_in")(z), query], 1)
        h = jnp.concatenate([context.sequence, own], 1)
        batch, tokens, _ = h.shape
        visible = jnp.concatenate([_visible(context), jnp.ones((batch, 3), bool)], 1)
        # a padded place sees itself, so that a caption withheld leaves no query without a key
        mask = causal(tokens) & visible[:, None] | jnp.eye(tokens, dtype=bool)
        h = self.read(h + self.parameter("position", tokens, self.width), mask)
        return dense(head, self.features, name="proj_out")(h[:, -1])


class CodePrior(_Transformer):
    """The autoregressive prior: p(code n | those before, context) (DALL-E 2, section 2.2).

    The context's sequence (the encoded caption, the text embedding, the similarity wanted) comes first among the keys
    of every attention layer, its vector is added to every token. No code was published: the paper leaves open how the
    caption enters.

    Attributes:
      num_codes: codes are 0 .. num_codes - 1.
    """

    width: int = 1664
    layers: int = 24
    heads: int = 26
    num_codes: int = 1024

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
          [B, N, num_codes] float32, or [B, 1, num_codes].
        """
        del time, dropout_keys
        batch, length = codes.shape
        # one id more, for the start; a cast, since the example that initialises a network is of floats
        start = jnp.full((batch, 1), self.num_codes)
        before = jnp.concatenate([start, codes[:, :-1].astype(jnp.int32)], 1)
        position = self.parameter("position", length, self.width)
        visible = jnp.broadcast_to(_visible(context)[:, None], (batch, length, context.sequence.shape[1]))
        mask = jnp.concatenate([visible, jnp.broadcast_to(causal(length), (batch, length, length))], 2)
        if at is not None:
            before, mask = (jax.lax.dynamic_slice_in_dim(a, at, 1, axis=1) for a in (before, mask))
            position = jax.lax.dynamic_slice_in_dim(position, at, 1)
        embed = nn.Embed(self.num_codes + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="token")
        h = embed(before) + position
        if context.vector is not None:
            h = h + context.vector[:, None]
        if at is None:
            h = self.read(h, mask, context.sequence)
        else:
            h = self.read(h, mask, at=context.sequence.shape[1] + at)
        return dense(self.style._replace(dtype="float32"), self.num_codes, name="logits")(h)


def sample_codes(
    prior: CodePrior,
    params: Mapping,
    context: Context,
    keys: Array,
    *,
    withheld: Context | None = None,
    scale: Array | float = 1.0,
    temperature: float = 1.0,
) -> Array:
    """Draws rows of codes, code by code, as one `lax.scan`; keys and values of earlier codes are remembered.

    Args:
      prior: the network.
      params: its parameters.
      context: what it is told, of B rows.
      keys: [B] typed PRNG keys; row i depends on keys[i] alone.
      withheld: the context with its conditions withheld, for classifier-free guidance: the logits are
        withheld + scale (given - withheld).
      scale: of that, scalar or [B]; may be traced.
      temperature: divides the logits; 0 takes the most probable code.

    Returns:
      [B, N] int32.
    """
    if withheld is not None:
        context = jax.tree.map(lambda *pair: jnp.concatenate(pair), context, withheld)
    scale = jnp.reshape(jnp.asarray(scale, jnp.float32), (-1, 1))

    def choose_code(logits: Array, n: Array) -> Array:
        logits = logits[:, 0]
        if withheld is not None:
            given, without = jnp.split(logits, 2)
            logits = without + scale * (given - without)
        if not temperature:
            return jnp.argmax(logits, -1).astype(jnp.int32)

        def draw(key, row):
            return jax.random.categorical(jax.random.fold_in(key, n), row / temperature)

        return jax.vmap(draw)(keys, logits).astype(jnp.int32)

    def ask(codes: Array, cache: Mapping, at: Array | None = None) -> tuple[Array, Mapping]:
        rows = codes if withheld is None else jnp.concatenate([codes, codes])
        logits, state = prior.apply({"params": params, **cache}, rows, None, context, at=at, mutable=["cache"])
        return logits, state

    def step(carry, n):
        codes, cache = carry
        logits, cache = ask(codes, cache, n)
        return (codes.at[:, n].set(choose_code(logits, n)), cache), None

    length = nn.meta.unbox(params["position"]).shape[0]
    codes = jnp.zeros((len(keys), length), jnp.int32)
    logits, cache = ask(codes, {})  # of no code but the first; what the cache holds of others is overwritten in time
    codes = codes.at[:, 0].set(choose_code(logits, jnp.int32(0)))
    (codes, _), _ = jax.lax.scan(step, (codes, cache), jnp.arange(1, length))
    return codes
