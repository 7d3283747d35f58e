"""Networks: they read z, a clock and conditions, and know nothing of diffusion (floor 0)."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models.conditioners import Clock, Inpaint, Label, LowRes
from diffax.models.layers import KERNEL_INITS, PADS, SINUSOIDS, Style, choose, sinusoid
from diffax.models.text import Text
from diffax.models.unet import POOLS, REMATS, RESAMPLES, Classifier, Context, Encoder, UNet

__all__ = [
    "Classifier",
    "Clock",
    "Context",
    "Inpaint",
    "Label",
    "LowRes",
    "Network",
    "Text",
    "UNet",
    "build",
    "example_inputs",
    "null_conditions",
    "sinusoid",
]

Array = jax.Array


class Network(nn.Module):
    """A U-Net and the conditioners that feed it.

    Attributes:
      unet: the U-Net.
      conditioners: pairs (name of the condition, module); a module's parameters bear that name. Planes are concatenated
        in this order.
    """

    # otherwise the parameters of a conditioner would be called conditioners_0_1
    preserve_adopted_names: ClassVar[bool] = True

    unet: UNet
    conditioners: tuple[tuple[str, nn.Module], ...] = ()

    @nn.compact
    def __call__(
        self, z: Array, time: Array, cond: Mapping[str, Array | Context], *, dropout_keys: Array | None = None
    ) -> Array:
        """Reads z at noise level `time` under the conditions `cond`.

        Args:
          z: [B, H, W, C] float32.
          time: [B] float32.
          cond: one array for each conditioner, and no more; or in its place what `encode_conditions` made of it.
          dropout_keys: [B] typed PRNG keys; None: no dropout.

        Returns:
          [B, H, W, C_out] float32.

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

    vectors, sequences, planes = gather("vector"), gather("sequence"), gather("planes")
    return Context(
        vector=sum(vectors) if vectors else None,
        sequence=jnp.concatenate(sequences, 1) if sequences else None,
        planes=jnp.concatenate(planes, -1) if planes else None,
    )


def example_inputs(network: nn.Module, shape: tuple[int, int, int], batch: int = 1) -> tuple:
    """Zeros, and captions without a word, to call `network.init(rng, *inputs)` with.

    Args:
      network: what `build` returned.
      shape: (H, W, C) of z.
      batch: how many.

    Returns:
      (z, time, cond) for a `Network`, (z, time) for a `Classifier`.
    """
    z, time = jnp.zeros((batch, *shape)), jnp.zeros((batch,))
    if isinstance(network, Classifier):
        return z, time
    return z, time, {name: module.example(z) for name, module in network.conditioners}


def null_conditions(network: Network) -> dict[str, int]:
    """{condition: the number that stands for it, at each of its places, where it is withheld}, of those that can be."""
    return {name: module.null for name, module in network.conditioners if module.null is not None}


def build(
    net: Mapping,
    *,
    shape: tuple[int, int, int],
    takes: tuple[str, ...] = (),
    num_classes: int = 0,
    out_channels: int,
    null_label: bool = False,
) -> nn.Module:
    """The network that a config describes.

    Args:
      net: name='unet' and fields of `UNet`, or name='classifier' and fields of `Classifier`; fields that only the
        other one has are passed over. `net['text']` is a mapping with the fields of `Text` (width, layers, heads,
        vocab_size, length, final_norm, padding_embedding), for networks that take 'text'; left out, they are those of
        the GLIDE models that were published.
      shape: (H, W, C) of the images.
      takes: the conditions it reads: 'label', 'text', 'inpaint', 'low_res', 'low_res_time'. Planes are concatenated to
        z in this order (GLIDE: 'inpaint' before 'low_res').
      num_classes: number of labels, if it takes 'label'.
      out_channels: channels of the output; the number of logits of a classifier.
      null_label: give 'label' one more row, number num_classes, for classifier-free guidance.

    Returns:
      A `Network` or a `Classifier`; `init(rng, *example_inputs(network, shape))` makes its
      parameters.

    Raises:
      ValueError: an unknown option, or options that do not fit together.
    """
    net = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in dict(net).items()}
    name, text_options = net.pop("name", "unet"), dict(net.pop("text", {}))
    kinds = {"unet": (UNet, "out_channels"), "classifier": (Classifier, "num_classes")}
    module, outputs = choose(kinds, name, "net.name")
    options = {kind: {*kind.__dataclass_fields__} - {"parent", "name", count} for kind, count in kinds.values()}
    for key in net:
        choose(dict.fromkeys(sorted(set.union(*options.values()))), key, "net option")
    network = module(**{k: v for k, v in net.items() if k in options[module]}, **{outputs: out_channels})
    _check(network, shape)
    _check_text(text_options)

    def label():
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; a network that takes 'label' needs at least 1")
        return Label(num_classes, 4 * network.channels, null_label, name="label")

    def text():
        style = Style(kernel_init=network.kernel_init, dtype=network.dtype)
        return Text(style, 4 * network.channels, **text_options, name="text")

    def clock():
        style = Style(kernel_init=network.kernel_init)
        return Clock(style, network.channels, network.sinusoid, name="low_res_time")

    makers = {
        "label": label,
        "text": text,
        "inpaint": lambda: Inpaint(name="inpaint"),
        "low_res": lambda: LowRes(name="low_res"),
        "low_res_time": clock,
    }
    conditioners = tuple((name, choose(makers, name, "condition")()) for name in takes)
    if isinstance(network, Classifier):
        if takes:
            raise ValueError(f"a classifier takes no conditions; takes is {takes}")
        return network
    return Network(network, conditioners)


def _check(net: Encoder, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError if `net` has an unknown option, or cannot run on images of `shape`."""
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
