"""Programs: the train step and the sampler of a section, traced with abstract arguments for any devices.

What they take is said by the model itself: its training example, and what its conditions are given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffax import config as configs
from diffax.models import base, cascade
from diffax.models.system import System
from diffax.tools.compile_ahead.roofline import tree_bytes
from diffax.training import loop, parallel


def run_of(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None = None) -> loop.Run:
    """The training run of a section.

    Args:
      config: checked, plain data or not.
      name: the section.
      devices: to run on or to compile for; None: all that there are.
    """
    how = {"seed": config["seed"], "mode": config["parallel"], "name": name, "devices": devices}
    identity = configs.identity(config, name, training=True)
    return loop.Run(System(config).model(name), config[name]["train"], identity=identity, **how)


def training_batch(model: base.Model, n: int) -> dict[str, Any]:
    """n examples as the loss of a model reads them, as shapes."""
    return base.add_batch(model.batch_example(), n)


def given_batch(model: base.Generator, n: int) -> dict[str, Any]:
    """{condition: n values} as a call of the sampler gives them, as shapes."""
    return base.add_batch({name: condition.given_example() for name, condition in model.given.items()}, n)


def init_params(system: System, model: base.Generator) -> dict[str, Any]:
    """{section: parameters} that sampling of a model needs, to be traced; what is measured on the data is zero."""
    found = {part: system.model(part).init(jax.random.key(0)) for part in model.sections}
    statistics = model.statistics_example() if hasattr(model, "statistics_example") else None
    if statistics is not None:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), statistics)
        found[model.name] = {**found[model.name], base.STATISTICS: zeros}
    return found


def lower_train(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, loop.Run]:
    """The train step of a section, traced for the devices, and its run."""
    run = run_of(config, name, devices)
    batch = training_batch(System(config).model(name), run.settings.batch_size)
    return run.step.lower(run.abstract, parallel.abstract_batch(run.where, batch)), run


def lower_sample(config: Mapping[str, Any], name: str, devices: Sequence[Any] | None) -> tuple[Any, int, Any]:
    """The sampler of one model, traced for the devices, under fsdp for those of one host, which share its parameters.

    Returns:
      It, how many samples all devices make, and its parameters as shapes, placed as they would be.
    """
    system, mode = System(config), parallel.sampling_mode(config["parallel"])
    model = system.model(name)
    every = list(parallel.layout("pmap", devices).mesh.devices.flat)
    there = [d for d in every if d.process_index == every[0].process_index] if mode == "fsdp" else every
    where = parallel.layout(mode, there)
    total = -(-config["sample"]["batch_size"] // len(every)) * len(every)
    n = total * len(there) // len(every)
    scales = {} if model.scale is None else {name: jax.ShapeDtypeStruct((n,), jnp.float32)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    args = (keys, {name: given_batch(model, n)}, scales)
    args = parallel.abstract_batch(where, args) if len(there) > 1 else args
    params = parallel.abstract(where, lambda: init_params(system, model))
    return parallel.spread(cascade.cascade([model]), there, mode).lower(params, args), total, params


def saved_bytes(config: Mapping[str, Any], name: str) -> int:
    """Bytes that the gradient keeps from the forward pass for each example; nothing is computed."""
    model = System(config).model(name)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    extra = model.init_extra()

    def kept(n: int) -> int:
        def pullback(params, batch):
            def loss(params):
                keys = jax.random.split(jax.random.key(0), n)
                return jnp.sum(model.loss(params, extra, batch, keys, jnp.arange(n), n)[0])

            return jax.vjp(loss, params)[1]

        return tree_bytes(jax.eval_shape(pullback, params, training_batch(model, n)))

    return kept(2) - kept(1)  # parameters, in whatever precision they are kept, cancel
