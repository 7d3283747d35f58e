"""The rows of a report, and where it was measured."""

import argparse
import contextlib
import os
import pathlib
import platform
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jaxlib
import numpy as np

from diffax.errors import RunError, UserError
from diffax.tools.benchmark import children, programs, timing
from diffax.training import parallel

WITHOUT_PEER = ("data", "checkpoint")
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
            row |= {peer: statistics.median(seconds), f"{peer} / diffax": timing.ratio(seconds, found["diffax"])}
    return row


def measure(config: Mapping, name: str, args: argparse.Namespace, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures what the flags ask for; yields the rows of the report.

    Those of programs also have '_seconds' {who: [rounds]}, '_peers' {peer: facts} and '_peak', see `peak_flops`.
    """
    commands = {peer: children.peer_command(args, peer, config[name]) for peer in args.peer}
    peak = train_seconds = None
    with contextlib.ExitStack() as stack:
        peers = {peer: stack.enter_context(contextlib.closing(children.Process(c))) for peer, c in commands.items()}
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
            peak = peak or timing.peak_flops()
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            with contextlib.closing(programs.prepare(config, name, program, pathlib.Path(folder))) as ours:
                for pid in ("self", *(process.pid for process in peers.values())):
                    timing.reset_peak(pid)
                found = timing.take_turns({"diffax": ours.run} | runs, rounds=args.rounds, least=args.seconds)
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


def memory_row(peers: Mapping[str, children.Process]) -> dict[str, Any]:
    """The most memory that training took: of the device where it has its own, else of the process."""
    device = next(iter(jax.numpy.zeros(()).devices()))
    own = (device.memory_stats() or {}).get("peak_bytes_in_use") if device.platform != "cpu" else timing.peak_memory()
    if own is None:
        return {"what": "peak memory of training, MiB"}
    row = {"what": "peak memory of training, MiB", "diffax": own / 2**20}
    for peer, process in peers.items():
        theirs = process.ask(memory=True)["bytes"] or timing.peak_memory(process.pid)
        row |= {peer: theirs / 2**20, f"{peer} / diffax": theirs / own}
    return row


def startup_rows(argv: Sequence[str], commands: Mapping[str, Sequence[str]], *, rounds: int) -> list[dict[str, Any]]:
    """From the command to the end of the first step."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    theirs: dict[str, list[float]] = {peer: [] for peer in commands}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in found:
                found[kind].append(children.start_once(argv, cache))
        for peer, command in commands.items():
            theirs[peer].append(children.start_peer(command))
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


def caption(header: Mapping[str, Any]) -> str:
    """What stands under a table: on what it was measured."""
    versions = header["versions"] | {k: v for about in header["peers"].values() for k, v in about["versions"].items()}
    peak = f"; peak {header['peak'][0] / 1e12:.3g} TFLOP/s ({header['peak'][1]})" if header["peak"] else ""
    on = f"{header['cpu']}, {header['cores']} cores, {header['devices']}{peak}"
    return f"\n{on}; {', '.join(f'{k} {v}' for k, v in versions.items())}."
