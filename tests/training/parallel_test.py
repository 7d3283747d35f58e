"""Layouts over four virtual devices, and two processes on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from diffax.training import checkpoint, parallel
from tests import micro


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_map_batch_pads_and_trims(n):
    run = parallel.map_batch(lambda shared, x, tree: {"y": shared * x + tree["z"]})
    x = np.arange(n * 2.0).reshape(n, 2)
    out = run(jnp.asarray(2.0), x, {"z": x})
    chex.assert_shape(out["y"], (n, 2))
    np.testing.assert_allclose(out["y"], 3 * x)


def test_map_batch_uses_every_device():
    out = parallel.map_batch(lambda shared, x: x + shared)(np.float32(1), np.zeros(8, np.float32))
    assert len(out.devices()) == 4


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown parallel 'dpp'; use one of pmap, jit, fsdp"):
        parallel.layout("dpp")


@pytest.mark.parametrize(("n", "count"), [(1, 2), (5, 2), (7, 3), (8, 4), (2, 4), (3, 1)])
def test_processes_share_rows(monkeypatch, n, count):
    """Each makes its share of them, and has every row once and in order."""
    made = []

    def make(part):
        rows = np.arange(n)[part]
        return {"row": rows, "squares": np.stack([rows, rows**2], 1).astype(np.float32)}

    def meet(mine):
        """Takes what this one has made, and gives what all have."""
        chex.assert_trees_all_equal(mine, make(parts[parallel.process_index()]))
        made.append(len(mine["row"]))
        return jax.tree.map(lambda *parts: np.stack(parts), *[make(part) for part in parts])

    each = -(-n // count)
    parts = [slice(min(i * each, n - each), min(i * each, n - each) + each) for i in range(count)]
    monkeypatch.setattr(parallel, "process_count", lambda: count)
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", meet)
    for index in range(count):
        monkeypatch.setattr(parallel, "process_index", lambda index=index: index)
        found = parallel.share(make, n)
        np.testing.assert_array_equal(found["row"], np.arange(n))
        np.testing.assert_array_equal(found["squares"], np.stack([np.arange(n), np.arange(n) ** 2], 1))
    assert made == ([each] * count if count > 1 else [])


@pytest.mark.parametrize("mode", parallel.MODES)
def test_prefetch_keeps_the_order_and_ends(mode):
    where = parallel.layout(mode)
    batches = [{"x": np.full((8, 2), i, np.float32)} for i in range(5)]
    got = list(parallel.prefetch(where, batches))
    assert [int(host["x"][0, 0]) for host, _ in got] == [0, 1, 2, 3, 4]
    for host, device in got:
        np.testing.assert_array_equal(np.asarray(device["x"]).reshape(8, 2), host["x"])


def test_fetch_reads_replicated_values():
    where = parallel.layout("pmap")
    tree = jax.device_put({"a": jnp.arange(3.0)}, where.replicated)
    np.testing.assert_array_equal(parallel.fetch(tree)["a"], [0, 1, 2])


def test_only_large_arrays_are_cut(monkeypatch):
    monkeypatch.undo()
    where = parallel.layout("fsdp")
    tree = {"w": np.zeros((3, 256, 512)), "odd": np.zeros((257, 1025)), "b": np.zeros(512)}
    found = {name: sharding.spec for name, sharding in parallel.shardings(where, tree).items()}
    assert found["w"] == jax.P(None, None, parallel.AXIS)
    assert found["odd"] == found["b"] == jax.P()


def test_a_shard_follows_its_axis():
    """Through Flax's transformations, which put an axis in and take it out again."""
    shard = parallel.Shard(np.zeros((2, 3, 4)), 1)
    for index, axis in [(0, 2), (1, 2), (2, 1)]:
        more = shard.add_axis(index, {})
        assert more.axis == axis and more.remove_axis(index, {}).axis == 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


CUTTING = """
from diffax import main
from diffax.training import parallel
parallel.WHOLE_BELOW = 1
raise SystemExit(main.run())
"""
LOCAL = Path(__file__).parent.parent / "launch" / "local.sh"


def start_processes(count, workdir, mode, logs, flags=()):
    """Starts `diffax.main` as `count` processes with 4 devices in all; each has a log, under pmap all one."""
    device_flags = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
    more = [f"--config.parallel={mode}", *flags]
    if count > 1:
        more += [f"--coordinator=localhost:{free_port()}", f"--processes={count}"]
    jobs = []
    if count > 1 and len(logs) == 1:  # by the script for that
        with logs[0].open("w") as file:
            env = os.environ | {"XLA_FLAGS": device_flags, "PYTHON": sys.executable, "PROCESSES": str(count)}
            command = ["bash", LOCAL, *micro.flags(workdir, more[0], *flags)]
            return [subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)]
    for index, log in enumerate(logs):
        own = micro.flags(workdir, *more, *([f"--process={index}"] if count > 1 else []))
        with log.open("w") as file:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, "-c", CUTTING, *own],
                    env=os.environ | {"XLA_FLAGS": device_flags},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return jobs


def run_processes(count, workdir, mode, *flags):
    """Runs them to the end and returns what each printed.

    XLA's CPU collectives give up when the other process is 30 s late to the first of them, as it can be on a busy
    machine while it still compiles. Then, and only then, they are started again, with the compiled programs at hand.
    """
    logs = [workdir.parent / f"{workdir.name}_{index}.log" for index in range(1 if mode == "pmap" else count)]
    for _ in range(3):
        jobs = start_processes(count, workdir, mode, logs, flags)
        deadline = time.monotonic() + 240
        while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
            if any("DEADLINE_EXCEEDED" in log.read_text() for log in logs):
                break
            time.sleep(0.5)
        for job in jobs:
            job.terminate()  # the script ends its processes
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
        outputs = [log.read_text() for log in logs]
        if not any("DEADLINE_EXCEEDED" in out for out in outputs):
            break
    assert [job.returncode for job in jobs] == [0] * len(jobs), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    run_processes(1, workdir, "pmap")
    return workdir


@pytest.mark.slow
def test_two_processes_make_a_share_of_the_samples_each(one_process, tmp_path):
    """The same pictures as one process, in as many files, and one grid."""
    flags, made = ("--mode=sample", "--config.sample.save=True", "--config.sample.num=1100"), []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        shutil.copytree(one_process, workdir)
        outputs = run_processes(count, workdir, "pmap", *flags)
        assert "".join(outputs).count("to score them:") == 1
        files = sorted((workdir / "samples").glob("*.npz"))
        assert [path.name for path in files] == ["samples_00000000.npz", "samples_00001000.npz"]
        made.append(np.concatenate([np.load(path)["arr_0"] for path in files]))
    assert made[0].shape == (1100, 8, 8, 1)
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1, "rounding alone"


@pytest.mark.slow
def test_two_processes_score_what_one_scores(one_process, tmp_path):
    """Samples, bounds and the numbers of a judge; one of them writes."""
    found, pictures = [], []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        shutil.copytree(one_process, workdir)
        outputs = run_processes(count, workdir, "pmap", "--mode=evaluate")
        assert "".join(outputs).count("report:") == 1
        found.append(json.loads((workdir / "evaluation.json").read_text()))
        pictures.append(np.asarray(PIL.Image.open(next((workdir / "evaluation").glob("samples_*.png"))), np.int32))
    for one, two in zip(found[0].pop("rows"), found[1].pop("rows"), strict=True):
        assert one.keys() == two.keys() and "bits_per_dim" in one and "accuracy" in one
        numbers = [{k: v for k, v in row.items() if not isinstance(v, str)} for row in (one, two)]
        chex.assert_trees_all_close(*numbers, rtol=1e-3)
    assert found[0] == found[1]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1, "rounding alone"


FAILING = """
import functools, sys
import jax
from diffax.training import parallel
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
parallel.start(sys.argv[1], 2, int(sys.argv[2]))
print(parallel.process_count(), "processes", flush=True)
if sys.argv[2] == "1":
    parallel.leave(3)
parallel.agree(False)
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
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: told.append(options))
    parallel.start("auto")
    parallel.start("localhost:1", 2, 1)
    assert [options["shutdown_timeout_seconds"] >= 86400 for options in told] == [True, True]


def test_who_is_alone_leaves_as_usual():
    assert parallel.leave(1) is None


def averages(workdir):
    with checkpoint.Checkpoints(workdir / "base" / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_ema()[:2]


@pytest.mark.parametrize("mode", ["pmap", *(pytest.param(m, marks=pytest.mark.slow) for m in ("jit", "fsdp"))])
def test_two_processes_train_what_one_trains(one_process, tmp_path, mode):
    outputs = run_processes(2, tmp_path, mode)
    assert "".join(outputs).count("samples:") == 1, "one process draws"
    drawn = [np.asarray(PIL.Image.open(workdir / "samples.png"), np.int32) for workdir in (one_process, tmp_path)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1, "each made its share of the same samples"
    on_the_way = (tmp_path / "base" / "samples" / "00000006.png").exists()
    assert on_the_way == (mode != "fsdp"), "parameters that are cut over processes are not drawn from"
    chex.assert_trees_all_close(averages(one_process), averages(tmp_path), rtol=1e-6, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
