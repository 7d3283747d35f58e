"""Weak and strong scaling of the train step by simulation: on virtual devices and processes of this machine's CPU.

    python benchmarks/scaling.py --output=runs/scaling

Every program computes on one core alone, so N devices take at least N times as long as one. What they take beyond that
is what dividing the work costs: communication, waiting for each other, and small batches.

- weak: N devices with --batch pictures each, against N times the program of one device with --batch ("beyond the
  cores") and against one device that has all pictures ("equal work": N devices update the parameters N times);
- strong: the pictures of the largest weak program, divided among N devices, against one device that has all of them;
- processes: the same devices in two processes, against one process.

The bytes that a device sends are read from the compiled programs. From them, from the measured overhead and from the
chip's figures a slice of up to 256 chips is modelled (`slice_row`), for --model, a config, without overlap of
communication and computation. Written are scaling.json, scaling.md, slice.json, slice.md and scaling.png.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peers  # benchmarks/peers.py: how a process hears when to run

Found = Mapping[tuple[int, int, int], Sequence[float]]  # {(devices, processes, pictures): seconds of each round}

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
CHIPS = (1, 8, 32, 64, 128, 256)
# bytes/s that a TPU v5e sends to its neighbours at most (vendor's figure: 1,600 Gbit/s over four links)
V5E_LINKS = 200e9


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def collective_bytes(text: str) -> dict[str, int]:
    """{kind of collective: bytes of its results on one device}, from the text of a compiled program."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
            size = sum(
                SIZES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
            found[match[2]] = found.get(match[2], 0) + size
    return found


def percent(share: float) -> str:
    """0.1 -> '10.0%'."""
    return f"{share:.1%}"


def overheads(found: Found, *, batch: int, most: int) -> Iterator[dict[str, Any]]:
    """What dividing the work costs: medians over rounds of the ratios of each round.

    Args:
      found: the seconds; (1, 1, batch) is among them, and (1, 1, pictures) of all pictures.
      batch: pictures of a device in the weak programs.
      most: the largest number of devices.
    """
    from diffax.tools.benchmark import ratio

    for (devices, processes, pictures), seconds in sorted(found.items(), key=lambda item: (item[0][1], *item[0])):
        if devices == 1:
            continue
        for kind, wanted in {"weak": devices * batch, "strong": most * batch}.items():
            if pictures != wanted:
                continue
            row = {"kind": kind, "devices": devices, "processes": processes, "pictures": pictures}
            row["ms"] = 1000 * sorted(seconds)[len(seconds) // 2]
            if kind == "weak":
                alone = [devices * s for s in found[1, 1, batch]]
                row["beyond the cores"] = percent(ratio(seconds, alone) - 1)
            row["equal work"] = percent(ratio(seconds, found[1, 1, pictures]) - 1)
            if processes > 1:
                row["than one process"] = percent(ratio(seconds, found[devices, 1, pictures]) - 1)
            yield row


def slice_row(
    chips: int, *, compute: float, sent: float, bandwidth: float, pictures: int, overhead: float
) -> dict[str, Any]:
    """A step on a slice, gradients added up in a ring after the backward pass.

    step = compute (1 + overhead) + 2 (N - 1) / N * sent / bandwidth; on one chip, compute alone.

    Args:
      chips: N.
      compute: seconds of a chip's own work.
      sent: bytes that are added up over the chips.
      bandwidth: bytes/s that a chip can send.
      pictures: of a chip.
      overhead: share of `compute` that is lost as soon as there are several.
    """
    reduce = 2 * (chips - 1) / chips * sent / bandwidth
    step = compute * (1 + overhead * (chips > 1)) + reduce
    row = {"chips": chips, "all-reduce, ms": 1000 * reduce, "step, ms": 1000 * step}
    return row | {"pictures/s": chips * pictures / step, "efficiency": f"{compute / step:.0%}"}


# ---- the processes --------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One process of one program: pins itself to its core, and runs when it is asked to."""
    replies = peers.own_stdout()
    os.sched_setaffinity(0, {args.core})
    flags = re.sub("--xla_force_host_platform_device_count=[0-9]+", "", os.environ.get("XLA_FLAGS", ""))
    devices = args.devices[0] // args.processes[0]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    from diffax.tools import benchmark
    from diffax.training import cpu_flags, processes

    cpu_flags.set_cpu_flags()
    if args.processes[0] > 1:
        processes.start(args.coordinator, args.processes[0], args.process)
    _, config, name = benchmark.read_flags(overrides)

    def prepare(program: str) -> tuple[Any, dict]:
        prepared = benchmark.prepare(config, name, program, pathlib.Path())
        facts = {"parameters": prepared.facts["parameters"]}
        return prepared.run, facts | {"sent": collective_bytes(prepared.facts["step"].as_text())}

    peers.serve(prepare, sys.stdin, replies)


def commands(key: tuple[int, int, int], core: int, overrides: Sequence[str]) -> list[list[str]]:
    """The command of each process of a program."""
    devices, processes, pictures = key
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    own = [sys.executable, __file__, "--serve", f"--devices={devices}", f"--processes={processes}", f"--core={core}"]
    own += [f"--coordinator={coordinator}", *overrides, f"--config.base.train.batch_size={pictures}"]
    return [[*own, f"--process={i}"] for i in range(processes)]


def measure(args: argparse.Namespace, overrides: Sequence[str]) -> tuple[dict, dict]:
    """({program: seconds of each round}, {program: facts}), all programs alive at once and in turns."""
    from diffax.tools import benchmark

    most, cores = max(args.devices), sorted(os.sched_getaffinity(0))
    totals = {args.batch * n for n in args.devices} | {args.batch * most}
    keys = {(1, 1, total) for total in totals}
    for n in args.devices:
        keys |= {
            (n, p, total) for p in {1, *args.processes} if n % p == 0 for total in (n * args.batch, most * args.batch)
        }
    with contextlib.ExitStack() as stack:
        programs = {
            key: [
                stack.enter_context(contextlib.closing(benchmark.Process(command)))
                for command in commands(key, cores[i % len(cores)], overrides)
            ]
            for i, key in enumerate(sorted(keys))
        }

        def ask_all(processes: Sequence[benchmark.Process], **request: Any) -> dict[str, Any]:
            for process in processes:
                process.send(**request)
            return [process.answer() for process in processes][0]

        for processes in programs.values():  # all compile at the same time
            for process in processes:
                process.send(prepare="train")
        facts = {key: [process.answer() for process in processes][0] for key, processes in programs.items()}
        runs = {
            key: lambda times, processes=processes: ask_all(processes, times=times)["seconds"]
            for key, processes in programs.items()
        }
        return benchmark.take_turns(runs, rounds=args.rounds, least=args.seconds), facts


# ---- the report -----------------------------------------------------------------------------------------------------


def modelled(args: argparse.Namespace, overhead: float, per_parameter: float) -> list[dict[str, Any]]:
    """The rows of `slice_row` for the config --model on TPU v5e.

    Args:
      args: model, pictures, share.
      overhead: measured.
      per_parameter: bytes that the measured programs send for each parameter.
    """
    import jax

    from diffax import config as configs
    from diffax.models.system import System
    from diffax.tools import benchmark
    from diffax.tools.compile_ahead import roofline
    from diffax.training import loop

    config = configs.to_dict(configs.load(args.model))
    model = next(model for model in System(config).generators if len(model.shape) == 3)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    flops = 3 * args.pictures * benchmark.forward_flops(config, model.name)
    compute = flops / (args.share * roofline.CHIPS["TPU v5 lite"].flops)
    sent = per_parameter * loop.count_parameters(params)
    own = dict(compute=compute, sent=sent, bandwidth=V5E_LINKS, pictures=args.pictures, overhead=max(0.0, overhead))
    return [slice_row(chips, **own) for chips in CHIPS]


def panels(rows: Sequence[Mapping[str, Any]], slices: Sequence[Mapping[str, Any]]) -> list:
    """What is drawn: measured overheads, and the modelled slice."""
    from diffax.data import plots

    def curve(kind: str, column: str, processes: int) -> tuple[list[int], list[float]]:
        chosen = [row for row in rows if row["kind"] == kind and row["processes"] == processes]
        return [row["devices"] for row in chosen], [float(row[column].rstrip("%")) for row in chosen]

    measured = {
        f"{kind}, {processes} process{'es' * (processes > 1)}": curve(kind, column, processes)
        for kind, column in {"weak": "beyond the cores", "strong": "equal work"}.items()
        for processes in sorted({row["processes"] for row in rows})
    }
    efficiency = [row["chips"] for row in slices], [float(row["efficiency"].rstrip("%")) for row in slices]
    return [
        plots.Panel("virtual devices", "overhead, %", measured),
        plots.Panel("chips of TPU v5e, modelled", "efficiency, %", {"no overlap": efficiency}),
    ]


def report(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measures, writes and prints."""
    from diffax import config as configs
    from diffax.data import plots
    from diffax.evaluation.report import write_report
    from diffax.tools import benchmark

    configs.load(args.model)  # a wrong name ends the command before anything is measured
    folder, most = pathlib.Path(args.output), max(args.devices)
    found, facts = measure(args, overrides)
    rows = list(overheads(found, batch=args.batch, most=most))
    for row in rows:
        sent = facts[row["devices"], row["processes"], row["pictures"]]["sent"]
        row["sent a step, MB"] = sum(sent.values()) / 1e6
    own = facts[most, 1, most * args.batch]
    alone = [most * seconds for seconds in found[1, 1, args.batch]]
    said = {
        "model": args.model,
        "pictures": args.pictures,
        "share": args.share,
        "overhead": benchmark.ratio(found[most, 1, most * args.batch], alone) - 1,
        "bytes per parameter": sum(own["sent"].values()) / own["parameters"],
        "links": V5E_LINKS,
    }
    slices = modelled(args, said["overhead"], said["bytes per parameter"])
    header = benchmark.machine() | {"batch": args.batch, "parameters": own["parameters"], "command": sys.argv[1:]}
    header |= {"seconds": {str(key): seconds for key, seconds in found.items()}}
    header |= {"sent": {str(key): fact["sent"] for key, fact in facts.items()}}
    print(write_report(folder, rows, header, name="scaling"))
    print(benchmark.caption(header | {"peers": {}, "peak": None}))
    print(write_report(folder, slices, said, name="slice"))
    print(f"\n{json.dumps(said)}\nplot: {folder / 'scaling.png'}")
    plots.line_plots(folder / "scaling.png", panels(rows, slices))


def numbers(text: str) -> list[int]:
    """'1,2' -> [1, 2]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Reads the command line; is one of the processes, or measures with all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=numbers, default=[1, 2, 4, 8], help="default 1,2,4,8")
    parser.add_argument("--processes", type=numbers, default=[1, 2], help="default 1,2")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a device in the weak programs (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a turn (default 0.5)")
    parser.add_argument("--model", default="adm_imagenet_64", help="config to model a slice for")
    parser.add_argument("--pictures", type=int, default=8, help="of it, on each chip (default 8)")
    parser.add_argument(
        "--share", type=float, default=0.55, help="of its peak that a chip reaches alone (default 0.55)"
    )
    parser.add_argument("--output", default="runs/scaling", help="where the report goes (default runs/scaling)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.serve:
        serve(args, overrides)
    else:
        report(args, overrides)


if __name__ == "__main__":
    main()
