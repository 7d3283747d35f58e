"""The fields of `config.sample`."""

from typing import Annotated

from diffax.components import In, Length


def sample(
    *,
    num: Annotated[int, In(1, 10**8)] = 64,
    batch_size: Annotated[int, In(1, 10**6)] = 64,
    seed: Annotated[int, In(0, 2**31 - 1)] = 0,
    columns: Annotated[int, In(1, 10**4)] = 8,
    save: bool = False,
    tile: Annotated[int, In(0, 8192)] = 0,
    prompts: Annotated[tuple[str, ...], Length(0, 10**4)] = (),
) -> None:
    """What is sampled.

    Args:
      num: how many pictures.
      batch_size: pictures at once, on all devices.
      seed: of the noise.
      columns: of the grid.
      save: whether the pictures are also written as arrays.
      tile: side of the tiles in which a large picture is enlarged; 0: the size that the model is made for.
      prompts: captions of the pictures, in turn.
    """
    del num, batch_size, seed, columns, save, tile, prompts
