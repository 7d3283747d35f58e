"""p(y | z_t), a classifier that works at every noise level (ADM, section 4)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from diffax.components import TRAINING, WIRED, In, Length, Of, component
from diffax.conditions.base import Condition
from diffax.conditions.label import Label
from diffax.data.pipeline import Column
from diffax.diffusion import losses
from diffax.diffusion.process import diffuse
from diffax.diffusion.schedules import NoiseLevel, NoiseSchedule
from diffax.diffusion.timesteps import TimestepSampler
from diffax.models import base
from diffax.models.base import Params

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedClassifier:
    """A noised classifier, every choice made.

    Attributes:
      name: the config's section.
      shape: (H, W, C) of the pictures that it classifies.
      num_classes: number of labels.
      net: (z, time) -> logits.
      schedule: noise level as a function of u.
      timesteps: how training draws u.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    net: Any
    schedule: NoiseSchedule
    timesteps: TimestepSampler

    frozen = ()
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve = ("loss", "top1")
    edit = None

    @property
    def sections(self) -> tuple[str, ...]:
        """Its own."""
        return (self.name,)

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """That of its pictures."""
        return self.shape

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """The label, which it predicts, and which guidance by it is given."""
        return {"label": Label(name="label", num_classes=self.num_classes)}

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""
        return self.net.init(key, jnp.zeros((1, *self.shape)), jnp.zeros((1,)))["params"]

    def init_extra(self) -> Any:
        """The state of the timestep sampler."""
        return self.timesteps.init()

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The next state of the timestep sampler."""
        return self.timesteps.update(extra, *feedback)

    def columns(self) -> dict[str, Column]:
        """Labels."""
        return base.columns_of(self.conditions)

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures and labels."""
        del params
        return {"image": batch["image"], "label": batch["label"]}

    def with_frozen(self, params: Mapping[str, Params]) -> "NoisedClassifier":
        """Itself."""
        del params
        return self

    def batch_example(self) -> dict[str, Any]:
        """One example as `loss` reads it, as shapes."""
        return {
            "image": jax.ShapeDtypeStruct(self.shape, jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def log_prob(self, params: Params, z: Array, t: NoiseLevel, label: Array) -> Array:
        """log p(label | z) of z [B, H, W, C] at levels [B]: [B]."""
        return -losses.cross_entropy(self.net.apply({"params": params}, z, t.time), label)

    def terms(self, params: Params, batch: Mapping[str, Array], t: NoiseLevel, eps: Array, **apply: Any) -> dict:
        """How well it classifies pictures at given noise levels.

        Args:
          params: its parameters.
          batch: 'image' [n, H, W, C], clean, and 'label' [n].
          t: levels [n].
          eps: [n, H, W, C] noise.
          **apply: passed to the network, such as dropout_keys.

        Returns:
          'loss' (cross entropy, nats), 'top1' and 'top5' (1 where the label is the best, in the best five), [n] each.
        """
        x, label = batch["image"].astype(jnp.float32), batch["label"]
        logits = self.net.apply({"params": params}, diffuse(x, t, eps), t.time, **apply)
        better = jnp.sum(logits > jnp.take_along_axis(logits, label[:, None], axis=1), axis=1)
        hits = {name: (better < rank).astype(jnp.float32) for name, rank in {"top1": 1, "top5": 5}.items()}
        return {"loss": losses.cross_entropy(logits, label), **hits}

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        """See `base.Model.loss`: cross entropy on noised pictures (ADM, section 4)."""
        keys = base.split(keys, "noise", "timestep", "dropout")
        u, weight = self.timesteps.draw(extra, keys["timestep"], position, total)
        eps = base.normal(keys["noise"], self.shape)
        terms = self.terms(params, batch, self.schedule(u), eps, dropout_keys=keys["dropout"])
        return terms["loss"] * weight, base.by_quarter(terms, u), (u, terms["loss"])

    @property
    def noised(self) -> bool:
        """Whether its pictures are noisy."""
        return True


@component("model", "classifier")
def classifier(
    *,
    shape: Annotated[tuple[int, ...], In(1, 8192), Length(3, 3)] = (32, 32, 3),
    num_classes: Annotated[int, In(1, 10**7)] = 1000,
    net: Annotated[Any, Of("network", "classifier", late=True)],
    schedule: Annotated[NoiseSchedule, Of("schedule", "linear")],
    timesteps: Annotated[Any, Of("timesteps", "uniform", late=True), TRAINING],
    name: Annotated[str, WIRED],
) -> NoisedClassifier:
    """A classifier of noisy pictures, which guides diffusion models.

    Args:
      shape: (height, width, channels) of its pictures.
      num_classes: number of labels.
      net: its network.
      schedule: noise level as a function of time; that of the model it guides.
      timesteps: how training draws noise levels.
      name: of the section.
    """
    network = net(num_classes=num_classes)
    if hasattr(network, "check"):
        network.check(tuple(shape))
    draw = timesteps(num_timesteps=schedule.num_timesteps)
    return NoisedClassifier(name, tuple(shape), num_classes, network, schedule, draw)
