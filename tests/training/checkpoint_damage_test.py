"""Checkpoints: damage, full disks and killed runs are never silent, and lose at most the last save."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffax.errors import RunError, UserError
from diffax.training.checkpoints import Checkpoints, disk, integrity, verify
from tests.training.states import EMA, META, TARGET, damage, make_ema, make_state, raw_bytes, save_steps

# Tensorstore finishes other reads of a damaged step after asyncio has left.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_damage_falls_back_quarantines_and_saves_again(copy):
    damage(copy / "30")
    warnings = []
    with Checkpoints(copy, warn=warnings.append) as checkpoints:
        found = checkpoints.restore(TARGET)
        assert found.step == 20
        assert raw_bytes(found.state) == raw_bytes(make_state(20))
        assert len(warnings) == 1
        assert re.fullmatch(
            r"step 30 is damaged \(.*(digest mismatch|unreadable.*)\): "
            r"moved to _corrupt/30; using step 20",
            warnings[0],
        )
        checkpoints.save(25, make_state(25), ema=make_ema(25), meta=META)
        checkpoints.save(30, make_state(31), ema=make_ema(31), meta=META)
        checkpoints.wait()
        damage(copy / "30")
        assert checkpoints.restore(TARGET).step == 25
        assert "moved to _corrupt/30.1; using step 25" in warnings[1]
        checkpoints.save(30, make_state(32), ema=make_ema(32), meta=META)
    assert verify(copy) == [(20, None), (25, None), (30, None)]


def test_explicit_step_and_read_only_move_nothing(copy):
    damage(copy / "30")
    warnings = []
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(UserError, match=r"step 30 is damaged \(.*choose another step"):
            checkpoints.restore(TARGET, step=30)
        assert checkpoints.restore(TARGET, step=20).step == 20
        with pytest.raises(UserError, match="there is no step 7;.*it has 10, 20, 30"):
            checkpoints.restore(TARGET, step=7)
    (copy / "40.orbax-checkpoint-tmp").mkdir()
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    with Checkpoints(copy, read_only=True, warn=warnings.append) as checkpoints:
        assert checkpoints.restore(TARGET).step == 20
        with pytest.raises(ValueError, match="read_only"):
            checkpoints.save(50, make_state(50), ema={}, meta={})
    assert len(warnings) == 1 and warnings[0].endswith("; using step 20")
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == before
    assert os.path.isdir(copy / "30")


def test_nothing_intact_is_an_error_for_ever(copy):
    for step in (10, 20, 30):
        damage(copy / str(step))
    for _ in range(2):  # Also when all were quarantined by an earlier run.
        with Checkpoints(copy, warn=lambda line: None) as checkpoints:
            with pytest.raises(UserError, match="no intact checkpoint is left"):
                checkpoints.restore(TARGET)


def test_empty_half_deleted_and_foreign_entries(copy):
    (copy / "500").mkdir()
    (copy / "600" / "state" / "d").mkdir(parents=True)
    shutil.rmtree(copy / "10" / "state")
    (copy / "10" / "meta" / "metadata").unlink()
    (copy / "400" / "state").mkdir(parents=True)
    (copy / "400" / "state" / "manifest.ocdbt").write_bytes(b"")
    (copy / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (copy / "notes.txt").write_text("mine")
    (copy / "700").write_text("a file")
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.latest() == 400
    with Checkpoints(copy, keep=2, warn=lambda line: None) as checkpoints:
        assert checkpoints.removed_unfinished == [40]
        assert checkpoints.restore(TARGET).step == 30
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        checkpoints.wait()
        assert checkpoints.steps() == [30, 40]
    assert sorted(os.listdir(copy)) == ["30", "40", "700", "_corrupt", "notes.txt"]


def corrupt(path: pathlib.Path, rng: random.Random) -> str:
    """One random injury to a step; the name of it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choices(files, [p.stat().st_size + 64 for p in files])[0]
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "zero", "delete", "swap", "noise"])
    if kind == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == "zero":
        start = rng.randrange(len(data) + 1)
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == "noise":
        start = rng.randrange(len(data) + 1)
        data[start : start + 64] = rng.randbytes(len(data[start : start + 64]))
    elif kind == "swap":
        older = path.parent / "20" / file.relative_to(path)
        data = older.read_bytes() if older.exists() else b""
    file.write_bytes(data)
    if kind == "delete":
        file.unlink()
    return f"{kind} {file.relative_to(path)}"


def test_no_corruption_is_silent(saved, tmp_path):
    rng = random.Random(0)
    expected = {step: (raw_bytes(make_state(step)), raw_bytes(make_ema(step))) for step in (20, 30)}
    copies = int(os.environ.get("DIFFAX_CORRUPTIONS", 32))
    found_steps, mismatches = [], 0
    for i in range(copies):
        directory = tmp_path / str(i)
        for step in ("20", "30"):
            shutil.copytree(saved / step, directory / step)
        what = corrupt(directory / "30", rng)
        warnings = []
        with Checkpoints(directory, warn=warnings.append) as checkpoints:
            found = checkpoints.restore(TARGET)
        mismatches += "digest mismatch" in str(warnings)
        got = raw_bytes(found.state), raw_bytes(found.ema)
        assert got == expected[found.step] and found.meta == META, what
        assert (found.step == 20) == (directory / "_corrupt" / "30").exists(), what
        found_steps.append(found.step)
        shutil.rmtree(directory)
    # The rest hit copies and metadata that nothing reads.
    assert found_steps.count(20) > copies // 2
    assert mismatches > copies // 20


@pytest.mark.parametrize(("item", "leaf"), [("state", "params.w0"), ("ema", "ema.0.9999.w0")])
def test_verify_names_the_damaged_leaf(tmp_path, item, leaf, monkeypatch):
    save_steps(tmp_path, [10, 20])
    assert verify(tmp_path) == [(10, None), (20, None)]
    read = integrity._read_arrays

    def one_bit_off(path, names):
        arrays = read(path, names)
        name = leaf.removeprefix("ema.").replace(".", "/").replace("0/9999", EMA)
        if path.parts[-2:] == ("20", item) and name in arrays:
            arrays[name] = arrays[name].copy()
            arrays[name].view(np.uint8)[0, 0] ^= 1
        return arrays

    monkeypatch.setattr(integrity, "_read_arrays", one_bit_off)
    assert verify(tmp_path) == [(10, None), (20, f"{leaf}: digest mismatch")]


def test_verify_names_the_file_that_is_gone(copy):
    (copy / "20" / "meta" / "metadata").unlink()
    shutil.rmtree(copy / "30" / "ema")
    (ten, none), (_, twenty), (_, thirty) = verify(copy)
    assert (ten, none) == (10, None)
    assert twenty == "meta: file missing"
    assert thirty.startswith("ema.0.9999.")


def test_a_copied_step_under_another_number_is_damage(copy):
    shutil.copytree(copy / "20", copy / "40")
    assert verify(copy)[-1] == (40, "it holds step 20")


def test_disk_full_is_seen_before_writing(copy, monkeypatch):
    usage = shutil.disk_usage(copy)._replace(free=1000)
    with Checkpoints(copy) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(
                RunError,
                match=r"^cannot save step 40: disk full \(need 0\.3 MB, "
                r"0\.0 MB free\); step 30 is intact$",
            ):
                checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        assert checkpoints.steps() == [10, 20, 30]
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
    assert verify(copy)[-1] == (40, None)


def fail_in_background(monkeypatch, error):
    """Lets the next commit fail in Orbax's thread, as a full disk does."""
    handler = integrity.ocp.JsonCheckpointHandler
    original = handler._save_fn

    async def broken(self, x, directory):
        if "sha256" in x:
            await original(self, x, directory)
            raise error
        await original(self, x, directory)

    monkeypatch.setattr(handler, "_save_fn", broken)


@pytest.mark.parametrize("surfaces", ["check", "wait", "save", "close", "exit"])
def test_background_failure_ends_the_run(copy, monkeypatch, surfaces):
    checkpoints = Checkpoints(copy, keep=1)
    with monkeypatch.context() as patch:
        fail_in_background(patch, OSError(28, "No space left on device"))
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        with pytest.raises(
            RunError,
            match=r"cannot save step 40: disk full \(need .* MB, .*; "
            "step 30 is intact",
        ):
            if surfaces == "check":
                for _ in range(2000):
                    checkpoints.check()
                    time.sleep(0.005)
            elif surfaces == "save":
                checkpoints.save(50, make_state(50), ema=make_ema(50), meta=META)
            elif surfaces == "exit":
                with checkpoints:
                    pass
            else:
                getattr(checkpoints, surfaces)()
    # keep=1, and still no older step went: the new one was never there.
    assert sorted(os.listdir(copy)) == ["10", "20", "30"]
    checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
    checkpoints.close()
    assert verify(copy) == [(40, None)]


def test_failed_save_does_not_hide_the_error_that_ended_the_run(copy, monkeypatch):
    fail_in_background(monkeypatch, OSError(5, "Input/output error"))
    warnings = []
    with pytest.raises(ZeroDivisionError):
        with Checkpoints(copy, warn=warnings.append) as checkpoints:
            checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
            raise ZeroDivisionError
    assert len(warnings) == 1
    assert "cannot save step 40" in warnings[0] and "Input/output" in warnings[0]


def test_a_refused_save_is_an_error(copy, monkeypatch):
    monkeypatch.setattr(integrity.ocp.CheckpointManager, "save", lambda *a, **k: False)
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(RunError, match="cannot save step 40: refused.*step 30 is intact"):
            checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("look_first", [True, False])
def test_really_full_disk(small_disk, monkeypatch, look_first):
    if not look_first:
        monkeypatch.setattr(disk, "free_bytes", lambda path: None)
    noise = np.random.default_rng(0).random(600_000, np.float32)
    for _ in range(2):
        checkpoints = Checkpoints(small_disk)
        first = checkpoints.latest() or 0
        with pytest.raises(RunError, match=r"disk full \(need 2\.7 MB, .*step 1 is intact"):
            for step in range(first + 1, first + 4):
                checkpoints.save(step, {"w": noise + (step > 1)}, ema={}, meta={})
                checkpoints.wait()
        assert os.listdir(small_disk) == ["1"]
        assert verify(small_disk) == [(1, None)]


KILLED = """
import sys
import jax
import numpy as np
from diffax.training.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=2, warn=print) as c:
    w = np.zeros((64, 1024), np.float32)
    found = c.restore({'state': {'w': jax.ShapeDtypeStruct(w.shape, w.dtype)}, 'ema': {}})
    first = found.step if found else 0
    assert found is None or (np.asarray(found.state['w']) == first).all()
    print('from', first, c.removed_unfinished, flush=True)
    for step in range(first + 1, first + 400):
        c.check()
        c.save(step, {'w': w + step}, ema={'0.9': {'w': w - step}}, meta={'step': step})
        c.wait()
        print(step, flush=True)
"""


def test_kill_in_mid_save_loses_at_most_that_save(tmp_path):
    rng = random.Random(0)
    committed = 0
    for _ in range(int(os.environ.get("DIFFAX_KILLS", 3))):
        run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        line = run.stdout.readline()
        assert line.startswith("from "), line
        assert int(line.split()[1]) in (committed, committed + 1), line
        for _ in range(rng.randrange(1, 6)):
            committed = int(run.stdout.readline())
        time.sleep(rng.random() * 0.08)
        run.send_signal(signal.SIGKILL)
        committed = max([committed, *map(int, run.stdout.read().split())])
        run.wait()
        run.stdout.close()
        assert len(list(tmp_path.glob("*tmp*"))) <= 1
        assert all(problem is None for _, problem in verify(tmp_path))
