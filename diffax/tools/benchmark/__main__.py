"""python -m diffax.tools.benchmark."""

import sys

from diffax.tools.benchmark import run

sys.exit(run())
