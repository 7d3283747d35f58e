"""A smaller picture that a model enlarges (Improved DDPM; ADM; CDM, section 3)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import RUNTIME, TRAINING, WIRED, In, Length, component
from diffax.conditions.base import Condition, one_each
from diffax.diffusion import augment
from diffax.diffusion.schedules import NoiseLevel
from diffax.errors import UserError
from diffax.networks.context import Context
from diffax.networks.layers import Style, dense, sinusoid

Array = jax.Array
# ways to enlarge the smaller picture, and the arguments of `jax.image.resize`
RESIZES = {
    "bilinear": {"method": "bilinear", "antialias": False},
    "bicubic": {"method": "cubic", "antialias": True},
}


class LowResEncoder(nn.Module):
    """A smaller picture, resized to the size of z and concatenated to it; and how noisy it is, if it can be.

    Attributes:
      resize: 'bilinear', or 'bicubic' (karlo's upsampler; Keys' kernel with a = -1/2). Pixels have half-pixel centres.
      noised: whether the input has a noise level, embedded like the network's own and added to it (CDM, section 3).
      channels: width of the sinusoid of that embedding.
      features: size of the embedding.
      sinusoid: see `networks.layers.sinusoid`.
      kernel_init: see `networks.layers.Style`.
    """

    resize: str = "bilinear"
    noised: bool = False
    channels: int = 0
    features: int = 0
    sinusoid: str = "openai"
    kernel_init: str = "torch"

    @nn.compact
    def __call__(self, low_res: Mapping[str, Array], z: Array) -> Context:
        """low_res: {'image': [B, h, w, K] of any size, in [-1, 1]} and, if noised, 'time': [B] of its noise level."""
        image = low_res["image"].astype(jnp.float32)
        planes = jax.image.resize(image, (*z.shape[:3], image.shape[-1]), **RESIZES[self.resize])
        if not self.noised:
            return Context(planes=planes)
        style = Style(kernel_init=self.kernel_init)
        h = sinusoid(low_res["time"], self.channels, self.sinusoid)
        h = dense(style, self.features, name="time_0")(h)
        return Context(planes=planes, vector=dense(style, self.features, name="time_1")(nn.silu(h)))


@component("condition", "low_res")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRes(Condition):
    """The picture at a fraction of the size, made worse in training so that a cascade forgives its earlier models.

    Attributes:
      factor: how much smaller it is.
      noise: strongest Gaussian noise on it in training, as u of the model's schedule; 0: none.
      level: the noise on it in sampling, as u.
      truncated: whether the model before stops at that level in place of being noised to it.
      blur: share of the training examples in which it is blurred.
      blur_sigma: range of the standard deviation of the blur, in pixels.
      round: whether it is rounded to bytes, as files hold it.
      jpeg: range of the JPEG quality that training writes it in, or none.
      degrade: BSRGAN's degradations, in place of blur and jpeg.
      crop: side of the random window that training cuts from picture and smaller picture; 0: the whole.
      resize: how it is enlarged before the network.
    """

    factor: Annotated[int, In(2, 64)] = 4
    noise: Annotated[float, In(0, 1)] = 0.0
    level: Annotated[float, In(0, 1), RUNTIME] = 0.0
    truncated: Annotated[bool, RUNTIME] = False
    blur: Annotated[float, In(0, 1), TRAINING] = 0.0
    blur_sigma: Annotated[tuple[float, ...], In(0, 100), Length(2, 2), TRAINING] = (0.4, 0.6)
    round: Annotated[bool, TRAINING] = True
    jpeg: Annotated[tuple[int, ...], In(1, 100), Length(0, 2), TRAINING] = ()
    degrade: Annotated[Literal["none", "bsr", "bsr_light"], TRAINING] = "none"
    crop: Annotated[int, In(0, 8192), TRAINING] = 0
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: Annotated[Any, WIRED] = None

    def __post_init__(self):
        if self.level > self.noise:
            raise ValueError(f"level must be at most noise, {self.noise:g}, got {self.level:g}")
        if self.degrade != "none" and (self.blur or self.jpeg):
            raise ValueError(f"degrade is {self.degrade!r}, which blurs and writes JPEG itself; leave out blur, jpeg")
        if self.blur_sigma[0] > self.blur_sigma[1] or (self.jpeg and self.jpeg[0] > self.jpeg[-1]):
            raise ValueError(f"blur_sigma and jpeg are ranges, lowest first; got {self.blur_sigma} and {self.jpeg}")
        if self.truncated and not self.level:
            raise ValueError("truncated needs a level above 0, at which the model before stops; got level 0")
        if self.shape and any(side % self.factor for side in self.shape[:2]):
            raise ValueError(f"factor must divide the sides of {self.shape}, got {self.factor}")

    def check(self, model: Any) -> None:
        halvings = len(getattr(model.net.net, "channel_mult", (1,))) - 1
        step, most = math.lcm(self.factor, 2**halvings), min(self.shape[:2])
        if self.crop and (self.crop % step or self.crop > most):
            raise ValueError(f"{self.name}.crop must be a multiple of {step} and at most {most}, got {self.crop}")

    # ---- what it is

    @property
    def argument(self) -> str:
        return "image"

    @property
    def small(self) -> tuple[int, ...]:
        """(h, w, C) of the smaller picture."""
        return (*(side // self.factor for side in self.shape[:2]), *self.shape[2:])

    @property
    def planes(self) -> int:
        return self.shape[-1]

    @property
    def stops_before(self) -> float | None:
        return self.level if self.truncated else None

    def encoder(self, net: nn.Module) -> nn.Module:
        how = {}
        if self.noise:
            how = {"channels": getattr(net, "channels", 128), "features": net.vector_width}
            how |= {key: getattr(net, key) for key in ("sinusoid", "kernel_init") if hasattr(net, key)}
        return LowResEncoder(resize=self.resize, noised=self.noise > 0, **how, name=self.name)

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        time = {"time": jax.ShapeDtypeStruct((), jnp.float32)} if self.noise else {}
        return {"image": jax.ShapeDtypeStruct(self.small, jnp.float32)} | time

    def given_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        level = {"level": jax.ShapeDtypeStruct((), jnp.float32)} if self.noise else {}
        return {"image": jax.ShapeDtypeStruct(self.small, jnp.float32)} | level

    def batch_example(self) -> dict[str, Any]:
        return {self.name: jax.ShapeDtypeStruct(self.small, jnp.float32)} if self.edit else {}

    # ---- on the host

    def columns(self) -> dict[str, tuple[str, Any]]:
        return {}  # made of the picture

    @property
    def edit(self) -> Callable | None:
        if not self.jpeg and self.degrade == "none":
            return None
        from diffax.data import image_ops

        if self.jpeg:
            return image_ops.jpeg_smaller(self.factor, self.jpeg, name=self.name)
        return image_ops.degraded(self.factor, self.degrade, crop=self.crop, name=self.name)

    def count(self, value: Any) -> int | None:
        return len(value) if np.ndim(value) == 4 else None

    def from_user(self, value: Any, n: int) -> dict[str, np.ndarray]:
        from diffax.data import images

        try:
            image = images.as_floats(np.asarray(value))
            wrong = image.ndim not in (3, 4) or image.shape[-1] != self.shape[-1]
        except (TypeError, ValueError):
            wrong = True
        if wrong:
            shape, channels = getattr(value, "shape", "no array"), self.shape[-1]
            raise UserError(
                f"image is {shape}; sample_fn; pass one picture [h, w, {channels}], or [n, h, w, {channels}]"
            )
        if not np.isfinite(image).all() or np.abs(image).max(initial=0) > 1 + 1e-3:
            raise UserError("image has values outside [-1, 1]; sample_fn; pass uint8, or floats in [-1, 1]")
        return {"image": one_each("image", image, n, 3)} | self.levels(None, n)

    def levels(self, value: Any, n: int) -> dict[str, np.ndarray]:
        """{'level': [n] noise on the smaller picture}, as given or its own; {} where it never has any."""
        if not self.noise:
            return {}
        array = np.asarray(self.level if value is None else value, np.float32)
        outside = [v for v in array.ravel() if not 0 <= v <= self.noise + 1e-6]
        if outside:
            raise UserError(f"level is {outside[0]:g}; sample_fn; training had levels from 0 to {self.noise:g}")
        return {"level": one_each("level", array, n, 0)}

    def from_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        small = np.asarray(augment.area_downsample(np.asarray(batch["image"]), self.factor))
        return {"image": small} | self.levels(None, len(small))

    # ---- on the devices

    def in_training(self, batch: Mapping[str, Array], x: Array, keys: Array) -> tuple[Array, dict[str, Array]]:
        crop, blur, level, noise = jax.vmap(lambda key: jax.random.split(key, 4))(keys).T
        small = batch[self.name] if self.name in batch else augment.area_downsample(x, self.factor)
        if self.crop and x.shape[1] != self.crop:
            x, small = augment.crop_together(x, small, crop, side=self.crop)
        if self.round:
            small = augment.round_to_bytes(small)
        if self.blur:
            low, high = self.blur_sigma
            small = augment.random_blur(small, blur, share=self.blur, low=low, high=high)
        if not self.noise:
            return x, {"image": small}
        # From 0, no noise, to the strongest, both included, in steps of the chain if it has any.
        at = self.schedule(self.noise * jax.vmap(jax.random.uniform)(level))
        return x, {"image": augment.noise_to(small, at, noise), "time": at.time}

    def in_sampling(self, given: Mapping[str, Any], keys: Array, params: Mapping[str, Any]) -> dict[str, Array]:
        small, reached = given["image"], given.get("reached")
        if self.round and reached is None:
            small = augment.round_to_bytes(small)
        if not self.noise:
            return {"image": small}
        if reached is not None:  # it is as noisy as it should be
            return {"image": small, "time": jnp.broadcast_to(reached.time, keys.shape)}
        level = jnp.asarray(given.get("level", self.level), jnp.float32)
        at = self.schedule(jnp.broadcast_to(level, keys.shape))
        return {"image": augment.noise_to(small, at, keys), "time": at.time}

    def result_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        height, width = given["image"].shape[1:3]
        return self.factor * height, self.factor * width

    def made(self, out: Array, given: Mapping[str, Array] | None, reached: NoiseLevel | None) -> dict[str, Any]:
        return {**(given or {}), "image": out} | ({} if reached is None else {"reached": reached})
