"""Two processes of the command line on this machine train, sample and score what one does."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import PIL.Image
import pytest

from diffax.training import checkpoints
from tests import micro
from tests.training.processes_test import free_port

SHARDING = """
from diffax import main
from diffax.training import parallel
parallel.WHOLE_BELOW = 1
raise SystemExit(main.run())
"""
LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"


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
                    [sys.executable, "-c", SHARDING, *own],
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


def averages(workdir):
    with checkpoints.Checkpoints(workdir / "base" / "checkpoints", read_only=True) as found:
        return found.restore_ema()[:2]


@pytest.mark.parametrize("mode", ["pmap", *(pytest.param(m, marks=pytest.mark.slow) for m in ("jit", "fsdp"))])
def test_two_processes_train_what_one_trains(one_process, tmp_path, mode):
    outputs = run_processes(2, tmp_path, mode)
    assert "".join(outputs).count("samples:") == 1, "one process draws"
    drawn = [np.asarray(PIL.Image.open(workdir / "samples.png"), np.int32) for workdir in (one_process, tmp_path)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1, "each made its share of the same samples"
    on_the_way = (tmp_path / "base" / "samples" / "00000006.png").exists()
    assert on_the_way == (mode != "fsdp"), "parameters that are sharded over processes are not drawn from"
    chex.assert_trees_all_close(averages(one_process), averages(tmp_path), rtol=1e-6, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
