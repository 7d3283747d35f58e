"""Data that TFDS prepared as array_record, read without TensorFlow."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from diffax.components import RUNTIME, TRAINING, component
from diffax.data import image_ops
from diffax.data.source import Data, Source, Splits
from diffax.errors import UserError

# Decoded images of a dataset up to this size stay in memory: a small network outruns the decoding.
CACHE_BYTES = 256 * 2**20


@component("data", "tfds")
def prepared(
    *,
    path: Annotated[str, RUNTIME] = "",
    split: Annotated[str, TRAINING] = "train",
    label: Annotated[str, TRAINING] = "label",
) -> Data:
    """A data set that TFDS prepared as array_record.

    Args:
      path: the folder of the data set, which holds dataset_info.json.
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      label: the column of classes that is the label, of data with several.
    """
    if not path:
        raise ValueError("path must name the folder of a prepared TFDS dataset, got ''")
    return Splits(lambda shape, split: read_prepared(open_prepared(path), split, shape[2], label), split)


def open_prepared(path: str):
    """The builder of a folder that TFDS prepared, which may hold one version below it.

    Raises:
      UserError: there is no such folder, or its files cannot be read by number.
    """
    import tensorflow_datasets as tfds

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


def read_prepared(builder, split: str, channels: int, label: str = "label") -> Source:
    """A Source of what TFDS prepared.

    Args:
      builder: of TFDS, as array_record.
      split: as TFDS writes it: 'train', 'train[:10%]', 'train+test'.
      channels: 1 or 3.
      label: the column of classes that is to be 'label'.

    Raises:
      UserError: no such split or column, or no image.
    """
    features = builder.info.features
    image_key, labels, caption_key = _columns(builder)
    if label != "label" and label not in labels:
        raise UserError(
            f"the data have no column {label!r} of classes, there is {', '.join(labels) or 'none'}; data.label; "
            "name one of them"
        )
    records = _records(builder, split, image_key)

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

    keys = dict.fromkeys((*labels, *["label"] * (label in labels), *["caption"] * bool(caption_key)))
    stored = features[image_key].shape
    if None not in stored and len(records) * math.prod(stored[:2]) * channels <= CACHE_BYTES:
        read = functools.lru_cache(maxsize=None)(read)
    class_names = tuple(features[label].names) if label in labels else ()
    name = f"{builder.info.full_name}[{split}]"
    return Source(name, len(records), read, tuple(keys), class_names, f"{name} record {{}}".format)


def _columns(builder) -> tuple[str, tuple[str, ...], str | None]:
    """The names of the image, of the columns of classes, and of the captions."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    image = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
    if image is None:
        raise UserError(f"no image among the features {sorted(features)}; {builder.data_dir}; take another data set")
    labels = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel))
    captions = (key for key in ("caption", "captions", "text") if key in features and _is_text(features[key]))
    return image, labels, next(captions, None)


def _records(builder, split: str, image_key: str) -> Sequence[dict[str, Any]]:
    import tensorflow_datasets as tfds

    try:
        return builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"no split {split!r} with data, there is {', '.join(builder.info.splits)}; {builder.data_dir}; data.split"
        ) from error


def _is_text(feature) -> bool:
    """Whether a feature is a text, or a list of texts."""
    import tensorflow_datasets as tfds

    return isinstance(getattr(feature, "feature", feature), tfds.features.Text)


def _texts(value: bytes | np.ndarray) -> str | tuple[str, ...]:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return tuple(text.decode("utf-8", "replace") for text in value) or ""
