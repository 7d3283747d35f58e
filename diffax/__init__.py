"""diffax: pixel diffusion in JAX - DDPM, Improved DDPM and what grew out of them.

`sample_fn = diffax.load('runs/quickstart')` gives pictures; the modules give the parts.
"""

from diffax.errors import RunError, UserError
from diffax.sampling.pipeline import SampleFn, load

__all__ = ["RunError", "SampleFn", "UserError", "load"]
__version__ = "0.1.0"
