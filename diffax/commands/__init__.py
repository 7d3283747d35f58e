"""The modes of the command, a file each: `run(job)`. Their modules are imported when they are used."""

import argparse
import pathlib
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What a command line describes.

    Attributes:
      config: checked, as plain data.
      workdir: where everything is written.
      args: the other flags.
    """

    config: dict[str, Any]
    workdir: pathlib.Path
    args: argparse.Namespace
