"""The two kinds of failure that a user sees as one line.

`main` prints `diffax: error: <message>`; a message reads `<what>; <where>; <what to do>`.
"""

import sys
import traceback
from collections.abc import Sequence

EXIT_FAILED, EXIT_USER, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class UserError(ValueError):
    """The input cannot be used: a config, a path, a file or an argument. Exit status 2."""


class RunError(RuntimeError):
    """The run started and cannot go on: disk full, repeated non-finite steps. Exit status 1."""


class Preempted(Exception):
    """A signal stopped a run, and its state is saved. Exit status 75: the same command continues it."""


def complain(error: Exception, status: int, argv: Sequence[str]) -> int:
    """One line on stderr; the traceback with --debug."""
    if "--debug" in argv:
        traceback.print_exception(error)
    print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
    return status
