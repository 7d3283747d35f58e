"""What several modes read of a workdir and of the flags."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from diffax.commands import Job
from diffax.conditions.text import read_prompts
from diffax.errors import UserError
from diffax.models.system import System
from diffax.sampling.load import load_workdir
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes
from diffax.training import workdir as workdirs


def are_trained(config: Mapping[str, Any], workdir: str | os.PathLike[str], names: Iterable[str]) -> bool:
    """Whether there are checkpoints of these sections. Every process must call it.

    All get the same answer, though another job may just be writing the first: what follows they do together.
    """
    folders = [workdirs.folder_of(config, name, workdir) / "checkpoints" for name in names]
    return not processes.agree(not all(folder.exists() for folder in folders))


def makes_pictures(config: Mapping[str, Any]) -> bool:
    """Whether a stage of the config is sampled, and makes pictures."""
    return any(len(model.shape) == 3 for model in System(config).generators)


def class_names(job: Job) -> list[str]:
    """Names of the labels that the first section with any was trained on; empty if none was."""
    return workdirs.class_names(job.config, job.workdir, System(job.config).trained)


def load_trained(job: Job) -> SampleFn:
    """The trained model of the workdir, under this job's config."""
    args = job.args
    return load_workdir(job.config, job.workdir, step=args.step, decay=args.ema, raw=args.raw)


def prompts_of(job: Job) -> list[str]:
    """The prompts of the command line; empty if there are none.

    Raises:
      UserError: the file of prompts cannot be read or holds none.
    """
    if job.args.prompt is not None:
        return [job.args.prompt]
    return read_prompts(job.args.prompts) if job.args.prompts else []


def output_of(job: Job, name: str) -> pathlib.Path:
    """The picture to write: --output, or that name in the workdir.

    Raises:
      UserError: --output exists, and --overwrite is not given.
    """
    path = pathlib.Path(job.args.output or job.workdir / name)
    if job.args.output and path.exists() and not job.args.overwrite:
        raise UserError(f"the output exists; {path}; pass --overwrite or another --output")
    return path
