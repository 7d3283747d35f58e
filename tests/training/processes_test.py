"""Processes: sharing work, failing, waiting."""

import os
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from diffax.training import checkpoints, loop, processes
from tests.training.regression import batches, make


@pytest.mark.parametrize(("n", "count"), [(1, 2), (5, 2), (7, 3), (8, 4), (2, 4), (3, 1)])
def test_processes_share_rows(monkeypatch, n, count):
    """Each makes its share of them, and has every row once and in order."""
    made = []

    def make(part):
        rows = np.arange(n)[part]
        return {"row": rows, "squares": np.stack([rows, rows**2], 1).astype(np.float32)}

    def meet(mine):
        """Takes what this one has made, and gives what all have."""
        chex.assert_trees_all_equal(mine, make(parts[processes.process_index()]))
        made.append(len(mine["row"]))
        return jax.tree.map(lambda *parts: np.stack(parts), *[make(part) for part in parts])

    each = -(-n // count)
    parts = [slice(min(i * each, n - each), min(i * each, n - each) + each) for i in range(count)]
    monkeypatch.setattr(processes, "process_count", lambda: count)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", meet)
    for index in range(count):
        monkeypatch.setattr(processes, "process_index", lambda index=index: index)
        found = processes.share(make, n)
        np.testing.assert_array_equal(found["row"], np.arange(n))
        np.testing.assert_array_equal(found["squares"], np.stack([np.arange(n), np.arange(n) ** 2], 1))
    assert made == ([each] * count if count > 1 else [])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


FAILING = """
import functools, sys
import jax
from diffax.training import processes
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
processes.start(sys.argv[1], 2, int(sys.argv[2]))
print(processes.process_count(), "processes", flush=True)
if sys.argv[2] == "1":
    processes.leave(3)
processes.agree(False)
"""


def test_a_process_that_fails_leaves_nobody_waiting():
    port = free_port()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, f"localhost:{port}", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert all("2 processes" in out for out in outputs), outputs
    assert jobs[1].returncode == 3 and jobs[0].returncode != 0


def test_who_is_done_waits_for_those_who_sample(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.append(options))
    processes.start("auto")
    processes.start("localhost:1", 2, 1)
    assert [options["shutdown_timeout_seconds"] >= 86400 for options in given] == [True, True]


def test_who_is_alone_leaves_as_usual():
    assert processes.leave(1) is None


TRAINING = """
import pathlib, sys
from tests.training.regression import batches, make
from diffax.training import loop, parallel, processes
parallel.WHOLE_BELOW = 1
port, index, mode, workdir = sys.argv[1:]
processes.start(f"localhost:{port}", 2, int(index))
part = slice(8 * int(index), 8 * int(index) + 8)
mine = lambda first: ({name: a[part] for name, a in batch.items()} for batch in batches(first))
seen = []
loop.fit(make(mode), pathlib.Path(workdir), batches=mine, on_step=lambda step, _: seen.append(step))
print(seen, flush=True)
"""


@pytest.mark.parametrize("mode", ["fsdp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("pmap", "jit"))])
def test_two_processes_train_what_one_trains(tmp_path, mode):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    port = str(free_port())
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING, port, str(index), mode, str(tmp_path / "two")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == ["[4, 8, 12]", "[]"], "one process reports"
    loop.fit(make("pmap"), tmp_path / "one", batches=batches)
    found = []
    for workdir in ("one", "two"):
        with checkpoints.Checkpoints(tmp_path / workdir / "checkpoints", read_only=True) as store:
            found.append(store.restore_ema()[:2])
    chex.assert_trees_all_close(*found, rtol=1e-6, atol=1e-6)
