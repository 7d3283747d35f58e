"""Devices: the only file that names them (leaf). One pure step runs under pmap, jit or jit with sharded parameters.

The state never carries a device axis: pmap takes it with `in_axes=None`. Batches come from the host as numpy arrays,
this process's part of the global batch.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MODES = ("pmap", "jit", "fsdp")
AXIS = "data"


class Layout(NamedTuple):
    """Where things live.

    Attributes:
      mode: 'pmap' (replicated state, explicit means), 'jit' (the same, found by the compiler) or 'fsdp' (jit with
        parameters and optimizer state cut over the devices).
      mesh: the devices of this process under pmap, all devices otherwise, on one axis.
    """

    mode: str
    mesh: Mesh

    @property
    def axis_name(self) -> str | None:
        """The name to average over inside the step; None where the compiler does it."""
        return AXIS if self.mode == "pmap" else None

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_example(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))


def layout(mode: str = "pmap") -> Layout:
    """The layout over all devices that there are.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown parallel {mode!r}; use one of {', '.join(MODES)}")
    devices = jax.local_devices() if mode == "pmap" else jax.devices()
    return Layout(mode, Mesh(np.array(devices), (AXIS,)))


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def process_index() -> int:
    """This process's number."""
    return jax.process_index()


def process_count() -> int:
    """How many processes take part."""
    return jax.process_count()


def shardings(where: Layout, tree: Any) -> Any:
    """A sharding for each leaf: replicated, or under fsdp cut along the largest dimension that divides evenly."""
    count = where.mesh.size

    def cut(leaf) -> NamedSharding:
        splittable = [size for size in leaf.shape if size % count == 0 and size >= count]
        if where.mode != "fsdp" or not splittable:
            return where.replicated
        axis = leaf.shape.index(max(splittable))
        return NamedSharding(where.mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(cut, tree)


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


def place(tree: Any, like: Any) -> Any:
    """Arrays of the host where those of `like` are, cut as they are; every process has all of `tree`."""
    return jax.tree.map(
        lambda a, there: jax.make_array_from_callback(a.shape, there.sharding, lambda index, a=a: a[index]), tree, like
    )


def put(where: Layout, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves this process's part of a global batch to the devices.

    Under pmap arrays gain a leading device axis; otherwise they become one global array.
    """
    if where.mode == "pmap":
        local = where.mesh.size
        return {k: jax.device_put(v.reshape(local, -1, *v.shape[1:]), where.by_example) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(where.by_example, v) for k, v in batch.items()}


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
        return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=(0,))
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


def map_batch(fn: Callable, *, devices: list | None = None) -> Callable:
    """Runs `fn(shared, *per_example)` over this process's devices, for any number of examples.

    On one device it is jitted; on several it is pmapped, the examples padded by repeating the last and trimmed
    afterwards. One program is compiled per padded size.

    Args:
      fn: pure; `shared` is replicated, the others are trees of arrays [B, ...], and so is the result.
      devices: default all local ones.

    Returns:
      A function with the same arguments, returning device or numpy arrays [B, ...].
    """
    devices = devices or jax.local_devices()
    count = len(devices)
    if count == 1:
        return jax.jit(fn)
    mapped = jax.pmap(lambda shared, args: fn(shared, *args), devices=devices, in_axes=(None, 0))

    def call(shared, *args):
        n = jax.tree.leaves(args)[0].shape[0]
        padded = -(-n // count) * count

        def spread(a):
            a = jnp.concatenate([a, jnp.repeat(a[-1:], padded - n, axis=0)]) if padded > n else a
            return a.reshape(count, padded // count, *a.shape[1:])

        out = mapped(shared, jax.tree.map(spread, args))
        return jax.tree.map(lambda a: a.reshape(padded, *a.shape[2:])[:n], out)

    return call


def agree(stop: bool) -> bool:
    """True on every process once any of them says so; every process must ask at the same step."""
    if process_count() == 1:
        return stop
    return bool(np.any(multihost_utils.process_allgather(np.asarray(stop))))


def start(coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Joins the other processes of a run. To be called before any other use of JAX.

    Args:
      coordinator: 'host:port' of process 0; 'auto' where JAX finds its peers itself (Cloud TPU, SLURM, Kubernetes,
        Open MPI); empty for a single process.
      count: number of processes, with 'host:port'.
      index: this process's number, with 'host:port'.

    Raises:
      ValueError: count and index do not name a process.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        if not 0 <= index < count:
            raise ValueError(f"process {index} of {count} processes cannot be; with a coordinator both are needed")
        jax.distributed.initialize(coordinator, count, index)


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in `folder` for later runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
