"""Published PyTorch weights <-> Flax parameters; as a command, `python -m diffax.weights`."""

from diffax.weights import clip, diffusers, glide, karlo, openai
from diffax.weights.architecture import Architecture
from diffax.weights.table import Entry, Layout, Table, to_flax, to_torch
