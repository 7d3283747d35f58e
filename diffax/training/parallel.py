"""Devices: the only file that names them (leaf). One pure step runs under pmap, jit or jit with sharded parameters.

The state never carries a device axis: pmap takes it with `in_axes=None`. Batches come from the host as numpy arrays,
this process's part of the global batch.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffax.errors import UserError

MODES = ("pmap", "jit", "fsdp")
AXIS = "data"
WHOLE_BELOW = 2**16  # elements: gathering fewer takes as long, and saves nothing


class Layout(NamedTuple):
    """Where things live.

    Attributes:
      mode: 'pmap' (replicated state), 'jit' (the same, as one program over arrays of all devices) or 'fsdp' (jit with
        parameters and optimizer state cut over the devices).
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
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_example(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))


def layout(mode: str = "pmap", devices: Sequence[Any] | None = None) -> Layout:
    """The layout over all devices that there are, or over `devices`, such as those of a slice that is not here.

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


def process_index() -> int:
    """This process's number."""
    return jax.process_index()


def process_count() -> int:
    """How many processes take part."""
    return jax.process_count()


def shardings(where: Layout, tree: Any) -> Any:
    """A sharding for each leaf: replicated, or a large one under fsdp cut along its longest dimension that can be."""
    count = where.mesh.size

    def cut(leaf) -> NamedSharding:
        splittable = [size for size in leaf.shape if size % count == 0 and size >= count]
        if where.mode != "fsdp" or not splittable or math.prod(leaf.shape) < WHOLE_BELOW:
            return where.replicated
        axis = leaf.shape.index(max(splittable))
        return NamedSharding(where.mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(cut, tree)


@flax.struct.dataclass
class Shard(nn.meta.AxisMetadata):
    """A parameter of which each device has a part; the layer that asks Flax for it gets the whole.

    So it is gathered where it is used, and by a block that is computed again for the backward pass (remat) again, and
    need not be kept. The gradient is the part's, summed over the devices.

    Attributes:
      part: this device's.
      axis: along which the parts lie.
    """

    part: jax.Array
    axis: int = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return jax.lax.all_gather(self.part, AXIS, axis=self.axis, tiled=True)

    def replace_boxed(self, val: Any) -> "Shard":
        return self.replace(part=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        return self.replace(axis=self.axis + (index <= self.axis))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        return self.replace(axis=self.axis - (index < self.axis))


def _is_shard(leaf: Any) -> bool:
    return isinstance(leaf, Shard)


def _cuts(where: Layout, params: Any) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, shardings(where, params))


def _boxed(params: Any, cuts: Any) -> Any:
    """A device's parts of parameters, with those that are cut as `Shard`s."""
    return jax.tree.map(lambda a, cut: Shard(a, cut.index(AXIS)) if AXIS in cut else a, params, cuts)


def whole(params: Any) -> Any:
    """Within a program: parameters, with every `Shard` among them gathered."""
    return nn.meta.unbox(params)


def tied(params: Any, to: Any) -> Any:
    """Within a loop: parameters, whose `Shard`s wait for `to`, so that XLA gathers none of them before the loop."""
    if not any(map(_is_shard, jax.tree.leaves(params, is_leaf=_is_shard))):
        return params
    return jax.lax.optimization_barrier((params, to))[0]


def mean(tree: Any, axis_name: str | None) -> Any:
    """Within a program: gradients averaged over the devices; those of a `Shard` have been summed already."""
    if axis_name is None:
        return tree

    def average(leaf):
        if _is_shard(leaf):
            return leaf.replace_boxed(leaf.part / jax.lax.axis_size(axis_name))
        return jax.lax.pmean(leaf, axis_name)

    return jax.tree.map(average, tree, is_leaf=_is_shard)


def on_each_device(where: Layout | None, fn: Callable) -> Callable:
    """Within a program over all devices: `fn` on each one's own examples, as pmap would run it.

    Nothing is left to XLA's partitioner, which takes the cut of a kernel over to the pictures and moves these between
    devices, and which cannot divide a kernel of Pallas.

    Args:
      where: the layout; None or pmap: `fn` as it is.
      fn: (params, batch, *shared, axis_name) -> (gradients like params, rest), the rest the same on every device.

    Returns:
      `fn` over whole arrays; within it cut parameters are `Shard`s.
    """
    if where is None or where.mode == "pmap":
        return fn

    def over(params, batch, *shared, axis_name=None):
        del axis_name  # None here: `fn` is given that of the mesh
        cuts = _cuts(where, params)

        def each(params, batch, *shared):
            gradients, rest = fn(_boxed(params, cuts), batch, *shared, axis_name=AXIS)
            return jax.tree.map(lambda a: a.part if _is_shard(a) else a, gradients, is_leaf=_is_shard), rest

        everywhere = PartitionSpec()
        ins = (cuts, PartitionSpec(AXIS), *(everywhere for _ in shared))
        return jax.shard_map(each, mesh=where.mesh, in_specs=ins, out_specs=(cuts, everywhere), check_vma=False)(
            params, batch, *shared
        )

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
        cut = (n, leaf.shape[0] // n, *leaf.shape[1:]) if where.mode == "pmap" else leaf.shape
        return jax.ShapeDtypeStruct(cut, leaf.dtype, sharding=where.by_example)

    return jax.tree.map(shape, batch)


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


def trim_memory() -> None:
    """Gives the system back what compiling left behind: glibc keeps it, half a gigabyte after one train step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
    there is no such axis; `shared` is cut, and `fn` gets its large arrays as `Shard`s.
    """

    def run(shared, args):
        return fn(shared, *args)

    if len(devices) == 1:
        return jax.jit(run)
    if mode != "fsdp":
        return jax.pmap(run, devices=devices, in_axes=(None, 0))
    where = layout(mode, devices)

    def over(shared, args):
        cuts, each = _cuts(where, shared), PartitionSpec(AXIS)
        return jax.shard_map(
            lambda shared, args: run(_boxed(shared, cuts), args),
            mesh=where.mesh,
            in_specs=(cuts, each),
            out_specs=each,
            check_vma=False,
        )(shared, args)

    return jax.jit(over)


def map_batch(fn: Callable, *, devices: list | None = None, mode: str = "pmap") -> Callable:
    """Runs `fn(shared, *per_example)` over this process's devices, for any number of examples.

    On one device it is jitted; on several each takes its share, the examples padded by repeating the last and trimmed
    afterwards. One program is compiled per padded size.

    Args:
      fn: pure; the others are trees of arrays [B, ...], and so is the result.
      devices: default all local ones.
      mode: of `sampling_mode`: 'pmap', `shared` is replicated, or 'fsdp', it is cut over the devices and read through
        Flax, which makes it whole.

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

        def cut(a):
            a = jnp.concatenate([a, jnp.repeat(a[-1:], padded - n, axis=0)]) if padded > n else a
            return a.reshape(count, padded // count, *a.shape[1:]) if mode == "pmap" else a

        out = mapped(shared, jax.tree.map(cut, args))
        return jax.tree.map(lambda a: (a.reshape(padded, *a.shape[2:]) if mode == "pmap" else a)[:n], out)

    return call


# ---- devices that are not here --------------------------------------------------------------------------------------

# Kinds of TPU: dimensions of a slice, and the most chips of one host.
SLICES = {"v4": (3, 4), "v5e": (2, 8), "v5p": (3, 4), "v6e": (2, 8)}


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """'v5e:4x4' -> ('v5e', (4, 4)), the kind of TPU and how many chips lie along each dimension of the slice.

    Raises:
      UserError: it names no slice.
    """
    kind, _, dims = name.partition(":")
    rank = SLICES[kind][0] if kind in SLICES else 2
    if kind not in SLICES or not re.fullmatch(rf"[1-9]\d{{0,3}}(x[1-9]\d{{0,3}}){{{rank - 1}}}", dims):
        like = f"{kind}:2x2x4" if rank == 3 else "v5e:4x4"
        raise UserError(
            f"there is no TPU slice {name!r}; --topology; kinds are {', '.join(SLICES)}, and it is written as {like}"
        )
    return kind, tuple(map(int, dims.split("x")))


def compile_only() -> None:
    """Lets programs be compiled for TPUs where there are none. To be called before any other use of JAX."""
    # Otherwise libtpu asks a metadata server which TPU this is, and JAX tries to start that one. And libtpu lets in one
    # process at a time, though those that compile touch no chip.
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):  # it has started already, in a notebook
        jax.config.update("jax_platforms", "cpu")


def slice_devices(name: str) -> list[Any]:
    """The devices of a TPU slice such as 'v5e:4x4', to compile for and not to run on; `compile_only` comes first.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    kind, dims = parse_topology(name)
    # A slice of one host has that host's shape. A v4 chip has two cores, which programs see as one device.
    hosts = (*dims, 1, 1)[:3] if math.prod(dims) <= SLICES[kind][1] else (2, 2, 1)
    more = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(name, platform="tpu", chips_per_host_bounds=hosts, **more)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                f"libtpu is not installed, which compiles for TPUs; --topology={name}; pip install 'diffax[tpu]'"
            ) from None
        if "lockfile" in str(error):
            raise UserError(
                f"another program uses libtpu; --topology={name}; let it end, or, if there is none, remove the file "
                f"named here: {error}"
            ) from None
        like = f"{kind}:{'x'.join('4' * len(dims))}"
        raise UserError(
            f"there is no TPU slice {name!r} ({error}); --topology; sides are even, as in {like}"
        ) from error
    return list(found.devices)


def agree(stop: bool) -> bool:
    """True on every process once any of them says so; every process must ask at the same step."""
    if process_count() == 1:
        return stop
    return bool(np.any(multihost_utils.process_allgather(np.asarray(stop))))


def share(make: Callable[[slice], Any], n: int) -> Any:
    """What the processes make together, each its share of n rows; all must call it, and all get the whole.

    Args:
      make: rows n[slice] -> a tree of their arrays, [rows, ...]; a row must depend on its number alone. Shares are
        equally long, so that a few rows may be made by two processes; the result has each once.
      n: how many, at least one.

    Returns:
      The tree of numpy arrays [n, ...].
    """
    count = process_count()
    if count == 1:
        return jax.tree.map(np.asarray, make(slice(0, n)))
    each = -(-n // count)
    starts = [min(i * each, n - each) for i in range(count)]
    mine = make(slice(starts[process_index()], starts[process_index()] + each))

    def joined(parts: np.ndarray) -> np.ndarray:
        rows = np.empty((n, *parts.shape[2:]), parts.dtype)
        for first, part in zip(starts, parts, strict=True):
            rows[first : first + each] = part
        return rows

    return jax.tree.map(joined, multihost_utils.process_allgather(mine))


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
    # who is done waits for process 0, which draws, edits and compares alone; JAX would end both after 5 minutes
    wait = {"shutdown_timeout_seconds": 7 * 24 * 3600}
    if coordinator == "auto":
        jax.distributed.initialize(**wait)
    elif coordinator:
        if not 0 <= index < count:
            raise ValueError(f"process {index} of {count} processes cannot be; with a coordinator both are needed")
        jax.distributed.initialize(coordinator, count, index, **wait)


def leave(status: int) -> None:
    """Ends a process that failed among others at once, which else would wait for them as they wait for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if process_index() == 0:
            time.sleep(2)  # if they fail by the same error, they may say so before they lose their coordinator
        os._exit(status)


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in `folder` for later runs."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
