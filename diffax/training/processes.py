"""The processes of one run: how they start, agree, divide work and end."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that is done waits for process 0, which samples, edits and compares alone; by default JAX would end both
# after 5 minutes.
_SHUTDOWN_SECONDS = 7 * 24 * 3600


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
        jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    elif coordinator:
        if not 0 <= index < count:
            raise ValueError(f"process {index} of {count} processes cannot be; with a coordinator both are needed")
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)


def leave(status: int) -> None:
    """Ends a process that failed among others at once; otherwise it and they would wait for each other."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if process_index() == 0:
            time.sleep(2)  # if the others fail by the same error, they may report it before they lose their coordinator
        os._exit(status)


def process_index() -> int:
    """This process's number."""
    return jax.process_index()


def process_count() -> int:
    """How many processes take part."""
    return jax.process_count()


def is_primary() -> bool:
    """Whether this is the process that writes shared files and shows progress."""
    return process_index() == 0


def agree(stop: bool) -> bool:
    """True on every process if it is on any; every process must call it at the same point."""
    if process_count() == 1:
        return stop
    return bool(np.any(multihost_utils.process_allgather(np.asarray(stop))))


def from_primary(value: Any) -> Any:
    """The primary process's JSON value, on every process; every process must call it at the same point."""
    if process_count() == 1:
        return value
    sent = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(sent.size)))
    buffer = np.zeros(size, np.uint8)
    buffer[: sent.size] = sent[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def share(make: Callable[[slice], Any], n: int) -> Any:
    """Divides n rows among the processes; all must call it, and all get every row.

    Args:
      make: rows n[slice] -> a tree of their arrays, [rows, ...]; a row must depend on its number alone. Shares are
        equally long, so that two processes may make the same few rows; the result has each once.
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
