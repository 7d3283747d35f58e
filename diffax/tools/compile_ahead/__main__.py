"""Prints reports as one table: python -m diffax.tools.compile_ahead runs/*/ahead/*.json."""

import json
import pathlib
import sys

from diffax.tools.compile_ahead.text import table

print(table([json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:]]), end="")
