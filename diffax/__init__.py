"""diffax: pixel diffusion in JAX - DDPM, Improved DDPM and what grew out of them.

    config = diffax.config("quickstart:tiny", "base.train.num_train_steps=200")
    diffax.train(config, workdir="runs/quickstart")
    sample_fn = diffax.load("runs/quickstart")
    pictures = sample_fn(0, label=[3, 7], guidance=1.5)

The rooms give the parts: `from diffax.diffusion import schedules, samplers`.
"""

import importlib
from typing import Any

from diffax.errors import Preempted, RunError, UserError

__all__ = ["Preempted", "RunError", "SampleFn", "UserError", "config", "evaluate", "load", "train"]
__version__ = "0.1.0"

# Where what is heavy lies; it is imported when it is first used. `diffax.config` is a module that can be called.
_LAZY = {
    "SampleFn": "diffax.sampling.sample_fn",
    "evaluate": "diffax.evaluation.api",
    "load": "diffax.sampling.load",
    "train": "diffax.commands.train",
}


def __getattr__(name: str) -> Any:
    if name == "config":
        return importlib.import_module("diffax.config")
    if name not in _LAZY:
        raise AttributeError(f"module 'diffax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
