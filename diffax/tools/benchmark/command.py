"""The command line of the benchmark."""

import argparse
import json
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import absl.logging

from diffax import components
from diffax import config as configs
from diffax.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, RunError, UserError, complain
from diffax.evaluation.report import write_report
from diffax.models.system import System
from diffax.tools.benchmark import programs, rows
from diffax.tools.benchmark.children import PEERS
from diffax.tools.benchmark.programs import PROGRAMS
from diffax.training import cpu_flags, parallel

DESCRIPTION = "How fast diffax is, beside PyTorch if asked; medians over rounds in which all programs take turns."


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command; --config.a.b=value is taken apart by `diffax.config`."""
    p = _Parser(prog="python -m diffax.tools.benchmark", description=DESCRIPTION, allow_abbrev=False)
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
            near = components.closest(program, PROGRAMS)
            raise UserError(f"unknown program {program!r}{near}; --programs; use {', '.join(PROGRAMS)}")
    for peer in args.peer:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}{components.closest(peer, PEERS)}; --peer; use {' or '.join(PEERS)}")
    if args.rounds < 1 or args.seconds < 0:
        raise UserError(f"--rounds={args.rounds} and --seconds={args.seconds:g} cannot be; use at least 1 and 0")
    config = configs.load(args.config, rest) if args.config else programs.benchmark_config(rest)
    configs.check(config, device_count=parallel.device_count())
    there = [model.name for model in System(config).generators if len(model.shape) == 3]
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
            prepared = programs.prepare_train(config, name)
            prepared.run(1)
            print(json.dumps({"total": time.time() - args.first_step, "compile": prepared.facts["compile"]}))
            return 0
        found = []
        for row in rows.measure(config, name, args, argv):
            _show(row)
            found.append(row)
        section = config[name]
        header = {
            "name": config["name"],
            "section": {k: section[k] for k in ("shape", "net", "train")},
        } | rows.machine()
        header |= {"seconds": {row["what"]: row["_seconds"] for row in found if "_seconds" in row}}
        header |= {"peers": next((row["_peers"] for row in found if row.get("_peers")), {}), "command": argv}
        header |= {"peak": next((row["_peak"] for row in found if "_peak" in row), None)}
        print(write_report(pathlib.Path(args.output), found, header, name="benchmark"))
        print(rows.caption(header))
        return 0
    except UserError as error:
        return complain(error, EXIT_USER, argv)
    except RunError as error:
        return complain(error, EXIT_FAILED, argv)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _show(row: Mapping[str, Any]) -> None:
    """Prints the numbers of a row as soon as it is known."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if not k.startswith("_")}
    print(shown, file=sys.stderr, flush=True)
