"""Counting operations and bytes, and timing programs in turns."""

import contextlib
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax.tools.compile_ahead import roofline
from diffax.training import parallel


def count_flops(fn: Callable, *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in `fn(*args)`, 2 for each multiply-add.

    Nothing is computed. The body of a scan counts as often as it runs; padding counts like pixels.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features
        inside = [getattr(value, "jaxpr", value) for value in jax.tree.leaves([*eqn.params.values()])]
        total += eqn.params.get("length", 1) * sum(_flops(part) for part in inside if hasattr(part, "eqns"))
    return total


def take_turns(runs: Mapping[str, Callable[[int], float]], *, rounds: int, least: float) -> dict[str, list[float]]:
    """Times programs, each in its turn.

    A turn repeats its program until about `least` seconds are over, as the second run of each predicts; the first warms
    it up, and is the only one if it takes ten times as long. Every other round goes in reverse order.

    Args:
      runs: {name: times -> seconds that so many repetitions took}.
      rounds: turns of each.
      least: seconds.

    Returns:
      {name: seconds of one repetition, [rounds]}.
    """
    times, found = {}, {name: [] for name in runs}
    for name, run in runs.items():
        long = run(1) >= 10 * least
        times[name] = 1 if long else max(1, math.ceil(least / run(1)))
    for i in range(rounds):
        for name in runs if i % 2 == 0 else reversed(runs):
            found[name].append(runs[name](times[name]) / times[name])
    return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long the other program takes: the median over rounds of the ratio of each."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def peak_memory(pid: int | str = "self") -> int | None:
    """The most bytes of memory that a process held at once since `reset_peak`; None where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
        return 1024 * int(found[1]) if found else None


def reset_peak(pid: int | str = "self") -> None:
    """Has `peak_memory` start again from what the process holds now, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_flops() -> tuple[float, str]:
    """(FLOP/s that all devices could do at most, where the number is from): the vendor's, or a measured product."""
    device = next(iter(jax.numpy.zeros(()).devices()))
    if chip := roofline.CHIPS.get(device.device_kind):
        count = parallel.device_count()
        return count * chip.flops, f"{count} x {device.device_kind}, vendor's figure for bfloat16"
    side, rows = 2048, 4096
    product = parallel.map_batch(lambda w, x: x @ w)
    w, x = np.ones((side, side), np.float32), np.ones((rows, side), np.float32)
    seconds = take_turns({"product": repeated(lambda: product(w, x))}, rounds=5, least=0.1)["product"]
    return 2 * rows * side * side / min(seconds), f"a product of {rows} x {side} x {side}, float32, measured"


def repeated(once: Callable[[], Any]) -> Callable[[int], float]:
    """times -> seconds, to the end of the last repetition."""

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            out = once()
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run
