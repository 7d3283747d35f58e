"""A small regression that stands for a model in the tests of training."""

import dataclasses
import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax import components
from diffax.training import loop, settings


@dataclasses.dataclass(frozen=True)
class Regression:
    """Least squares with noise from each example's key.

    Attributes:
      poison: makes the loss NaN where the batch says so.
      rates: see `Trainable`.
    """

    poison: bool = False
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def init(self, key):
        return {"w": jax.random.normal(key, (4, 8)), "b": jnp.zeros(8)}

    def init_extra(self):
        return jnp.zeros(16)

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        params = nn.meta.unbox(params)  # as a layer would
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
        out = (batch["image"] + 0.1 * noise) @ params["w"] + params["b"]
        value = jnp.mean((out - batch["label"][:, None]) ** 2, axis=-1)
        if self.poison:
            value = jnp.where(batch["index"] < 0, jnp.nan, value)
        n = jnp.asarray(len(value), jnp.float32)
        return value, {"loss": (jnp.sum(value), n), "place": (jnp.sum(position / total), n)}, value

    def update_extra(self, extra, feedback):
        return 0.9 * extra + feedback


def train(**changes):
    """The `train` section of a run of 12 steps."""
    few = dict(num_train_steps=12, batch_size=16, learning_rate=1e-2, warmup_steps=3, ema=(0.5, 0.9))
    return few | dict(log_every=4, save_every=100, sample_every=0) | changes


def make(mode="pmap", poison=False, rates=None, **changes):
    """A run of it, with a field of the model in its identity."""
    section = components.complete(components.schema(settings.train), train(**changes), "train")
    same = components.identity(components.schema(settings.train), section, training=True)
    identity = {f"train.{key}": value for key, value in same.items()} | {"width": 8}
    return loop.Run(Regression(poison, rates or {}), section, seed=0, mode=mode, identity=identity, name="base")


def batches(first, bad=()):
    """Batches from a step on; `bad` are the steps whose loss is NaN under poison."""
    for k in itertools.count(first):
        rng = np.random.default_rng(k)
        index = np.full(16, -1) if k in bad else np.arange(16)
        yield {
            "image": rng.standard_normal((16, 4)).astype(np.float32),
            "label": rng.standard_normal(16).astype(np.float32),
            "index": index,
        }
