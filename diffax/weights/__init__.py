"""Published PyTorch weights <-> Flax parameters; as a command, `python -m diffax.weights`."""

from diffax.weights import clip, diffusers, glide, karlo, openai
from diffax.weights.architecture import Architecture
from diffax.weights.catalogue import PUBLISHED
from diffax.weights.exporting import export
from diffax.weights.folders import is_weights
from diffax.weights.matching import Match, match, match_all, recognise
from diffax.weights.saving import load, save
from diffax.weights.table import Entry, Layout, Table, to_flax, to_torch

__all__ = [
    "PUBLISHED",
    "Architecture",
    "Entry",
    "Layout",
    "Match",
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
