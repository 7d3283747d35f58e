"""--mode=embed: the image embeddings of training data, into the folder that `loader.embeddings` names."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffax import components
from diffax.commands import Job
from diffax.data.embeddings import embedded, with_embeddings, write_embeddings
from diffax.data.source import Source
from diffax.errors import UserError
from diffax.models.base import clip_of
from diffax.models.system import System
from diffax.sampling.sample_fn import embedder
from diffax.training import processes
from diffax.training import workdir as workdirs


def run(job: Job) -> None:
    """Embeds the data of --stage, or of every stage that names a folder."""
    config, system = job.config, System(job.config)
    chosen = [job.args.stage] if job.args.stage else config["stages"]
    names = [name for name in chosen if config[name]["loader"]["embeddings"]]
    if not names:
        raise UserError("no folder is named; --mode=embed; pass --config.NAME.loader.embeddings=FOLDER")
    for name in names:
        section, clip = config[name], _clip_of(system.model(name))
        embed, about = image_embedder(config, clip, job.workdir)
        files = write_embeddings(
            section["loader"]["embeddings"],
            components.build(section["data"], "data", path=f"config.{name}.data").open(clip.shape),
            section["loader"],
            shape=clip.shape,
            embed=embed,
            clip=about,
            batch_size=max(1, section["train"]["batch_size"] // processes.process_count()),
            process_index=processes.process_index(),
            process_count=processes.process_count(),
        )
        for done, total in files:
            folder = section["loader"]["embeddings"]
            print(f"embedded: {done} of {total} files, {folder}", file=sys.stderr, flush=True)


def image_embedder(
    config: Mapping[str, Any], clip: Any, workdir: str | os.PathLike[str]
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """(pictures -> embeddings, what distinguishes the network) of a CLIP, which was trained before.

    Raises:
      UserError: there is no trained CLIP.
    """
    params, step = workdirs.load_params(config, clip.name, workdir)
    run_over, scale = embedder(clip), float(params["logit_scale"])
    about = f"step {step}, logit scale {scale:.9g}, embeddings [{clip.features}] of length {clip.norm:g}"
    return lambda image: np.asarray(run_over(params, image)), about


def _clip_of(model: Any) -> Any:
    clip = clip_of(model)
    if clip is None:
        raise UserError(
            f"config.{model.name}.loader.embeddings names a folder, but no condition of {model.name} has a CLIP; leave "
            "it empty"
        )
    return clip


def embedded_source(
    config: Mapping[str, Any], model: Any, workdir: str | os.PathLike[str], open_pictures: Callable[[], Source]
) -> Source:
    """The data of a model whose image embeddings lie in files: they alone, or beside the pictures that it reads."""
    clip = _clip_of(model)
    _, about = image_embedder(config, clip, workdir)
    found = embedded(config[model.name]["loader"]["embeddings"], clip=about, size=clip.features)
    return with_embeddings(open_pictures(), found) if "image" in model.batch_example() else found
