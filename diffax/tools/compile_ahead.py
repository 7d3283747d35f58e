"""Compile ahead: what a config's programs need on devices that need not be here.

The very train step and sampler are compiled, with abstract arguments, for a TPU slice by libtpu, or for the devices at
hand. XLA then says how much memory a device needs, and how many operations and bytes it would take it.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.models import stages
from diffax.training import loop, parallel, reporting

PROGRAMS = ("train", "sample")
QUICK = -1.0  # the least effort of XLA to make a program fast
FEW = 8  # of fewer pictures XLA:TPU cuts each into strips that overlap, to convolve them: about five times the bytes
GIB = 2**30


class Chip(NamedTuple):
    """One device, by its vendor's figures.

    Attributes:
      memory: bytes.
      flops: bfloat16 operations per second, dense, at best.
      bandwidth: bytes of memory per second, at best.
      links: bytes per second between it and its neighbours in a slice, at best; 0 where that is the network's matter.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float = 0.0


# By the name that JAX calls the device. TPUs multiply float32 in bfloat16 too, unless told otherwise; GPUs do not.
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(32 * GIB, 918e12, 1640e9, 400e9),
    "NVIDIA A100-SXM4-40GB": Chip(40e9, 312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 989e12, 3350e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4800e9),
}


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def roofline(flops: float, accessed: float, chip: Chip) -> tuple[float, str]:
    """The least time that a program can take: max(flops / peak, bytes / bandwidth) (Williams et al. 2009).

    Args:
      flops: operations of one device.
      accessed: bytes that it reads and writes.
      chip: the device.

    Returns:
      Seconds, and what sets them: 'arithmetic' or 'memory traffic'.
    """
    by_arithmetic, by_traffic = flops / chip.flops, accessed / chip.bandwidth
    return max((by_arithmetic, "arithmetic"), (by_traffic, "memory traffic"))


def talk(parameters: int, *, devices: int, mode: str, dtype: str, remat: bool, accumulate: int) -> float:
    """Bytes that one device sends in a train step, at least.

    Gradients are summed once a step, each part by one device and then told to all: two passes. Under fsdp parameters
    are gathered for every microbatch, with remat twice, and the gradients of each summed by their owners. Gathered are
    numbers of the type that a layer computes in: XLA:TPU converts before it gathers, if not at the least effort.

    Args:
      parameters: how many; their gradients have 4 bytes.
      devices: how many.
      mode: 'pmap', 'jit' or 'fsdp'.
      dtype: what the network computes in.
      remat: whether blocks are computed again.
      accumulate: microbatches.
    """
    gathered = (1 + remat) * jnp.dtype(dtype).itemsize
    each = (gathered + 4) * accumulate if mode == "fsdp" else 2 * 4
    return parameters * each * (devices - 1) / devices


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree; a typed key counts as two words."""

    def size(leaf) -> int:
        word = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return math.prod(leaf.shape) * word

    return sum(map(size, jax.tree.leaves(tree)))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""

    def held(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return tree_bytes(jax.tree.map(held, tree))


def largest_block(params: Any) -> int:
    """Bytes of the largest block or layer by itself of a network, all devices together."""
    sizes: dict[Any, int] = collections.defaultdict(int)
    for path, leaf in jax.tree.leaves_with_path(params):
        ends = (i + 1 for i, key in enumerate(path) if re.search("block|attention", key.key))
        sizes[path[: next(ends, -1)]] += tree_bytes(leaf)
    return max(sizes.values())


class Need(NamedTuple):
    """What a train step wants of one device, as far as it can be told apart.

    Attributes:
      state: bytes of parameters, optimizer and averages.
      gradients: bytes of one set of gradients.
      block: bytes of the parameters of the largest block.
      activations: bytes of the rest, which grows with the examples of a microbatch.
      limit: bytes that there are.
      examples: of a microbatch.
      accumulate: microbatches.
      devices: how many.
    """

    state: float
    gradients: float
    block: float
    activations: float
    limit: float
    examples: int
    accumulate: int
    devices: int


def remedies(need: Need, savings: Mapping[str, float]) -> list[dict[str, Any]]:
    """The fewest changes that would make a train step fit, by estimate: every such choice of them.

    Args:
      need: what it wants now.
      savings: {change: share of the activations that is left}, of 'remat' and 'bfloat16', where they are still open;
        and 'fsdp', whatever its share, where the state is not yet cut over the devices.

    Returns:
      [{change: True}], with 'accumulate': the number of microbatches; the same length each; empty if nothing helps.
    """

    def fits(changes: Sequence[str], factor: int) -> bool:
        left = math.prod(savings[c] for c in changes if c != "fsdp")
        sets = 2 if need.accumulate * factor > 1 else 1
        kept = need.state + sets * need.gradients
        if "fsdp" in changes:
            again = "remat" in changes or "remat" not in savings  # blocks gather their parameters again
            kept = kept / need.devices + 2 * (need.block if again else need.gradients)
        return kept + need.activations * left / factor <= need.limit

    factors = [f for f in range(2, need.examples + 1) if need.examples % f == 0]
    for count in range(1, len(savings) + 2):
        found = [dict.fromkeys(changes, True) for changes in itertools.combinations(savings, count) if fits(changes, 1)]
        for changes in itertools.combinations(savings, count - 1):
            factor = next((f for f in factors if fits(changes, f)), None)
            if factor:
                found.append({**dict.fromkeys(changes, True), "accumulate": need.accumulate * factor})
        if found:
            return found
    return []


def as_flags(name: str, changes: Mapping[str, Any]) -> str:
    """Changes from `remedies` as flags of the command line."""
    flags = {
        "remat": f"--config.{name}.net.remat=blocks",
        "bfloat16": f"--config.{name}.net.dtype=bfloat16",
        "fsdp": "--config.parallel=fsdp",
        "accumulate": f"--config.{name}.train.accumulate={changes.get('accumulate')}",
    }
    return " ".join(flags[change] for change in changes)


# ---- programs -------------------------------------------------------------------------------------------------------


def example_batch(model: Any, config: Mapping[str, Any], names: Sequence[str], n: int) -> dict[str, Any]:
    """n examples as shapes: what training reads, or what a call of the sampler gives.

    Args:
      model: a stage, a noised classifier or a CLIP.
      config: the whole config.
      names: which arrays: 'image', 'label', 'text', 'clip_text', 'low_res' and the embeddings.
      n: how many.

    Returns:
      {name: [n, ...] shape}.
    """
    section, clip = config[model.name], getattr(model, "clip", None)
    reader = clip or getattr(model, "guide", None)

    def shape(name: str) -> tuple[tuple[int, ...], Any]:
        if name == "image":
            return model.shape, jnp.float32
        if name == "label":
            return (), jnp.int32
        if name == "text":
            return (section["text"]["length"],), jnp.int32
        if name == "clip_text":
            return (config[reader.name]["text"]["length"],), jnp.int32
        if name == "low_res":
            factor = model.low_res.factor
            return (model.shape[0] // factor, model.shape[1] // factor, model.shape[2]), jnp.float32
        if name == "text_features":
            return (config[clip.name]["text"]["length"], clip.net.text.width), jnp.float32
        return (clip.net.image.features,), jnp.float32  # image_embedding, text_embedding

    return {name: jax.ShapeDtypeStruct((n, *shape(name)[0]), shape(name)[1]) for name in names}


def training_batch(model: Any, config: Mapping[str, Any], n: int) -> dict[str, Any]:
    """n examples as the objective of a model reads them, as shapes."""
    if not isinstance(model, stages.Stage):
        return example_batch(model, config, ("image", *getattr(model, "takes", ("label",))), n)
    made = "image_embedding" if model.emits == "image_embedding" else "image"
    names = dict.fromkeys((made, *(name for name in model.takes if name not in stages.MADE)))
    return example_batch(model, config, tuple(names), n)


def lower_train(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, loop.Run]:
    """The train step of a section, traced for the devices, and its run."""
    model, section = stages.build(config, name), config[name]
    run = loop.Run(stages.objective(model), section, seed=config["seed"], mode=config["parallel"], devices=devices)
    batch = training_batch(model, config, section["train"]["batch_size"])
    return run.step.lower(run.abstract, parallel.abstract_batch(run.where, batch)), run


def lower_sample(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, int, Any]:
    """The sampler of one stage, traced for the devices, under fsdp for those of one host, which share its parameters.

    Returns:
      It, how many samples all devices make, and its parameters as shapes, placed as they would be.
    """
    stage, mode = stages.build(config, name), parallel.sampling_mode(config["parallel"])
    every = list(parallel.layout("pmap", devices).mesh.devices.flat)
    there = [d for d in every if d.process_index == every[0].process_index] if mode == "fsdp" else every
    where = parallel.layout(mode, there)
    total = -(-config["sample"]["batch_size"] // len(every)) * len(every)
    n = total * len(there) // len(every)

    def init():
        found = {part: stages.init_params(stages.build(config, part), jax.random.key(0)) for part in stage.sections}
        if stage.codec is not None:
            found[name] |= {"fitted": jax.tree.map(jnp.asarray, stage.codec)._asdict()}
        elif stage.analytic:
            found[name] |= {"fitted": dict.fromkeys(("logsnr", "residual"), jnp.zeros(stage.num_steps))}
        return found

    pure = stages.sample_fn((stage,))
    scales = {"guidance": {name: jax.ShapeDtypeStruct((n,), jnp.float32)}} if stage.is_guided else {}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    cond = example_batch(stage, config, stage.reads, n)
    args = parallel.abstract_batch(where, (keys, scales, cond)) if len(there) > 1 else (keys, scales, cond)
    mapped = parallel.spread(lambda params, keys, scales, cond: pure(params, keys, **scales, **cond), there, mode)
    params = parallel.abstract(where, init)
    return mapped.lower(params, args), total, params


def saved_bytes(config: Mapping[str, Any], name: str) -> int:
    """Bytes that the gradient keeps from the forward pass for each example; nothing is computed."""
    model = stages.build(config, name)
    objective = stages.objective(model)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    extra = objective.init_extra()

    def kept(n: int) -> int:
        def pullback(params, batch):
            def loss(params):
                keys = jax.random.split(jax.random.key(0), n)
                return jnp.sum(objective.loss(params, extra, batch, keys, jnp.arange(n), n)[0])

            return jax.vjp(loss, params)[1]

        return tree_bytes(jax.eval_shape(pullback, params, training_batch(model, config, n)))

    return kept(2) - kept(1)  # parameters, in whatever precision they are kept, cancel


# ---- the report -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def telling(what: str, every: float = 15.0) -> Iterator[None]:
    """Says on stderr every so many seconds for how long `what` has been going on."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"{what}: {reporting.duration(time.monotonic() - start)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
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
    for name, words in (
        ("total", rf"Used {size} of {size} hbm"),
        ("temporary", rf"temporaries \({size}\) exceeds available HBM \({size}\)"),
    ):
        if found := re.search(words, message):
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
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
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
    if not topology and parallel.process_count() > 1:
        raise UserError("several processes compile nothing ahead; --mode=compile; start one, with --topology")
    devices = parallel.slice_devices(topology) if topology else None
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
        "dtype": c["net"]["dtype"],
        "remat": c["net"]["remat"],
        "flash": c["net"].get("flash", False),
        "effort": effort,
        "versions": versions(),
    }
    found |= (_train_report if program == "train" else _sample_report)(config, name, devices, found)
    images.write_atomically(path, lambda f: f.write((json.dumps(found, indent=2) + "\n").encode()))
    return found


def _train_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    c = config[name]["train"]
    with telling(f"diffax: tracing {_what(about)}"):
        lowered, run = lower_train(config, name, devices)
    state, params = device_bytes(run.abstract), device_bytes(run.abstract.params)
    # Outside of the loop over microbatches is the update: the state is read and written, the gradients are read.
    found = _compiled(lowered, about, held=state, loops=c["accumulate"], outside=2 * state + params)
    found |= {"steps": c["steps"], "batch_size": c["batch_size"], "accumulate": c["accumulate"], "state": state}
    found["parameters"] = loop.count_parameters(run.abstract.params)
    per_device = c["batch_size"] // run.where.mesh.size // c["accumulate"]
    found["few"] = few_pictures(config[name]["net"]["name"], per_device, about["platform"])
    if "seconds" in found:
        found["images_per_second"] = c["batch_size"] / found["seconds"]
        found["days"] = found["seconds"] * c["steps"] / 86400
    if found["fits"] is False:
        sets = 2 if c["accumulate"] > 1 else 1
        rest = max(0.0, found["total"] - state - sets * params)
        block = largest_block(run.abstract.params)
        need = Need(state, params, block, rest, found["limit"], per_device, c["accumulate"], run.where.mesh.size)
        with telling(f"diffax: looking for what would make {_what(about)} fit"):
            found["savings"] = open_savings(config, name)
        found["remedies"] = [as_flags(name, changes) for changes in remedies(need, found["savings"])]
    return found


def few_pictures(net: str, pictures: int, platform: str) -> int:
    """How many pictures a device convolves at once, where they are so few that it matters; else 0."""
    return pictures if platform == "tpu" and net in ("unet", "classifier") and pictures < FEW else 0


def open_savings(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """{change: share of the activations that it leaves}, of the changes that a section has not made yet."""
    net, changes = config[name]["net"], {}
    if net["remat"] == "none":
        changes["remat"] = {"remat": "blocks"}
    if net["dtype"] == "float32":
        changes["bfloat16"] = {"dtype": "bfloat16"}
    now = saved_bytes(config, name) if changes else 1
    savings = {
        change: saved_bytes({**config, name: {**config[name], "net": {**net, **options}}}, name) / max(1, now)
        for change, options in changes.items()
    }
    return savings if config["parallel"] == "fsdp" else {**savings, "fsdp": 1.0}


def _sample_report(config: Mapping[str, Any], name: str, devices, about: Mapping[str, Any]) -> dict[str, Any]:
    with telling(f"diffax: tracing {_what(about)}"):
        lowered, n, params = lower_sample(config, name, devices)
    stage = stages.build(config, name)
    found = _compiled(lowered, about, held=device_bytes(params), loops=stage.num_steps)
    found |= {"steps": stage.num_steps, "batch_size": n}
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
            cut=about["parallel"] == "fsdp",
        )
    return found


def sample_remedies(
    *, held: float, rest: float, samples: int, devices: int, hosts: int, limit: float, cut: bool
) -> list[str]:
    """The flags that would make a sampler fit, by estimate: the fewest that do; empty if nothing helps.

    Args:
      held: bytes of the parameters on each device.
      rest: bytes of all else, which grows with the samples.
      samples: of each device.
      devices: how many.
      hosts: that these are of; one's share its parameters.
      limit: bytes that each has.
      cut: whether the parameters are cut already (fsdp).
    """
    fewer = {} if samples == 1 else {f"--config.sample.batch_size={devices}": (held, rest / samples)}
    part = held * hosts / devices
    fsdp = {} if cut or devices == hosts else {"--config.parallel=fsdp": (part, rest)}
    found = [flag for flag, needs in {**fewer, **fsdp}.items() if sum(needs) <= limit]
    if not found and fewer and fsdp and part + rest / samples <= limit:
        return [" ".join((*fsdp, *fewer))]
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
        with telling(f"diffax: compiling {_what(about)}"):
            compiled = lowered.compile({"exec_time_optimization_effort": about["effort"]})
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise RunError(f"XLA cannot compile {_what(about)}: {error}; --mode=compile; another --topology") from error
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
        lines.append(f"  no figures of the peak of {found['kind']} are known here, so no time is told")
        return "\n".join(lines)
    share = found["flops"] / (found["seconds"] * CHIPS[found["kind"]].flops)
    lines.append(
        f"  roofline, from the vendor's figures, talk between devices left out: {1000 * found['seconds']:,.1f} ms, "
        f"bound by {found['bound']}, {100 * share:.0f} % of the peak; {found['images_per_second']:,.1f} images/s"
    )
    if seconds := _talk_seconds(found):
        lines.append(
            f"  talk between devices, at least, by the vendor's figure: {1000 * seconds:,.1f} ms, more or less of it "
            "while they compute"
        )
    if found.get("few"):
        lines.append(
            f"  of fewer than {FEW} pictures, here {found['few']} in a device's microbatch, a TPU moves some 5 times "
            "the bytes of each: take fewer microbatches or devices; remat and fsdp leave more room for pictures"
        )
    if "days" in found:
        lines.append(f"  {found['steps']:,} steps at that pace: {found['days']:,.1f} days")
    return "\n".join(lines)


def _talk_seconds(found: Mapping[str, Any]) -> float:
    """The least time of a train step's talk; 0 of a sampler, of one device, and where links are not known."""
    chip = CHIPS.get(found["kind"])
    if not chip or not chip.links or "parameters" not in found:
        return 0.0
    options = {key: found[key] for key in ("dtype", "accumulate")}
    options |= {"mode": found["parallel"], "remat": found["remat"] != "none", "devices": found["count"]}
    return talk(found["parameters"], **options) / chip.links


COLUMNS = (
    *("config", "program", "devices", "how", "memory", "TFLOP", "GB", "roofline", "of peak", "talk"),
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
            sent = _talk_seconds(row)
            work[2:] = [f"{1000 * row['seconds']:,.0f} ms, {row['bound']}", share]
            work += [f"{1000 * sent:,.0f} ms" if sent else "", f"{row['images_per_second']:,.0f}"]
            work += [f"{row['days']:,.1f}" if "days" in row else ""]
        memory = f"{row['total'] / GIB:.1f}{limit} GiB" + (" **does not fit**" if row["fits"] is False else "")
        devices = row["topology"] or f"{row['count']} x {row['kind']}"
        rows.append([f"{row['config']}.{row['section']}", row["program"], devices, ", ".join(how), memory, *work])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


if __name__ == "__main__":  # python -m diffax.tools.compile_ahead runs/*/ahead/*.json
    print(table([json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:]]), end="")
