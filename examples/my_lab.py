"""One of everything, outside diffax: a network, a loss, a sampler, a guidance, a condition and a data set.

    python -m diffax.main --config=examples/my_config.py --workdir=runs/bars

names them; docs/add_your_own.md walks through the lines.
"""

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import WIRED, In
from diffax.conditions.base import Condition
from diffax.data.source import Source, Splits
from diffax.diffusion.guidance import edit_x
from diffax.diffusion.losses import mean_flat
from diffax.diffusion.process import expand, target
from diffax.diffusion.samplers import Sampler
from diffax.models.guidance import Guidance
from diffax.networks.context import Context
from diffax.networks.layers import sinusoid


class Mixer(nn.Module):
    """An MLP-Mixer: no convolution but that which makes 2 x 2 patches."""

    width: Annotated[int, In(1)] = 64
    layers: Annotated[int, In(1)] = 3
    out_channels: Annotated[int, WIRED] = 1

    @property
    def vector_width(self):
        return self.width

    @nn.compact
    def __call__(self, z, time, context, *, dropout_keys=None):
        batch, height, width, _ = z.shape
        h = nn.Conv(self.width, (2, 2), strides=2)(z).reshape(batch, -1, self.width)
        vector = nn.Dense(self.width)(sinusoid(time, self.width))
        vector = vector if context.vector is None else vector + context.vector
        for _ in range(self.layers):
            tokens = nn.LayerNorm()(h + vector[:, None]).swapaxes(1, 2)
            h = h + nn.Dense(h.shape[1])(nn.silu(nn.Dense(2 * h.shape[1])(tokens))).swapaxes(1, 2)
            h = h + nn.Dense(self.width)(nn.silu(nn.Dense(2 * self.width)(nn.LayerNorm()(h))))
        h = h.reshape(batch, height // 2, width // 2, self.width)
        return nn.ConvTranspose(self.out_channels, (2, 2), strides=(2, 2))(h)


def min_snr(*, gamma: Annotated[float, In(0, above=True)] = 5.0):
    """L_simple of eps, weighted by min(SNR, gamma) / SNR (Hang et al. 2023)."""

    def loss(out, batch, *, predicts, variance):
        wanted = target(predicts, x=batch.x, z=batch.z, eps=batch.eps, step=batch.step)
        mse, snr = mean_flat((wanted - out) ** 2), jnp.exp(batch.step.t.logsnr)
        return jnp.minimum(snr, gamma) / snr * mse, {"mse": mse}

    return loss


def churned(*, share: Annotated[float, In(0, 1)] = 0.3):
    """DDIM, a share of whose noise is drawn anew at every step."""

    def step(denoise, z, step, noise, memory, **conditions):
        p = denoise(z, step, **conditions)
        mixed = np.sqrt(1 - share**2) * p.eps + share * noise
        return expand(step.s.alpha, z) * p.x + expand(step.s.sigma, z) * mixed, p, memory

    return Sampler(lambda z, count: (), step)


def contrast(*, amount: Annotated[float, In(0)] = 0.1):
    """Guidance that raises the contrast of the estimate of x."""
    return Guidance(wrap=lambda site: edit_x(lambda x: (1 + amount) * x))


class AngleEncoder(nn.Module):
    """An angle as a vector."""

    features: int

    @nn.compact
    def __call__(self, angle, z):
        return Context(vector=nn.Dense(self.features)(jnp.stack([jnp.cos(2 * angle), jnp.sin(2 * angle)], -1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Angle(Condition):
    """The direction of a bar, in radians."""

    def example(self):
        return jax.ShapeDtypeStruct((), jnp.float32)

    def encoder(self, net):
        return AngleEncoder(net.vector_width, name=self.name)


def bars(*, size: Annotated[int, In(4)] = 8, count: Annotated[int, In(1)] = 512):
    """White bars on black, at any angle."""

    def load(shape, split):
        y, x = np.mgrid[:size, :size] - (size - 1) / 2

        def read(index):
            angle = np.random.default_rng((index, split == "test")).uniform(0, np.pi)
            bar = np.abs(x * np.sin(angle) - y * np.cos(angle)) < 1
            return {"image": np.repeat(255 * bar[..., None], shape[-1], 2).astype(np.uint8), "angle": np.float32(angle)}

        return Source("bars", count, read, keys=("angle",))

    return Splits(load, test="test")
