"""diffax: pixel diffusion in JAX - DDPM, Improved DDPM and what grew out of them.

`sample_fn = diffax.load('runs/quickstart')` gives pictures; the modules give the parts.
"""

import importlib

from diffax.errors import RunError, UserError

__all__ = ["RunError", "SampleFn", "UserError", "load"]
__version__ = "0.1.0"

_LAZY = {"SampleFn": "diffax.sampling.pipeline", "load": "diffax.sampling.pipeline"}


def __getattr__(name: str):
    """Imports what is heavy when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'diffax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
