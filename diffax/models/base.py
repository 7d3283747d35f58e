"""The protocol of models, and what several of them share.

A *model* is what one section of a config describes and one training run trains. A *generator* is a model that can be
sampled. A system is a list of generators, sampled one after the other by `models.cascade`. Whoever trains, samples,
scores or compiles a model knows this protocol and no kind of model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffax.conditions.base import Condition, zeros
from diffax.data.pipeline import Column
from diffax.diffusion import augment, samplers

Array = jax.Array
Params = Any
Metrics = dict[str, tuple[Array, Array]]
Batches = Iterator[Mapping[str, Any]]
STATISTICS = "statistics"  # among a model's parameters: what is measured on the data, and not trained


class Model(Protocol):
    """What can be trained.

    Attributes:
      name: the config's section.
      conditions: what it depends on besides its noise level, {name: condition}.
      frozen: sections whose trained parameters its own training needs.
      sections: sections whose parameters its use needs, its own first.
      data_shape: (H, W, C) of the pictures that its training reads.
      rates: {regular expression on the path of a parameter: factor of the learning rate}.
      curve: metrics worth drawing.
    """

    name: str
    conditions: Mapping[str, Condition]
    frozen: tuple[str, ...]
    sections: tuple[str, ...]
    data_shape: tuple[int, int, int]
    rates: Mapping[str, float]
    curve: tuple[str, ...]

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""

    def init_extra(self) -> Any:
        """Whatever else belongs to the training state: a history of losses, or nothing."""

    def loss(
        self,
        params: Params,
        extra: Any,
        batch: Mapping[str, Any],
        keys: Array,
        position: Array,
        total: int,
        gather: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Metrics, Any]:
        """The loss of each of n examples.

        Args:
          params: parameters.
          extra: what else belongs to the training state.
          batch: what `prepare` made, [n, ...].
          keys: [n], one for each example.
          position: [n], places of the examples among the `total` of the global batch.
          total: see position.
          gather: brings the examples of all devices together, [n, ...] -> [N, ...]; without it those at hand are all.

        Returns:
          The loss [n], metrics {name: (sum, count)}, and feedback for `update_extra`, a tree of arrays [n].
        """

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The next `extra`, from the feedback of the whole global batch."""

    def columns(self) -> dict[str, Column]:
        """What a batch of the data holds besides its pictures."""

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the data as `loss` reads it; `params` are those of `frozen` models."""

    def with_frozen(self, params: Mapping[str, Params]) -> "Model":
        """The model with null values that frozen models make, for training."""

    def batch_example(self) -> dict[str, Any]:
        """`jax.ShapeDtypeStruct`s of one example as `loss` reads it."""


class Generator(Model, Protocol):
    """What can be sampled.

    Attributes:
      output: the condition that its sample is to later models, such as 'low_res'.
      number: its place among the generators of a config, which its noise depends on.
      shape: of one sample.
      num_steps: how often sampling calls the network for one sample.
      given: the conditions that sampling is given, its own and those of its guidance.
      scale: of the guidance that has one, where a call gives none; None: it has no such guidance.
    """

    output: str
    number: int
    shape: tuple[int, ...]
    num_steps: int
    given: Mapping[str, Condition]
    scale: float | None

    def sample(
        self,
        params: Mapping[str, Params],
        keys: Array,
        given: Mapping[str, Any],
        *,
        scale: Array | None = None,
        start: "Start | None" = None,
        stop: float | None = None,
        keep: int = 0,
    ) -> Any:
        """Samples.

        Args:
          params: {section: parameters}.
          keys: [B] typed PRNG keys; sample i depends on keys[i] and the i-th values alone.
          given: {condition: what it is given}.
          scale: of guidance, scalar or [B]; None: the model's own.
          start: where the chain starts; None: at noise.
          stop: log-SNR at which it stops; None: at clean data.
          keep: also return this many estimates of x on the way.

        Returns:
          [B, ...]; with `keep`, also [keep, B, ...].
        """

    def reached(self, stop: float | None) -> Any:
        """The noise level at which sampling that stops at a log-SNR ends; None: clean."""

    def resampled(self, choice: "Sampling") -> "Generator":
        """The generator with another sampling grid or sampler.

        Raises:
          ValueError: the grid is not possible.
        """


@dataclasses.dataclass(frozen=True)
class Start:
    """Where sampling starts, and what of the result is known.

    Attributes:
      image: [B, H, W, C] in [-1, 1], what is edited, of the size of the last model; or None.
      known: [B, H, W, 1], 1 where the image stays as it is; or None.
      noise: [B, ...] the z that sampling starts from, in place of a draw; or None.
      strength: share of the steps that are walked, from the noised image (SDEdit, Meng et al. 2022); 1: all of them,
        from noise.
    """

    image: Array | None = None
    known: Array | None = None
    noise: Array | None = None
    strength: float = 1.0

    def at(self, shape: tuple[int, ...], *, first: bool) -> "Start":
        """The same start for an image model of this shape; the later ones of a cascade walk all their steps."""
        start = self if first else dataclasses.replace(self, noise=None, strength=1.0)
        if self.image is None:
            return start
        known = jnp.zeros_like(self.image[..., :1]) if self.known is None else self.known
        image, smaller = augment.shrink_known(self.image, known, self.image.shape[1] // shape[0])
        return dataclasses.replace(start, image=image, known=None if self.known is None else smaller)


jax.tree_util.register_dataclass(Start, data_fields=["image", "known", "noise"], meta_fields=["strength"])


class Sampling(NamedTuple):
    """Choices of one call of the sampler in place of the config's; None: the config's.

    Attributes:
      steps: the sampling grid.
      sampler: how its steps are walked.
    """

    steps: str | None = None
    sampler: samplers.Sampler | None = None


# ---- what several models share --------------------------------------------------------------------------------------


def split(keys: Array, *names: str) -> dict[str, Array]:
    """[n] keys -> {name: [n] keys}."""
    return dict(zip(names, jax.vmap(lambda k: jax.random.split(k, len(names)))(keys).T, strict=True))


def fold_in(keys: Array, number: int) -> Array:
    """[n] keys and a number -> [n] other keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, jnp.int32(number)))(keys)


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """[n] keys -> [n, *shape], each example's noise from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def by_quarter(terms: Mapping[str, Array], u: Array) -> Metrics:
    """Sums and counts of [n] terms: of all, and of each quarter of the noise range, least noise first."""
    metrics = {}
    for name, term in terms.items():
        metrics[name] = (jnp.sum(term), jnp.asarray(term.size, jnp.float32))
        for q in range(4):
            inside = jnp.clip(jnp.ceil(4 * u) - 1, 0, 3) == q
            metrics[f"{name}_q{q}"] = (jnp.sum(jnp.where(inside, term, 0)), jnp.sum(inside, dtype=jnp.float32))
    return metrics


def add_batch(examples: Mapping[str, Any], n: int) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct`s of one example -> those of n."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), dict(examples))


def columns_of(conditions: Mapping[str, Condition]) -> dict[str, Column]:
    """What all conditions read of the data, by its name in a batch."""
    columns = {name: column for c in conditions.values() for name, column in c.columns().items()}
    return {name: Column(key, convert) if convert else Column(key) for name, (key, convert) in columns.items()}


def check_sequences(net: Any, conditions: Mapping[str, Condition], shape: tuple[int, ...]) -> None:
    """Raises ValueError if the sequences that conditions make for one network differ in width."""
    if sum(hasattr(c, "width") for c in conditions.values()) < 2:
        return
    inputs, z = {name: zeros(c.example()) for name, c in conditions.items()}, jnp.zeros((1, *shape))
    contexts, _ = jax.eval_shape(lambda key: net.init_with_output(key, inputs, z, method="encode"), jax.random.key(0))
    widths = {name: c.sequence.shape[-1] for name, c in contexts.items() if c.sequence is not None}
    if len({*widths.values()}) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(f"conditions must make sequences of one width, got {found}; set their width alike")


def clip_of(model: Model) -> Any | None:
    """The CLIP whose embeddings a model makes or is conditioned on; None if there is none."""
    parts = (getattr(model, "target", None), *model.conditions.values())
    return next((part.clip for part in parts if getattr(part, "clip", None) is not None), None)


def edit_of(conditions: Mapping[str, Condition]) -> Callable | None:
    """The change of training pictures on the host that one of the conditions wants; None if none does."""
    return next((c.edit for c in conditions.values() if c.edit is not None), None)


def host(tree: Any) -> Any:
    """A tree of arrays as numpy."""
    return jax.tree.map(np.asarray, tree)
