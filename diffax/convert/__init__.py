"""Published PyTorch weights <-> Flax parameters (floor 3)."""

from diffax.convert import diffusers, glide, openai
from diffax.convert.architecture import Architecture
from diffax.convert.table import Entry, Layout, Table, to_flax, to_torch

__all__ = ["Architecture", "Entry", "Layout", "Table", "diffusers", "glide", "openai", "to_flax", "to_torch"]
