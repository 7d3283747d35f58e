"""CLIP scores of pictures and the captions that they were made from."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from diffax import config as configs
from diffax import weights
from diffax.data import images
from diffax.errors import UserError
from diffax.evaluation import metrics
from diffax.evaluation.features import filled, in_batches
from diffax.evaluation.pictures import Pictures
from diffax.models.system import System
from diffax.training import parallel
from diffax.training import workdir as workdirs

Params = Any


def clip_scorer(source: str | os.PathLike[str], *, batch_size: int) -> Callable[[Pictures, Sequence[str]], float]:
    """(pictures, prompts) -> `metrics.clip_score`, picture i against prompt i, prompts in turn.

    Pictures are cut to the square in their middle and resized by bicubic interpolation, as CLIP's were.

    Args:
      source: a workdir with a CLIP of clean pictures, or published weights of one, see `diffax.weights`.
      batch_size: pictures at once.

    Raises:
      UserError: there is no such CLIP, or several.
    """
    clip, params = _clip_at(source)
    embed_image = parallel.map_batch(clip.embed_image)
    embed_text = parallel.map_batch(lambda params, ids: clip.embed_text(params, ids).embedding)

    def embedded(embed: Callable, batches: Iterable[np.ndarray]) -> np.ndarray:
        # One program serves all batches: the last one is filled up.
        return np.concatenate([np.asarray(embed(params, filled(rows, batch_size)))[: len(rows)] for rows in batches])

    def score(pictures: Pictures, prompts: Sequence[str]) -> float:
        ids = clip.tokenizer(list(prompts))
        text = embedded(embed_text, (ids[i : i + batch_size] for i in range(0, len(ids), batch_size)))
        chunks = in_batches(pictures, batch_size)
        image = embedded(embed_image, (images.from_uint8(_square(chunk)) for chunk in chunks))
        return metrics.clip_score(image, text[np.arange(len(image)) % len(text)])

    return score


def _clip_at(source: str | os.PathLike[str]) -> tuple[Any, Params]:
    """The one CLIP of clean pictures in a workdir or in published weights, and its parameters."""
    published = weights.is_weights(source)
    config, params = weights.load(source)[:2] if published else (workdirs.read_config(source), {})
    system = System(configs.from_dict(config))
    models = [system.model(name) for name in configs.sections(system.config)]
    found = [model for model in models if hasattr(model, "embed_text") and not model.noised]
    if len(found) != 1:
        what = "several CLIPs" if found else "no CLIP of clean pictures"
        raise UserError(f"{what}; {source}; convert one: python -m diffax.weights ViT-B-16.pt runs/clip")
    (clip,) = found
    return clip, params[clip.name] if published else workdirs.load_params(system.config, clip.name, source)[0]


def _square(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, S, S, C], the middle."""
    height, width = pictures.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]
