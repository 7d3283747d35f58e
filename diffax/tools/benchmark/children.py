"""Programs in processes of their own: peers of PyTorch, and fresh starts of this command."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from diffax.errors import RunError, UserError

PEERS = ("diffusers", "guided-diffusion")


class Process:
    """A program in a process of its own, which answers JSON requests on stdin (see benchmarks/peers.py).

    Args:
      command: what to run.
      env: environment variables to add.

    Raises:
      RunError: (by `ask` and `answer`) it ended; the message has the last line that it wrote to stderr.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self._said = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        self._child = subprocess.Popen(command, env=os.environ | (env or {}), **pipes)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._child.pid

    def send(self, **request: Any) -> None:
        """Sends a request, whose reply `answer` waits for."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._child.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The reply to the request before."""
        if line := self._child.stdout.readline():
            return json.loads(line)
        self._child.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()] or [f"it ended with {self._child.returncode}"]
        raise RunError(lines[-1][:300])

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request."""
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def peer_command(args: argparse.Namespace, peer: str, section: Mapping) -> list[str]:
    """The command of a peer's process, for the network of a section.

    Raises:
      UserError: there is no such program here, or it has no such network.
    """
    script = pathlib.Path(__file__).parents[3] / "benchmarks" / "peers.py"
    if not script.exists():
        raise UserError(f"peers need a checkout of diffax; there is no {script}; run inside one")
    if shutil.which(args.peer_python) is None:
        raise UserError(
            f"there is no such python; --peer-python={args.peer_python}; pass one that has {peer} and torch"
        )
    if section["net"]["name"] != "unet" or set(section["conditions"]) - {"label"}:
        raise UserError(f"{peer} is compared on U-Nets with labels at most; --peer; choose another --config")
    if peer == "guided-diffusion" and args.peer_path:
        if not (pathlib.Path(args.peer_path) / "guided_diffusion" / "unet.py").exists():
            raise UserError(f"no guided_diffusion/unet.py in it; --peer-path={args.peer_path}; pass a checkout")
    fields = ("channels", "channel_mult", "num_res_blocks", "attention", "heads", "head_channels", "scale_shift")
    net = {field: section["net"][field] for field in (*fields, "resample", "dropout", "groups", "dtype")}
    learned = section["variance"] in ("learned", "learned_range")
    net |= {"shape": section["shape"], "out_channels": section["shape"][2] * (1 + learned)}
    net |= {"num_classes": section["conditions"].get("label", {}).get("num_classes", 0)}
    net |= {"batch_size": section["train"]["batch_size"], "channels_last": args.channels_last}
    path = [f"--path={args.peer_path}"] if peer == "guided-diffusion" and args.peer_path else []
    return [args.peer_python, str(script), f"--peer={peer}", f"--network={json.dumps(net)}", *path]


def start_once(argv: Sequence[str], cache: str) -> dict[str, float]:
    """Runs this command to the end of its first train step: {'total', 'compile'} in seconds.

    Raises:
      RunError: it failed.
    """
    command = [sys.executable, "-m", "diffax.tools.benchmark", *argv, f"--first-step={time.time()!r}"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"the first step failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_peer(command: Sequence[str]) -> float:
    """Seconds from starting a peer to the end of its first train step."""
    begin = time.perf_counter()
    with contextlib.closing(Process(command)) as process:
        process.ask(prepare="train")
        process.ask(times=1)
        return time.perf_counter() - begin
