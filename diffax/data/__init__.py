"""Datasets and batches: TFDS builders and folders, read with Grain, without TensorFlow."""

from diffax.data.load import load_source, names
from diffax.data.pipeline import batches
from diffax.data.source import Source

__all__ = ["Source", "batches", "load_source", "names"]
