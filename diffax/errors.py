"""The two kinds of failure that a user sees as one line.

`main` prints `diffax: error: <message>`; a message reads `<what>; <where>; <what to do>`.
"""


class UserError(ValueError):
    """The input cannot be used: a config, a path, a file or an argument. Exit status 2."""


class RunError(RuntimeError):
    """The run started and cannot go on: disk full, repeated non-finite steps. Exit status 1."""


class Preempted(Exception):
    """A signal stopped a run, and its state is saved. Exit status 75: the same command continues it."""
