"""Networks: they read z, a clock and conditions, and know nothing of diffusion (floor 0)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.networks.clip import CLIP
from diffax.networks.conditioners import RESIZES, Clock, Inpaint, Label, LowRes
from diffax.networks.layers import KERNEL_INITS, PADS, REMATS, SINUSOIDS, Style, choose, sinusoid
from diffax.networks.prior import CodePrior, Prior, sample_codes
from diffax.networks.transformer import Text
from diffax.networks.unclip import ClipEmbedding, ClipFeatures, ClipSizes, Similarity, Tokens
from diffax.networks.unet import POOLS, RESAMPLES, Classifier, Context, Encoder, UNet

__all__ = [
    "CLIP",
    "Classifier",
    "ClipEmbedding",
    "ClipFeatures",
    "ClipSizes",
    "Clock",
    "CodePrior",
    "Context",
    "Inpaint",
    "Label",
    "LowRes",
    "Network",
    "Prior",
    "Similarity",
    "Text",
    "Tokens",
    "UNet",
    "build",
    "example_inputs",
    "merge",
    "null_conditions",
    "sample_codes",
    "sinusoid",
    "widen_input",
]

Array = jax.Array


class Network(nn.Module):
    """A U-Net, or a prior in its place, and the conditioners that feed it.

    Attributes:
      unet: the U-Net, whose parameters are called 'unet'; or a prior, 'prior' or 'code_prior'.
      conditioners: pairs (name of the condition, module); a module's parameters bear that name. Planes are concatenated
        in this order.
    """

    # otherwise the parameters of a conditioner would be called conditioners_0_1
    preserve_adopted_names: ClassVar[bool] = True

    unet: UNet | Prior | CodePrior
    conditioners: tuple[tuple[str, nn.Module], ...] = ()

    @nn.compact
    def __call__(
        self, z: Array, time: Array, cond: Mapping[str, Array | Context], *, dropout_keys: Array | None = None
    ) -> Array:
        """Reads z at noise level `time` under the conditions `cond`.

        Args:
          z: [B, H, W, C] float32; of a prior, [B, D], or codes [B, N].
          time: [B] float32.
          cond: one array for each conditioner, and no more; or in its place what `encode_conditions` made of it.
          dropout_keys: [B] typed PRNG keys; None: no dropout.

        Returns:
          [B, H, W, C_out] float32; of a prior, [B, D_out], or logits [B, N, K].

        Raises:
          ValueError: a condition is missing or unknown; H or W cannot be halved often enough.
        """
        names = [name for name, _ in self.conditioners]
        for name in names:
            if name not in cond:
                raise ValueError(f"condition {name!r} is missing; this network takes {names}")
        contexts = self.encode_conditions(cond, z)
        return self.unet(z, time, merge([contexts[name] for name in names]), dropout_keys=dropout_keys)

    def encode_conditions(self, cond: Mapping[str, Array | Context], z: Array) -> dict[str, Context]:
        """What the conditioners make of conditions: to be called once where the network runs for many levels.

        `network.apply({'params': params}, cond, z, method='encode_conditions')`, or a part of `cond`, such as the text;
        what is encoded already stays as it is.

        Args:
          cond: arrays by the name of the condition.
          z: [B, H, W, C], whose shape alone matters.

        Returns:
          {name: context}, for `__call__`.

        Raises:
          ValueError: a condition is unknown.
        """
        modules = dict(self.conditioners)
        for name in cond:
            if name not in modules:
                raise ValueError(f"condition {name!r} is unknown; this network takes {[*modules]}")
        return {name: c if isinstance(c, Context) else modules[name](c, z) for name, c in cond.items()}


def merge(contexts: list[Context]) -> Context:
    """One context out of several: vectors are summed, sequences and planes concatenated."""

    def gather(field):
        return [part for part in (getattr(c, field) for c in contexts) if part is not None]

    vectors, sequences, planes, mask = gather("vector"), gather("sequence"), gather("planes"), None
    if gather("mask"):
        read = [c for c in contexts if c.sequence is not None]
        mask = [jnp.ones(c.sequence.shape[:2], bool) if c.mask is None else c.mask for c in read]
        mask = jnp.concatenate(mask, 1)
    return Context(
        mask=mask,
        vector=sum(vectors) if vectors else None,
        sequence=jnp.concatenate(sequences, 1) if sequences else None,
        planes=jnp.concatenate(planes, -1) if planes else None,
    )


def example_inputs(network: nn.Module, shape: tuple[int, ...], batch: int = 1) -> tuple:
    """Zeros, and captions without a word, to call `network.init(rng, *inputs)` with.

    Args:
      network: what `build` returned.
      shape: of z, without the batch.
      batch: how many.

    Returns:
      (z, time, cond) for a `Network`, (z, time) for a `Classifier`.
    """
    if isinstance(network, CLIP):
        return network.example(batch)
    z, time = jnp.zeros((batch, *shape)), jnp.zeros((batch,))
    if isinstance(network, Classifier):
        return z, time
    return z, time, {name: module.example(z) for name, module in network.conditioners}


def null_conditions(network: Network) -> dict[str, int | float]:
    """{condition: the number that stands for it, at each of its places, where it is withheld}, of those that can be."""
    return {name: module.null for name, module in network.conditioners if module.null is not None}


def build(
    net: Mapping,
    *,
    shape: tuple[int, ...],
    takes: tuple[str, ...] = (),
    num_classes: int = 0,
    out_channels: int,
    null_label: bool = False,
) -> nn.Module:
    """The network that a config describes.

    Args:
      net: name='unet' and fields of `UNet`, or 'classifier' and of `Classifier`, 'prior' and of `Prior`, 'code_prior'
        and of `CodePrior`; fields that only another one has are passed over. Mappings below it describe what feeds the
        network: `net['text']` has the fields of `Text` (width, layers, heads, vocab_size, length, final_norm,
        padding_embedding), for networks that take 'text', by default those of the GLIDE models that were published;
        of a prior, vocab_size and length alone matter. `net['clip']` has the fields of `ClipSizes`, by default karlo's.
        `net['low_res_resize']` is 'bilinear' or 'bicubic'.
      shape: (H, W, C) of the images; (D,) of an embedding, (N,) of a row of codes.
      takes: the conditions it reads. A U-Net: 'label', 'text', 'inpaint', 'low_res', 'low_res_time',
        'image_embedding', 'text_embedding', 'text_features'. Planes are concatenated to z in this order (GLIDE:
        'inpaint' before 'low_res'), and so are sequences. A prior: 'text' or 'text_features', then 'text_embedding'.
        A code prior: 'text' or 'text_features', 'text_embedding', 'similarity'.
      num_classes: number of labels, if it takes 'label'; of buckets, if it takes 'similarity'.
      out_channels: channels of the output; the number of logits of a classifier, or of codes.
      null_label: give 'label' one more row, number num_classes, for classifier-free guidance.

    Returns:
      A `Network` or a `Classifier`; `init(rng, *example_inputs(network, shape))` makes its
      parameters.

    Raises:
      ValueError: an unknown option, or options that do not fit together.
    """
    net = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in dict(net).items()}
    name, resize = net.pop("name", "unet"), net.pop("low_res_resize", "bilinear")
    text, clip = dict(net.pop("text", {})), dict(net.pop("clip", {}))
    kinds = {
        "unet": (UNet, "out_channels"),
        "classifier": (Classifier, "num_classes"),
        "prior": (Prior, "features"),
        "code_prior": (CodePrior, "num_codes"),
    }
    module, outputs = choose(kinds, name, "net.name")
    options = {kind: {*kind.__dataclass_fields__} - {"parent", "name", count} for kind, count in kinds.values()}
    for key in net:
        choose(dict.fromkeys(sorted(set.union(*options.values()))), key, "net option")
    network = module(**{k: v for k, v in net.items() if k in options[module]}, **{outputs: out_channels}, name=name)
    choose(RESIZES, resize, "net.low_res_resize")
    _check_names(network)
    if isinstance(network, Encoder):
        _check(network, shape)
    else:
        _check_prior(network, shape, takes)
    _check_text(text)
    for key in clip:
        choose(dict.fromkeys(ClipSizes._fields), key, "net.clip option")
    if isinstance(network, Classifier):
        if takes:
            raise ValueError(f"a classifier takes no conditions; takes is {takes}")
        return network
    makers = _conditioners(network, ClipSizes(**clip), text, num_classes, null_label, resize, takes)
    return Network(network, tuple((name, choose(makers, name, "condition")()) for name in takes))


def _conditioners(
    network: UNet | Prior | CodePrior,
    clip: ClipSizes,
    text: Mapping,
    num_classes: int,
    null_label: bool,
    resize: str,
    takes: tuple[str, ...],
) -> dict[str, Callable[[], nn.Module]]:
    """{condition: maker of its conditioner}, of those that the network can read."""
    style = Style(kernel_init=network.kernel_init, dtype=network.dtype)

    def count(name: str) -> int:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a network that takes {name!r} needs at least 1")
        return num_classes

    def embedding(name: str, **options) -> Callable[[], nn.Module]:
        return lambda: ClipEmbedding(style, clip.size, **options, name=name)

    def features(width: int, *, norm: bool) -> Callable[[], nn.Module]:
        return lambda: ClipFeatures(style, clip.length, clip.width, width, norm, name="text_features")

    if isinstance(network, Prior):
        caption = {key: text.get(key, getattr(Text, key)) for key in ("vocab_size", "length")}
        return {
            "text": lambda: Tokens(style, network.width, **caption, name="text"),
            "text_features": features(network.width, norm=False),
            "text_embedding": embedding("text_embedding", tokens=1, width=network.width),
        }

    width = text.get("width", Text.width) if "text" in takes else clip.sequence_width
    if isinstance(network, CodePrior):
        return {
            "text": lambda: Text(style, network.width, **text, remat=network.remat, name="text"),
            "text_features": features(width, norm=True),
            "text_embedding": embedding("text_embedding", tokens=1, width=width),
            "similarity": lambda: Similarity(style, count("similarity"), width, name="similarity"),
        }
    vector, tokens = 4 * network.channels, dict(tokens=clip.tokens, width=width)
    return {
        "label": lambda: Label(count("label"), vector, null_label, name="label"),
        "text": lambda: Text(style, vector, **text, remat=network.remat, name="text"),
        "inpaint": lambda: Inpaint(name="inpaint"),
        "low_res": lambda: LowRes(resize, name="low_res"),
        "low_res_time": lambda: Clock(
            Style(kernel_init=network.kernel_init), network.channels, network.sinusoid, name="low_res_time"
        ),
        "image_embedding": embedding("image_embedding", features=vector, learned_null=True, **tokens),
        "text_embedding": embedding("text_embedding", features=vector),
        "text_features": features(width, norm=True),
    }


def _check_names(net: nn.Module) -> None:
    """Raises a ValueError if an option of `net` is none of the names there are."""
    valid = dict(
        resample=RESAMPLES,
        downsample_pad=PADS,
        sinusoid=SINUSOIDS,
        remat=REMATS,
        kernel_init=KERNEL_INITS,
        dtype=("float32", "bfloat16"),
        pool=POOLS,
    )
    for key, names in valid.items():
        if hasattr(net, key):
            choose(dict.fromkeys(names), getattr(net, key), f"net.{key}")


def _check_prior(net: Prior | CodePrior, shape: tuple[int, ...], takes: tuple[str, ...]) -> None:
    """Raises a ValueError if `net` cannot make what has `shape` from the conditions `takes`."""
    if len(shape) != 1:
        raise ValueError(f"a prior makes a vector; shape is {tuple(shape)}, not one number")
    if not takes:
        raise ValueError("a prior needs something to be told; takes is empty; name 'text_embedding'")
    if net.heads < 1 or net.width % net.heads:
        raise ValueError(f"net.heads {net.heads} does not divide net.width {net.width}; change one of them")


def _check(net: Encoder, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError if `net` cannot run on images of `shape`."""
    factors = [2**level for level in range(len(net.widths))]
    if isinstance(net, UNet) and any(size % factors[-1] for size in shape[:2]):
        raise ValueError(
            f"shape {tuple(shape)} cannot be halved {len(factors) - 1} times; use "
            f"multiples of {factors[-1]} or fewer entries in net.channel_mult"
        )
    attention = {*net.attention, *(getattr(net, "attention_up", None) or ())}
    for factor in attention - {*factors}:
        raise ValueError(f"net.attention {factor} is no downsampling factor of this network; they are {factors}")
    for factor, width in zip(factors, net.widths, strict=True):
        if width < 1 or width % net.groups:
            raise ValueError(
                f"net.channels {net.channels} and net.channel_mult "
                f"{net.channel_mult} make a level of {width} channels; it must be a "
                f"multiple of net.groups {net.groups}"
            )
        if factor not in attention and not (net.mid_attention and factor == factors[-1]):
            continue
        if net.head_channels and width % net.head_channels:
            raise ValueError(
                f"net.head_channels {net.head_channels} does not divide the {width} "
                f"channels at factor {factor}; change it or net.channels"
            )
        for heads in {net.heads, getattr(net, "heads_up", 0) or net.heads}:
            if not net.head_channels and (heads < 1 or width % heads):
                raise ValueError(
                    f"{heads} heads do not divide the {width} channels at factor "
                    f"{factor}; change net.heads, net.heads_up or net.channels"
                )


def _check_text(options: Mapping) -> None:
    """Raises a ValueError if `net.text` has an unknown option, or options that do not fit together."""
    fields = {*Text.__dataclass_fields__} - {"parent", "name", "style", "features"}
    for key in options:
        choose(dict.fromkeys(sorted(fields)), key, "net.text option")
    width, heads = (options.get(key, getattr(Text, key)) for key in ("width", "heads"))
    if heads < 1 or width % heads:
        raise ValueError(f"net.text.heads {heads} does not divide net.text.width {width}; change one of them")


def widen_input(params: Mapping, *, at: int, by: int) -> dict:
    """A network's parameters with room for more input channels, whose weights are zero: the same function as before.

    Args:
      params: of a `Network`.
      at: the first new channel.
      by: how many are new.
    """
    kernel = params["unet"]["conv_in"]["kernel"]
    blank = jnp.zeros((*kernel.shape[:2], by, kernel.shape[3]), kernel.dtype)
    wide = jnp.concatenate([kernel[:, :, :at], blank, kernel[:, :, at:]], 2)
    conv_in = {**params["unet"]["conv_in"], "kernel": wide}
    return {**params, "unet": {**params["unet"], "conv_in": conv_in}}
