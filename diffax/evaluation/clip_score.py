"""The CLIP score of pictures and their prompts."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffax import weights
from diffax.data import images
from diffax.errors import UserError
from diffax.evaluation import metrics
from diffax.evaluation.pictures import Pictures, in_batches, square
from diffax.models.system import System
from diffax.sampling.sample_fn import embedder, text_embedder
from diffax.training import workdir as workdirs


def clip_scorer(source: str | os.PathLike[str], *, batch_size: int) -> Callable[[Pictures, Sequence[str]], float]:
    """(pictures, prompts) -> `metrics.clip_score`, picture i against prompt i, prompts in turn.

    Pictures are cut to the square in their middle and resized by bicubic interpolation, as CLIP's were.

    Args:
      source: a workdir with a CLIP of clean pictures, or published weights of one, see `diffax.weights`.
      batch_size: pictures at once.

    Raises:
      UserError: there is no such CLIP, or several.
    """
    model, params = _clip_at(source)
    embed_image, embed_text = embedder(model), text_embedder(model)

    def filled(embed: Callable, rows: np.ndarray) -> np.ndarray:
        """One program serves all batches: the last one is filled up."""
        filled = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), 0)])
        return np.asarray(embed(params, filled))[: len(rows)]

    def score(pictures: Pictures, prompts: Sequence[str]) -> float:
        ids = model.tokenizer(list(prompts))
        text = [filled(embed_text, ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        image = [filled(embed_image, images.from_uint8(square(chunk))) for chunk in in_batches(pictures, batch_size)]
        image, text = np.concatenate(image), np.concatenate(text)
        return metrics.clip_score(image, text[np.arange(len(image)) % len(text)])

    return score


def _clip_at(source: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The one CLIP of clean pictures in a workdir or in published weights, and its parameters."""
    if weights.is_weights(source):
        config, params, _ = weights.load(source)
    else:
        config, params = workdirs.read_config(source), {}
    system = System(config)
    models = [system.model(name) for name in config if isinstance(config[name], Mapping) and "train" in config[name]]
    clips = [model for model in models if hasattr(model, "embed_text") and not model.noised]
    if len(clips) != 1:
        what = "several CLIPs" if clips else "no CLIP of clean pictures"
        raise UserError(f"{what}; {source}; convert one: python -m diffax.weights ViT-B-16.pt runs/clip")
    name = clips[0].name
    return clips[0], params[name] if params else workdirs.load_params(config, name, source)[0]
