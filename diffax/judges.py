"""Judges: classifiers of real pictures that tell what generated ones show (floor 4).

A judge has seen no generated picture and no noise, and is none of the classifiers that guide.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax import config as configs
from diffax import data, parallel, reporting, stages, train
from diffax.errors import UserError
from diffax.schedules import NoiseLevel

# An SVC on more pictures than this takes longer than the pictures themselves.
SVC_EXAMPLES = 5000


class Judge(NamedTuple):
    """Who tells what a picture shows.

    Attributes:
      classify: pictures [N, H, W, C] in [-1, 1] -> labels [N].
      features: pictures -> [N, D], what it sees before it decides.
      accuracy: on held-out real pictures.
    """

    classify: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray]
    accuracy: float


def svc(section: Mapping[str, Any]) -> Judge:
    """A support vector classifier of the pixels: right for small pictures whose subject stays in place.

    Args:
      section: a stage's section; its data have labels.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("scikit-learn is not installed; evaluate; pip install diffax[demo]") from None
    c, shape = section["data"], section["shape"]
    real = data.examples(data.load_source(c, shape=shape), c, shape=shape, limit=SVC_EXAMPLES)
    fitted = SVC(C=10.0).fit(real["image"].reshape(len(real["image"]), -1), real["label"])

    def features(pictures: np.ndarray) -> np.ndarray:
        return np.asarray(pictures).reshape(len(pictures), -1)

    return _judged(lambda pictures: fitted.predict(features(pictures)), features, section)


def network(section: Mapping[str, Any], *, steps: int = 300) -> Judge:
    """A small convolutional network, for pictures whose subject may be anywhere; trained here, in about a minute.

    It is the encoder half of the U-Net, on clean pictures only.

    Args:
      section: a stage's section; its data have labels.
      steps: how long it is trained.
    """
    source = data.load_source(section["data"], shape=section["shape"])
    config = configs.config_defaults("judge")
    c = config.base
    c.shape, c.num_classes = tuple(section["shape"]), len(source.class_names) or section["num_classes"]
    # The means of all activations: behind a last norm, the mean of a channel says next to nothing.
    c.net.update(name="classifier", pool="spatial", channels=32, channel_mult=(1, 2, 4), num_res_blocks=1)
    c.net.update(attention=(), groups=8)
    c.train.update(steps=steps, batch_size=128, learning_rate=1e-3, anneal="cosine", warmup_steps=50, ema=())
    plain = configs.to_dict(config)

    def clean(u):
        return NoiseLevel(time=0 * u, logsnr=0 * u + np.inf)

    model = dataclasses.replace(stages.build_classifier(plain, "base"), schedule=clean)
    run = train.Run(stages.objective(model), plain["base"], seed=0, mode="pmap")
    stream = data.batches(source, section["data"], shape=c.shape, batch_size=c.train.batch_size, seed=0)
    state = run.create()
    batches = parallel.prefetch(run.where, stream)
    for _, (_, batch) in zip(reporting.progress_bar(range(steps), "training the judge"), batches, strict=False):
        state, metrics = run.step(state, batch)
        jax.block_until_ready(metrics)  # on CPU devices, many steps in flight wait for each other's threads
    params = jax.device_get(state.params)

    @parallel.map_batch
    def look(params, pictures):
        time = jnp.zeros(len(pictures))
        logits, seen = model.net.apply({"params": params}, pictures, time, mutable=["intermediates"])
        return jnp.argmax(logits, axis=-1), seen["intermediates"]["features"][0]

    def looked(pictures: np.ndarray, which: int) -> np.ndarray:
        return np.concatenate([look(params, pictures[i : i + 256])[which] for i in range(0, len(pictures), 256)])

    return _judged(lambda pictures: looked(pictures, 0), lambda pictures: looked(pictures, 1), section)


def _judged(classify: Callable, features: Callable, section: Mapping[str, Any]) -> Judge:
    c, shape = section["data"], section["shape"]
    test = data.examples(data.held_out(c, shape=shape), c, shape=shape, limit=SVC_EXAMPLES)
    return Judge(classify, features, float(np.mean(classify(test["image"]) == test["label"])))


JUDGES: dict[str, Callable[[Mapping[str, Any]], Judge]] = {"svc": svc, "network": network}
