"""Datasets and batches: TFDS builders and folders, read with Grain, without TensorFlow."""

from diffax.data.load import has_held_out, held_out, load_source, names
from diffax.data.pipeline import batches, examples
from diffax.data.source import Source

__all__ = ["Source", "batches", "examples", "has_held_out", "held_out", "load_source", "names"]
