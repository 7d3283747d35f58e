"""Devices: one pure step runs under pmap, jit or jit with sharded parameters. Only this room names devices.

The state never carries a device axis: pmap takes it with `in_axes=None`. Batches come from the host as numpy arrays,
this process's part of the global batch.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffax.networks.sharding import AXIS, Shard, is_shard

MODES = ("pmap", "jit", "fsdp")
WHOLE_BELOW = 2**16  # elements: gathering fewer takes as long, and saves nothing


class Layout(NamedTuple):
    """Where things live.

    Attributes:
      mode: 'pmap' (replicated state), 'jit' (the same, as one program over arrays of all devices) or 'fsdp' (jit with
        parameters and optimizer state sharded over the devices).
      mesh: the devices of this process under pmap, all devices otherwise, on one axis.
      devices: those that were chosen; None: all that there are.
    """

    mode: str
    mesh: Mesh
    devices: tuple[Any, ...] | None = None

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu'."""
        return self.mesh.devices.flat[0].platform

    @property
    def axis_name(self) -> str | None:
        """The name to average over inside the step; None where the step sees the arrays of all devices."""
        return AXIS if self.mode == "pmap" else None

    @property
    def replicated(self) -> NamedSharding:
        """Every device has all."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_example(self) -> NamedSharding:
        """Each device has its part of the examples."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))


def layout(mode: str = "pmap", devices: Sequence[Any] | None = None) -> Layout:
    """The layout over all devices, or over `devices`, such as those of a slice that is not here.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown parallel {mode!r}; use one of {', '.join(MODES)}")
    there = devices or (jax.local_devices() if mode == "pmap" else jax.devices())
    return Layout(mode, Mesh(np.array(there), (AXIS,)), tuple(devices) if devices else None)


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def shardings(where: Layout, tree: Any) -> Any:
    """A sharding for each leaf: replicated, or under fsdp a large one along its longest dimension that divides."""
    return jax.tree.map(lambda leaf: _sharding(where, leaf.shape), tree)


def _sharding(where: Layout, shape: tuple[int, ...]) -> NamedSharding:
    count = where.mesh.size
    divisible = [size for size in shape if size % count == 0 and size >= count]
    if where.mode != "fsdp" or not divisible or math.prod(shape) < WHOLE_BELOW:
        return where.replicated
    axis = shape.index(max(divisible))
    return NamedSharding(where.mesh, PartitionSpec(*[None] * axis, AXIS))


def _specs(where: Layout, params: Any) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, shardings(where, params))


def _boxed(params: Any, specs: Any) -> Any:
    """A device's parts of parameters, with those that are sharded as `Shard`s."""
    return jax.tree.map(lambda a, spec: Shard(a, spec.index(AXIS)) if AXIS in spec else a, params, specs)


def _unboxed(tree: Any) -> Any:
    """A device's parts again."""
    return jax.tree.map(lambda a: a.part if is_shard(a) else a, tree, is_leaf=is_shard)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Within a program: gradients averaged over the devices; those of a `Shard` have been summed already."""
    if axis_name is None:
        return tree

    def average(leaf):
        if is_shard(leaf):
            return leaf.replace_boxed(leaf.part / jax.lax.axis_size(axis_name))
        return jax.lax.pmean(leaf, axis_name)

    return jax.tree.map(average, tree, is_leaf=is_shard)


def on_each_device(where: Layout | None, fn: Callable) -> Callable:
    """Within a program over all devices: `fn` on each one's own examples, as pmap would run it.

    Nothing is left to XLA's partitioner, which applies the sharding of a kernel to the pictures and moves these between
    devices, and which cannot divide a kernel of Pallas.

    Args:
      where: the layout; None or pmap: `fn` as it is.
      fn: (params, batch, *shared, axis_name) -> (gradients like params, rest), the rest the same on every device.

    Returns:
      `fn` over whole arrays; within it sharded parameters are `Shard`s.
    """
    if where is None or where.mode == "pmap":
        return fn

    def over(params, batch, *shared, axis_name=None):
        del axis_name  # None here: `fn` gets that of the mesh
        specs, everywhere = _specs(where, params), PartitionSpec()

        def each(params, batch, *shared):
            gradients, rest = fn(_boxed(params, specs), batch, *shared, axis_name=AXIS)
            return _unboxed(gradients), rest

        ins = (specs, PartitionSpec(AXIS), *(everywhere for _ in shared))
        mapped = jax.shard_map(each, mesh=where.mesh, in_specs=ins, out_specs=(specs, everywhere), check_vma=False)
        return mapped(params, batch, *shared)

    return over


def abstract(where: Layout, init: Callable, *args) -> Any:
    """The result of `init(*args)` as shapes with their shardings, nothing computed."""
    shapes = jax.eval_shape(init, *args)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings(where, shapes)
    )


def create(where: Layout, init: Callable, *args) -> Any:
    """`init(*args)`, born where it will live."""
    # XLA:CPU takes half a minute to optimise the random draws of a small network, which run once in milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    out = shardings(where, jax.eval_shape(init, *args))
    return jax.jit(init, out_shardings=out, compiler_options=options)(*args)


def abstract_batch(where: Layout, batch: Any) -> Any:
    """What `put` makes of the whole global batch, as shapes with their shardings; on no devices but the layout's."""
    n = where.mesh.size

    def shape(leaf) -> jax.ShapeDtypeStruct:
        dims = (n, leaf.shape[0] // n, *leaf.shape[1:]) if where.mode == "pmap" else leaf.shape
        return jax.ShapeDtypeStruct(dims, leaf.dtype, sharding=where.by_example)

    return jax.tree.map(shape, batch)


def place(tree: Any, like: Any) -> Any:
    """Arrays of the host placed and sharded as those of `like` are; every process has all of `tree`."""
    return jax.tree.map(
        lambda a, there: jax.make_array_from_callback(a.shape, there.sharding, lambda index, a=a: a[index]), tree, like
    )


def put(where: Layout, batch: Any) -> Any:
    """Moves this process's part of a global batch, a tree of arrays, to the devices.

    Under pmap arrays gain a leading device axis; otherwise they become one global array.
    """
    if where.mode != "pmap":
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where.by_example, a), batch)
    local = where.mesh.size
    return jax.tree.map(lambda a: jax.device_put(a.reshape(local, -1, *a.shape[1:]), where.by_example), batch)


def compile_step(where: Layout, step: Callable, state: Any) -> Callable:
    """Compiles `step(state, batch, axis_name=...) -> (state, metrics)` over the devices; the old state is given up.

    Args:
      where: the layout.
      step: the pure step.
      state: the state or its `abstract` form.

    Returns:
      (state, batch from `put`) -> (state, metrics), metrics replicated.
    """
    step = functools.partial(step, axis_name=where.axis_name)
    if where.mode == "pmap":
        return jax.pmap(
            step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=(0,), devices=where.devices
        )
    kept = shardings(where, state)
    return jax.jit(
        step,
        in_shardings=(kept, where.by_example),
        out_shardings=(kept, where.replicated),
        donate_argnums=(0,),
    )


def fetch(tree: Any) -> Any:
    """Replicated device arrays as numpy, read from one local device."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_shards[0].data), tree)


def prefetch(where: Layout, batches: Iterable[dict], size: int = 2) -> Iterator[tuple[dict, dict]]:
    """Yields (batch on the host, batch on the devices), moving `size` batches ahead of their use."""
    queue: collections.deque = collections.deque()
    batches = iter(batches)
    for batch in itertools.islice(batches, size):
        queue.append((batch, put(where, batch)))
    while queue:
        yield queue.popleft()
        for batch in itertools.islice(batches, 1):
            queue.append((batch, put(where, batch)))


# ---- programs without gradients -------------------------------------------------------------------------------------


def sampling_mode(mode: str) -> str:
    """How the devices of one process run what needs no gradient: 'fsdp' where training is so, else 'pmap'."""
    return "fsdp" if mode == "fsdp" else "pmap"


def settled(shared: Any, mode: str = "pmap") -> Any:
    """What a program of `map_batch` shares, moved to this process's devices once, for many calls."""
    if mode != "fsdp":
        return jax.device_put(shared)
    return jax.device_put(shared, shardings(layout(mode, jax.local_devices()), shared))


def spread(fn: Callable, devices: Sequence[Any], mode: str = "pmap") -> Callable:
    """`fn(shared, *per_example)` as a program (shared, [per_example, ...]) of several devices, or of the only one.

    Under pmap on several the arrays of the examples have a leading device axis, and so have the results. Under fsdp
    there is no such axis; `shared` is sharded, and `fn` gets its large arrays as `Shard`s.
    """

    def run(shared, args):
        return fn(shared, *args)

    if len(devices) == 1:
        return jax.jit(run)
    if mode != "fsdp":
        return jax.pmap(run, devices=devices, in_axes=(None, 0))
    where = layout(mode, devices)

    def over(shared, args):
        specs, each = _specs(where, shared), PartitionSpec(AXIS)

        def each_device(shared, args):
            return run(_boxed(shared, specs), args)

        mapped = jax.shard_map(each_device, mesh=where.mesh, in_specs=(specs, each), out_specs=each, check_vma=False)
        return mapped(shared, args)

    return jax.jit(over)


def map_batch(fn: Callable, *, devices: list | None = None, mode: str = "pmap") -> Callable:
    """Runs `fn(shared, *per_example)` over this process's devices, for any number of examples.

    On one device it is jitted; on several each takes its share, the examples padded by repeating the last and trimmed
    afterwards. One program is compiled per padded size.

    Args:
      fn: pure; the others are trees of arrays [B, ...], and so is the result.
      devices: default all local ones.
      mode: of `sampling_mode`: 'pmap', `shared` is replicated, or 'fsdp', it is sharded over the devices and read
        through Flax, which gathers it.

    Returns:
      A function with the same arguments, returning device or numpy arrays [B, ...].
    """
    devices = devices or jax.local_devices()
    count = len(devices)
    mapped = spread(fn, devices, mode)
    if count == 1:
        return lambda shared, *args: mapped(shared, args)

    def call(shared, *args):
        n = jax.tree.leaves(args)[0].shape[0]
        padded = -(-n // count) * count

        def divided(a):
            a = jnp.concatenate([a, jnp.repeat(a[-1:], padded - n, axis=0)]) if padded > n else a
            return a.reshape(count, padded // count, *a.shape[1:]) if mode == "pmap" else a

        out = mapped(shared, jax.tree.map(divided, args))
        return jax.tree.map(lambda a: (a.reshape(padded, *a.shape[2:]) if mode == "pmap" else a)[:n], out)

    return call


# ---- this machine ---------------------------------------------------------------------------------------------------


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in `folder` for later runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder))


def trim_memory() -> None:
    """Gives memory that compiling left behind back to the system; glibc keeps half a gigabyte after one train step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
