"""One run in a workdir at a time."""

import errno
import importlib.util
import os
import subprocess
import sys
import types

import pytest

from diffax.errors import UserError
from diffax.training.checkpoints import Checkpoints, lock, locking


def test_lock_has_one_holder(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom diffax.training.checkpoints import lock\n"
            f'with lock({str(tmp_path)!r}):\n    print("held", flush=True)\n    sys.stdin.read()',
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"workdir is in use by pid {holder.pid} on host .+;"):
            with lock(tmp_path):
                pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with lock(tmp_path):
        with pytest.raises(UserError, match=f"workdir is in use by pid {os.getpid()} "):
            with lock(tmp_path):
                pass
    with lock(tmp_path):
        pass


def test_unwritable_places_are_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match="cannot write to workdir"):
        with lock(tmp_path / "file"):
            pass
    with pytest.raises(UserError, match="no mounted directory"):
        Checkpoints("gs://bucket/run")


@pytest.fixture
def windows_lock(monkeypatch):
    """`lock` where there is no fcntl, and a stand-in for `msvcrt.locking` of a file's own bytes."""
    held = {}

    def hold(descriptor, mode, count):
        byte = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        assert count == 1 and byte[1] > 10**6, "behind the text, which others read"
        if mode == "unlock":
            assert held.pop(byte) == descriptor
        elif byte in held:
            raise OSError(errno.EACCES, "Permission denied")
        else:
            held[byte] = descriptor

    fake = types.SimpleNamespace(locking=hold, LK_NBLCK="lock", LK_UNLCK="unlock")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    spec = importlib.util.spec_from_file_location("windows_locking", locking.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.lock
    assert not held


def test_the_lock_of_windows(windows_lock, tmp_path):
    for _ in range(2):
        with windows_lock(tmp_path):
            with pytest.raises(UserError, match=f"workdir is in use by pid {os.getpid()} on host .+;"):
                with windows_lock(tmp_path):
                    pass
    with pytest.raises(ZeroDivisionError):
        with windows_lock(tmp_path):
            raise ZeroDivisionError
    with windows_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} ")
