"""Enlarging one picture of any size, in overlapping tiles where it is large."""

from typing import Any

import numpy as np

from diffax.data import images
from diffax.errors import UserError
from diffax.sampling.sample_fn import SampleFn


def enlarge(
    sample_fn: SampleFn, image: np.ndarray, *, seed: int = 0, tile: int = 0, batch_size: int = 16, **call: Any
) -> np.ndarray:
    """Enlarges one picture of any size.

    A tile is sampled with noise of its own, and neighbours are blended over a quarter of a tile, so that no seam shows.
    The picture is extended by reflection to whole tiles.

    Args:
      sample_fn: its first stage enlarges.
      image: [h, w, C], uint8 or floats in [-1, 1].
      seed: of the noise.
      tile: side of a tile of `image`; by default the size that the stage is made for.
      batch_size: tiles at once.
      **call: for `sample_fn`, such as label=3 or steps=50.

    Returns:
      [h * factor, w * factor, C] float32, over the factors of all stages.

    Raises:
      UserError: the first stage enlarges nothing, or `call` does not fit.
    """
    model, image = sample_fn.models[0], images.as_floats(image)
    if not sample_fn.enlarges:
        raise UserError(f"{model.name} enlarges no picture; enlarge; start at a stage with the condition 'low_res'")
    if image.ndim != 3:
        raise UserError(f"image is {image.shape}; enlarge; pass one picture [h, w, C]")
    tile = tile or min(sample_fn.arguments["image"].small[:2])
    corners, padded = images.tile_corners(image.shape[:2], tile, overlap=tile // 4)
    extended = images.pad_reflecting(image, padded)
    tiles = np.stack([extended[y : y + tile, x : x + tile] for y, x in corners])
    made = sample_fn(seed, len(tiles), image=tiles, batch_size=min(batch_size, len(tiles)), **call)
    factor = made.shape[1] // tile
    whole = images.blend_tiles(made, [(factor * y, factor * x) for y, x in corners], overlap=factor * (tile // 4))
    return whole[: factor * image.shape[0], : factor * image.shape[1]]
