"""Statistics of sets of pictures: features of the FID's network, or of patches, and the files that keep them."""

import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.evaluation import metrics
from diffax.evaluation.pictures import (
    MARK,
    Pictures,
    has_pictures,
    in_batches,
    open_pictures,
    size_in_words,
)
from diffax.networks.inception import Inception
from diffax.training import parallel
from diffax.weights import inception as inception_weights

# What is known of a set: arrays by the names that ADM's reference files use, and some of our own.
Statistics = dict[str, np.ndarray]
Extract = Callable[[np.ndarray], dict[str, np.ndarray]]

VERSION = 1
NEIGHBOUR = 3  # of precision and recall
KID_SUBSET = 1000
POOL = 2048


def measurement(
    features: str, inception: str | None = None, *, batch_size: int
) -> tuple[dict[str, str], Callable[[Pictures], Statistics]]:
    """How a set of pictures is measured.

    Args:
      features: a key of `NUMBERS`.
      inception: the weights of the FID's network, see `weights.inception.find`.
      batch_size: pictures at once.

    Returns:
      What statistics depend on beside the pictures, and the function that makes them.

    Raises:
      UserError: there are no such weights.
    """
    if features == "inception":
        params, digest = inception_weights.load(inception_weights.find(inception))
        extract = inception_extractor(params)
        run = functools.partial(inception_statistics, extract=extract, batch_size=batch_size)
        return {"features": features, "weights": digest}, run
    return {"features": features, "weights": ""}, functools.partial(patch_statistics, batch_size=batch_size)


def inception_extractor(params: Any) -> Extract:
    """Pictures uint8 [B, H, W, 3] -> '2048', 'spatial' and 'logits' of `Inception`, on all devices."""
    network = Inception()

    @parallel.map_batch
    def run(params, pictures):
        found = network.apply({"params": params}, pictures)
        return {name: found[name] for name in ("2048", "spatial", "logits")}

    params = jax.device_put(params)
    return lambda pictures: run(params, pictures)


def inception_statistics(pictures: Pictures, extract: Extract, *, batch_size: int) -> Statistics:
    """What the numbers of Inception features need.

    Args:
      pictures: N of them.
      extract: see `inception_extractor`.
      batch_size: pictures at once.

    Returns:
      float64 mu, sigma (of the pooled features), mu_s, sigma_s (of the spatial ones); features [N, 2048] float32;
      score [2], the Inception Score of 10 parts and its deviation.
    """
    parts: dict[str, list[np.ndarray]] = {"2048": [], "spatial": [], "logits": []}
    pending: tuple[dict, int] | None = None

    def keep() -> None:
        for name, part in parts.items():
            part.append(np.asarray(pending[0][name])[: pending[1]])

    for chunk in in_batches(pictures, batch_size):
        # One program serves all batches. The last one is read from the devices while they work at this one.
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk), 0)])
        out = extract(filled)
        if pending:
            keep()
        pending = out, len(chunk)
    keep()
    features, spatial, logits = (np.concatenate(parts.pop(name)) for name in list(parts))
    pool, places = metrics.moments(features), metrics.moments(spatial)
    return {
        "mu": pool.mean,
        "sigma": pool.covariance,
        "mu_s": places.mean,
        "sigma_s": places.covariance,
        "features": features,
        "score": np.array(metrics.inception_score(logits, splits=min(10, len(logits)))),
    }


def patch_statistics(pictures: Pictures, *, batch_size: int) -> Statistics:
    """float64 mu and sigma of `metrics.patches`, which need no weights."""
    total = None
    for chunk in in_batches(pictures, batch_size):
        patches = metrics.patches(images.from_uint8(chunk))
        if len(patches) < 2:
            raise UserError(
                f"pictures of {size_in_words(chunk.shape[1:])}; {pictures.source}; patches need 12x12 or more"
            )
        here = metrics.moments(patches)
        total = here if total is None else metrics.merge(total, here)
    return {"mu": total.mean, "sigma": total.covariance}


def digest(pictures: Pictures) -> str:
    """SHA-256 of the names and the bytes of the files, whatever their dates say; of all pixels where there are none."""
    total = hashlib.sha256()
    for chunk in pictures.chunks(1000) if not pictures.files else ():
        total.update(f"{chunk.shape}".encode() + chunk.tobytes())
    for file in pictures.files:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        total.update(f"{file.relative_to(pictures.source)}\0{found}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def cached(pictures: Pictures, about: Mapping[str, Any], measure: Callable[[], Statistics]) -> Statistics:
    """`measure()`, or what it gave before for the same pictures and the same `about`.

    It is kept beside the pictures, in NAME.statistics-KEY.npz. The key is a hash of every byte of the pictures and of
    `about`, so that a file is never taken for others.
    """
    text = json.dumps({**about, "count": pictures.count, "content": digest(pictures), "version": VERSION})
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    source = pictures.source.absolute()
    path = source.with_name(f"{source.name}{MARK}{key}.npz")
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            if str(found["about"]) == text:
                pictures.notes[:] = [str(note) for note in found["notes"]]
                return found
        except Exception:  # Whatever a damaged file raises, the remedy is the same.
            print(f"diffax: note: {path} is damaged and is made again", file=sys.stderr)
    found = measure()
    found |= {"about": np.array(text), "notes": np.array(pictures.notes, np.str_)}
    try:
        images.write_atomically(path, lambda file: np.savez(file, **found))
    except RunError as error:
        print(f"diffax: note: the statistics are not kept ({error})", file=sys.stderr)
    return found


def read_statistics(path: pathlib.Path, *, about: Mapping[str, Any]) -> Statistics | None:
    """The statistics in a file of ours or of ADM's; None if it holds pictures alone.

    Raises:
      UserError: it is damaged, or its numbers are those of other features than `about` says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file.files:
                return None
            found = {name: file[name] for name in file.files if not name.startswith("arr_")}
        own = json.loads(str(found["about"])) if "about" in found else {"features": "inception"}
        for suffix in ("", "_s") if "mu_s" in found else ("",):
            width = len(found["mu" + suffix])
            if found["sigma" + suffix].shape != (width, width) or not np.isfinite(found["sigma" + suffix]).all():
                raise ValueError(f"sigma{suffix} is {found['sigma' + suffix].shape} or not finite")
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged files.
        raise UserError(
            f"cannot read the file ({type(error).__name__}: {error}); {path}; expected arr_0, or mu and sigma"
        ) from error
    other = [f"{name} {own[name]}" for name in about if name in own and own[name] != about[name]]
    if not other and own["features"] == "inception" and "about" not in found and len(found["mu"]) != POOL:
        other = [f"{len(found['mu'])} of them, not {POOL}"]
    if other:
        raise UserError(f"statistics of other features ({', '.join(other)}); {path}; give the pictures")
    return found


def statistics_of(
    path: str | os.PathLike[str],
    measure: Callable[[Pictures], Statistics],
    *,
    about: Mapping[str, Any],
    limit: int | None = None,
    cache: bool = True,
) -> tuple[Statistics, list[str]]:
    """What is known of a set of pictures, or of a file of statistics.

    A file that has both, as ADM's references, gives moments as they are there, and of its pictures the rest.

    Args:
      path: see `open_pictures` and `read_statistics`.
      measure: pictures -> statistics.
      about: what those depend on beside the pictures: 'features' and 'weights'.
      limit: see `open_pictures`.
      cache: whether to keep the result beside the pictures, and to look for it there.

    Returns:
      The statistics, with 'count' (0 where it is not known) and 'size' (height and width) where pictures were there;
      and notes on them.
    """
    path = pathlib.Path(path).expanduser()
    given = read_statistics(path, about=about) if path.is_file() and path.suffix == ".npz" else None
    if given is not None and not has_pictures(path):
        known = json.loads(str(given["about"])) if "about" in given else {}
        sizes = {"size": np.array(known["size"])} if "size" in known else {}
        return given | sizes | {"count": np.array(known.get("count", 0))}, []
    found, notes = statistics_of_pictures(open_pictures(path, limit), measure, about=about, cache=cache)
    if given is None:
        return found, notes
    # The count of the pictures beside them says nothing about the moments.
    return found | given | {"count": np.array(0)}, notes


def statistics_of_pictures(
    pictures: Pictures, measure: Callable[[Pictures], Statistics], *, about: Mapping[str, Any], cache: bool = True
) -> tuple[Statistics, list[str]]:
    """`statistics_of` pictures that are open; what is kept of those that come from no file is beside their `source`."""
    if pictures.count <= NEIGHBOUR:
        raise UserError(f"{pictures.count} pictures; {pictures.source}; a comparison takes at least {NEIGHBOUR + 1}")
    size = list(next(pictures.chunks(1)).shape[1:3])
    about = {**about, "size": size}
    found = cached(pictures, about, lambda: measure(pictures)) if cache else measure(pictures)
    return found | {"count": np.array(pictures.count), "size": np.array(size)}, pictures.notes
