"""Metrics and progress."""

import builtins
import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from diffax.errors import RunError, UserError
from diffax.training.reporting import Reporter, duration, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def reporter(directory, start=0, total=100, stream=None, **options):
    return Reporter(
        directory,
        total_steps=total,
        start_step=start,
        primary=True,
        stream=io.StringIO() if stream is None else stream,
        **options,
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.6, "1m 00s"),
        (309, "5m 09s"),
        (3599.6, "1h 00m"),
        (3 * 3600 + 7 * 60 + 59, "3h 07m"),
        (86400 * 2 + 4 * 3600, "2d 04h"),
        (-3, "0s"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_rows_are_strict_json_and_keep_the_keys_of_what_is_not_finite(tmp_path):
    path = tmp_path / "base" / "metrics.jsonl"
    with reporter(tmp_path / "base") as r:
        r.log(1, {"loss": jnp.float32(0.5), "n": 3})
        r.log(np.int64(2), {"loss": float("nan"), "up": float("inf"), "down": np.float32("-inf")})
        assert len(read_metrics(path)) == 2  # On disk at once.

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert {k: first[k] for k in ("step", "loss", "n")} == {"step": 1, "loss": 0.5, "n": 3}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["time"])
    assert second | {"time": ""} == {"step": 2, "time": "", "loss": None, "up": None, "down": None}
    assert read_metrics(path) == [first, second]


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'{"step": 31, "lo',
        b'{"step": 40, "loss": 1}',
        b"\x00\x00",
        b"\xff\n",
        b"[1]\n",
        b'{"step": 5, "loss": 9}\n',
    ],
)
def test_resume_continues_the_rows(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with reporter(tmp_path) as r:
        for step in (10, 20, 30):
            r.log(step, {"loss": step})
    kept = path.read_bytes().splitlines(keepends=True)[:2]
    with path.open("ab") as file:
        file.write(tail)
    with reporter(tmp_path, start=25) as r:
        r.log(30, {"loss": -30})
        r.log(40, {"loss": -40})
    assert path.read_bytes().splitlines(keepends=True)[:2] == kept
    rows = [(row["step"], row["loss"]) for row in read_metrics(path)]
    assert rows == [(10, 10), (20, 20), (30, -30), (40, -40)]
    with reporter(tmp_path, start=0):
        pass
    assert read_metrics(path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_read_metrics_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="cannot read metrics"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"torn\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is no row of metrics"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"torn')
    assert read_metrics(path) == [{"step": 1}]


def test_disk_errors_end_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write metrics"):
        reporter(tmp_path / "file" / "base")
    r = reporter(tmp_path)
    r._file.close()
    r._file = open("/dev/full", "w")
    with pytest.raises(RunError, match="cannot write metrics at step 1: No space left"):
        r.log(1, {"loss": 1})


def run(r, clock, steps, seconds, first=0.0):
    for step in steps:
        clock.now += first or seconds
        first = 0.0
        r.progress(step, 0.041234)


def test_plain_progress_is_a_line_every_ten_seconds_and_the_last(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with reporter(tmp_path / "base", total=5000, stream=stream, clock=clock) as r:
        run(r, clock, range(1, 5001), 0.01, first=60.0)
        r.progress(5000, 0.041234)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "base  step 1/5,000  0 %  loss 0.04123"
    # The 60 seconds of the first step are in no speed.
    assert re.fullmatch(r"base  step 1,00\d/5,000  20 %  loss 0.04123  100\.0 steps/s  ETA 40s", lines[1])
    assert lines[-1] == "base  step 5,000/5,000  100 %  loss 0.04123  100.0 steps/s"
    assert len(lines) == 6


def test_speed_is_that_of_a_recent_window(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with reporter(tmp_path, start=400, total=1000, stream=stream, clock=clock) as r:
        run(r, clock, range(401, 801), 0.1)
        run(r, clock, range(801, 901), 2.0)
    line = stream.getvalue().splitlines()[-1]
    assert "2.0 s/step" in line and "step 89" in line or "step 900" in line
    assert re.search(r"ETA 3m \d\ds", line)


def test_terminal_redraws_one_line(tmp_path):
    stream, clock = Terminal(), Clock()
    with reporter(tmp_path / "base", total=50, stream=stream, clock=clock) as r:
        run(r, clock, range(1, 26), 0.2)
        r.note("saved step 25")
        run(r, clock, range(26, 51), 0.01)
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.endswith("\n")
    above, below = text.split("\n")[:2]
    assert above.endswith("\rsaved step 25")
    shown = [part.rstrip() for part in above.split("\r") if part.startswith("base")]
    assert len(shown) == 25
    assert shown[-1] == "base  step 25/50  50 %  loss 0.04123  5.0 steps/s  ETA 5s"
    assert below.split("\r")[-1].startswith("base  step 50/50  100 %")
    assert len(below.split("\r")) < 10  # Not at every one of 100 steps in a second.


def test_progress_shows_more_values_and_nan(tmp_path):
    stream = io.StringIO()
    with reporter(tmp_path / "base", total=10, stream=stream) as r:
        r.progress(10, float("nan"), vb=1234567.0)
    assert stream.getvalue() == "base  step 10/10  100 %  loss nan  vb 1.235e+06\n"


def test_other_processes_write_nothing(tmp_path):
    stream = io.StringIO()
    with Reporter(tmp_path / "base", total_steps=2, start_step=0, primary=False, tensorboard=True, stream=stream) as r:
        r.log(1, {"loss": 1.0})
        r.progress(2, 1.0)
        r.note("hello")
    assert stream.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_tensorboard_is_written_where_asked(tmp_path):
    pytest.importorskip("tensorboardX")
    with reporter(tmp_path / "base", tensorboard=True) as r:
        r.log(1, {"some_loss": 0.5})
    files = list((tmp_path / "base" / "tensorboard").iterdir())
    assert len(files) == 1 and b"some_loss" in files[0].read_bytes()


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest, **options):
        if name == "tensorboardX":
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install diffax\[log\]"):
        reporter(tmp_path / "base", tensorboard=True)
    assert list(tmp_path.iterdir()) == []
    reporter(tmp_path / "base").close()


def test_close_twice(tmp_path):
    r = reporter(tmp_path)
    r.close()
    r.close()
