"""The command: `python -m diffax.main --config=configs/quickstart.py` (floor 5)."""

import argparse
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import absl.logging
import jaxlib

from diffax import checkpoint, data, evaluate, images, parallel, pipeline, stages, train
from diffax import config as configs
from diffax.errors import RunError, UserError

EXIT_FAILED, EXIT_USER, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class Job(NamedTuple):
    """What the command line asks for: a validated config (plain dict), where, and the other flags."""

    config: dict[str, Any]
    workdir: pathlib.Path
    args: argparse.Namespace


# ---- the modes ------------------------------------------------------------------------------------------------------


def run_train(job: Job) -> None:
    """Trains the stages and ends with a grid of samples."""
    config, chosen = job.config, job.args.stage
    names = [chosen] if chosen else config["stages"]
    sources = {name: data.load_source(config[name]["data"], shape=config[name]["shape"]) for name in names}
    for name in names:
        check_data(name, config[name], sources[name])
    with checkpoint.lock(job.workdir):
        for name in names:
            train_stage(job, name, sources[name])
    if all((job.workdir / name / "checkpoints").exists() for name in config["stages"]):
        run_sample(job)


def check_data(name: str, section: dict[str, Any], source: data.Source) -> None:
    """Raises UserError if the data cannot feed the stage."""
    if "label" in section["takes"]:
        if "label" not in source.keys:
            raise UserError(f"{name} takes 'label' and the data have none; {name}.data; sort them into sub-folders")
        if source.class_names and len(source.class_names) > section["num_classes"]:
            raise UserError(
                f"the data have {len(source.class_names)} classes; {name}.num_classes={section['num_classes']}; "
                f"use --config.{name}.num_classes={len(source.class_names)}"
            )


def train_stage(job: Job, name: str, source: data.Source) -> None:
    """Trains one stage into its own folder of the workdir."""
    config, section = job.config, job.config[name]
    stage = stages.build_stage(config, name)
    run = train.Run(stages.objective(stage), section, seed=config["seed"], mode=config["parallel"])
    folder = job.workdir / name
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as found:
        run.check(found)
    if parallel.process_index() == 0:
        text = json.dumps(config, indent=2) + "\n"
        images.write_atomically(job.workdir / "config.json", lambda f: f.write(text.encode()))
        names = json.dumps(source.class_names)
        images.write_atomically(folder / "classes.json", lambda f: f.write(names.encode()))

    def batches(first_step: int):
        return data.batches(
            source,
            section["data"],
            shape=section["shape"],
            batch_size=section["train"]["batch_size"],
            seed=config["seed"],
            start_step=first_step,
            process_index=parallel.process_index(),
            process_count=parallel.process_count(),
            keys=tuple(k for k in stage.takes if k in source.keys),
        )

    draw = None
    if "low_res" not in stage.takes:

        def draw(params, step):
            sample_fn = pipeline.SampleFn((stage,), {name: params}, config, {name: step})
            write_samples(sample_fn, config, folder / "samples" / f"{step:08d}.png", source.class_names)

    train.fit(run, folder, batches=batches, draw=draw, tensorboard=job.args.tensorboard)


def write_samples(sample_fn: pipeline.SampleFn, config: dict, path: pathlib.Path, class_names: Sequence[str]) -> None:
    """Samples as the config's `sample` section says, into one labelled grid."""
    c = config["sample"]
    cond = pipeline.sample_conditions(sample_fn.stages, c["num"])
    made = sample_fn(c["seed"], c["num"], batch_size=c["batch_size"], **cond)
    labels = [class_names[i] if i < len(class_names) else str(i) for i in cond["label"]] if cond else None
    pipeline.draw_grid(path, made, columns=c["columns"], labels=labels)


def run_sample(job: Job) -> None:
    """Samples from a trained workdir into one picture."""
    sample_fn = load_trained(job)
    path = pathlib.Path(job.args.output or job.workdir / "samples.png")
    if job.args.output and path.exists() and not job.args.overwrite:
        raise UserError(f"the output exists; {path}; pass --overwrite or another --output")
    if parallel.process_index() == 0:
        write_samples(sample_fn, job.config, path, class_names(job.workdir / sample_fn.stages[0].name))
        print(f"samples: {path}")


def run_evaluate(job: Job) -> None:
    """Scores a trained workdir; writes evaluation.json, evaluation.md and a picture."""
    sample_fn = load_trained(job)
    stage = sample_fn.stages[-1]
    section = job.config[stage.name]
    rows = []
    for row in evaluate.scores(sample_fn, section, job.config["eval"]):
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if not k.startswith("_")}
        print(shown, file=sys.stderr, flush=True)
        rows.append(row)
    header = {"name": job.config["name"], "training_step": dict(sample_fn.step)}
    print(evaluate.write_report(job.workdir, rows, header))
    for row in rows:
        end = f"{row['steps']}_steps.png"
        if "_samples" in row:
            pipeline.draw_grid(job.workdir / f"evaluation_{end}", row["_samples"], columns=stage.num_classes)
        if "_curve" in row:
            x, y = row["_curve"]
            labels = {"xlabel": "rate, bits per dimension", "ylabel": "distortion, RMSE of 0 to 255"}
            images.line_plot(job.workdir / f"rate_distortion_{end}", x, y, **labels)
    write_progress(sample_fn, job.config, job.workdir / "progressive.png")
    print(f"report: {job.workdir / 'evaluation.md'}")


def write_progress(sample_fn: pipeline.SampleFn, config: dict, path: pathlib.Path) -> None:
    """A row for each of a few pictures: what the model takes them for on the way (DDPM, figure 6)."""
    rows, moments = 8, 10
    _, kept = sample_fn(
        config["sample"]["seed"], rows, keep=moments, **pipeline.sample_conditions(sample_fn.stages, rows)
    )
    pipeline.draw_grid(path, kept.reshape(rows * moments, *kept.shape[2:]), columns=moments)


MODES: dict[str, Callable[[Job], None]] = {
    "train": run_train,
    "sample": run_sample,
    "evaluate": run_evaluate,
}


def class_names(folder: pathlib.Path) -> list[str]:
    """Names of the labels that a stage was trained on, from its folder; empty if they have none."""
    path = folder / "classes.json"
    return json.loads(path.read_text()) if path.exists() else []


def load_trained(job: Job) -> pipeline.SampleFn:
    """The trained model of the workdir, under this job's config."""
    return pipeline.load(job.workdir, config=job.config, step=job.args.step, decay=job.args.ema, raw=job.args.raw)


# ---- the command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command; --config.a.b=value is taken apart by `diffax.config`."""
    p = _Parser(
        prog="python -m diffax.main",
        description="Trains, samples and evaluates diffusion models.",
        epilog="Any field of the config can be set: --config.base.train.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--config", metavar="FILE[:VARIANT]", help="such as configs/quickstart.py; see the list below")
    p.add_argument("--mode", default="train", help=f"{', '.join(MODES)} (default train)")
    p.add_argument("--workdir", help="where all is written (default runs/NAME)")
    p.add_argument("--stage", help="train this stage alone")
    p.add_argument("--step", type=int, help="sample, evaluate: this checkpoint instead of the newest")
    p.add_argument("--ema", help="sample, evaluate: this average of the parameters, such as 0.999")
    p.add_argument("--raw", action="store_true", help="sample, evaluate: the parameters without averaging")
    p.add_argument("--output", help="sample: the picture to write (default WORKDIR/samples.png)")
    p.add_argument("--overwrite", action="store_true", help="sample: replace the output")
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (diffax[log])")
    p.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="several processes: where process 0 listens, or auto"
    )
    p.add_argument("--processes", type=int, default=0, help="several processes: how many")
    p.add_argument("--process", type=int, default=-1, help="several processes: which one this is")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def help_text() -> str:
    """--help: the flags, then every config with its variants."""
    lines = [parser().format_help(), "configs:"]
    for name, (summary, variants) in sorted(configs.available().items()):
        lines.append(f"  configs/{name}.py  {summary}")
        lines += [f"      :{variant:<10} {what}" for variant, what in variants.items()]
    return "\n".join(lines)


def set_cpu_flags() -> None:
    """Makes XLA:CPU fast, where the user did not choose otherwise; to be called before JAX meets a device.

    One device per core (a power of two), because one device computes little but convolutions on all cores. And jaxlib
    0.10.2's new kernels off: with them the weight gradient of a 3x3 convolution at 32 pixels takes ten times as long.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        flags += f" --xla_force_host_platform_device_count={min(8, 1 << (cores.bit_length() - 1))}"
    # XLA ends the process over a flag it does not know, hence the exact version.
    if "xla_cpu_experimental_ynn" not in flags and jaxlib.__version__ == "0.10.2":
        flags += " --xla_cpu_experimental_ynn_fusion_type="
    os.environ["XLA_FLAGS"] = flags.strip()


def prepare(argv: Sequence[str]) -> Job:
    """Reads the command line and the config, and validates both before anything is written or compiled."""
    args, rest = parser().parse_known_args(argv)
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; command line; see --help")
    if args.mode not in MODES:
        near = configs.closest(args.mode, MODES)
        raise UserError(f"unknown --mode={args.mode}{near}; command line; modes are {', '.join(MODES)}")
    if args.config is None and (args.mode == "train" or args.workdir is None):
        raise UserError("no config; command line; pass --config=configs/quickstart.py (see --help)")
    if args.config is None:
        config = configs.from_dict(pipeline.read_config(args.workdir))
        configs.override(config, rest)
    else:
        config = configs.load(args.config, rest)
    name = config.name if args.config is None else pathlib.Path(args.config).name.replace(".py", "").replace(":", "_")
    workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / name)
    set_cpu_flags()
    try:
        parallel.start(args.coordinator, args.processes, args.process)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {error}; --coordinator; see --help") from error
    configs.validate(config, device_count=parallel.device_count(), process_count=parallel.process_count())
    if args.stage and args.stage not in config.stages:
        raise UserError(f"unknown --stage={args.stage}; command line; stages are {', '.join(config.stages)}")
    return Job(configs.to_dict(config), workdir, args)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed), 2 (bad input) or 75 (preempted, saved)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax and Grain tell of every save and thread
    try:
        job = prepare(argv)
        cache_compilations(job.workdir)
        MODES[job.args.mode](job)
        return 0
    except UserError as error:
        return complain(error, EXIT_USER, argv)
    except RunError as error:
        return complain(error, EXIT_FAILED, argv)
    except train.Preempted as error:
        print(f"diffax: {error}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("diffax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def cache_compilations(workdir: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, so that a rerun starts at once (unless the user chose a place)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        parallel.keep_compiled(workdir / "compiled")


def complain(error: Exception, status: int, argv: Sequence[str]) -> int:
    """One line on stderr; the traceback with --debug."""
    if "--debug" in argv:
        traceback.print_exception(error)
    print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run())
