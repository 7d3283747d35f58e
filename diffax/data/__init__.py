"""Datasets and batches: TFDS builders and folders, read with Grain, without TensorFlow."""

from diffax.data import image_ops, shapes
from diffax.data.embeddings import embedded, with_embeddings, write_embeddings
from diffax.data.load import has_held_out, held_out, load_source, names
from diffax.data.pipeline import batches, examples
from diffax.data.source import Source, can_caption, captioned

__all__ = [
    "Source",
    "batches",
    "can_caption",
    "captioned",
    "embedded",
    "examples",
    "has_held_out",
    "held_out",
    "image_ops",
    "load_source",
    "names",
    "shapes",
    "with_embeddings",
    "write_embeddings",
]
