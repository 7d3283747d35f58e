"""The command: `python -m diffax.main --config=configs/quickstart.py`. Flags, and a table of modes.

What is heavy is imported once the flags and the name of the config are known to be right.
"""

import argparse
import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

import absl.logging

from diffax import components
from diffax import config as configs
from diffax.commands import Job
from diffax.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER,
    Preempted,
    RunError,
    UserError,
    complain,
)

# Each is a module with a function `run(job)`.
MODES = {
    "train": "diffax.commands.train",
    "embed": "diffax.commands.embed",
    "sample": "diffax.commands.sample",
    "edit": "diffax.commands.edit",
    "evaluate": "diffax.commands.evaluate",
    "compile": "diffax.commands.compile",
}


# ---- flags ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command; --config.a.b=value is read by `diffax.config`."""
    p = _Parser(
        prog="python -m diffax.main",
        description="Trains, samples and evaluates diffusion models.",
        epilog="Any field of the config can be set: --config.base.train.num_train_steps=1000; a component by its name "
        f"or\nimport path: --config.base.loss=my_lab.losses:min_snr. --help=KIND lists components and their fields;\n"
        f"kinds: {', '.join(components.HOMES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = p.add_argument
    add("--help", "-h", metavar="KIND[.NAME]", nargs="?", const="", help="this text, or the fields of components")
    add("--config", metavar="FILE[:VARIANT]", help="such as configs/quickstart.py; see the list below")
    add("--mode", default="train", help=f"{', '.join(MODES)} (default train)")
    add("--workdir", help="where everything is written (default runs/NAME)")
    add("--stage", help="train: this section alone; sample --input: enlarge by the stages from this one on")
    add("--step", type=int, help="sample, evaluate: this checkpoint instead of the newest")
    add("--ema", help="sample, evaluate: this average of the parameters, such as 0.999")
    add("--raw", action="store_true", help="sample, evaluate: the parameters without averaging")
    _add_pictures(add)
    _add_scores(add)
    add("--topology", default="", metavar="SLICE", help="compile: for this TPU slice, such as v5e:4x4 (diffax[tpu])")
    add("--program", help="compile: one program alone, train or sample")
    add("--effort", type=float, help="compile: XLA's, from -1 (default: soon done) to 1; 0 is a run's and takes longer")
    add("--tensorboard", action="store_true", help="also write TensorBoard events (diffax[log])")
    add("--coordinator", default="", metavar="HOST:PORT", help="several processes: address of process 0, or auto")
    add("--processes", type=int, default=0, help="several processes: how many")
    add("--process", type=int, default=-1, help="several processes: which one this is")
    add("--debug", action="store_true", help="show the traceback of an error")
    return p


def _add_pictures(add) -> None:
    """Flags of sample and edit."""
    add(
        "--input",
        metavar="FILE",
        help="sample: enlarge this picture, or the samples of an .npz file, by --stage (default the last one); edit: "
        "pictures, as a.png,b.png",
    )
    add("--prompt", metavar="TEXT", help="sample: what the pictures show, for models that read text")
    add("--prompts", metavar="FILE", help="sample: prompts, one a line")
    add("--mask", metavar="FILE", help="sample: what of --input to keep, white, and what to fill in, black")
    add("--strength", type=float, help="sample: paint over --input; 0.3 stays near it, 1 forgets it")
    add("--edit", help="edit: which edit, such as variations, of a system whose decoder reads image embeddings")
    add("--to", metavar="TEXT", help="edit, diff: the caption of the result; --prompt is that of the input")
    add("--count", type=int, default=7, help="edit: pictures made in a row (default 7)")
    add("--output", help="sample, edit: the picture to write (default WORKDIR/samples.png)")
    add("--overwrite", action="store_true", help="sample, edit: replace the output")


def _add_scores(add) -> None:
    """Flags of evaluate."""
    add(
        "--reference",
        metavar="PATH",
        help="evaluate: FID, sFID, IS, precision, recall and KID of sample.num samples beside these pictures, or these "
        "statistics (see python -m diffax.evaluation --help); 'data': beside all the training data",
    )
    add("--inception", metavar="FILE", help="evaluate: weights of the FID's network, or 'fetch'")


def help_text(of: str = "") -> str:
    """--help: the flags and every config with its variants; --help=KIND or KIND.NAME: components."""
    if of:
        kind, _, name = of.partition(".")
        if kind not in components.HOMES:
            kinds = ", ".join(components.HOMES)
            raise UserError(f"unknown --help={of}{components.closest(kind, components.HOMES)}; kinds are {kinds}")
        return components.describe(kind, name)
    lines = [parser().format_help(), "configs:"]
    for name, (summary, variants) in sorted(configs.available().items()):
        lines.append(f"  configs/{name}.py  {summary}")
        lines += [f"      :{variant:<10} {what}" for variant, what in variants.items()]
    return "\n".join(lines)


# ---- from the command line to a job ---------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, overrides: Sequence[str]) -> Job:
    """Reads the config, joins the other processes and checks everything; nothing is written or compiled before."""
    if args.config is not None:
        configs.find(args.config)  # a wrong name is answered before JAX is imported
    from diffax.models.system import System
    from diffax.sampling.load import default_name, with_embedding_statistics
    from diffax.training import cpu_flags, parallel, processes, slices, workdir

    if args.config is not None:
        config, name = configs.load(args.config, overrides), default_name(args.config)
    else:
        config = configs.from_dict(workdir.read_config(args.workdir))
        configs.override(config, overrides)
        name = config.name
    folder = pathlib.Path(args.workdir or pathlib.Path("runs") / name)
    cpu_flags.set_cpu_flags()
    if args.topology:
        slices.compile_only()
    try:
        processes.start(args.coordinator, args.processes, args.process)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {error}; --coordinator; see --help") from error
    count = len(slices.slice_devices(args.topology)) if args.topology else parallel.device_count()
    configs.check(config, device_count=count, process_count=processes.process_count())
    there = System(config).trained
    if args.stage and args.stage not in there:
        raise UserError(f"unknown --stage={args.stage}; command line; stages are {', '.join(there)}")
    return Job(with_embedding_statistics(configs.to_dict(config), folder), folder, args)


def check_flags(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raises UserError for a flag that is unknown or that another one contradicts."""
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; command line; see --help")
    if args.mode not in MODES:
        near = components.closest(args.mode, MODES)
        raise UserError(f"unknown --mode={args.mode}{near}; command line; modes are {', '.join(MODES)}")
    if args.edit and args.mode != "edit":
        raise UserError(f"--edit={args.edit} is for another mode; command line; pass --mode=edit")
    if args.topology and args.mode != "compile":
        raise UserError("a slice that is not here runs nothing; --topology; pass --mode=compile with it")
    if args.config is None and (args.mode == "train" or args.workdir is None):
        raise UserError("no config; command line; pass --config=configs/quickstart.py (see --help)")


def _cache_compilations(workdir: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, so that a rerun starts at once (unless the user chose a place)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        from diffax.training import parallel

        parallel.keep_compiled(workdir / "compiled")


def _run(argv: Sequence[str]) -> None:
    args, rest = parser().parse_known_args(argv)
    if args.help is not None:
        print(help_text(args.help))
        return
    check_flags(args, rest)
    job = prepare(args, rest)
    if args.mode != "compile":  # what is read from that cache does not say what it needs
        _cache_compilations(job.workdir)
    importlib.import_module(MODES[args.mode]).run(job)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed), 2 (bad input) or 75 (preempted, saved)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if os.getcwd() not in sys.path:  # for import paths such as my_lab.losses:min_snr
        sys.path.append(os.getcwd())
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax and Grain log every save and thread
    try:
        _run(argv)
        return 0
    except UserError as error:
        return complain(error, EXIT_USER, argv)
    except RunError as error:
        return complain(error, EXIT_FAILED, argv)
    except Preempted as error:
        print(f"diffax: {error}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("diffax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def script() -> None:
    """Runs the command and ends the process with its status."""
    try:
        status = run()
    except Exception as error:  # none that was thought of
        traceback.print_exception(error)
        status = EXIT_FAILED
    if status not in (0, EXIT_PREEMPTED) and "jax" in sys.modules:
        from diffax.training import processes

        processes.leave(status)
    sys.exit(status)


if __name__ == "__main__":
    script()
