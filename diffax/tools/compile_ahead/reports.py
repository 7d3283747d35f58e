"""Reports: programs compiled, or what was found when they were compiled before."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.models.system import System
from diffax.tools.compile_ahead.lowering import lower_sample, lower_train, saved_bytes
from diffax.tools.compile_ahead.roofline import (
    CHIPS,
    FEW,
    Need,
    as_flags,
    device_bytes,
    largest_block,
    remedies,
    roofline,
    sample_remedies,
)
from diffax.tools.compile_ahead.text import what
from diffax.training import loop, parallel, processes, reporting, slices

QUICK = -1.0  # the least effort of XLA to make a program fast


@contextlib.contextmanager
def progress(what: str, every: float = 15.0) -> Iterator[None]:
    """Writes to stderr every so many seconds for how long `what` has been going on."""
    done, start = threading.Event(), time.monotonic()

    def write() -> None:
        while not done.wait(every):
            print(f"{what}: {reporting.duration(time.monotonic() - start)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def needed_bytes(message: str) -> dict[str, float] | None:
    """What XLA:TPU says of a program that does not fit, in bytes; None if it is about something else.

    Returns:
      'limit', what there is, and 'total', what it uses, or 'temporary', what it uses besides its arguments.
    """
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)([KMGT])"
    for name, pattern in (
        ("total", rf"Used {size} of {size} hbm"),
        ("temporary", rf"temporaries \({size}\) exceeds available HBM \({size}\)"),
    ):
        if found := re.search(pattern, message):
            return {name: float(found[1]) * unit[found[2]], "limit": float(found[3]) * unit[found[4]]}
    return None


def measure(compiled: Any) -> dict[str, float]:
    """Bytes and operations of a compiled program, for one device. What a loop holds is counted once.

    Raises:
      UserError: XLA does not say.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, Sequence) else cost
    if memory is None or not cost:
        raise UserError("XLA says nothing of memory or cost for these devices; --mode=compile; pass --topology")
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    return sizes | {"total": total, "flops": cost.get("flops", 0.0), "accessed": cost.get("bytes accessed", 0.0)}


def versions() -> dict[str, str]:
    """Of what a report depends on; 'source' is a digest of diffax, which changes more often than its version."""
    files = sorted(pathlib.Path(__file__).parents[2].rglob("*.py"))
    found = {"source": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]}
    for name in ("diffax", "jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def report(
    config: Mapping[str, Any],
    name: str,
    program: str,
    *,
    topology: str,
    folder: str | os.PathLike[str],
    effort: float = QUICK,
) -> dict[str, Any]:
    """Compiles one program, or reads what was found when it was compiled before.

    Args:
      config: a checked config, as plain data.
      name: the section.
      program: 'train' or 'sample'.
      topology: a TPU slice such as 'v5e:4x4'; '' for the devices at hand.
      folder: where reports are kept, one JSON file for each config, topology, effort and versions.
      effort: XLA's, to make the program fast: from -1, which compiles many times as soon, to 1; 0 is that of a run.

    Returns:
      A dict of plain values, see `describe`. Of memory in bytes and of work per device.

    Raises:
      UserError: there is no such slice, libtpu is missing, or XLA says nothing of these devices.
    """
    if not topology and processes.process_count() > 1:
        raise UserError("several processes compile nothing ahead; --mode=compile; start one, with --topology")
    devices = slices.slice_devices(topology) if topology else None
    chip = list(parallel.layout("pmap", devices).mesh.devices.flat)
    where = {"kind": chip[0].device_kind, "count": len(chip), "platform": chip[0].platform}
    key = {"config": config, "section": name, "program": program, "topology": topology, "on": where, "effort": effort}
    text = json.dumps(key | {"versions": versions()}, sort_keys=True)
    file = f"{name}_{program}_{(topology or where['kind']).replace(':', '-').replace(' ', '-')}"
    path = pathlib.Path(folder) / f"{file}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if path.exists():
        return json.loads(path.read_text()) | {"cached": str(path)}
    net = config[name]["net"]
    found = {
        "config": config["name"],
        "section": name,
        "program": program,
        "topology": topology,
        **where,
        "parallel": config["parallel"] if program == "train" else parallel.sampling_mode(config["parallel"]),
        "dtype": net.get("dtype", "float32"),
        "remat": net.get("remat", "none"),
        "flash": net.get("flash", False),
        "effort": effort,
        "versions": versions(),
    }
    found |= (_train_report if program == "train" else _sample_report)(config, name, devices, found)
    images.write_atomically(path, lambda f: f.write((json.dumps(found, indent=2) + "\n").encode()))
    return found


def _train_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    c = config[name]["train"]
    with progress(f"diffax: tracing {what(about)}"):
        lowered, run = lower_train(config, name, devices)
    state, params = device_bytes(run.abstract), device_bytes(run.abstract.params)
    # Outside of the loop over microbatches is the update: the state is read and written, the gradients are read.
    found = _compiled(lowered, about, held=state, loops=c["accumulate"], outside=2 * state + params)
    found |= {
        "steps": c["num_train_steps"],
        "batch_size": c["batch_size"],
        "accumulate": c["accumulate"],
        "state": state,
    }
    found["parameters"] = loop.count_parameters(run.abstract.params)
    per_device = c["batch_size"] // run.where.mesh.size // c["accumulate"]
    found["few"] = few_pictures(config[name]["net"], per_device, about["platform"])
    if "seconds" in found:
        found["images_per_second"] = c["batch_size"] / found["seconds"]
        found["days"] = found["seconds"] * c["num_train_steps"] / 86400
    if found["fits"] is False:
        sets = 2 if c["accumulate"] > 1 else 1
        rest = max(0.0, found["total"] - state - sets * params)
        block = largest_block(run.abstract.params)
        need = Need(state, params, block, rest, found["limit"], per_device, c["accumulate"], run.where.mesh.size)
        with progress(f"diffax: looking for what would make {what(about)} fit"):
            found["savings"] = open_savings(config, name)
        found["remedies"] = [as_flags(name, changes) for changes in remedies(need, found["savings"])]
    return found


def few_pictures(net: Mapping[str, Any], pictures: int, platform: str) -> int:
    """How many pictures a device convolves at once, where they are so few that it matters; else 0."""
    convolves = "channel_mult" in net
    return pictures if platform == "tpu" and convolves and pictures < FEW else 0


def open_savings(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """{change: share of the activations that it leaves}, of the changes that a section has not made yet."""
    net, changes = config[name]["net"], {}
    if net.get("remat") == "none":
        changes["remat"] = {"remat": "blocks"}
    if net.get("dtype") == "float32":
        changes["bfloat16"] = {"dtype": "bfloat16"}
    now = saved_bytes(config, name) if changes else 1
    savings = {
        change: saved_bytes({**config, name: {**config[name], "net": {**net, **options}}}, name) / max(1, now)
        for change, options in changes.items()
    }
    return savings if config["parallel"] == "fsdp" else {**savings, "fsdp": 1.0}


def _sample_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    with progress(f"diffax: tracing {what(about)}"):
        lowered, n, params = lower_sample(config, name, devices)
    count = System(config).model(name).num_steps
    found = _compiled(lowered, about, held=device_bytes(params), loops=count)
    found |= {"steps": count, "batch_size": n}
    if "seconds" in found:
        found["images_per_second"] = n / found["seconds"]
    if found["fits"] is False:
        held = device_bytes(params)
        hosts = len({d.process_index for d in devices}) if devices else 1
        found["remedies"] = sample_remedies(
            held=held,
            rest=found["total"] - held,
            samples=n // about["count"],
            devices=about["count"],
            hosts=hosts,
            limit=found["limit"],
            sharded=about["parallel"] == "fsdp",
        )
    return found


def _compiled(
    lowered: Any, about: Mapping[str, Any], *, held: float, loops: int, outside: float = 0.0
) -> dict[str, Any]:
    """Compiles; whether it fits, its memory, its work, and the least time for that.

    Args:
      lowered: the program, traced.
      about: the head of its report.
      held: bytes of the state or the parameters, for a program that does not fit.
      loops: turns of its one large loop, of which XLA counts one.
      outside: bytes accessed outside of that loop, which are not multiplied.
    """
    start, chip = time.monotonic(), CHIPS.get(about["kind"])
    limit = chip.memory if chip else None
    try:
        with progress(f"diffax: compiling {what(about)}"):
            compiled = lowered.compile({"exec_time_optimization_effort": about["effort"]})
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise RunError(f"XLA cannot compile {what(about)}: {error}; --mode=compile; another --topology") from error
        total = held + needed.get("temporary", 0.0)
        return {"fits": False, "total": total, **needed, "compile_seconds": time.monotonic() - start}
    found = measure(compiled) | {"limit": limit, "loops": loops, "compile_seconds": time.monotonic() - start}
    once = min(outside, found["accessed"])
    found |= {"flops": loops * found["flops"], "accessed": once + loops * (found["accessed"] - once)}
    # XLA:TPU would have refused; others do not look.
    found["fits"] = True if about["platform"] == "tpu" else found["total"] <= limit if limit else None
    if chip:
        found["seconds"], found["bound"] = roofline(found["flops"], found["accessed"], chip)
    return found
