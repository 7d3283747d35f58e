"""Programs that the benchmark measures: each ready to run, on data that are drawn."""

import io
import itertools
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from diffax import config as configs
from diffax.components import spec
from diffax.data import image_ops
from diffax.data.pipeline import batches
from diffax.data.source import Source
from diffax.models.base import add_batch
from diffax.models.system import System
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn
from diffax.tools.compile_ahead.lowering import run_of as build_run
from diffax.tools.compile_ahead.roofline import tree_bytes
from diffax.training import checkpoints as stores
from diffax.training import loop, parallel, processes

SAMPLERS = {"ddim": ("ddim", "{}"), "dpm": ("dpm_solver_pp_2m", "logsnr{}")}  # (sampler, its steps)
PER_DEVICE = {"gpu": 64, "tpu": 8}  # pictures of 64 pixels that a device trains on at once


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


def repeated(once: Callable[[], Any]) -> Callable[[int], float]:
    """times -> seconds, to the end of the last repetition."""

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            out = once()
        jax.block_until_ready(out)
        return time.perf_counter() - start

    return run


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
        config = configs.new("benchmark")
        stage = config.base
        stage.net.update(channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention=(2,), heads=4)
        stage.net.update(scale_shift=True, resample="biggan")
        stage.schedule, stage.variance = spec("schedule", "cosine"), "learned_range"
        stage.loss = spec("loss", "hybrid")
        stage.train.update(batch_size=32, learning_rate=1e-4, grad_clip=0.0)
        stage.train.optimizer = spec("optimizer", "adamw")
    else:
        config = configs.load("adm_imagenet_64")
        config.stages, stage = ("base",), config.base
        stage.guidance = configs.each("guidance", "clip_denoised")
        stage.net.dtype = "bfloat16"
        stage.train.batch_size = parallel.device_count() * PER_DEVICE.get(backend, 8)
    configs.override(config, overrides)
    return config


def model_of(config: Mapping, name: str) -> Any:
    """The model of a section of a config, a plain dict."""
    return System(configs.from_dict(config)).model(name)


def network_inputs(model: Any, n: int) -> tuple[Any, Any, dict[str, Any]]:
    """z, time and the inputs of the conditions: zeros."""
    conditions = add_batch({name: c.example() for name, c in model.conditions.items()}, n)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), conditions)
    return np.zeros((n, *model.shape), np.float32), np.zeros(n, np.float32), zeros


def forward_flops(config: Mapping, name: str) -> int:
    """`count_flops` of one picture's way through the network of a section."""
    model = model_of(config, name)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    inputs = network_inputs(model, 1)
    return count_flops(lambda params, *inputs: model.net.apply({"params": params}, *inputs), params, *inputs)


def draw_batch(config: Mapping, name: str) -> dict[str, Any]:
    """This process's part of a batch such as a section is trained on: noise, label 0, empty captions."""
    n = config[name]["train"]["batch_size"] // processes.process_count()
    rng, shapes = np.random.default_rng(0), add_batch(model_of(config, name).batch_example(), n)

    def draw(a: Any) -> np.ndarray:
        return rng.uniform(-1, 1, a.shape).astype(a.dtype) if a.dtype == np.float32 else np.zeros(a.shape, a.dtype)

    return jax.tree.map(draw, shapes)


def prepare_train(config: Mapping, name: str) -> Prepared:
    """The train step, on a batch that is on the devices already."""
    run = build_run(config, name)
    state, batch = run.create(), parallel.put(run.where, draw_batch(config, name))
    start = time.perf_counter()
    step = run.step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    parallel.trim_memory()  # as training does
    # of several processes each has its own part of the batch, which a program compiled ahead does not take under pmap
    call = step if processes.process_count() == 1 else run.step

    def once():
        nonlocal state
        state, metrics = call(state, batch)
        return metrics

    n = config[name]["train"]["batch_size"]
    facts = {"pictures": n, "flops": 3 * n * forward_flops(config, name), "compile": seconds}
    return Prepared(repeated(once), facts | {"parameters": loop.count_parameters(state.params), "step": step})


def drawn_params(config: Mapping, name: str) -> dict[str, Any]:
    """{section: parameters} that sampling of a model needs, on the host: small random numbers, quickly drawn."""
    rng, system, found = np.random.default_rng(0), System(configs.from_dict(config)), {}
    for section in system.model(name).sections:
        shapes = jax.eval_shape(lambda section=section: system.model(section).init(jax.random.key(0)))
        found[section] = jax.tree.map(lambda a: 0.02 * rng.standard_normal(a.shape, np.float32), shapes)
    return found


def prepare_forward(config: Mapping, name: str) -> Prepared:
    """One call of the network."""
    model, n = model_of(config, name), config[name]["train"]["batch_size"]
    params = jax.device_put(drawn_params(config, name)[name], parallel.layout("jit").replicated)
    inputs = network_inputs(model, n)
    call = parallel.map_batch(lambda params, *inputs: model.net.apply({"params": params}, *inputs))
    facts = {"pictures": n, "flops": n * forward_flops(config, name)}
    return Prepared(repeated(lambda: call(params, *inputs)), facts)


def prepare_sampling(config: Mapping, name: str, program: str) -> Prepared:
    """A batch of samples, as `SampleFn` makes them, by 'ddimN' or 'dpmN'."""
    kind, count = re.fullmatch("([a-z]+)([0-9]+)", program).groups()
    sampler, steps = SAMPLERS[kind]
    model, n = model_of(config, name), config[name]["train"]["batch_size"]
    sample_fn = SampleFn((model,), drawn_params(config, name), config, {name: 0})
    given = grids.conditions_for(sample_fn, n, ["a red ring"])
    if sample_fn.enlarges:
        given["image"] = np.zeros((n, *sample_fn.arguments["image"].small), np.float32)
    call = dict(sampler=sampler, steps=steps.format(count), batch_size=n, **given)
    facts = {"pictures": n}
    if model.scale is None:
        facts["flops"] = n * int(count) * forward_flops(config, name)
    return Prepared(repeated(lambda: sample_fn(0, n, **call)), facts)


def prepare_data(config: Mapping, name: str) -> Prepared:
    """A batch from JPEGs of 256 x 256 pixels, cropped and flipped, the next ones being decoded meanwhile."""
    section, shape = config[name], model_of(config, name).data_shape
    loader, n = {**section["loader"], "flip": True, "crop": "random"}, section["train"]["batch_size"]
    source = jpegs(num=256, side=256, channels=shape[2])
    stream = batches(source, loader, shape=shape, batch_size=n, seed=config["seed"])
    return Prepared(repeated(lambda: next(stream)["image"]), {"pictures": n}, stream.close)


def jpegs(*, num: int, side: int, channels: int) -> Source:
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
        return {"image": image_ops.decode(held[i], channels=channels)}

    return Source("JPEGs", num, read, (), (), "JPEG {}".format)


def prepare_checkpoint(config: Mapping, name: str, folder: pathlib.Path) -> Prepared:
    """The time that a save stops training for; `facts['on disk']` gathers the seconds until it was written."""
    run = build_run(config, name)
    state, numbers = run.create(), itertools.count(1)
    checkpoints, written = stores.Checkpoints(folder, keep=1), []

    def save(times: int) -> float:
        stopped = 0.0
        for _ in range(times):
            start = time.perf_counter()
            run.save(checkpoints, state, next(numbers))
            stopped += time.perf_counter() - start
            checkpoints.wait()
            written.append(time.perf_counter() - start)
        return stopped

    return Prepared(save, {"on disk": written, "bytes": tree_bytes(state)}, checkpoints.close)


def prepare(config: Mapping, name: str, program: str, folder: pathlib.Path) -> Prepared:
    """Builds one of the programs, but 'startup', for a section of a config; `folder` is an empty one."""
    if program == "checkpoint":
        return prepare_checkpoint(config, name, folder)
    makers = {"train": prepare_train, "forward": prepare_forward, "data": prepare_data}
    return makers[program](config, name) if program in makers else prepare_sampling(config, name, program)
