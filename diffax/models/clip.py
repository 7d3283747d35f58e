"""CLIP: which caption goes with which picture (Radford et al. 2021); noised, at every noise level (GLIDE)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import RUNTIME, TRAINING, WIRED, Group, In, Length, Of, component
from diffax.conditions.base import Condition
from diffax.conditions.text import Captioned
from diffax.conditions.tokenizers import LazyTokenizer
from diffax.data.pipeline import Column
from diffax.diffusion import losses
from diffax.diffusion.guidance import unit
from diffax.diffusion.process import diffuse
from diffax.diffusion.schedules import NoiseLevel, NoiseSchedule
from diffax.diffusion.timesteps import TimestepSampler
from diffax.models import base, codes
from diffax.models.base import Params

Array = jax.Array
LARGEST_LOGIT_SCALE = float(np.log(100.0))  # Radford et al. 2021


class TextOut(NamedTuple):
    """What the text encoder makes: embedding [B, E], sequence [B, L, W] and which of its places count [B, L]."""

    embedding: Array
    features: Array
    mask: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedCaption(Captioned):
    """The caption that CLIP guidance compares pictures with, given as ids and read once."""

    clip: Any

    @property
    def ids(self) -> LazyTokenizer:
        """The CLIP's tokenizer."""
        return self.clip.tokenizer

    @property
    def sections(self) -> tuple[str, ...]:
        """The CLIP's."""
        return (self.clip.name,)

    def example(self) -> jax.ShapeDtypeStruct:
        """An embedding."""
        return jax.ShapeDtypeStruct((self.clip.features,), jnp.float32)

    def in_sampling(self, given: Array, keys: Array, params: Mapping[str, Params]) -> Array:
        """The embeddings [B, E] of captions' ids."""
        embedding, _ = self.clip.net.apply({"params": params[self.clip.name]}, given, method="encode_text")
        return embedding


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP, every choice made.

    Attributes:
      name: the config's section.
      shape: (H, W, C) of its pictures.
      net: a `networks.clip.CLIP`.
      tokenizer: caption -> ids.
      noised: whether its pictures are noisy, at a noise level that it reads.
      schedule: noise level as a function of u.
      timesteps: how training draws u.
      norm: the length that conditions are given its embeddings in; 0: their own.
      scale: mean and deviation of its image embeddings, which a prior works without.
    """

    name: str
    shape: tuple[int, int, int]
    net: Any
    tokenizer: LazyTokenizer
    noised: bool
    schedule: NoiseSchedule
    timesteps: TimestepSampler
    norm: float
    scale: codes.Scale

    frozen = ()
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve = ("loss", "image_top1")
    edit = None

    @property
    def sections(self) -> tuple[str, ...]:
        """Its own."""
        return (self.name,)

    @property
    def features(self) -> int:
        """E, the size of its embeddings."""
        return self.net.image.features

    @property
    def text_width(self) -> int:
        """Of the sequence that its text encoder makes."""
        return self.net.text.width

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """That of its pictures."""
        return self.shape

    @property
    def caption(self) -> Condition:
        """The caption, as guidance by this CLIP is given it."""
        return GuidedCaption(name="clip_text", clip=self)

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """The caption."""
        return {"text": dataclasses.replace(self.caption, name="text")}

    # ---- training

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""
        return self.net.init(key, *self.net.example())["params"]

    def init_extra(self) -> Any:
        """The state of the timestep sampler."""
        return self.timesteps.init()

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The next state of the timestep sampler."""
        return self.timesteps.update(extra, *feedback)

    def columns(self) -> dict[str, Column]:
        """Captions."""
        return base.columns_of(self.conditions)

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures and the ids of their captions."""
        del params
        return {"image": batch["image"], "text": batch["text"]}

    def with_frozen(self, params: Mapping[str, Params]) -> "Clip":
        """Itself."""
        del params
        return self

    def batch_example(self) -> dict[str, Any]:
        """One example as `loss` reads it, as shapes."""
        return {
            "image": jax.ShapeDtypeStruct(self.shape, jnp.float32),
            "text": jax.ShapeDtypeStruct((self.tokenizer.length,), jnp.int32),
        }

    def terms(
        self,
        params: Params,
        batch: Mapping[str, Array],
        t: NoiseLevel,
        eps: Array,
        *,
        position: Array | None = None,
        gather: Callable[[Array], Array] | None = None,
    ) -> dict[str, Array]:
        """How well it matches pictures at given noise levels with their captions.

        Args:
          params: its parameters.
          batch: 'image' [n, H, W, C], clean, and 'text' [n, L], the ids of their captions.
          t: levels [n]; not used by a CLIP of clean pictures.
          eps: [n, H, W, C] noise.
          position: see `losses.contrastive`.
          gather: see `losses.contrastive`; without it the n pairs are all there are.

        Returns:
          'loss' (nats), 'image_top1' and 'text_top1', [n] each.
        """
        x = batch["image"].astype(jnp.float32)
        z, time = (diffuse(x, t, eps), t.time) if self.noised else (x, None)
        image, text, scale = self.net.apply({"params": params}, z, batch["text"], time)
        position = jnp.arange(len(x)) if position is None else position
        more = {"gather": gather} if gather else {}
        scale = jnp.minimum(scale, LARGEST_LOGIT_SCALE)
        loss, hits = losses.contrastive(image, text, scale, position, **more)
        return {"loss": loss, **hits}

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        """See `base.Model.loss`: the contrastive loss over the global batch.

        Of an accumulated batch each part is contrasted alone.
        """
        keys = base.split(keys, "noise", "timestep")
        u, weight = self.timesteps.draw(extra, keys["timestep"], position, total)
        eps = base.normal(keys["noise"], self.shape)
        terms = self.terms(params, batch, self.schedule(u), eps, position=position, gather=gather)
        return terms["loss"] * weight, base.by_quarter(terms, u), (u, terms["loss"])

    # ---- use

    def logit_scale(self, params: Params) -> Array:
        """Log of the scale of its cosines."""
        return jnp.minimum(params["logit_scale"], LARGEST_LOGIT_SCALE)

    def encode_image(self, params: Params, z: Array, t: NoiseLevel | None) -> Array:
        """[B, E], not normalised, of pictures [B, H, W, C] in [-1, 1] at levels [B]; None: clean."""
        time = None if t is None else t.time
        return self.net.apply({"params": params}, z, time, method="encode_image")

    def _of_norm(self, embedding: Array) -> Array:
        return self.norm * unit(embedding) if self.norm else embedding

    def embed_image(self, params: Params, image: Array) -> Array:
        """The image embeddings [B, E] of pictures [B, H, W, C] in [-1, 1], of the CLIP's size or another."""
        if image.shape[1:] != self.shape:
            image = jax.image.resize(image, (len(image), *self.shape), "cubic", antialias=True)
        return self._of_norm(self.encode_image(params, image, None))

    def image_embedding(self, params: Mapping[str, Params], batch: Mapping[str, Array]) -> Array:
        """The image embeddings that a batch of the data has, or those of its pictures."""
        if "image_embedding" in batch:
            return batch["image_embedding"]
        return self.embed_image(params[self.name], batch["image"])

    def embed_text(self, params: Params, ids: Array) -> TextOut:
        """What the text encoder makes of captions' ids [B, L]."""
        embedding, features = self.net.apply({"params": params}, ids, method="encode_text")
        return TextOut(self._of_norm(embedding), features, ids >= 0)


def embedding(
    *,
    norm: Annotated[float, In(0, 10**4)] = 0.0,
    mean: Annotated[tuple[float, ...], In(-(10**4), 10**4), Length(0, 8192), RUNTIME] = (),
    std: Annotated[tuple[float, ...], In(0, 10**4, above=True), Length(0, 8192), RUNTIME] = (),
) -> None:
    """How other models are given the embeddings of a CLIP.

    Args:
      norm: the length that they are scaled to; 0: their own.
      mean: a prior works on (embedding - mean) / std; one number or one for each dimension.
      std: see mean.
    """
    del norm, mean, std


@component("model", "clip")
def clip(
    *,
    shape: Annotated[tuple[int, ...], In(1, 8192), Length(3, 3)] = (64, 64, 3),
    tokenizer: Annotated[LazyTokenizer, Of("tokenizer", "clip")],
    net: Annotated[Any, Of("network", "clip", late=True)],
    noised: bool = True,
    schedule: Annotated[NoiseSchedule, Of("schedule", "linear")],
    timesteps: Annotated[Any, Of("timesteps", "uniform", late=True), TRAINING],
    embedding: Annotated[Any, Group(embedding)],
    name: Annotated[str, WIRED],
) -> Clip:
    """A CLIP of clean pictures, or one of noisy pictures that guides diffusion models.

    Args:
      shape: (height, width, channels) of its pictures.
      tokenizer: caption -> ids.
      net: its network.
      noised: whether its pictures are noisy.
      schedule: noise level as a function of time, of a noised one; that of the model it guides.
      timesteps: how training draws noise levels.
      embedding: how other models are given its embeddings.
      name: of the section.
    """
    if noised and not schedule.num_timesteps:
        raise ValueError("schedule must have discrete timesteps for a noised CLIP, which embeds each of them")
    draw = timesteps(num_timesteps=schedule.num_timesteps)
    if jax.tree.leaves(draw.init()):
        raise ValueError("timesteps must be without a history for a CLIP; use 'uniform'")
    network = net(
        shape=tuple(shape),
        num_timesteps=schedule.num_timesteps if noised else 0,
        vocab_size=tokenizer.vocab_size,
        length=tokenizer.length,
    )
    sizes = {len(value) for value in (embedding.mean, embedding.std)}
    if not sizes <= {0, 1, network.image.features}:
        raise ValueError(f"embedding.mean and std must be 0, 1 or {network.image.features} numbers, got {sizes}")
    mean = np.array(embedding.mean or (0,), np.float32)
    std = np.array(embedding.std or (1,), np.float32)
    scale = codes.Scale(mean, std)
    return Clip(name, tuple(shape), network, tokenizer, noised, schedule, draw, embedding.norm, scale)
