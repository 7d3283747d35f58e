"""Grids of samples: what to sample where nobody said, sampling by several processes, and drawing."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffax import config as configs
from diffax.components import build
from diffax.conditions.base import Offer
from diffax.data import images
from diffax.data.pipeline import Column, examples
from diffax.diffusion import augment
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes


def held_out_examples(
    section: Mapping[str, Any], shape: Sequence[int], limit: int, columns: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """At most `limit` held-out records of a section's data, as one batch.

    Args:
      section: of the config.
      shape: (H, W, C) of the pictures.
      limit: how many at most.
      columns: what they hold besides, see `data.pipeline.batches`.
    """
    source = build(section["data"], "data").held_out(tuple(shape))
    return examples(source, section["loader"], shape=tuple(shape), limit=limit, columns=columns or {})


def columns_there(section: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Column]:
    """Labels and captions as the data of a section have them."""
    source = build(section["data"], "data").held_out(tuple(shape))
    found = {key: Column(key) for key in source.keys}
    if "caption" not in found and source.class_names:
        found["caption"] = Column("caption")
    return found


def conditions_for(sample_fn: SampleFn, n: int, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Conditions for n pictures where the user named none, by the arguments of a call of `sample_fn`.

    Labels in turn; prompts in turn, by default those of the config's `sample.prompts`, else captions of the data; of a
    decoder alone, the embeddings of held-out pictures.
    """
    config = configs.from_dict(sample_fn.config)
    model = sample_fn.models[0]
    section, found = config[model.name], {}

    def held_out(limit: int) -> Mapping[str, np.ndarray]:
        if limit not in found:
            columns = columns_there(section, model.data_shape)
            found[limit] = held_out_examples(section, model.data_shape, limit, columns)
        return found[limit]

    offer = Offer(list(prompts) or list(config["sample"]["prompts"]), held_out, lambda image: sample_fn.embed(image))
    return {name: condition.choose(n, offer) for name, condition in sample_fn.arguments.items() if name != "image"}


def arguments_of(sample_fn: SampleFn, examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of a call that makes pictures like held-out ones: their labels, captions, smaller pictures.

    Args:
      sample_fn: the trained model.
      examples: 'image' [n, H, W, C], of a multiple of the model's size, and what the records hold besides, by name.
    """
    image, found = examples["image"], {}
    offer = Offer([], lambda n: examples, lambda pictures: sample_fn.embed(pictures))
    for name, condition in sample_fn.arguments.items():
        keys = [key for key, _ in condition.columns().values()]
        if name == "image":
            found[name] = smaller(image, image.shape[1] // condition.small[0])
        elif keys:
            found[name] = examples[keys[0]]
        else:
            found[name] = condition.choose(len(image), offer)
    return found


def captions_of(sample_fn: SampleFn, values: Mapping[str, Any], class_names: Sequence[str]) -> list[str] | None:
    """What stands below pictures that were made with these values of the arguments; the prompt before a label."""
    for name in sorted(values, key=lambda name: name != "prompt"):
        if name in sample_fn.arguments:
            found = sample_fn.arguments[name].captions(values[name], class_names)
            if found is not None:
                return found
    return None


def sample_together(
    sample_fn: SampleFn, key: int, n: int, each: Mapping[str, Any], **how: Any
) -> np.ndarray | dict[str, np.ndarray]:
    """`sample_fn(key, n, **each, **how)`, of which every process makes its share; all must call it, and get the whole.

    Args:
      sample_fn: the trained model.
      key: a seed.
      n: how many.
      each: arguments that have a value for every picture, such as label, prompt or the images to enlarge.
      **how: arguments that are the same for all; not `keep`.
    """

    def make(part: slice) -> Any:
        own = {name: values[part] for name, values in each.items()}
        return sample_fn(key, part.stop - part.start, first=part.start, **own, **how)

    return processes.share(make, n)


def smaller(image: np.ndarray, factor: int) -> np.ndarray:
    """[N, H, W, C] -> [N, H / factor, W / factor, C], what a stage is trained to enlarge."""
    return np.asarray(augment.area_downsample(np.asarray(image), factor))


def draw_enlargements(path: str | os.PathLike[str], small: np.ndarray, made: np.ndarray, real=None) -> None:
    """Writes a column for each picture: the small one, enlarged bicubically, by the model, and the real one if given.

    Args:
      path: the PNG.
      small: [N, h, w, C] in [-1, 1]; made: [N, h * f, w * f, C]; real: like made, or None.
    """
    factor = made.shape[1] // small.shape[1]
    rows = [small.repeat(factor, 1).repeat(factor, 2), images.bicubic(small, factor), made]
    rows += [] if real is None else [real]
    names = ["input", "bicubic", "diffax", "real"]
    labels = [name if i == 0 else None for name in names[: len(rows)] for i in range(len(small))]
    draw_grid(path, np.concatenate(rows), columns=len(small), labels=labels)


def draw_grid(
    path: str | os.PathLike[str], pictures: np.ndarray, *, columns: int, labels: Sequence[str | None] | None = None
) -> None:
    """Writes pictures [n, H, W, C] in [-1, 1] as one PNG.

    Raises:
      RunError: a picture is not finite; nothing is written.
    """
    images.check_finite(pictures)
    images.save_png(path, images.grid(images.to_uint8(pictures), columns, labels))
