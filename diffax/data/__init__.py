"""Data sets and batches: TFDS builders and folders, read with Grain, without TensorFlow.

A component of kind 'data' makes `Data`; opened for a shape they are a `Source`, of which `batches` makes arrays:

    source = build(spec("data", "digits"), "data").open((16, 16, 1))
    columns = {"label": Column("label")}
    stream = batches(source, Loader(flip=True), shape=(16, 16, 1), batch_size=64, seed=0, columns=columns)

All names below are loaded when they are first used.
"""

import importlib
from typing import Any

_MODULES = {
    "embeddings": ("embedded", "with_embeddings", "write_embeddings"),
    "mix": ("mixed",),
    "pipeline": ("Column", "Loader", "batches", "examples"),
    "source": ("Data", "Source", "Splits", "can_caption", "captioned"),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
