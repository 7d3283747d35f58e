"""From the `data` section of a config to a Source."""

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from diffax.data import builders, folders, image_ops, shapes
from diffax.data.source import Source, mix
from diffax.errors import UserError

# Decoded images of a dataset up to this size stay in memory: a small network outruns the decoding.
CACHE_BYTES = 256 * 2**20
# Of the weights in a mix.
MAX_WEIGHT = 1000
_PART = re.compile(r"\s*(?:(\d+)\s+)?(\S*)\s*(.*?)\s*", re.DOTALL)


def names() -> list[str]:
    """Every value that data.name can have."""
    return [*builders.BUILDERS, "folder", "captions", "tfds", "mix"]


def load_source(data: Mapping[str, Any], *, shape: Sequence[int]) -> Source:
    """Opens the data a config names, preparing it first if it is one of ours and new.

    Args:
      data: the `data` section of a stage: name, path, data_dir, split, and label, the column of
        classes to use (of data with several, as shapes: 'colour'); for shapes also holdout,
        combinations such as 'red circle' to keep out of every split but 'holdout', and single, to
        leave out scenes of two things. Name 'mix' reads several data in turn, those that path lists, each with
        its weight and its own path if it has them: '2 shapes, photos, 3 captions /data/birds', no comma in
        a path (see `diffax.data.source.mix`); the rest of the section goes for all of them.
      shape: (height, width, channels) the images are wanted in. Channels (1 or 3) are converted
        here; sizes only choose between prepared sizes, `batches` resizes.

    Returns:
      A Source; its images are uint8 [h, w, channels] of whatever size is stored.

    Raises:
      UserError: an unknown name or split, a missing folder or package, data that cannot be read.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise UserError(
            f"images have 1 or 3 channels, got {channels}; shape={tuple(shape)}; "
            "use (height, width, 1) or (height, width, 3)"
        )
    name = data["name"]
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise UserError(f"unknown data {name!r}, there is {', '.join(names())}; data.name; {hint}")
    split, path, label = data["split"], data["path"], data.get("label", "label")
    if name == "mix":
        weights, parts = zip(*_parts(data), strict=True)
        return mix([load_source(part, shape=shape) for part in parts], weights)
    if name == "folder":
        return folders.folder(path, split, channels)
    if name == "captions":
        return folders.captions(path, split, channels)
    if name == "tfds":
        return _from_tfds(_open_prepared(path), split, channels, label)
    if "://" in data["data_dir"]:
        raise UserError(f"not a local folder; data.data_dir={data['data_dir']!r}; prepare on a local disk")
    if name == "shapes":
        return _shapes(data, max(height, width), channels)
    builder = builders.prepare(name, side=max(height, width), data_dir=data["data_dir"], archive_dir=path)
    return _from_tfds(builder, split, channels, label)


def has_held_out(data: Mapping[str, Any]) -> bool:
    """Whether the data a config names have a test split by that name (those that diffax prepares do)."""
    if data["name"] == "mix":
        return all(has_held_out(part) for _, part in _parts(data))
    return data["name"] in builders.BUILDERS


def held_out(data: Mapping[str, Any], *, shape: Sequence[int]) -> Source:
    """The test split of the data a config names, or the split it names where there is none; see `load_source`."""
    return load_source({**data, "split": "test"} if has_held_out(data) else data, shape=shape)


def _parts(data: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Weight and `data` section of every part of a mix."""
    parts = []
    for text in data["path"].split(","):
        weight, name, path = _PART.fullmatch(text).groups()
        if name not in names() or name == "mix" or not 0 < int(weight or 1) <= MAX_WEIGHT:
            raise UserError(
                f"not a part of a mix: {text.strip()!r}; data.path={data['path']!r}; write data apart by commas, each "
                f"as [WEIGHT] NAME [PATH] with a whole weight of 1 to {MAX_WEIGHT}, as in '2 shapes, captions /birds', "
                f"and as NAME {', '.join(names()[:-1])}"
            )
        parts.append((int(weight or 1), {**data, "name": name, "path": path}))
    return parts


def _shapes(data: Mapping[str, Any], side: int, channels: int) -> Source:
    """Shapes without the held-out combinations, or, as split 'holdout', only those of 'train'; single: one thing."""
    holdout = tuple(data.get("holdout", ()))
    for pair in holdout:
        if pair not in {f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES}:
            raise UserError(
                f"no such combination {pair!r}; data.holdout; write '<colour> <shape>' "
                f"of {', '.join(shapes.COLOURS)} and {', '.join(shapes.SHAPES)}"
            )
    only = data["split"] == "holdout"
    if only and not holdout:
        raise UserError("split 'holdout' is empty; data.holdout; name combinations such as 'red circle'")
    split = "train" if only else data["split"]
    builder = builders.prepare("shapes", side=side, data_dir=data["data_dir"])
    source = _from_tfds(builder, split, channels, data.get("label", "label"))
    single = data.get("single", False)
    if not holdout and not single:
        return source
    if split not in builders.Shapes.ranges:
        raise UserError(
            f"data.holdout and data.single go with whole splits, got {split!r}; data.split; use 'train', 'test' or "
            "'holdout'"
        )

    def wanted(things: tuple[shapes.Thing, ...]) -> bool:
        held_out = any(f"{thing.colour} {thing.shape}" in holdout for thing in things)
        return only == held_out and not (single and len(things) > 1)

    kept = [number for number, i in enumerate(builders.Shapes.ranges[split]) if wanted(shapes.scene(i).things)]
    limits = [f"{'only' if only else 'without'} {', '.join(holdout)}"] * bool(holdout) + ["single"] * single
    return dataclasses.replace(
        source,
        name=f"{source.name} {' '.join(limits)}",
        size=len(kept),
        read=lambda i: source.read(kept[i]),
        where=lambda i: source.where(kept[i]),
    )


def _open_prepared(path: str):
    """The builder of a folder that TFDS prepared, which may hold one version below it."""
    root = os.path.expanduser(path)
    if not path:
        raise UserError(
            "no folder given; data.path; set it to the folder of a prepared TFDS "
            "dataset, the one that holds dataset_info.json"
        )
    found = [folder for folder, folders_, files in os.walk(root) if "dataset_info.json" in files]
    if len(found) != 1:
        what = "no dataset_info.json" if not found else f"{len(found)} datasets"
        raise UserError(
            f"{what} below data.path; {root}; give the folder of one prepared TFDS "
            "dataset, as in ~/tensorflow_datasets/NAME/1.0.0"
        )
    try:
        builder = tfds.builder_from_directory(found[0])
    except Exception as error:
        raise UserError(f"not a dataset that TFDS can read ({error}); {found[0]}; prepare it again") from error
    file_format = builder.info.file_format
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"the data is stored as {file_format.value}, which cannot be read by number; "
            f"{found[0]}; where TensorFlow is installed run: tfds convert_format "
            f"--dataset_version_dir={found[0]} --out_file_format=array_record --out_dir=NEW"
        )
    return builder


def _from_tfds(builder, split: str, channels: int, label: str) -> Source:
    """A Source of what TFDS prepared; the column `label` is handed over as 'label'."""
    features = builder.info.features
    image_key = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
    if image_key is None:
        raise UserError(f"no image among the features {sorted(features)}; {builder.data_dir}; take another dataset")
    labels = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel))
    if label != "label" and label not in labels:
        raise UserError(
            f"the data have no column {label!r} of classes, there is {', '.join(labels) or 'none'}; data.label; "
            "name one of them"
        )
    caption_key = next(
        (key for key in ("caption", "captions", "text") if key in features and _is_text(features[key])),
        None,
    )
    try:
        records = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"no split {split!r} with data, there is {', '.join(builder.info.splits)}; {builder.data_dir}; data.split"
        ) from error

    def read(index: int) -> dict[str, Any]:
        try:
            example = records[index]
        except Exception as error:  # whatever the C++ reader makes of damaged bytes
            raise image_ops.BadRecord(f"damaged ({error})") from error
        record = {key: np.int32(example[key]) for key in labels}
        if label in record:
            record["label"] = record[label]
        if caption_key:
            record["caption"] = _texts(example[caption_key])
        return record | {"image": image_ops.decode(example[image_key], channels=channels)}

    keys = dict.fromkeys((*labels, *(["label"] if label in labels else []), *(["caption"] if caption_key else [])))
    stored = features[image_key].shape
    if None not in stored and len(records) * math.prod(stored[:2]) * channels <= CACHE_BYTES:
        read = functools.lru_cache(maxsize=None)(read)
    names_ = tuple(features[label].names) if label in labels else ()
    return Source(
        f"{builder.info.full_name}[{split}]",
        len(records),
        read,
        tuple(keys),
        names_,
        f"{builder.info.full_name}[{split}] record {{}}".format,
    )


def _is_text(feature) -> bool:
    """Whether a feature is a text, or a list of texts."""
    return isinstance(getattr(feature, "feature", feature), tfds.features.Text)


def _texts(value: bytes | np.ndarray) -> str | tuple[str, ...]:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return tuple(text.decode("utf-8", "replace") for text in value) or ""
