"""What is measured: programs of a section of a config, ready to run."""

import io
import itertools
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffax import config as configs
from diffax import data
from diffax.conditions.base import zeros
from diffax.config import spec
from diffax.data import image_ops
from diffax.models.system import System
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn
from diffax.tools.benchmark.timing import count_flops, repeated
from diffax.tools.compile_ahead import lowering, roofline
from diffax.training import loop, parallel, processes
from diffax.training.checkpoints import Checkpoints

PROGRAMS = ("train", "forward", "ddim50", "dpm10", "data", "checkpoint", "startup")
SAMPLERS = {"ddim": ("ddim", "{}"), "dpm": ("dpm_solver_pp_2m", "logsnr{}")}  # (sampler, its steps)
PER_DEVICE = {"gpu": 64, "tpu": 8}  # pictures of 64 pixels that a device trains on at once


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


def benchmark_config(overrides: Sequence[str] = ()) -> Any:
    """The config that is measured where none is named: on a CPU a network of 7.7 M parameters, else ADM's of 64 pixels.

    The small one is guided-diffusion's U-Net at 32 pixels with 64 channels, in float32; ADM's computes in bfloat16.
    """
    if (backend := jax.default_backend()) == "cpu":
        config = configs.new("benchmark")
        section = config.base
        section.net.update(channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention=(2,), heads=4)
        section.net.update(scale_shift=True, resample="biggan")
        section.update(schedule=spec("schedule", "cosine"), variance="learned_range", loss=spec("loss", "hybrid"))
        adamw = spec("optimizer", "adamw")
        section.train.update(batch_size=32, learning_rate=1e-4, optimizer=adamw, grad_clip=0.0)
    else:
        config = configs.load("adm_imagenet_64")
        config.stages, section = ("base",), config.base
        section.guidance = configs.each("guidance", "clip_denoised")
        section.net.dtype = "bfloat16"
        section.train.batch_size = parallel.device_count() * PER_DEVICE.get(backend, 8)
    configs.override(config, overrides)
    return config


def network_inputs(model: Any, n: int) -> tuple[Any, Any, dict[str, Any]]:
    """(z, time, conditions) of n examples, zeros, for the network of a model of pictures."""
    conditions = {name: zeros(condition.example(), n) for name, condition in model.conditions.items()}
    return jnp.zeros((n, *model.shape)), jnp.zeros(n), conditions


def forward_flops(config: Mapping, name: str) -> int:
    """`count_flops` of one picture's way through the network of a section."""
    model = System(config).model(name)
    inputs = jax.eval_shape(lambda: network_inputs(model, 1))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return count_flops(lambda params, *inputs: model.net.apply({"params": params}, *inputs), params, *inputs)


def draw_batch(config: Mapping, name: str) -> dict[str, np.ndarray]:
    """This process's part of a batch such as a section is trained on: noise, label 0, captions of one token."""
    n = config[name]["train"]["batch_size"] // processes.process_count()
    rng, shapes = np.random.default_rng(0), lowering.training_batch(System(config).model(name), n)

    def draw(a: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.uniform(-1, 1, a.shape).astype(a.dtype) if a.dtype == np.float32 else np.zeros(a.shape, a.dtype)

    return jax.tree.map(draw, shapes)


def prepare_train(config: Mapping, name: str) -> Prepared:
    """The train step, on a batch that is on the devices already."""
    run = lowering.run_of(config, name)
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
    rng, system = np.random.default_rng(0), System(config)
    shapes = jax.eval_shape(lambda: lowering.init_params(system, system.model(name)))
    return jax.tree.map(lambda a: 0.02 * rng.standard_normal(a.shape, np.float32), shapes)


def prepare_forward(config: Mapping, name: str) -> Prepared:
    """One call of the network."""
    model, n = System(config).model(name), config[name]["train"]["batch_size"]
    params = jax.device_put(drawn_params(config, name)[name], parallel.layout("jit").replicated)
    inputs = jax.tree.map(np.asarray, network_inputs(model, n))
    call = parallel.map_batch(lambda params, *inputs: model.net.apply({"params": params}, *inputs))
    facts = {"pictures": n, "flops": n * forward_flops(config, name)}
    return Prepared(repeated(lambda: call(params, *inputs)), facts)


def prepare_sampling(config: Mapping, name: str, program: str) -> Prepared:
    """A batch of samples, as `SampleFn` makes them, by 'ddimN' or 'dpmN'."""
    kind, count = re.fullmatch("([a-z]+)([0-9]+)", program).groups()
    sampler, steps = SAMPLERS[kind]
    model, n = System(config).model(name), config[name]["train"]["batch_size"]
    sample_fn = SampleFn((model,), drawn_params(config, name), config, {name: 0})
    given = grids.conditions_for(sample_fn, n, ["a red ring"])
    if "image" in sample_fn.arguments:
        given["image"] = np.zeros((n, *sample_fn.arguments["image"].small), np.float32)
    call = dict(sampler=sampler, steps=steps.format(count), batch_size=n, **given)
    facts = {"pictures": n}
    if model.scale is None:
        facts["flops"] = n * int(count) * forward_flops(config, name)
    return Prepared(repeated(lambda: sample_fn(0, n, **call)), facts)


def prepare_data(config: Mapping, name: str) -> Prepared:
    """A batch from JPEGs of 256 x 256 pixels, cropped and flipped, the next ones being decoded meanwhile."""
    section, shape = config[name], System(config).model(name).data_shape
    loader, n = {**section["loader"], "flip": True, "crop": "random"}, section["train"]["batch_size"]
    source = jpegs(num=256, side=256, channels=shape[2])
    stream = data.batches(source, loader, shape=shape, batch_size=n, seed=config["seed"])
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
        return {"image": image_ops.decode(held[i], channels=channels)}

    return data.Source("JPEGs", num, read, (), (), "JPEG {}".format)


def prepare_checkpoint(config: Mapping, name: str, folder: pathlib.Path) -> Prepared:
    """The time that a save stops training for; `facts['on disk']` gathers the seconds until it was written."""
    run = lowering.run_of(config, name)
    state, numbers = run.create(), itertools.count(1)
    checkpoints, written = Checkpoints(folder, keep=1), []

    def save(times: int) -> float:
        stopped = 0.0
        for _ in range(times):
            start = time.perf_counter()
            run.save(checkpoints, state, next(numbers))
            stopped += time.perf_counter() - start
            checkpoints.wait()
            written.append(time.perf_counter() - start)
        return stopped

    return Prepared(save, {"on disk": written, "bytes": roofline.tree_bytes(state)}, checkpoints.close)


def prepare(config: Mapping, name: str, program: str, folder: pathlib.Path) -> Prepared:
    """Builds one of the programs, but 'startup', for a section of a config; `folder` is an empty one."""
    if program == "checkpoint":
        return prepare_checkpoint(config, name, folder)
    makers = {"train": prepare_train, "forward": prepare_forward, "data": prepare_data}
    return makers[program](config, name) if program in makers else prepare_sampling(config, name, program)
