"""CLIP (Radford et al. 2021) and the noised CLIP that guides GLIDE (Nichol et al. 2021)."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.components import RUNTIME, WIRED, Group, In, Length, component
from diffax.networks.layers import (
    ACTIVATIONS,
    REMATS,
    Style,
    TransformerBlock,
    causal,
    choose,
    kernel_init,
    layer_norm,
    rematerialized,
)

Array = jax.Array

# of the pixels that OpenAI's models were trained on, in [0, 1]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD = 0  # the token that stands where a caption has ended
DTYPES = ("float32", "bfloat16")


class Tower(nn.Module):
    """What both encoders are: a transformer, of which one position is projected.

    Attributes:
      style: compute dtype, initialiser of the kernels and eps of the norms.
      features: size E of the embedding.
      width: W of the transformer.
      layers: number of its blocks.
      heads: attention heads of each.
      head_channels: channels of a head; 0: W / heads.
      hidden: width of a block's hidden layer; 0: 4 W.
      activation: key of `layers.ACTIVATIONS`; 'quick_gelu' in OpenAI's models, 'gelu' in GLIDE's.
      remat: what is computed again for the backward pass, see `layers.rematerialized`.
    """

    style: Style = Style()
    features: int = 512
    width: int = 512
    layers: int = 12
    heads: int = 8
    head_channels: int = 0
    hidden: int = 0
    activation: str = "quick_gelu"
    remat: str = "none"

    def blocks(self, style: Style, h: Array, mask: Array | None = None, **init) -> Array:
        """[B, T, W] -> [B, T, W] in the compute dtype."""
        block = rematerialized(TransformerBlock, self.remat)
        for i in range(self.layers):
            options = {"head_channels": self.head_channels, "name": f"block_{i}"} | init
            h = block(style, self.heads, self.activation, self.hidden, **options)(h, mask)
        return h

    def norm_out(self, h: Array) -> Array:
        """The last norm: [..., W] -> [..., W] float32."""
        return layer_norm(self.style._replace(dtype="float32"), name="norm_out")(h)

    def project(self, h: Array) -> Array:
        """[B, W] -> [B, E] float32, without a bias."""
        return nn.Dense(self.features, use_bias=False, kernel_init=self.table_init(), name="proj")(h)

    def table_init(self) -> nn.initializers.Initializer:
        """N(0, 1/W): of the projection, and of what is added to patches."""
        return nn.initializers.normal(self.width**-0.5)


class ImageEncoder(Tower):
    """A vision transformer; its slot 0, before the patches, becomes the embedding.

    In slot 0 stands one learned vector, or in the noised CLIP a vector for each step of the noise schedule.

    Attributes:
      shape: (H, W, C) of the images.
      patch: side of a patch in pixels; divides H and W.
      times: rows of the table of steps, numbered from 0; 0: CLIP for clean images, which reads no time.
      mean, std: of each channel, for pixels in [0, 1].
    """

    width: int = 768
    heads: int = 12
    shape: tuple[int, int, int] = (224, 224, 3)
    patch: int = 16
    times: int = 0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @nn.compact
    def __call__(self, image: Array, time: Array | None = None) -> Array:
        """Embeds images.

        Args:
          image: [B, H, W, C] floats, [-1, 1] where they are clean.
          time: [B], as the schedule numbers it, rounded to a step 0 .. times - 1; out of this range gives NaN. None for
            clean images.

        Returns:
          [B, features] float32, not normalised.

        Raises:
          ValueError: images of another shape; a time where there is no table, or none where there is one.
        """
        if image.shape[1:] != tuple(self.shape):
            raise ValueError(f"images are {image.shape[1:]}, not {tuple(self.shape)}; resize them or change the shape")
        if (time is None) == bool(self.times):
            raise ValueError(
                "this CLIP was made for noisy images; pass their time"
                if self.times
                else "this CLIP was made for clean images and reads no time; set times for a noised CLIP"
            )
        pixels = ((image + 1) / 2 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        h = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            use_bias=False,
            dtype=self.style.dtype,
            kernel_init=kernel_init(self.style),
            name="patch",
        )(pixels)
        h = h.reshape(h.shape[0], -1, self.width)
        slot = jnp.broadcast_to(self._slot(time), (h.shape[0], self.width))
        h = jnp.concatenate([slot[:, None], h], 1)
        h = h + self.param("position", self.table_init(), h.shape[1:])
        h = self.blocks(self.style, layer_norm(self.style, name="norm_in")(h))
        return self.project(self.norm_out(h[:, 0]))

    def _slot(self, time: Array | None) -> Array:
        if time is None:
            return self.param("class", self.table_init(), (self.width,))
        steps = self.param("time", self.table_init(), (self.times, self.width))
        index = jnp.rint(time).astype(jnp.int32)
        return steps.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def example(self, batch: int = 1) -> tuple[Array, Array | None]:
        """Black images, and times if it reads them, to call `init(rng, *inputs)` with."""
        return jnp.full((batch, *self.shape), -1.0), jnp.zeros((batch,)) if self.times else None


class TextEncoder(Tower):
    """A causal transformer; the last position of a caption becomes the embedding.

    The condition is one array of token ids, as in `networks.transformer`: -1 is padding, which is read as token 0.

    Attributes:
      vocab_size: token ids are 0 .. vocab_size - 1.
      length: tokens of a caption, padding included.
    """

    vocab_size: int = 49408
    length: int = 77

    @nn.compact
    def __call__(self, text: Array) -> tuple[Array, Array]:
        """Embeds captions.

        Args:
          text: [B, length] integers; -1 is padding, after the caption. A token out of range gives NaN.

        Returns:
          The embedding [B, features] float32, not normalised, read at the last position that is not padding (the
          first one of a caption of padding alone); and the sequence after the last norm, [B, length, width] float32.

        Raises:
          ValueError: captions of another length.
        """
        if text.shape[1:] != (self.length,):
            raise ValueError(f"captions are {text.shape}, not (B, {self.length}); cut them or pad them with -1")
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), name="token")
        position = self.param("position", nn.initializers.normal(0.01), (self.length, self.width))
        h = embed(jnp.where(text < 0, PAD, text)) + position
        # each of the 2 * layers terms that are summed starts smaller (Radford et al. 2021, released code)
        gains = (1 / (2 * self.layers), 1 / 2, 2 / self.layers)
        style = self.style._replace(kernel_init="clip")
        # padding needs no mask: what comes before it does not see it
        h = self.blocks(style, h.astype(style.dtype), causal(self.length), gains=gains)
        h = self.norm_out(h)
        last = jnp.max(jnp.where(text < 0, 0, jnp.arange(self.length)), 1)
        return self.project(jnp.take_along_axis(h, last[:, None, None], 1)[:, 0]), h

    def example(self, batch: int = 1) -> tuple[Array]:
        """Captions without a word, to call `init(rng, *inputs)` with."""
        return (jnp.full((batch, self.length), -1, jnp.int32),)


class CLIP(nn.Module):
    """Both encoders, and the scale of their cosines.

    Attributes:
      image: the image encoder.
      text: the text encoder.
    """

    image: ImageEncoder
    text: TextEncoder

    def setup(self):
        """Makes the scale, which both encoders share."""
        # exp of it multiplies the cosines; 0.07 is CLIP's first temperature
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(0.07)), ())

    def __call__(self, image: Array, text: Array, time: Array | None = None) -> tuple[Array, Array, Array]:
        """See `encode_image` and `encode_text`. Returns the embeddings [B, E] of both, and the log of the scale []."""
        return self.encode_image(image, time), self.encode_text(text)[0], self.logit_scale

    def encode_image(self, image: Array, time: Array | None = None) -> Array:
        """[B, H, W, C] in [-1, 1], and their time [B] if it is a noised CLIP -> [B, E], not normalised."""
        return self.image(image, time)

    def encode_text(self, text: Array) -> tuple[Array, Array]:
        """[B, L] token ids, -1 for padding -> embedding [B, E], not normalised, and sequence [B, L, W]."""
        return self.text(text)

    def example(self, batch: int = 1) -> tuple[Array, Array, Array | None]:
        """Black images, captions without a word, and times if it reads them, to call `init(rng, *inputs)` with."""
        image, time = self.image.example(batch)
        return image, *self.text.example(batch), time


def build(options: Mapping, shape: tuple[int, int, int]) -> CLIP:
    """The CLIP that a config describes.

    Args:
      options: features, activation, dtype ('float32' or 'bfloat16') and remat, which both encoders share; and
        mappings `image` (width, layers, heads, head_channels, hidden, patch, times, mean, std) and `text` (width,
        layers, heads, head_channels, hidden, vocab_size, length), each with an activation of its own if it has
        another. What is left out is that of ViT-B/16.
      shape: (H, W, C) of the images.

    Returns:
      The network; `init(rng, *network.example())` makes its parameters.

    Raises:
      ValueError: an unknown option, or options that do not fit together.
    """
    options = dict(options)
    towers = {"image": (ImageEncoder, {"shape": tuple(shape)}), "text": (TextEncoder, {})}
    own = {name: dict(options.pop(name, {})) for name in towers}
    shared = {"features": 512, "activation": "quick_gelu", "dtype": "float32", "remat": "none"}
    for key in options:
        choose(dict.fromkeys([*shared, *towers]), key, "net option")
    shared |= options
    for key, names in {"activation": ACTIVATIONS, "dtype": DTYPES, "remat": REMATS}.items():
        choose(dict.fromkeys(names), shared[key], f"{key}")
    shared["style"] = Style(dtype=shared.pop("dtype"))
    encoders = {}
    for name, (module, given) in towers.items():
        fields = {*module.__dataclass_fields__} - {"parent", "name", *shared, *given} | {"activation"}
        for key in own[name]:
            choose(dict.fromkeys(sorted(fields)), key, f"{name} option")
        values = {key: tuple(v) if isinstance(v, list | tuple) else v for key, v in own[name].items()}
        if "activation" in values:
            choose(ACTIVATIONS, values["activation"], f"{name}.activation")
        encoders[name] = module(**shared | values, **given)
    network = CLIP(**encoders)
    _check(network)
    return network


def _check(network: CLIP) -> None:
    """Raises a ValueError if the options of `network` do not fit together."""
    image, text = network.image, network.text
    at_least_1 = {
        "features": image.features,
        "image.patch": image.patch,
        "text.vocab_size": text.vocab_size,
        "text.length": text.length,
    }
    for name, tower in (("image", image), ("text", text)):
        at_least_1 |= {f"{name}.{key}": getattr(tower, key) for key in ("width", "layers", "heads")}
    for name, value in at_least_1.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name, tower in (("image", image), ("text", text)):
        if not tower.head_channels and tower.width % tower.heads:
            raise ValueError(
                f"{name}.heads {tower.heads} does not divide {name}.width {tower.width}; change one of them"
            )
        if tower.head_channels < 0:
            raise ValueError(f"{name}.head_channels is {tower.head_channels}; use a number, or 0 for width / heads")
        if tower.hidden < 0:
            raise ValueError(f"{name}.hidden is {tower.hidden}; use a width, or 0 for 4 times that of the tokens")
    if image.shape[0] % image.patch or image.shape[1] % image.patch:
        raise ValueError(f"image.patch {image.patch} does not divide images of {image.shape}; change one of them")
    if image.times < 0:
        raise ValueError(f"image.times is {image.times}; use the number of steps, or 0 for clean images")
    for name, values in (("mean", image.mean), ("std", image.std)):
        if len(values) != image.shape[2]:
            raise ValueError(f"image.{name} has {len(values)} numbers; use {image.shape[2]}, one per channel")
    if min(image.std) <= 0:
        raise ValueError(f"image.std is {image.std}; all must be positive")


# ---- as a component -------------------------------------------------------------------------------------------------


def image_tower(
    *,
    width: Annotated[int, In(1, 2**16)] = 768,
    layers: Annotated[int, In(1, 256)] = 12,
    heads: Annotated[int, In(1, 1024)] = 12,
    head_channels: Annotated[int, In(0, 2**16)] = 0,
    hidden: Annotated[int, In(0, 2**18)] = 0,
    activation: Literal["", "gelu", "quick_gelu"] = "",
    patch: Annotated[int, In(1, 1024)] = 4,
    mean: Annotated[tuple[float, ...], Length(1, 64)] = MEAN,
    std: Annotated[tuple[float, ...], In(0, above=True), Length(1, 64)] = STD,
) -> None:
    """The image encoder.

    Args:
      width: of its tokens.
      layers: number of blocks.
      heads: attention heads of each.
      head_channels: width of a head; 0: that of the tokens, divided by heads.
      hidden: width of a block's hidden layer; 0: 4 times that of the tokens.
      activation: of the hidden layers; '': that of the network.
      patch: side of the patches that become tokens.
      mean: of the channels, in [0, 1], which is subtracted.
      std: of the channels, by which they are divided.
    """
    del width, layers, heads, head_channels, hidden, activation, patch, mean, std


def text_tower(
    *,
    width: Annotated[int, In(1, 2**16)] = 512,
    layers: Annotated[int, In(1, 256)] = 12,
    heads: Annotated[int, In(1, 1024)] = 8,
    head_channels: Annotated[int, In(0, 2**16)] = 0,
    hidden: Annotated[int, In(0, 2**18)] = 0,
    activation: Literal["", "gelu", "quick_gelu"] = "",
    vocab_size: Annotated[int, In(0, 10**7)] = 0,
) -> None:
    """The text encoder.

    Args:
      width: of its tokens.
      layers: number of blocks.
      heads: attention heads of each.
      head_channels: width of a head; 0: that of the tokens, divided by heads.
      hidden: width of a block's hidden layer; 0: 4 times that of the tokens.
      activation: of the hidden layers; '': that of the network.
      vocab_size: rows of the token table; 0: as many as the tokenizer has ids.
    """
    del width, layers, heads, head_channels, hidden, activation, vocab_size


@component("network", "clip")
def clip(
    *,
    features: Annotated[int, In(1, 2**16)] = 512,
    image: Annotated[Any, Group(image_tower)],
    text: Annotated[Any, Group(text_tower)],
    activation: Literal["gelu", "quick_gelu"] = "gelu",
    dtype: Annotated[Literal["float32", "bfloat16"], RUNTIME] = "float32",
    remat: Annotated[Literal["none", "blocks"], RUNTIME] = "none",
    shape: Annotated[tuple[int, ...], WIRED],
    num_timesteps: Annotated[int, WIRED],
    vocab_size: Annotated[int, WIRED],
    length: Annotated[int, WIRED],
) -> CLIP:
    """Both encoders of a CLIP.

    Args:
      features: size of the embeddings.
      image: the image encoder.
      text: the text encoder.
      activation: of the hidden layers; 'quick_gelu' in OpenAI's models, 'gelu' in GLIDE's.
      dtype: what layers compute in.
      remat: 'blocks' computes blocks again in the backward pass.
    """
    if text.vocab_size and text.vocab_size < vocab_size:
        raise ValueError(f"text.vocab_size must be 0 or at least {vocab_size}, the tokenizer's, got {text.vocab_size}")
    ids = {"vocab_size": text.vocab_size or vocab_size, "length": length}
    image, text = ({k: v for k, v in vars(tower).items() if v != ""} for tower in (image, text))
    return build(
        {
            "features": features,
            "activation": activation,
            "dtype": dtype,
            "remat": remat,
            "image": {**image, "times": num_timesteps},
            "text": {**text, **ids},
        },
        shape,
    )
