"""Programs of a config, traced with abstract arguments: the train step and the sampler."""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffax import components
from diffax import config as configs
from diffax.errors import UserError
from diffax.models.base import add_batch
from diffax.models.cascade import cascade
from diffax.models.system import System
from diffax.tools.roofline import tree_bytes
from diffax.training import loop, parallel, reporting


def network_of(model: Any) -> Any:
    """The network of a model, without the encoders of its conditions."""
    return getattr(model.net, "net", model.net)


def build_run(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None = None) -> loop.Run:
    """The training run of a section.

    Args:
      config: a checked config, as a plain dict.
      name: the section.
      devices: to compile for; None: those at hand.
    """
    whole = configs.from_dict(config)
    fields = configs.section_fields(whole, name)
    how = {"seed": config["seed"], "mode": config["parallel"], "devices": devices, "name": name}
    identity = components.identity(fields, whole[name], training=True)
    return loop.Run(System(whole).model(name), whole[name].train, identity=identity, **how)


def lower_train(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, loop.Run]:
    """The train step of a section, traced for the devices, and its run."""
    run = build_run(config, name, devices)
    model = System(configs.from_dict(config)).model(name)
    batch = add_batch(model.batch_example(), config[name]["train"]["batch_size"])
    return run.step.lower(run.abstract, parallel.abstract_batch(run.where, batch)), run


def init_all(system: System, name: str) -> dict[str, Any]:
    """{section: initial parameters} of a model and of what its sampling needs, with what is measured on the data."""
    found = {part: system.model(part).init(jax.random.key(0)) for part in system.model(name).sections}
    statistics = system.model(name).statistics_example()
    if statistics is not None:
        found[name] = {**found[name], "statistics": jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), statistics)}
    return found


def lower_sample(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, int, Any]:
    """The sampler of one model, traced for the devices, under fsdp for those of one host, which share its parameters.

    Returns:
      It, how many samples all devices make, and its parameters as shapes, placed as they would be.
    """
    system, mode = System(configs.from_dict(config)), parallel.sampling_mode(config["parallel"])
    model = system.model(name)
    every = list(parallel.layout("pmap", devices).mesh.devices.flat)
    there = [d for d in every if d.process_index == every[0].process_index] if mode == "fsdp" else every
    where = parallel.layout(mode, there)
    total = -(-config["sample"]["batch_size"] // len(every)) * len(every)
    n = total * len(there) // len(every)
    pure = cascade((model,))
    scales = {name: jax.ShapeDtypeStruct((n,), jnp.float32)} if model.scale is not None else {}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    given = {name: add_batch({key: c.given_example() for key, c in model.given.items()}, n)}
    args = (keys, scales, given)
    args = parallel.abstract_batch(where, args) if len(there) > 1 else args
    mapped = parallel.spread(lambda params, keys, scales, given: pure(params, keys, given, scales), there, mode)
    params = parallel.abstract(where, lambda: init_all(system, name))
    return mapped.lower(params, args), total, params


def saved_bytes(config: Mapping[str, Any], name: str) -> int:
    """Bytes that the gradient keeps from the forward pass for each example; nothing is computed."""
    model = System(configs.from_dict(config)).model(name)
    params, extra = jax.eval_shape(lambda: model.init(jax.random.key(0))), model.init_extra()

    def kept(n: int) -> int:
        def pullback(params, batch):
            def loss(params):
                keys = jax.random.split(jax.random.key(0), n)
                return jnp.sum(model.loss(params, extra, batch, keys, jnp.arange(n), n)[0])

            return jax.vjp(loss, params)[1]

        return tree_bytes(jax.eval_shape(pullback, params, add_batch(model.batch_example(), n)))

    return kept(2) - kept(1)  # parameters, in whatever precision they are kept, cancel


@contextlib.contextmanager
def waiting(what: str, every: float = 15.0) -> Iterator[None]:
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
