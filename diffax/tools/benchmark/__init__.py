"""How fast it is, beside PyTorch if asked: `python -m diffax.tools.benchmark`.

Programs: train (one step), forward (one call of the network), ddimN and dpmN (N steps of DDIM, of DPM-Solver++), data
(one batch of JPEGs), checkpoint (how long a save stops training) and startup (from the command to the end of the
first step, with an empty and with a filled compile cache). What is printed are medians over rounds in which all that is
compared takes turns, each alive in a process of its own, so that what else the machine does meets all of them alike.
"""

from diffax.tools.benchmark.children import Process
from diffax.tools.benchmark.command import read_flags, run
from diffax.tools.benchmark.programs import forward_flops, prepare
from diffax.tools.benchmark.rows import caption, machine
from diffax.tools.benchmark.timing import ratio, take_turns

__all__ = ["Process", "caption", "forward_flops", "machine", "prepare", "ratio", "read_flags", "run", "take_turns"]
