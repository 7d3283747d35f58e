"""The launch scripts: their syntax, and what they do with stand-ins for Python and gcloud.

Two processes train for real by launch/local.sh in tests/training/two_processes_test.py.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# In place of Python: notes its arguments, and does as BEHAVIOUR says, by the number of the process.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || { echo 1234; exit; }
for a in "$@"; do case $a in --process=*) i=${a#*=} ;; esac; done
printf '%s\\n' "$@" > "$NOTES/$i"
trap 'exit 75' TERM
touch "$NOTES/ready$i"
eval "$BEHAVIOUR"
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_there_are_scripts():
    assert {"local.sh", "quickstart.sh", "slurm.sh", "test.sh", "tpu_pod.sh"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sh", "jobset.yaml"])
def test_two_lines_are_to_be_edited(name):
    """Between the marks, and with flags that the command knows."""
    lines = (LAUNCH / name).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "edit these two lines" in line)
    assert "----" in lines[first + 3], "the second mark"
    assert "--config=adm_imagenet_64" in lines[first + 2]
    assert "--coordinator=auto" in (LAUNCH / name).read_text()


def test_slurm_reads_every_line_that_is_meant_for_it():
    """sbatch stops reading at the first command."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    meant = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(meant) == 2 and max(meant) < command


def start(tmp_path, behaviour):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "NOTES": str(tmp_path), "BEHAVIOUR": behaviour}
    return subprocess.Popen(["bash", LAUNCH / "local.sh", "--config=quickstart", "--workdir=a b"], env=env)


def test_processes_get_their_numbers_and_the_same_place_to_meet(tmp_path):
    assert start(tmp_path, "exit 0").wait(30) == 0
    flags = [(tmp_path / str(i)).read_text().splitlines() for i in range(2)]
    want = ["-P", "-m", "diffax.main", "--config=quickstart", "--workdir=a b", "--coordinator=localhost:1234"]
    assert flags == [[*want, "--processes=2", f"--process={i}"] for i in range(2)]


def test_a_process_that_fails_ends_the_others(tmp_path):
    began = time.monotonic()
    assert start(tmp_path, "[ $i = 0 ] || exit 2; for n in {1..300}; do sleep 0.1; done").wait(30) == 2
    assert time.monotonic() - began < 20, "the other one was not ended"


def test_a_signal_reaches_all_and_they_may_save(tmp_path):
    job = start(tmp_path, "for n in {1..300}; do sleep 0.1; done")
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75


# In place of gcloud: a slice that is preempted in the middle of the first run, noted call by call.
GCLOUD = """#!/usr/bin/env bash
what=$4
echo "$what" >> "$NOTES/calls"
case $what in
  describe) [ ! -e "$NOTES/state" ] || cat "$NOTES/state" ;;
  create) echo READY > "$NOTES/state" ;;
  delete) rm -f "$NOTES/state" ;;
  ssh)
    for a in "$@"; do case $a in --command=*) command=${a#*=} ;; esac; done
    case $command in *diffax.main*) ;; *) exit 0 ;; esac
    echo "$command" >> "$NOTES/runs"
    [ "$OUTCOME" = preempted ] && [ "$(wc -l < "$NOTES/runs")" = 1 ] && { echo PREEMPTED > "$NOTES/state"; exit 255; }
    [ "$OUTCOME" != failed ] || exit 2
    ;;
esac
[ "$what" != describe ] || [ -e "$NOTES/state" ]
"""


def pod(tmp_path, outcome):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    env = os.environ | {
        "NOTES": str(tmp_path),
        "OUTCOME": outcome,
        "USER": "me",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "--config.seed=1 2"], env=env, capture_output=True, text=True, timeout=60
    )
    runs = (tmp_path / "runs").read_text().splitlines()
    return done, runs, (tmp_path / "calls").read_text().split()


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(tmp_path):
    done, runs, calls = pod(tmp_path, "preempted")
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call in ("create", "delete")] == ["create", "delete", "create"]
    assert len(runs) == 2 and runs[0] == runs[1], "the same command goes on"
    assert "--coordinator=auto" in runs[0] and "--config.seed=1\\ 2" in runs[0]


def test_a_run_that_fails_on_a_healthy_slice_is_not_tried_again(tmp_path):
    done, runs, _ = pod(tmp_path, "failed")
    assert done.returncode == 2 and len(runs) == 1
    assert "failed with 2 on a healthy slice" in done.stderr
