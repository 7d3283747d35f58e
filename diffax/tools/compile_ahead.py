"""Compile ahead: what a config's programs need on devices that need not be here.

The very train step and sampler are compiled, with abstract arguments, for a TPU slice by libtpu, or for the devices at
hand. XLA then says how much memory a device needs, and how many operations and bytes it would take it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import diffax
from diffax import config as configs
from diffax.data.files import write_atomically
from diffax.errors import RunError, UserError
from diffax.models.system import System
from diffax.tools import programs, roofline
from diffax.tools.roofline import CHIPS, GIB
from diffax.training import loop, parallel, processes, slices

PROGRAMS = ("train", "sample")
QUICK = -1.0  # the least effort of XLA to make a program fast
FEW = 8  # of fewer pictures XLA:TPU divides each into strips that overlap, to convolve them: about five times the bytes


def versions() -> dict[str, str]:
    """Of what a report depends on; 'source' is a digest of diffax, which changes more often than its version."""
    files = sorted(pathlib.Path(diffax.__file__).parent.rglob("*.py"))
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
      config: a validated config, as a plain dict.
      name: the section.
      program: 'train' or 'sample'.
      topology: a TPU slice such as 'v5e:4x4'; '' for the devices at hand.
      folder: where reports are kept, one JSON file for each config, topology, effort and versions.
      effort: XLA's, to make the program fast: from -1, which compiles many times as soon, to 1; 0 is that of a run.

    Returns:
      A dict of plain values, see `describe`. Of memory in bytes and of work per device.

    Raises:
      UserError: there is no such slice, libtpu is missing, or these devices cannot be asked.
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
    c = config[name]
    found = {
        "config": config["name"],
        "section": name,
        "program": program,
        "topology": topology,
        **where,
        "parallel": config["parallel"] if program == "train" else parallel.sampling_mode(config["parallel"]),
        "dtype": c["net"].get("dtype", "float32"),
        "remat": c["net"].get("remat", "none"),
        "flash": c["net"].get("flash", False),
        "effort": effort,
        "versions": versions(),
    }
    found |= (_train_report if program == "train" else _sample_report)(config, name, devices, found)
    write_atomically(path, lambda f: f.write((json.dumps(found, indent=2) + "\n").encode()))
    return found


def _train_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    c = config[name]["train"]
    with programs.waiting(f"diffax: tracing {_what(about)}"):
        lowered, run = programs.lower_train(config, name, devices)
    state, params = roofline.device_bytes(run.abstract), roofline.device_bytes(run.abstract.params)
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
    network = programs.network_of(System(configs.from_dict(config)).model(name))
    found["few"] = few_pictures(hasattr(network, "channel_mult"), per_device, about["platform"])
    if "seconds" in found:
        found["images_per_second"] = c["batch_size"] / found["seconds"]
        found["days"] = found["seconds"] * c["num_train_steps"] / 86400
    if found["fits"] is False:
        sets = 2 if c["accumulate"] > 1 else 1
        rest = max(0.0, found["total"] - state - sets * params)
        block = roofline.largest_block(run.abstract.params)
        need = roofline.Need(
            state, params, block, rest, found["limit"], per_device, c["accumulate"], run.where.mesh.size
        )
        with programs.waiting(f"diffax: looking for what would make {_what(about)} fit"):
            found["savings"] = open_savings(config, name)
        found["remedies"] = [roofline.as_flags(name, changes) for changes in roofline.remedies(need, found["savings"])]
    return found


def few_pictures(convolves: bool, pictures: int, platform: str) -> int:
    """How many pictures a device convolves at once, where they are so few that it matters; else 0."""
    return pictures if platform == "tpu" and convolves and pictures < FEW else 0


def open_savings(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """{change: share of the activations that it leaves}, of the changes that a section has not made yet."""
    net, changes = config[name]["net"], {}
    if net.get("remat") == "none":
        changes["remat"] = {"remat": "blocks"}
    if net.get("dtype") == "float32":
        changes["bfloat16"] = {"dtype": "bfloat16"}
    now = programs.saved_bytes(config, name) if changes else 1
    savings = {
        change: programs.saved_bytes({**config, name: {**config[name], "net": {**net, **options}}}, name) / max(1, now)
        for change, options in changes.items()
    }
    return savings if config["parallel"] == "fsdp" else {**savings, "fsdp": 1.0}


def _sample_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    with programs.waiting(f"diffax: tracing {_what(about)}"):
        lowered, n, params = programs.lower_sample(config, name, devices)
    model = System(configs.from_dict(config)).model(name)
    found = _compiled(lowered, about, held=roofline.device_bytes(params), loops=model.num_steps)
    found |= {"steps": model.num_steps, "batch_size": n}
    if "seconds" in found:
        found["images_per_second"] = n / found["seconds"]
    if found["fits"] is False:
        held = roofline.device_bytes(params)
        hosts = len({d.process_index for d in devices}) if devices else 1
        found["remedies"] = roofline.sample_remedies(
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
        with programs.waiting(f"diffax: compiling {_what(about)}"):
            compiled = lowered.compile({"exec_time_optimization_effort": about["effort"]})
    except jax.errors.JaxRuntimeError as error:
        needed = programs.needed_bytes(str(error))
        if needed is None:
            raise RunError(f"XLA cannot compile {_what(about)}: {error}; --mode=compile; another --topology") from error
        total = held + needed.get("temporary", 0.0)
        return {"fits": False, "total": total, **needed, "compile_seconds": time.monotonic() - start}
    found = programs.measure(compiled) | {"limit": limit, "loops": loops, "compile_seconds": time.monotonic() - start}
    once = min(outside, found["accessed"])
    found |= {"flops": loops * found["flops"], "accessed": once + loops * (found["accessed"] - once)}
    # XLA:TPU would have refused; others do not look.
    found["fits"] = True if about["platform"] == "tpu" else found["total"] <= limit if limit else None
    if chip:
        found["seconds"], found["bound"] = roofline.roofline(found["flops"], found["accessed"], chip)
    return found


# ---- in words -------------------------------------------------------------------------------------------------------


def _what(found: Mapping[str, Any]) -> str:
    program = {"train": "train step", "sample": "sampler"}[found["program"]]
    return f"the {program} of {found['config']}.{found['section']} for {found['count']} x {found['kind']}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def describe(found: Mapping[str, Any]) -> str:
    """A report as lines of text."""
    each = f"{found['batch_size']} samples" if found["program"] == "sample" else f"batch {found['batch_size']}"
    more = f" in {found['accumulate']} microbatches" if found.get("accumulate", 1) > 1 else ""
    more += f", {found['dtype']}, remat {found['remat']}" + ", flash attention" * found["flash"]
    lines = [f"{_what(found)}, {found['parallel']}, {each}{more}"]
    limit = f" of {_size(found['limit'])}" if found.get("limit") else ""
    if found["fits"] is False:
        lines.append(f"  does not fit: {_size(found['total'])}{limit} on each device")
        if found["remedies"]:
            lines.append("  by estimate it would fit with one of these:")
            lines += [f"    {flags}" for flags in found["remedies"]]
        else:
            lines.append("  neither a smaller batch nor remat nor fsdp would make it fit; take more or larger devices")
        return "\n".join(lines)
    lines.append(
        f"  memory of each device: {_size(found['total'])}{limit}: arguments {_size(found['arguments'])}, outputs "
        f"{_size(found['outputs'])} ({_size(found['aliased'])} of them in place), temporary "
        f"{_size(found['temporary'])}, code {_size(found['code'])}"
    )
    turns = f", all {found['loops']:,} turns of its loop, of which XLA counts one" if found["loops"] > 1 else ""
    work = f"{found['flops'] / 1e9:,.1f} GFLOP and {found['accessed'] / 1e9:,.2f} GB accessed"
    lines.append(f"  work of each device: {work}{turns}")
    if "seconds" not in found:
        lines.append(f"  no figures of the peak of {found['kind']} are known here, so no time is estimated")
        return "\n".join(lines)
    share = found["flops"] / (found["seconds"] * CHIPS[found["kind"]].flops)
    lines.append(
        f"  roofline, from the vendor's figures, without communication: {1000 * found['seconds']:,.1f} ms, "
        f"bound by {found['bound']}, {100 * share:.0f} % of the peak; {found['images_per_second']:,.1f} images/s"
    )
    if seconds := _communication_seconds(found):
        lines.append(
            f"  communication between devices, at least, by the vendor's figure: {1000 * seconds:,.1f} ms, "
            "more or less of it while they compute"
        )
    if found.get("few"):
        lines.append(
            f"  of fewer than {FEW} pictures, here {found['few']} in a device's microbatch, a TPU moves some 5 times "
            "the bytes of each: take fewer microbatches or devices; remat and fsdp leave more room for pictures"
        )
    if "days" in found:
        lines.append(f"  {found['steps']:,} steps at that pace: {found['days']:,.1f} days")
    return "\n".join(lines)


def _communication_seconds(found: Mapping[str, Any]) -> float:
    """The least time of a train step's communication; 0 of a sampler, of one device, and where links are not known."""
    chip = CHIPS.get(found["kind"])
    if not chip or not chip.links or "parameters" not in found:
        return 0.0
    options = {key: found[key] for key in ("dtype", "accumulate")}
    options |= {"mode": found["parallel"], "remat": found["remat"] != "none", "devices": found["count"]}
    return roofline.communication(found["parameters"], **options) / chip.links


COLUMNS = (
    *("config", "program", "devices", "how", "memory", "TFLOP", "GB", "roofline", "of peak", "communication"),
    *("images/s", "days"),
)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Reports as a Markdown table: memory and work per device."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in found:
        how = [row["parallel"], row["dtype"], *(key for key in ("remat", "flash") if row[key] not in ("none", False))]
        how += [f"batch {row['batch_size']}" + (f" / {row['accumulate']}" if row.get("accumulate", 1) > 1 else "")]
        limit = f" of {row['limit'] / GIB:.1f}" if row.get("limit") else ""
        work = [""] * 7
        if row["fits"] is not False:
            work[:2] = [f"{row['flops'] / 1e12:.2f}", f"{row['accessed'] / 1e9:.1f}"]
        if "seconds" in row:
            share = f"{row['flops'] / row['seconds'] / CHIPS[row['kind']].flops:.0%}"
            sent = _communication_seconds(row)
            work[2:] = [f"{1000 * row['seconds']:,.0f} ms, {row['bound']}", share]
            work += [f"{1000 * sent:,.0f} ms" if sent else "", f"{row['images_per_second']:,.0f}"]
            work += [f"{row['days']:,.1f}" if "days" in row else ""]
        memory = f"{row['total'] / GIB:.1f}{limit} GiB" + (" **does not fit**" if row["fits"] is False else "")
        devices = row["topology"] or f"{row['count']} x {row['kind']}"
        rows.append([f"{row['config']}.{row['section']}", row["program"], devices, ", ".join(how), memory, *work])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


if __name__ == "__main__":  # python -m diffax.tools.compile_ahead runs/*/ahead/*.json
    print(table([json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:]]), end="")
