"""Arithmetic: how long a program takes at least, what devices send each other, and what would make one fit."""

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

GIB = 2**30
FEW = 8  # of fewer pictures XLA:TPU cuts each into strips that overlap, to convolve them: about five times the bytes


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


# By the name that JAX calls the device. TPUs multiply float32 in bfloat16 too by default; GPUs do not.
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


def communication(parameters: int, *, devices: int, mode: str, dtype: str, remat: bool, accumulate: int) -> float:
    """Bytes that one device sends in a train step, at least.

    Gradients are summed once a step, each part by one device, which then sends it to all: two passes. Under fsdp
    parameters are gathered for every microbatch, with remat twice, and the gradients of each are summed by their
    owners. What is gathered has the type that a layer computes in: XLA:TPU converts before it gathers, if not at the
    least effort.

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
    """Bytes of all arrays of a tree; a typed key counts as eight."""

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
    """What a train step needs of one device.

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
      need: what it needs now.
      savings: {change: share of the activations that is left}, of 'remat' and 'bfloat16', where they are still open;
        and 'fsdp', whatever its share, where the state is not yet sharded.

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


def sample_remedies(
    *, held: float, rest: float, samples: int, devices: int, hosts: int, limit: float, sharded: bool
) -> list[str]:
    """The flags that would make a sampler fit, by estimate: the fewest that do; empty if nothing helps.

    Args:
      held: bytes of the parameters on each device.
      rest: bytes of all else, which grows with the samples.
      samples: of each device.
      devices: how many.
      hosts: that these are of; one's share its parameters.
      limit: bytes that each has.
      sharded: whether the parameters are sharded already (fsdp).
    """
    fewer = {} if samples == 1 else {f"--config.sample.batch_size={devices}": (held, rest / samples)}
    part = held * hosts / devices
    fsdp = {} if sharded or devices == hosts else {"--config.parallel=fsdp": (part, rest)}
    found = [flag for flag, needs in {**fewer, **fsdp}.items() if sum(needs) <= limit]
    if not found and fewer and fsdp and part + rest / samples <= limit:
        return [" ".join((*fsdp, *fewer))]
    return found
