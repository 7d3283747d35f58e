"""Reports of a run: metrics.jsonl, one line of progress, TensorBoard."""

import collections
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from diffax.errors import RunError, UserError

_PLAIN_SECONDS = 10.0
_TTY_SECONDS = 0.1
_WINDOW_SECONDS = 30.0


def duration(seconds: float) -> str:
    """A length of time in its two largest units: '8s', '5m 09s', '3h 07m', '2d 04h'."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def progress_bar(items: Iterable, what: str) -> Iterable:
    """Yields `items` and shows the progress and the time left; silent where stderr is no terminal."""
    return tqdm(items, desc=what, unit="batch", leave=False, disable=None)


class Reporter:
    """Writes the metrics of one run and shows its progress; only the primary process does either.

    Args:
      workdir: the model's own folder; progress lines begin with its name.
      total_steps: number of steps in the whole run.
      start_step: step that the run resumes from; later rows of an older run are removed.
      primary: False makes every call do nothing.
      tensorboard: also write TensorBoard event files to `workdir/tensorboard`.
      stream: receives progress; a terminal sees one line redrawn, else a line every 10 s.
      clock: seconds that only grow; for tests.

    Raises:
      UserError: `tensorboard` is set and tensorboardX is not installed.
      RunError: the metrics file cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int,
        primary: bool,
        tensorboard: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory = pathlib.Path(workdir)
        self._total = total_steps
        self._primary = primary
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._tty = self._stream.isatty()
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._open_line = ""
        self._file = self._board = None
        if not primary:
            return
        self._board = self._open_board(start_step) if tensorboard else None
        path = self._directory / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, start_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write metrics: {error.strerror}; {path}; choose another --workdir") from error

    def _open_board(self, start_step: int) -> Any:
        try:
            import tensorboardX
        except ImportError:
            raise UserError(
                "tensorboardX is not installed, which writes TensorBoard events; tensorboard; pip install diffax[log]"
            ) from None
        return tensorboardX.SummaryWriter(str(self._directory / "tensorboard"), purge_step=start_step + 1)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; NaN and infinities become null, their keys stay.

        Args:
          step: above that of the row before.
          metrics: name -> number; 0-d arrays are read from the device here.

        Raises:
          RunError: the disk is full.
        """
        if not self._primary:
            return
        values = {name: float(value) for name, value in metrics.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"step": int(step), "time": now}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write metrics at step {step}: {error.strerror}; {self._file.name}; free the space"
            ) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float | None = None, **values: float) -> None:
        """Shows `base  step 1,200/5,000  24 %  loss 0.0412  12.3 steps/s  ETA 5m 09s`.

        Call it after each step, with values already on the host: a device array would make the
        training wait. The speed leaves out the first call, whose step compiled.

        Args:
          step: number of steps done.
          loss: the newest known loss; None leaves it out.
          **values: further numbers to show by name.
        """
        if not self._primary:
            return
        now = self._clock()
        self._marks.append((now, step))
        while now - self._marks[0][0] > _WINDOW_SECONDS and len(self._marks) > 2:
            self._marks.popleft()
        due = now - self._shown_at >= (_TTY_SECONDS if self._tty else _PLAIN_SECONDS)
        if due or (step >= self._total and step != self._shown_step):
            shown = values if loss is None else {"loss": loss, **values}
            self._show(self._line(step, shown))
            self._shown_at, self._shown_step = now, step

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        percent = 100 * step // max(self._total, 1)
        parts = [self._directory.name, f"step {step:,}/{self._total:,}", f"{percent} %"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        (t0, first), (t1, last) = self._marks[0], self._marks[-1]
        if last > first and t1 > t0:
            speed = (last - first) / (t1 - t0)
            parts.append(f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step")
            if step < self._total:
                parts.append(f"ETA {duration((self._total - step) / speed)}")
        return "  ".join(parts)

    def _show(self, line: str) -> None:
        if not self._tty:
            print(line, file=self._stream, flush=True)
            return
        # Blanks cover the rest of a longer line before.
        self._stream.write("\r" + line.ljust(len(self._open_line)))
        self._stream.flush()
        self._open_line = line

    def note(self, line: str) -> None:
        """Shows one whole line, above the line that is redrawn."""
        if not self._primary:
            return
        if self._open_line:
            self._stream.write("\r" + " " * len(self._open_line) + "\r")
            self._open_line = ""
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the progress line and closes the files; a second call does nothing."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = ""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        self._file = self._board = None


def append_row(path: str | os.PathLike[str], step: int, values: Mapping[str, Any]) -> None:
    """Adds a row to a file like metrics.jsonl, and removes rows of this step and later ones that an older run left.

    Raises:
      RunError: it cannot be written.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, step - 1)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {path.name}: {error.strerror}; {path.parent}; free the space") from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; null stands for a value that was not finite.

    An incomplete last line, left by a killed run, is skipped.

    Raises:
      UserError: there is no such file, or another line is damaged.
    """
    path = pathlib.Path(path)
    rows = _parse(path)
    if None in rows:
        raise UserError(f"line {rows.index(None) + 1} is no row of metrics; {path}; remove that line")
    return rows


def _parse(path: pathlib.Path) -> list[dict[str, Any] | None]:
    """One row for each whole line; None for a damaged one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read metrics ({error.strerror}); {path}; check the path") from None
    rows = []
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows.append(row if isinstance(row, dict) and isinstance(row.get("step"), int) else None)
    return rows


def _truncate(path: pathlib.Path, start_step: int) -> None:
    """Keeps the rows up to `start_step`; those after it will be written again."""
    if not path.exists():
        return
    kept: list[dict[str, Any]] = []
    for row in _parse(path):
        if row and row["step"] <= start_step and (not kept or kept[-1]["step"] < row["step"]):
            kept.append(row)
    text = "".join(json.dumps(row) + "\n" for row in kept)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
