"""Compile ahead: what a config's programs need on devices that need not be here.

The very train step and sampler are compiled, with abstract arguments, for a TPU slice by libtpu, or for the devices at
hand. XLA then says how much memory a device needs, and how many operations and bytes it would take it.
`python -m diffax.tools.compile_ahead WORKDIR/ahead/*.json` prints reports as a table.
"""

from diffax.tools.compile_ahead.reports import QUICK, report
from diffax.tools.compile_ahead.text import describe, table

PROGRAMS = ("train", "sample")

__all__ = ["PROGRAMS", "QUICK", "describe", "report", "table"]
