"""How fast it is, beside PyTorch if asked: `python -m diffax.tools.benchmark`.

Programs: train (one step), forward (one call of the network), ddimN and dpmN (N steps of DDIM, of DPM-Solver++), data
(one batch of JPEGs), checkpoint (how long a save stops training) and startup (from the command to the end of the
first step, with an empty and with a filled compile cache). What is printed are medians over rounds in which all that is
compared takes turns, each alive in a process of its own, so that what else the machine does meets all of them alike.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import flax
import jax
import jaxlib
import numpy as np

from diffax import config as configs
from diffax.components import closest
from diffax.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, RunError, UserError, complain
from diffax.evaluation import report
from diffax.models.system import System
from diffax.tools.compile_ahead.roofline import CHIPS
from diffax.tools.measured import benchmark_config, prepare, prepare_train, repeated
from diffax.tools.peers import PEERS, WITHOUT_PEER, Process, peer_command, start_peer
from diffax.training import cpu_flags, parallel

PROGRAMS = ("train", "forward", "ddim50", "dpm10", "data", "checkpoint", "startup")


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
    if chip := CHIPS.get(device.device_kind):
        count = parallel.device_count()
        return count * chip.flops, f"{count} x {device.device_kind}, vendor's figure for bfloat16"
    side, rows = 2048, 4096
    product = parallel.map_batch(lambda w, x: x @ w)
    w, x = np.ones((side, side), np.float32), np.ones((rows, side), np.float32)
    seconds = take_turns({"product": repeated(lambda: product(w, x))}, rounds=5, least=0.1)["product"]
    return 2 * rows * side * side / min(seconds), f"a product of {rows} x {side} x {side}, float32, measured"


def start_once(argv: Sequence[str], cache: str) -> dict[str, float]:
    """Runs this command to the end of its first train step: {'total', 'compile'} in seconds.

    Raises:
      RunError: it failed.
    """
    command = [sys.executable, "-m", "diffax.tools.benchmark", *argv, f"--first-step={time.time()!r}"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"the first step failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the report -----------------------------------------------------------------------------------------------------

LABELS = {
    "train": "train step, s",
    "forward": "forward, s",
    "data": "data: a batch of JPEGs, s",
    "checkpoint": "checkpoint: training stops for, s",
}


def label(program: str) -> str:
    """What a table calls a program."""
    found = re.fullmatch("(ddim|dpm)([0-9]+)", program)
    names = {"ddim": "DDIM", "dpm": "DPM-Solver++"}
    return f"{names[found[1]]}, {found[2]} steps, s" if found else LABELS[program]


def as_row(what: str, found: Mapping[str, Sequence[float]], facts: Mapping[str, Any], peak: float) -> dict[str, Any]:
    """A row of the table: medians, how far the middle half of the rounds spreads, and what follows from them."""
    ours = statistics.median(found["diffax"])
    low, _, high = statistics.quantiles(found["diffax"], n=4) if len(found["diffax"]) > 1 else (ours, ours, ours)
    row = {"what": what, "diffax": ours, "spread": f"{(high - low) / ours:.0%}"}
    row["pictures/s"] = facts["pictures"] / ours if "pictures" in facts else None
    row["of peak"] = f"{facts['flops'] / ours / peak:.0%}" if "flops" in facts else None
    for peer, seconds in found.items():
        if peer != "diffax":
            row |= {peer: statistics.median(seconds), f"{peer} / diffax": ratio(seconds, found["diffax"])}
    return row


def measure(config: Mapping, name: str, args: argparse.Namespace, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures what the flags ask for; yields the rows of the report.

    Those of programs also have '_seconds' {who: [rounds]}, '_peers' {peer: facts} and '_peak', see `peak_flops`.
    """
    commands = {peer: peer_command(args, peer, config[name]) for peer in args.peer}
    peak = train_seconds = None
    with contextlib.ExitStack() as stack:
        peers = {peer: stack.enter_context(contextlib.closing(Process(c))) for peer, c in commands.items()}
        for program in [p for p in args.programs if p != "startup"]:
            runs, about = {}, {}
            for peer, process in peers.items() if program not in WITHOUT_PEER else ():
                try:
                    about[peer] = process.ask(prepare=program)
                except RunError as error:
                    where = f"--peer-python={args.peer_python}"
                    raise UserError(f"{peer} fails: {error}; {where}; use a python that has it and torch") from error
                if not about[peer].get("missing"):
                    runs[peer] = lambda times, process=process: process.ask(times=times)["seconds"]
            peak = peak or peak_flops()
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            with contextlib.closing(prepare(config, name, program, pathlib.Path(folder))) as ours:
                for pid in ("self", *(process.pid for process in peers.values())):
                    reset_peak(pid)
                found = take_turns({"diffax": ours.run} | runs, rounds=args.rounds, least=args.seconds)
                row = as_row(label(program), found, ours.facts, peak[0])
                yield row | {"_seconds": found, "_peers": about, "_peak": peak}
                if program == "train":
                    train_seconds = row["diffax"]
                    yield memory_row(peers)
                yield from following_rows(program, row, ours.facts, train_seconds)
            del ours  # its memory is free before the next one takes some
    if "startup" in args.programs:
        yield from startup_rows(argv, commands, rounds=min(args.rounds, 3))


def following_rows(
    program: str, row: Mapping[str, Any], facts: Mapping[str, Any], train_seconds: float | None
) -> Iterator[dict[str, Any]]:
    """What else is known once a program was measured; `train_seconds` is of a train step, if that was before."""
    if program == "train":
        yield {"what": "compile of the train step, s", "diffax": facts["compile"]}
    if program == "data" and train_seconds:
        share = row["pictures/s"] * train_seconds / facts["pictures"]
        yield {"what": "data, times what the train step takes in", "diffax": share}
    if program == "checkpoint":
        written = facts["on disk"][1:]  # the first one also opened the folder
        yield {"what": "checkpoint: until on disk, s", "diffax": statistics.median(written)}
        if train_seconds:
            yield {"what": "checkpoint: stops for, train steps", "diffax": row["diffax"] / train_seconds}


def memory_row(peers: Mapping[str, Process]) -> dict[str, Any]:
    """The most memory that training took: of the device where it has its own, else of the process."""
    device = next(iter(jax.numpy.zeros(()).devices()))
    own = (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform != "cpu" else peak_memory()
    if own is None:
        return {"what": "peak memory of training, MiB"}
    row = {"what": "peak memory of training, MiB", "diffax": own / 2**20}
    for peer, process in peers.items():
        theirs = process.ask(memory=True)["bytes"] or peak_memory(process.pid)
        row |= {peer: theirs / 2**20, f"{peer} / diffax": theirs / own}
    return row


def startup_rows(argv: Sequence[str], commands: Mapping[str, Sequence[str]], *, rounds: int) -> list[dict[str, Any]]:
    """From the command to the end of the first step."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    theirs: dict[str, list[float]] = {peer: [] for peer in commands}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in found:
                found[kind].append(start_once(argv, cache))
        for peer, command in commands.items():
            theirs[peer].append(start_peer(command))
    rows = []
    for kind, starts in found.items():
        seconds = {"diffax": [s["total"] for s in starts]} | theirs
        rows.append(as_row(f"start to the end of the first step, {kind} cache, s", seconds, {}, 1.0))
        compiling = statistics.median(s["compile"] for s in starts)
        rows.append({"what": f"of which compiling the train step, {kind} cache, s", "diffax": compiling})
    return rows


def machine() -> dict[str, Any]:
    """Where it was measured, and with what."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    device = next(iter(jax.numpy.zeros(()).devices()))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": f"{parallel.device_count()} x {device.device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (jax, jaxlib, flax, np)},
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


# ---- the command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command; --config.a.b=value is taken apart by `diffax.config`."""
    p = _Parser(prog="python -m diffax.tools.benchmark", description=__doc__, allow_abbrev=False)
    p.add_argument("--config", help="config to measure (default: a U-Net at 32 pixels on a CPU, else ADM at 64)")
    p.add_argument("--stage", help="its section to measure (default: the first stage)")
    p.add_argument("--programs", default=",".join(PROGRAMS), help=f"default {','.join(PROGRAMS)}")
    p.add_argument("--rounds", type=int, default=5, help="turns of each program (default 5)")
    p.add_argument("--seconds", type=float, default=1.0, help="least length of a turn (default 1)")
    p.add_argument(
        "--peer", action="append", default=[], help=f"measure beside it, may be repeated: {', '.join(PEERS)}"
    )
    p.add_argument("--peer-python", default=sys.executable, help="the python that has torch and the peer")
    p.add_argument("--peer-path", help="a checkout of guided-diffusion")
    p.add_argument("--channels-last", action="store_true", help="peers: this memory format in place of their own")
    p.add_argument(
        "--output", default="runs/benchmark", help="folder of benchmark.json and .md (default runs/benchmark)"
    )
    p.add_argument("--first-step", type=float, help=argparse.SUPPRESS)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def read_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], str]:
    """(flags, the config as a plain dict, the section to measure), all checked.

    Raises:
      UserError: what is wrong with them.
    """
    args, rest = parser().parse_known_args(argv)
    if unknown := [a for a in rest if not a.startswith("--config.")]:
        raise UserError(f"unknown argument {unknown[0]}; command line; see --help")
    args.programs = tuple(args.programs.split(","))
    for program in args.programs:
        if program not in PROGRAMS and not re.fullmatch("(ddim|dpm)[1-9][0-9]*", program):
            near = closest(program, PROGRAMS)
            raise UserError(f"unknown program {program!r}{near}; --programs; use {', '.join(PROGRAMS)}")
    for peer in args.peer:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}{closest(peer, PEERS)}; --peer; use {' or '.join(PEERS)}")
    if args.rounds < 1 or args.seconds < 0:
        raise UserError(f"--rounds={args.rounds} and --seconds={args.seconds:g} cannot be; use at least 1 and 0")
    config = configs.load(args.config, rest) if args.config else benchmark_config(rest)
    configs.check(config, device_count=parallel.device_count())
    system = System(config)
    there = [
        model.name for model in map(system.model, system.trained) if hasattr(model, "sample") and len(model.shape) == 3
    ]
    name = args.stage or next(iter(there), None)
    if name not in there:
        raise UserError(f"no stage {name!r} makes pictures; --stage; use {' or '.join(there) or 'another --config'}")
    return args, configs.to_dict(config), name


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        cpu_flags.set_cpu_flags()
        args, config, name = read_flags(argv)
        if args.first_step is not None:
            prepared = prepare_train(config, name)
            prepared.run(1)
            print(json.dumps({"total": time.time() - args.first_step, "compile": prepared.facts["compile"]}))
            return 0
        rows = []
        for row in measure(config, name, args, argv):
            print(report.numbers(row), file=sys.stderr, flush=True)
            rows.append(row)
        section = config[name]
        header = {"name": config["name"], "section": {k: section[k] for k in ("shape", "net", "train")}} | machine()
        header |= {"seconds": {row["what"]: row["_seconds"] for row in rows if "_seconds" in row}}
        header |= {"peers": next((row["_peers"] for row in rows if row.get("_peers")), {}), "command": argv}
        header |= {"peak": next((row["_peak"] for row in rows if "_peak" in row), None)}
        print(report.write_report(pathlib.Path(args.output), rows, header, name="benchmark"))
        print(caption(header))
        return 0
    except UserError as error:
        return complain(error, EXIT_USER, argv)
    except RunError as error:
        return complain(error, EXIT_FAILED, argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def caption(header: Mapping[str, Any]) -> str:
    """What stands under a table: on what it was measured."""
    versions = header["versions"] | {k: v for about in header["peers"].values() for k, v in about["versions"].items()}
    peak = f"; peak {header['peak'][0] / 1e12:.3g} TFLOP/s ({header['peak'][1]})" if header["peak"] else ""
    on = f"{header['cpu']}, {header['cores']} cores, {header['devices']}{peak}"
    return f"\n{on}; {', '.join(f'{k} {v}' for k, v in versions.items())}."


if __name__ == "__main__":
    sys.exit(run())
