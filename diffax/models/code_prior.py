"""The autoregressive prior: an image embedding of CLIP's, written code by code (DALL-E 2, section 2.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import RUNTIME, WIRED, Each, Group, In, Of, Section, component
from diffax.conditions.base import Condition, drop, zeros
from diffax.data.pipeline import Column
from diffax.diffusion import losses
from diffax.models import base, codes
from diffax.models.base import STATISTICS, Params
from diffax.models.best_of import best_of
from diffax.models.guidance import Guidance, as_scale, scale_of
from diffax.models.targets import Embeddings, check_clean
from diffax.networks.conditioned import Conditioned
from diffax.networks.context import Context, merge
from diffax.networks.layers import Style
from diffax.networks.prior import sample_codes

Array = jax.Array


class SimilarityEncoder(nn.Module):
    """One token for each bucket of the product of the two embeddings.

    Attributes:
      style: of the layers.
      buckets: numbers are 0 .. buckets - 1.
      width: of the token.
    """

    style: Style
    buckets: int
    width: int

    @nn.compact
    def __call__(self, similarity: Array, z: Array) -> Context:
        """similarity: [B] integers, `buckets` where it is dropped. Returns the sequence [B, 1, width]."""
        del z
        table = nn.Embed(self.buckets + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="embed")
        return Context(sequence=table(similarity)[:, None].astype(self.style.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity(Condition):
    """How well the picture to come fits its caption: the bucket of their embeddings' product.

    With buckets at quantiles of the training data, the better half of the fits are the upper half of the buckets. The
    model makes it itself, in training of the two embeddings, in sampling by a draw.
    """

    buckets: int
    width: int

    @property
    def argument(self) -> str:
        """Of the caption, with which it is dropped."""
        return "prompt"

    @property
    def can_drop(self) -> bool:
        """Yes."""
        return True

    def encoder(self, net: nn.Module) -> nn.Module:
        """One token."""
        return SimilarityEncoder(net.style, self.buckets, self.width, name=self.name)

    def example(self) -> jax.ShapeDtypeStruct:
        """A bucket."""
        return jax.ShapeDtypeStruct((), jnp.int32)

    def null(self, params: Mapping[str, Params]) -> np.ndarray:
        """The bucket after the last."""
        return np.int32(self.buckets)


@dataclasses.dataclass(frozen=True, eq=False)
class CodePrior:
    """An autoregressive prior, every choice made.

    Attributes:
      name: the config's section.
      number: its place among the generators.
      target: the embeddings.
      conditions: what it depends on; 'text_embedding' is among them.
      similarity: the condition that it makes itself.
      net: the network and the encoders.
      codec: how it writes embeddings; blank until that is fitted.
      examples: how many embeddings that is fitted to.
      percentile: of the products of embeddings and captions in training: sampling draws one from there up.
      condition_dropout: share of the training examples whose conditions are dropped.
      guidance: of sampling.
      temperature: divides the logits; 0 takes the most probable code.
      nulls: {condition: null value}, of those that training drops.
    """

    name: str
    number: int
    target: Embeddings
    conditions: Mapping[str, Condition]
    similarity: Similarity
    net: Conditioned
    codec: codes.Codec
    examples: int
    percentile: float
    condition_dropout: float
    guidance: Mapping[str, Guidance]
    temperature: float
    nulls: Mapping[str, Any]

    curve = ("loss",)
    output = "image_embedding"
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    edit = None
    has_bound = False

    @property
    def shape(self) -> tuple[int]:
        """(D,) of an embedding."""
        return self.target.shape

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures that training reads."""
        return self.target.data_shape

    @property
    def given(self) -> Mapping[str, Condition]:
        """The conditions that sampling is given."""
        return self.conditions

    @property
    def scale(self) -> float | None:
        """Of its guidance."""
        return scale_of(self.guidance)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The CLIP's section."""
        return self.target.sections

    @property
    def sections(self) -> tuple[str, ...]:
        """Its own and the CLIP's section."""
        return (self.name, *self.frozen)

    @property
    def num_steps(self) -> int:
        """How often sampling calls the network for one sample."""
        return self.codec.directions.shape[1]

    def resampled(self, choice: base.Sampling) -> "CodePrior":
        """Itself: it has neither a sampling grid nor a sampler."""
        del choice
        return self

    # ---- training

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""
        inputs = {name: zeros(c.example()) for name, c in self._every.items()}
        return self.net.init(key, jnp.zeros((1, self.num_steps)), jnp.zeros((1,)), inputs)["params"]

    @property
    def _every(self) -> dict[str, Condition]:
        return {**self.conditions, self.similarity.name: self.similarity}

    def init_extra(self) -> Any:
        """The codec."""
        return jax.tree.map(jnp.asarray, self.codec)

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The codec, which training does not change."""
        del feedback
        return extra

    def columns(self) -> dict[str, Column]:
        """What a batch holds besides its pictures."""
        return base.columns_of(self.conditions)

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the data as `loss` reads it."""
        found = self.target.prepare(params, batch)
        for condition in self.conditions.values():
            found |= condition.prepare(params, batch)
        return found

    def with_frozen(self, params: Mapping[str, Params]) -> "CodePrior":
        """The model with null values that frozen models make."""
        return dataclasses.replace(self, nulls={name: self._every[name].null(params) for name in self.nulls})

    def batch_example(self) -> dict[str, Any]:
        """One example as `loss` reads it, as shapes."""
        found = {self.target.key: jax.ShapeDtypeStruct(self.shape, jnp.float32)}
        for condition in self.conditions.values():
            found |= condition.batch_example()
        return found

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        """See `base.Model.loss`: cross entropy of the codes of an embedding, each given those before it.

        The bucket of the product of the two embeddings is one more condition, which is dropped with the caption.
        Metrics are the loss, the mean over codes in nats, and the share of codes that are the most probable; also of
        each quarter of the row, whose first components matter most.
        """
        keys = base.split(keys, "drop", "dropout", "conditions")
        x = batch["image_embedding"].astype(jnp.float32)
        wanted = codes.write(x, extra)
        inputs = {
            name: condition.in_training(batch, x, base.fold_in(keys["conditions"], number))[1]
            for number, (name, condition) in enumerate(self.conditions.items())
        }
        inputs[self.similarity.name] = codes.similarity_bucket(x, batch["text_embedding"], extra)
        if self.nulls:
            how = {"conditions": self._every, "rate": self.condition_dropout, "nulls": self.nulls}
            inputs = drop(inputs, keys["drop"], **how)
        logits = self.net.apply({"params": params}, wanted, None, inputs, dropout_keys=keys["dropout"])
        each = losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.ravel()).reshape(wanted.shape)
        hits = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
        metrics = {}
        for name, term in {"loss": each, "top1": hits}.items():
            parts = {"": term} | {f"_q{q}": part for q, part in enumerate(jnp.array_split(term, 4, axis=1))}
            metrics |= {name + q: (jnp.sum(a), jnp.asarray(a.size, jnp.float32)) for q, a in parts.items() if a.size}
        return jnp.mean(each, axis=1), metrics, ()

    # ---- what is measured on the data

    def measure_before(self, batches: base.Batches) -> dict[str, np.ndarray]:
        """Fits the codec to embeddings of the data, before training.

        Args:
          batches: as `loss` reads them.

        Raises:
          ValueError: the embeddings are too few or have too few dimensions.
        """
        image: list[np.ndarray] = []
        text: list[np.ndarray] = []
        while sum(map(len, image)) < self.examples:
            batch = next(batches)
            image.append(np.asarray(batch["image_embedding"]))
            text.append(np.asarray(batch["text_embedding"]))
        of_image, of_text = (np.concatenate(rows)[: self.examples] for rows in (image, text))
        buckets, components = self.codec.centres.shape[1], self.num_steps
        codec = codes.fit_codec(of_image, (of_image * of_text).sum(1), components=components, buckets=buckets)
        return codec._asdict()

    def describe_statistics(self, statistics: Mapping[str, np.ndarray], batches: base.Batches) -> str:
        """What is lost by writing embeddings in codes."""
        image = np.asarray(next(batches)["image_embedding"])
        codec = codes.Codec(**statistics)
        lost = np.mean((np.asarray(codes.read(codes.write(image, codec), codec)) - image) ** 2) / image.var(0).mean()
        return f"codes lose {lost:.2%} of the variance of embeddings"

    def with_statistics(self, statistics: Mapping[str, np.ndarray]) -> "CodePrior":
        """The model with a codec that was fitted."""
        return dataclasses.replace(self, codec=codes.Codec(**statistics))

    def statistics_example(self) -> dict[str, Any]:
        """`jax.ShapeDtypeStruct`s of the codec."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.float32), self.codec)._asdict()

    # ---- sampling

    def reached(self, stop: float | None) -> None:
        """Nothing: its samples are whole."""
        del stop

    def sample(self, params, keys, given, *, scale=None, start=None, stop=None, keep=0):
        """See `base.Generator.sample`.

        The wanted bucket of the product is drawn among those of `percentile` and above (the paper: the upper half).
        """
        del start, stop, keep
        own = params[self.name]
        codec = codes.Codec(**nn.meta.unbox(own[STATISTICS]))
        buckets = codec.similarity_edges.shape[0] + 1
        lowest = min(round(buckets * self.percentile / 100), buckets - 1)
        draw = jax.vmap(lambda key: jax.random.randint(key, (), lowest, buckets))
        inputs = {
            name: condition.in_sampling(given[name], base.fold_in(keys, -2 - number), params)
            for number, (name, condition) in enumerate(self.conditions.items())
        }
        inputs[self.similarity.name] = draw(base.fold_in(keys, -1))  # a number that no code has
        example = jnp.zeros((len(keys), codec.directions.shape[1]))

        def encode(inputs: Mapping[str, Any]) -> Context:
            found = self.net.apply({"params": own}, inputs, example, method="encode")
            return merge([found[name] for name, _ in self.net.encoders])

        dropped, scale = None, as_scale(scale, self.scale)
        if scale is not None:
            nulls = {name: self._every[name].null(params) for name in self.nulls}
            null = {
                name: jax.tree.map(lambda v, a: jnp.broadcast_to(jnp.asarray(v, a.dtype), a.shape), v, inputs[name])
                for name, v in nulls.items()
            }
            dropped = encode(inputs | null)
        row = sample_codes(
            self.net.net,
            own["net"],
            encode(inputs),
            keys,
            dropped=dropped,
            scale=1.0 if scale is None else scale,
            temperature=self.temperature,
        )
        return self.target.clip._of_norm(codes.read(row, codec))


def codes_fields(
    *,
    components: Annotated[int, In(1, 8192)] = 319,
    buckets: Annotated[int, In(2, 2**16)] = 1024,
    examples: Annotated[int, In(1, 2**31 - 1), RUNTIME] = 100_000,
    percentile: Annotated[float, In(0, 100, below=True), RUNTIME] = 50.0,
) -> None:
    """How embeddings are written as codes.

    Args:
      components: principal components that are kept.
      buckets: codes of each, and of the product of the two embeddings.
      examples: embeddings that these are fitted to.
      percentile: sampling draws a product of this rank or above.
    """
    del components, buckets, examples, percentile


@component("model", "code_prior")
def code_prior(
    *,
    shape: Annotated[tuple[int, ...], In(1, 8192)] = (768,),
    clip: Annotated[Any, Section(needs="embed_text", what="a CLIP")] = "clip",
    net: Annotated[Any, Of("network", "code_prior", late=True)],
    conditions: Annotated[Any, Each("condition", ("text_embedding",), late=True)],
    codes: Annotated[Any, Group(codes_fields)],
    condition_dropout: Annotated[float, In(0, 1, below=True)] = 0.0,
    guidance: Annotated[Any, Each("guidance"), RUNTIME],
    temperature: Annotated[float, In(0, 2), RUNTIME] = 1.0,
    candidates: Annotated[int, In(1, 64), RUNTIME] = 1,
    name: Annotated[str, WIRED],
    number: Annotated[int, WIRED] = 0,
) -> CodePrior:
    """The autoregressive prior of DALL-E 2.

    Args:
      shape: (D,), the size of the embeddings.
      clip: section of the CLIP whose embeddings it makes.
      net: its network.
      conditions: what it depends on; text_embedding is one of them.
      codes: how embeddings are written as codes.
      condition_dropout: share of the training examples whose conditions are dropped.
      guidance: classifier_free, or none.
      temperature: divides the logits.
      candidates: how many embeddings are made of a caption, of which the nearest to it is kept.
      name: of the section.
      number: place among the generators of the config.
    """
    return _build(
        shape, clip, net, conditions, codes, condition_dropout, guidance, temperature, candidates, name, number
    )


def _build(shape, clip, net, conditions, fields, condition_dropout, guidance, temperature, candidates, name, number):
    if "text_embedding" not in conditions:
        raise ValueError(f"conditions must have 'text_embedding' for a code prior, got {[*conditions]}")
    if clip is None or tuple(shape) != (clip.features,):
        raise ValueError(f"shape must be the features of its CLIP, got {shape}")
    check_clean(clip)
    if fields.components > shape[0]:
        raise ValueError(f"codes.components must be at most the {shape[0]} dimensions, got {fields.components}")
    if fields.examples < max(fields.buckets, fields.components):
        raise ValueError(
            f"codes.examples must be at least codes.buckets and codes.components, {fields.buckets} and "
            f"{fields.components}, got {fields.examples}"
        )
    drops = condition_dropout > 0
    network = net(out_channels=fields.buckets, name="net")
    made = {key: make(name=key, shape=tuple(shape), droppable=drops) for key, make in conditions.items()}
    width = next((getattr(c, "width", 0) for c in made.values() if getattr(c, "width", 0)), network.vector_width)
    similarity = Similarity(
        name="similarity", buckets=fields.buckets, width=width, droppable=drops, dropout=_dropout_of_captions(made)
    )
    every = {**made, "similarity": similarity}
    model = CodePrior(
        name=name,
        number=number,
        target=Embeddings(clip),
        conditions=made,
        similarity=similarity,
        net=Conditioned(network, tuple((key, c.encoder(network)) for key, c in every.items())),
        codec=codes.blank_codec(*shape, fields.components, fields.buckets),
        examples=fields.examples,
        percentile=fields.percentile,
        condition_dropout=condition_dropout,
        guidance=guidance,
        temperature=temperature,
        nulls={key: c.null({}) for key, c in every.items() if drops and c.can_drop},
    )
    for part in guidance.values():
        if part.scale is None or part.sections:
            raise ValueError(f"guidance of a code prior can be 'classifier_free' alone, got {[*guidance]}")
        part.check(model)
    scale_of(guidance)
    base.check_sequences(model.net, every, (fields.components,))
    return best_of(model, candidates)


def _dropout_of_captions(conditions: Mapping[str, Condition]) -> float:
    return next((c.dropout for c in conditions.values() if c.argument == "prompt"), 0.0)
