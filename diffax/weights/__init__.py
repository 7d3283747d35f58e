"""Published PyTorch weights <-> Flax parameters (floor 3); as a command, `python -m diffax.weights`."""

from diffax.weights import clip, diffusers, glide, karlo, openai
from diffax.weights.architecture import Architecture
from diffax.weights.published import PUBLISHED, export, is_weights, load, match, match_all, recognise, save
from diffax.weights.table import Entry, Layout, Table, to_flax, to_torch

__all__ = [
    "PUBLISHED",
    "Architecture",
    "Entry",
    "Layout",
    "Table",
    "clip",
    "diffusers",
    "export",
    "glide",
    "is_weights",
    "karlo",
    "load",
    "match",
    "match_all",
    "openai",
    "recognise",
    "save",
    "to_flax",
    "to_torch",
]
