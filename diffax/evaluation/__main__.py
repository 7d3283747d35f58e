"""`python -m diffax.evaluation A B` compares two sets of pictures: see `diffax.evaluation.compare`."""

import sys

from diffax.evaluation import compare

if __name__ == "__main__":
    sys.exit(compare.run())
