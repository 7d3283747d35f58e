"""Evaluation classifiers: networks and machines trained on real pictures, which say what samples show.

They have seen no sample and no noise, and are none of the noised classifiers that guide. A component of the kind
'evaluation' returns an `EvaluationClassifier`, which knows what it checks before it is fitted; `scores` fits it on the
data of a section and then knows the protocol `Fitted` alone. One of your own is named by its import path,
--config.eval.classifier=my_lab.scores:poses, and `train_reader` trains a network for it:

    @dataclasses.dataclass(frozen=True)
    class Poses:
        argument = "pose"                               # of a call of sample_fn
        columns = {"pose": Column("pose")}              # of the data

        def fit(self, section, shape):
            reader = train_reader(section, shape, {"pose": 12})
            return FittedPoses(reader)

    def poses():
        return Poses()
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, build, component
from diffax.data.pipeline import Column, batches, examples
from diffax.data.source import Source
from diffax.diffusion import augment, losses
from diffax.errors import UserError
from diffax.evaluation import metrics
from diffax.networks.classifier import Classifier
from diffax.sampling.grids import held_out_examples
from diffax.training import loop, parallel, reporting

Array = jax.Array
Params = Any
Shape = Sequence[int]

# An SVC on more pictures than this takes longer than the pictures themselves.
SVC_EXAMPLES = 5000


# ---- the protocol ---------------------------------------------------------------------------------------------------


class Fitted(Protocol):
    """An evaluation classifier that was trained on real pictures.

    Attributes:
      accuracy: on held-out real pictures.
      shares: names in `score` of shares of the samples, which are drawn against the guidance scale; may be empty.
    """

    accuracy: float
    shares: Sequence[str]

    def score(self, made: np.ndarray, wanted: Any, real: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The numbers of a row.

        Args:
          made: [N, H, W, C] in [-1, 1], samples.
          wanted: [N] values of `argument` that they were made with.
          real: held-out pictures, 'image' [M, H, W, C], and the `columns` [M].

        Returns:
          {name: number}; 'accuracy' is the share of samples that show what was wanted.
        """

    def others(self, num: int) -> Mapping[str, Sequence[Any]]:
        """Further values of `argument` that are worth sampling, {name: values}, where `num` samples are asked for.

        Their 'accuracy' is in the row as NAME_accuracy. Such as captions that training held out; {} for none.
        """


class EvaluationClassifier(Protocol):
    """What a component of the kind 'evaluation' makes; cheap to build.

    Attributes:
      argument: of a call of `sample_fn`: what samples are checked for, such as 'label'. Models without that argument
        are scored without a classifier.
      columns: of the data, which `fit` and `score` need, by their names in `real`.
    """

    argument: str
    columns: Mapping[str, Column]

    def fit(self, section: Mapping[str, Any], shape: Shape) -> Fitted:
        """Trains it on the data of a section.

        Args:
          section: of the config, with 'data' and 'loader'.
          shape: (H, W, C) of the samples.

        Raises:
          UserError: the data do not have what it needs.
        """


# ---- labels ---------------------------------------------------------------------------------------------------------


class FittedLabels(NamedTuple):
    """A classifier of labels; see `Fitted`.

    Attributes:
      classify: pictures [N, H, W, C] in [-1, 1] -> labels [N].
      features: pictures -> [N, D], what it sees before it decides.
      accuracy: on held-out real pictures.
    """

    classify: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray]
    accuracy: float
    shares: Sequence[str] = ("accuracy",)

    def score(self, made: np.ndarray, wanted: Any, real: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Accuracy, diversity within a class (real pictures: 1) and the Frechet distance of the features."""
        return {
            "accuracy": float(np.mean(self.classify(made) == wanted)),
            "diversity": metrics.spread(made, wanted) / metrics.spread(real["image"], real["label"]),
            "frechet_classifier": metrics.frechet_distance(self.features(made), self.features(real["image"])),
            "accuracy_of_classifier_on_real": self.accuracy,
        }

    def others(self, num: int) -> Mapping[str, Sequence[Any]]:
        """None."""
        del num
        return {}


def _fitted(classify: Callable, features: Callable, section: Mapping[str, Any], shape: Shape) -> FittedLabels:
    test = held_out_examples(section, shape, SVC_EXAMPLES, LABEL)
    return FittedLabels(classify, features, float(np.mean(classify(test["image"]) == test["label"])))


LABEL = {"label": Column("label")}


def _flat(pictures: np.ndarray) -> np.ndarray:
    return np.asarray(pictures).reshape(len(pictures), -1)


@dataclasses.dataclass(frozen=True)
class SVC:
    """See `svc`."""

    argument = "label"
    columns = LABEL

    def fit(self, section: Mapping[str, Any], shape: Shape) -> FittedLabels:
        """See `EvaluationClassifier.fit`."""
        try:
            from sklearn import svm
        except ImportError:
            raise UserError("scikit-learn is not installed; eval.classifier; pip install diffax[demo]") from None
        source = open_data(section, shape)
        real = examples(source, section["loader"], shape=tuple(shape), limit=SVC_EXAMPLES, columns=LABEL)
        machine = svm.SVC(C=10.0).fit(_flat(real["image"]), real["label"])
        return _fitted(lambda pictures: machine.predict(_flat(pictures)), _flat, section, shape)


@component("evaluation", "svc")
def svc() -> SVC:
    """A support vector classifier of the pixels: right for small pictures whose subject stays in place."""
    return SVC()


@dataclasses.dataclass(frozen=True)
class Network:
    """See `network`."""

    steps: int

    argument = "label"
    columns = LABEL

    def fit(self, section: Mapping[str, Any], shape: Shape) -> FittedLabels:
        """See `EvaluationClassifier.fit`."""
        count = len(open_data(section, shape).class_names) or _num_classes(section, self.argument)
        reader = train_reader(section, shape, {"label": count}, steps=self.steps)
        return _fitted(lambda pictures: reader.classify(pictures)["label"], reader.features, section, shape)


def _num_classes(section: Mapping[str, Any], name: str) -> int:
    condition = section.get("conditions", {}).get(name, {})
    if "num_classes" not in condition:
        raise UserError(f"nothing says how many classes the data have; eval.classifier; name them, or use {name!r}")
    return condition["num_classes"]


@component("evaluation", "network")
def network(*, steps: Annotated[int, In(1, 10**6)] = 300) -> Network:
    """A small convolutional network, for pictures whose subject may be anywhere; trained in about a minute.

    Args:
      steps: how long it is trained.
    """
    return Network(steps)


# ---- networks -------------------------------------------------------------------------------------------------------


def open_data(section: Mapping[str, Any], shape: Shape) -> Source:
    """The records that a section is trained on."""
    return build(section["data"], "data").open(tuple(shape))


class Reader(NamedTuple):
    """A trained network.

    Attributes:
      classify: pictures [N, H, W, C] in [-1, 1] -> {column: [N] classes}.
      features: pictures -> [N, D], what it sees before it decides.
    """

    classify: Callable[[np.ndarray], dict[str, np.ndarray]]
    features: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ReaderModel:
    """The encoder half of the U-Net on pictures without noise, a `training.step.Trainable`.

    Attributes:
      net: with an output for every class of every target.
      shape: (H, W, C) of the pictures.
      targets: {column: number of its classes}.
      blur: three training pictures in four are blurred by up to this many pixels.
    """

    net: Classifier
    shape: tuple[int, int, int]
    targets: Mapping[str, int]
    blur: float = 0.0

    rates = {}

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""
        return self.net.init(key, jnp.zeros((1, *self.shape)), jnp.zeros((1,)))["params"]

    def init_extra(self) -> tuple:
        """Nothing."""
        return ()

    def update_extra(self, extra: tuple, feedback: tuple) -> tuple:
        """Nothing."""
        del feedback
        return extra

    def look(self, params: Params, pictures: Array) -> tuple[dict[str, Array], Array]:
        """({column: logits [n, classes]}, features [n, D]) of pictures [n, H, W, C]."""
        time = jnp.zeros(len(pictures))
        logits, seen = self.net.apply({"params": params}, pictures, time, mutable=["intermediates"])
        parts = jnp.split(logits, np.cumsum(list(self.targets.values()))[:-1], axis=-1)
        return dict(zip(self.targets, parts, strict=True)), seen["intermediates"]["features"][0]

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        """Cross entropy, the sum over the targets; see `training.step.Trainable.loss`."""
        del extra, position, total, gather
        pictures = batch["image"].astype(jnp.float32)
        if self.blur:
            pictures = augment.random_blur(pictures, keys, share=0.75, low=0.0, high=self.blur)
        parts, _ = self.look(params, pictures)
        return sum(losses.cross_entropy(parts[name], batch[name]) for name in self.targets), {}, ()


def train_reader(
    section: Mapping[str, Any],
    shape: Shape,
    targets: Mapping[str, int],
    *,
    steps: int = 300,
    channels: int = 32,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    blur: float = 0.0,
) -> Reader:
    """Trains a small network to read several columns of the data from pictures.

    Args:
      section: of a config; its 'data' have the columns.
      shape: (H, W, C) of the pictures.
      targets: {column of the data: number of its classes}.
      steps: how long, in batches of `batch_size`.
      channels: base width.
      batch_size: pictures of a step.
      learning_rate: the first one, of a cosine.
      blur: three pictures in four are blurred by up to this many pixels.
    """
    # The means of all activations: behind a last norm, the mean of a channel says next to nothing.
    # Small pictures are halved once only: what distinguishes their shapes is one pixel wide.
    mult = (2, 4) if min(shape[:2]) < 24 else (1, 2, 4)
    how = {"channels": channels, "channel_mult": mult, "num_res_blocks": 1, "attention": (), "groups": 8}
    net = Classifier(num_classes=sum(targets.values()), pool="spatial", **how)
    model = ReaderModel(net, tuple(shape), dict(targets), blur)
    train = {"num_train_steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "warmup_steps": 50}
    run = loop.Run(model, {**train, "anneal": "cosine", "ema": ()}, seed=0, mode="pmap", identity={})
    columns = {name: Column(name) for name in targets}
    source = open_data(section, shape)
    stream = batches(source, section["loader"], shape=tuple(shape), batch_size=batch_size, seed=0, columns=columns)
    return _reader(model, _trained(run, stream, steps))


def _trained(run: loop.Run, stream: Any, steps: int) -> Params:
    """The parameters after so many steps, on the host."""
    state, read = run.create(), parallel.prefetch(run.where, stream)
    for _, (_, batch) in zip(reporting.progress_bar(range(steps), "evaluation classifier"), read, strict=False):
        state, done = run.step(state, {name: values for name, values in batch.items() if name != "index"})
        jax.block_until_ready(done)  # on CPU devices, many steps in flight wait for each other's threads
    return jax.device_get(state.params)


def _reader(model: ReaderModel, params: Params) -> Reader:
    @parallel.map_batch
    def decide(params, pictures):
        parts, features = model.look(params, pictures)
        return {name: jnp.argmax(part, axis=-1) for name, part in parts.items()}, features

    def looked(pictures: np.ndarray, which: int):
        rows = [decide(params, pictures[i : i + 256])[which] for i in range(0, len(pictures), 256)]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)

    return Reader(lambda pictures: looked(pictures, 0), lambda pictures: looked(pictures, 1))
