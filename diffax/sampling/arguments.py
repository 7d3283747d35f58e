"""Checks of what a call of a `SampleFn` is given."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffax.conditions.base import one_each
from diffax.data import images
from diffax.errors import UserError


def check_strength(strength: Any) -> None:
    """Raises UserError if it is no number in (0, 1]."""
    if strength is None:
        return
    if not isinstance(strength, int | float | np.number) or not 0 < strength <= 1:
        raise UserError(
            f"strength is {strength!r}; sample_fn; pass a number above 0, the picture, up to 1, noise alone"
        )


def known(mask: Any, image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[h, w, 1] or [n, h, w, 1], 1 where the image is known.

    Raises:
      UserError: the mask has another shape than the image, or values besides 0 and 1.
    """
    known = np.asarray(mask)
    if known.shape not in (image.shape[:-1], shape[:2]):
        raise UserError(f"mask is {known.shape}; sample_fn; it must be {image.shape[:-1]}, like the image")
    if known.dtype.kind not in "biuf" or not np.isin(known, (0, 1)).all():
        raise UserError("mask has values besides 0 and 1; sample_fn; pass 1 where the picture stays, 0 elsewhere")
    return known.astype(np.float32)[..., None]


def picture(image: Any, where: str) -> np.ndarray:
    """A picture or several as floats.

    Raises:
      UserError: it is no array of pixels.
    """
    try:
        array = np.asarray(image)
        if array.dtype.kind not in "uif":
            raise TypeError
        return images.as_floats(array)
    except (TypeError, ValueError):
        kind = type(image).__name__
        raise UserError(f"image is no array of pixels, but {kind}; {where}; pass uint8, or floats in [-1, 1]") from None


def in_range(image: np.ndarray, where: str) -> np.ndarray:
    """The image, if its values are in [-1, 1]."""
    if not np.isfinite(image).all() or np.abs(image).max(initial=0) > 1 + 1e-3:
        raise UserError(f"image has values outside [-1, 1]; {where}; pass uint8, or floats in [-1, 1]")
    return image


def keys(key: Any, first: int, n: int) -> jax.Array:
    """[n] keys: of a seed, of one key, or as they are."""
    if isinstance(key, bool | float | str) or key is None:
        raise UserError(f"key is {key!r}; sample_fn; pass a seed, a whole number, or a key of jax.random")
    key = jax.random.key(key) if isinstance(key, int | np.integer) else key
    keys = key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(first, first + n))
    if len(keys) != n:
        raise UserError(f"{len(keys)} keys for {n} pictures; sample_fn; pass one for all, or one each")
    return keys


def numbers(what: str, given: Any, own: Mapping[str, float], n: int, *, none: str) -> dict[str, np.ndarray]:
    """{stage: [n] float32}: `own` where nothing else is given, as one number, one each, or {stage: either}."""
    if given is not None and not own:
        raise UserError(none)
    given = given if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(own, given)
    numbers = {name: np.full(n, value, np.float32) for name, value in own.items()}
    for name, value in given.items():
        if name not in own:
            raise UserError(f"no stage {name!r} has {what}; sample_fn({what}=...); {', '.join(own)} has")
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            array = np.float32(np.nan)
        if not np.isfinite(array).all() or array.ndim > 1:
            raise UserError(f"{what} is {value!r}; sample_fn; pass a number, or one for each picture")
        numbers[name] = one_each(what, array, n, 0)
    return numbers
