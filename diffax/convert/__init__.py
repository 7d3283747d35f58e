"""Published PyTorch weights <-> Flax parameters (floor 3); as a command, `python -m diffax.convert`."""

from diffax.convert import clip, diffusers, glide, karlo, openai
from diffax.convert.architecture import Architecture
from diffax.convert.published import PUBLISHED, export, is_weights, load, match, match_all, recognise, save
from diffax.convert.table import Entry, Layout, Table, to_flax, to_torch

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
