"""How fast it is, beside PyTorch if asked: `python -m diffax.tools.benchmark`.

Programs: train (one step), forward (one call of the network), ddimN and dpmN (N steps of DDIM, of DPM-Solver++), data
(one batch of JPEGs), checkpoint (how long a save stops training) and startup (from the command to the end of the
first step, with an empty and with a filled compile cache). What is printed are medians over rounds in which all that is
compared takes turns, each alive in a process of its own, so that what else the machine does meets all of them alike.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import absl.logging
import flax
import jax
import jaxlib
import numpy as np
from PIL import Image

from diffax import config as configs
from diffax import data, main, networks
from diffax.errors import RunError, UserError
from diffax.evaluation import report
from diffax.models import stages
from diffax.sampling import pipeline
from diffax.tools import compile_ahead
from diffax.training import checkpoint, loop, parallel

PROGRAMS = ("train", "forward", "ddim50", "dpm10", "data", "checkpoint", "startup")
PEERS = ("diffusers", "guided-diffusion")
WITHOUT_PEER = ("data", "checkpoint")
SAMPLERS = {"ddim": ("ddim", "{}"), "dpm": ("dpm_solver_pp_2m", "logsnr{}")}  # (sampler, its steps)
PER_DEVICE = {"gpu": 64, "tpu": 8}  # pictures of 64 pixels that a device trains on at once


# ---- counting and timing --------------------------------------------------------------------------------------------


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
    if chip := compile_ahead.CHIPS.get(device.device_kind):
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


# ---- what is measured -----------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A program, ready to run.

    Attributes:
      run: times -> seconds that so many repetitions took.
      facts: of one repetition: 'pictures', 'flops' (of products and convolutions) if they are known, and others.
      close: ends what goes on in the background.
    """

    run: Callable[[int], float]
    facts: dict[str, Any]
    close: Callable[[], None] = lambda: None


def benchmark_config(overrides: Sequence[str] = ()):
    """The config that is measured where none is named: on a CPU a network of 7.7 M parameters, else ADM's of 64 pixels.

    The small one is guided-diffusion's U-Net at 32 pixels with 64 channels, in float32; ADM's computes in bfloat16.
    """
    if (backend := jax.default_backend()) == "cpu":
        config = configs.config_defaults("benchmark")
        stage = config.base
        stage.net.update(channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention=(2,), heads=4)
        stage.net.update(scale_shift=True, resample="biggan")
        stage.schedule.name, stage.variance, stage.loss.name = "cosine", "learned_range", "hybrid"
        stage.train.update(batch_size=32, learning_rate=1e-4, optimizer="adamw", clip=0.0)
    else:
        config = configs.load("adm_imagenet_64")
        config.stages, stage = ("base",), config.base
        stage.guidance, stage.classifier = ("clip_denoised",), ""
        stage.net.dtype = "bfloat16"
        stage.train.batch_size = parallel.device_count() * PER_DEVICE.get(backend, 8)
    configs.override(config, overrides)
    return config


def forward_flops(config: Mapping, name: str) -> int:
    """`count_flops` of one picture's way through the network of a section."""
    model = stages.build(config, name)
    inputs = jax.eval_shape(lambda: networks.example_inputs(model.net, model.shape))
    params = jax.eval_shape(lambda: stages.init_params(model, jax.random.key(0)))
    return count_flops(lambda params, *inputs: model.net.apply({"params": params}, *inputs), params, *inputs)


def draw_batch(config: Mapping, name: str) -> dict[str, np.ndarray]:
    """This process's part of a batch such as a section is trained on: noise, label 0, captions without a word."""
    n = config[name]["train"]["batch_size"] // parallel.process_count()
    rng, shapes = np.random.default_rng(0), compile_ahead.training_batch(stages.build(config, name), config, n)
    return {
        key: rng.uniform(-1, 1, a.shape).astype(a.dtype) if a.dtype == np.float32 else np.zeros(a.shape, a.dtype)
        for key, a in shapes.items()
    }


def build_run(config: Mapping, name: str) -> loop.Run:
    """The training run of a section."""
    objective = stages.objective(stages.build(config, name))
    return loop.Run(objective, config[name], seed=config["seed"], mode=config["parallel"])


def prepare_train(config: Mapping, name: str) -> Prepared:
    """The train step, on a batch that is on the devices already."""
    run = build_run(config, name)
    state, batch = run.create(), parallel.put(run.where, draw_batch(config, name))
    start = time.perf_counter()
    step = run.step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    parallel.trim_memory()  # as training does
    # of several processes each has its own part of the batch, which a program compiled ahead does not take under pmap
    call = step if parallel.process_count() == 1 else run.step

    def once():
        nonlocal state
        state, metrics = call(state, batch)
        return metrics

    n = config[name]["train"]["batch_size"]
    facts = {"pictures": n, "flops": 3 * n * forward_flops(config, name), "compile": seconds}
    return Prepared(repeated(once), facts | {"parameters": loop.count_parameters(state.params), "step": step})


def drawn_params(config: Mapping, name: str) -> dict[str, Any]:
    """{section: parameters} that sampling of a stage needs, on the host: small random numbers, quickly drawn."""
    rng, found = np.random.default_rng(0), {}
    for section in stages.build(config, name).sections:
        model = stages.build(config, section)
        shapes = jax.eval_shape(lambda model=model: stages.init_params(model, jax.random.key(0)))
        found[section] = jax.tree.map(lambda a: 0.02 * rng.standard_normal(a.shape, np.float32), shapes)
    return found


def prepare_forward(config: Mapping, name: str) -> Prepared:
    """One call of the network."""
    model, n = stages.build(config, name), config[name]["train"]["batch_size"]
    params = jax.device_put(drawn_params(config, name)[name], parallel.layout("jit").replicated)
    inputs = jax.tree.map(np.asarray, networks.example_inputs(model.net, model.shape, n))
    call = parallel.map_batch(lambda params, *inputs: model.net.apply({"params": params}, *inputs))
    facts = {"pictures": n, "flops": n * forward_flops(config, name)}
    return Prepared(repeated(lambda: call(params, *inputs)), facts)


def prepare_sampling(config: Mapping, name: str, program: str) -> Prepared:
    """A batch of samples, as `SampleFn` makes them, by 'ddimN' or 'dpmN'."""
    kind, count = re.fullmatch("([a-z]+)([0-9]+)", program).groups()
    sampler, steps = SAMPLERS[kind]
    model, n = stages.build(config, name), config[name]["train"]["batch_size"]
    sample_fn = pipeline.SampleFn((model,), drawn_params(config, name), config, {name: 0})
    cond = pipeline.sample_conditions(sample_fn, n, ["a red ring"])
    if model.low_res:
        small = [side // model.low_res.factor for side in model.shape[:2]]
        cond["image"] = np.zeros((n, *small, model.shape[2]), np.float32)
    call = dict(sampler=sampler, steps=steps.format(count), batch_size=n, **cond)
    facts = {"pictures": n}
    if not model.is_guided:
        facts["flops"] = n * int(count) * forward_flops(config, name)
    return Prepared(repeated(lambda: sample_fn(0, n, **call)), facts)


def prepare_data(config: Mapping, name: str) -> Prepared:
    """A batch from JPEGs of 256 x 256 pixels, cropped and flipped, the next ones being decoded meanwhile."""
    section, shape = config[name], configs.picture_shape(config, name)
    settings, n = {**section["data"], "flip": True, "crop": "random"}, section["train"]["batch_size"]
    source = jpegs(num=256, side=256, channels=shape[2])
    stream = data.batches(source, settings, shape=shape, batch_size=n, seed=config["seed"])
    return Prepared(repeated(lambda: next(stream)["image"]), {"pictures": n}, stream.close)


def jpegs(*, num: int, side: int, channels: int) -> data.Source:
    """Pictures of coloured patches with some noise, held as JPEGs of 30 kB or so.

    In memory, where the system keeps files that were read before; no file is gone while a thread still reads.
    """
    rng, held = np.random.default_rng(0), []
    for _ in range(num):
        coarse = rng.uniform(0, 220, (side // 16, side // 16, 3))
        picture = np.kron(coarse, np.ones((16, 16, 1))) + rng.uniform(0, 35, (side, side, 3))
        file = io.BytesIO()
        Image.fromarray(np.uint8(picture)).save(file, "JPEG", quality=90)
        held.append(file.getvalue())

    def read(i: int) -> dict[str, Any]:
        return {"image": data.image_ops.decode(held[i], channels=channels)}

    return data.Source("JPEGs", num, read, (), (), "JPEG {}".format)


def prepare_checkpoint(config: Mapping, name: str, folder: pathlib.Path) -> Prepared:
    """The time that a save stops training for; `facts['on disk']` gathers the seconds until it was written."""
    run = build_run(config, name)
    state, numbers = run.create(), itertools.count(1)
    checkpoints, written = checkpoint.Checkpoints(folder, keep=1), []

    def save(times: int) -> float:
        stopped = 0.0
        for _ in range(times):
            start = time.perf_counter()
            run.save(checkpoints, state, next(numbers))
            stopped += time.perf_counter() - start
            checkpoints.wait()
            written.append(time.perf_counter() - start)
        return stopped

    return Prepared(save, {"on disk": written, "bytes": compile_ahead.tree_bytes(state)}, checkpoints.close)


def prepare(config: Mapping, name: str, program: str, folder: pathlib.Path) -> Prepared:
    """Builds one of the programs, but 'startup', for a section of a config; `folder` is an empty one."""
    if program == "checkpoint":
        return prepare_checkpoint(config, name, folder)
    makers = {"train": prepare_train, "forward": prepare_forward, "data": prepare_data}
    return makers[program](config, name) if program in makers else prepare_sampling(config, name, program)


# ---- other processes ------------------------------------------------------------------------------------------------


class Process:
    """A program in a process of its own, which answers JSON requests on stdin (see benchmarks/peers.py).

    Args:
      command: what to run.
      env: environment variables to add.

    Raises:
      RunError: (by `ask` and `answer`) it ended; the message has the last line that it wrote to stderr.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self._said = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        self._child = subprocess.Popen(command, env=os.environ | (env or {}), **pipes)

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, **request: Any) -> None:
        """Sends a request, whose reply `answer` waits for."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._child.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The reply to the request before."""
        if line := self._child.stdout.readline():
            return json.loads(line)
        self._child.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()] or [f"it ended with {self._child.returncode}"]
        raise RunError(lines[-1][:300])

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request."""
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def peer_command(args: argparse.Namespace, peer: str, section: Mapping) -> list[str]:
    """The command of a peer's process, for the network of a section.

    Raises:
      UserError: there is no such program here, or it has no such network.
    """
    script = pathlib.Path(__file__).parent.parent / "benchmarks" / "peers.py"
    if not script.exists():
        raise UserError(f"peers need a checkout of diffax; there is no {script}; run inside one")
    if shutil.which(args.peer_python) is None:
        raise UserError(
            f"there is no such python; --peer-python={args.peer_python}; pass one that has {peer} and torch"
        )
    if section["net"]["name"] != "unet" or set(section["takes"]) - {"label"}:
        raise UserError(f"{peer} is compared on U-Nets that take labels at most; --peer; choose another --config")
    if peer == "guided-diffusion" and args.peer_path:
        if not (pathlib.Path(args.peer_path) / "guided_diffusion" / "unet.py").exists():
            raise UserError(f"no guided_diffusion/unet.py in it; --peer-path={args.peer_path}; pass a checkout")
    fields = ("channels", "channel_mult", "num_res_blocks", "attention", "heads", "head_channels", "scale_shift")
    net = {field: section["net"][field] for field in (*fields, "resample", "dropout", "groups", "dtype")}
    learned = section["variance"] in ("learned", "learned_range")
    net |= {"shape": section["shape"], "out_channels": section["shape"][2] * (1 + learned)}
    net |= {"num_classes": section["num_classes"] if "label" in section["takes"] else 0}
    net |= {"batch_size": section["train"]["batch_size"], "channels_last": args.channels_last}
    path = [f"--path={args.peer_path}"] if peer == "guided-diffusion" and args.peer_path else []
    return [args.peer_python, str(script), f"--peer={peer}", f"--network={json.dumps(net)}", *path]


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


def start_peer(command: Sequence[str]) -> float:
    """Seconds from starting a peer to the end of its first train step."""
    begin = time.perf_counter()
    with contextlib.closing(Process(command)) as process:
        process.ask(prepare="train")
        process.ask(times=1)
        return time.perf_counter() - begin


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
            near = configs.closest(program, PROGRAMS)
            raise UserError(f"unknown program {program!r}{near}; --programs; use {', '.join(PROGRAMS)}")
    for peer in args.peer:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}{configs.closest(peer, PEERS)}; --peer; use {' or '.join(PEERS)}")
    if args.rounds < 1 or args.seconds < 0:
        raise UserError(f"--rounds={args.rounds} and --seconds={args.seconds:g} cannot be; use at least 1 and 0")
    config = configs.load(args.config, rest) if args.config else benchmark_config(rest)
    configs.validate(config, device_count=parallel.device_count())
    there = [s for s in configs.trained_sections(config) if configs.makes_pictures(config[s])]
    name = args.stage or next(iter(there), None)
    if name not in there:
        raise UserError(f"no stage {name!r} makes pictures; --stage; use {' or '.join(there) or 'another --config'}")
    return args, configs.to_dict(config), name


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        main.set_cpu_flags()
        args, config, name = read_flags(argv)
        if args.first_step is not None:
            prepared = prepare_train(config, name)
            prepared.run(1)
            print(json.dumps({"total": time.time() - args.first_step, "compile": prepared.facts["compile"]}))
            return 0
        rows = []
        for row in measure(config, name, args, argv):
            main.show_row(row)
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
        return main.complain(error, main.EXIT_USER, argv)
    except RunError as error:
        return main.complain(error, main.EXIT_FAILED, argv)
    except KeyboardInterrupt:
        return main.EXIT_INTERRUPTED


def caption(header: Mapping[str, Any]) -> str:
    """What stands under a table: on what it was measured."""
    versions = header["versions"] | {k: v for about in header["peers"].values() for k, v in about["versions"].items()}
    peak = f"; peak {header['peak'][0] / 1e12:.3g} TFLOP/s ({header['peak'][1]})" if header["peak"] else ""
    on = f"{header['cpu']}, {header['cores']} cores, {header['devices']}{peak}"
    return f"\n{on}; {', '.join(f'{k} {v}' for k, v in versions.items())}."


if __name__ == "__main__":
    sys.exit(run())
