"""Checkpoints that are verified, resumable on any topology and never silently wrong.

A step is one directory that Orbax commits with a rename. It holds the training state, the averaged weights (EMA) as an
item of its own, `meta` (JSON: the config and what else the run must remember) and `digests` (JSON: sha256, dtype and
shape of every array). Orbax itself does not check the data of arrays: one flipped bit restores as a wrong number, hence
the digests. Only this package imports orbax, and no file of a checkpoint is ever a pickle.
"""

from diffax.training.checkpoints.compare import config_difference
from diffax.training.checkpoints.integrity import verify
from diffax.training.checkpoints.lazy import LazyArray
from diffax.training.checkpoints.locking import lock
from diffax.training.checkpoints.store import Checkpoints, Restored, print_warning

__all__ = ["Checkpoints", "LazyArray", "Restored", "config_difference", "lock", "print_warning", "verify"]
