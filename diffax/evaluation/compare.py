"""Two sets of pictures compared by the numbers that papers print: `python -m diffax.evaluation A B`."""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import jax
import numpy as np
from PIL import Image

from diffax import config as configs
from diffax import weights
from diffax.data import images
from diffax.data.folders import SUFFIXES
from diffax.errors import RunError, UserError
from diffax.evaluation import metrics
from diffax.models import stages
from diffax.networks.inception import Inception
from diffax.sampling import pipeline
from diffax.training import parallel, reporting
from diffax.weights import inception as inception_weights

# What is known of a set: arrays by the names that ADM's reference files use, and some of our own.
Statistics = dict[str, np.ndarray]
Extract = Callable[[np.ndarray], dict[str, np.ndarray]]

MARK = ".statistics-"  # in the names of files that this module leaves beside the pictures
VERSION = 1
THREADS = 8
NEIGHBOUR = 3
KID_SUBSET = 1000
POOL = 2048


class Pictures(NamedTuple):
    """A folder or a file of pictures.

    Attributes:
      source: where they are.
      count: how many are read.
      files: the files that hold them, in order; none where pictures come from elsewhere.
      chunks: (size) -> uint8 [at most size, H, W, 3] in turn.
      notes: what is to be known of them, filled while they are read.
    """

    source: pathlib.Path
    count: int
    files: Sequence[pathlib.Path]
    chunks: Callable[[int], Iterator[np.ndarray]]
    notes: list[str]


def open_pictures(path: str | os.PathLike[str], limit: int | None = None) -> Pictures:
    """Finds pictures; none is read yet.

    Args:
      path: a folder with images, in sub-folders too, or with .npz files; or one .npz file with `arr_0`, uint8
        [N, H, W, 1 or 3], as `images.save_npz` writes it.
      limit: how many to read, the first ones in the order of their names; by default all.

    Raises:
      UserError: there are no pictures, or files of both kinds.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no such folder or file; {path}; check the path")
    if path.is_file():
        if path.suffix != ".npz":
            raise UserError(f"neither a folder nor an .npz file; {path}; give the folder of the pictures")
        return _from_arrays(path, [path], limit)
    found = sorted(_walk(path), key=str)
    arrays = [file for file in found if file.suffix == ".npz"]
    pictures = [file for file in found if file.suffix != ".npz"]
    if arrays and pictures:
        raise UserError(
            f"both .npz files ({arrays[0].name}) and images ({pictures[0].name}); {path}; put them in separate folders"
        )
    if not found:
        raise UserError(f"no image ({', '.join(SUFFIXES)}) and no .npz file; {path}; check the path")
    return _from_arrays(path, arrays, limit) if arrays else _from_images(path, pictures, limit)


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot read the folder ({error.strerror}); {error.filename}; check its permissions")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith((".npz", *SUFFIXES)) and MARK not in name:
                yield pathlib.Path(folder, name)


def _from_images(source: pathlib.Path, files: Sequence[pathlib.Path], limit: int | None) -> Pictures:
    files, notes = files[:limit], []

    def read(file: pathlib.Path) -> tuple[np.ndarray, bool]:
        picture = images.read_image(file)
        with Image.open(file) as image:
            return picture, image.mode == "RGB"

    def chunks(size: int) -> Iterator[np.ndarray]:
        first, changed = None, 0
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for low in range(0, len(files), size):
                some = files[low : low + size]
                read_now = list(pool.map(read, some))
                for file, (picture, plain) in zip(some, read_now, strict=True):
                    first = picture.shape if first is None else first
                    changed += not plain
                    if picture.shape != first:
                        raise UserError(
                            f"pictures of two sizes: {files[0].name} is {_size(first)}, {file.name} "
                            f"{_size(picture.shape)}; {source}; crop or resize them to one"
                        )
                yield np.stack([picture for picture, _ in read_now])
        if changed:
            notes.append(
                f"{changed} of {len(files)} pictures in {source.name} are not RGB and are converted: grey is repeated "
                "over the channels, transparent pixels lie over white"
            )

    return Pictures(source, len(files), files, chunks, notes)


def _from_arrays(source: pathlib.Path, files: Sequence[pathlib.Path], limit: int | None) -> Pictures:
    shapes = {file: array_shape(file) for file in files}
    first = shapes[files[0]]
    for file, shape in shapes.items():
        if shape[1:] != first[1:]:
            raise UserError(
                f"pictures of two sizes: {files[0].name} has {_size(first[1:])}, {file.name} {_size(shape[1:])}; "
                f"{source}; compare them apart"
            )
    total = sum(shape[0] for shape in shapes.values())
    count = total if limit is None else min(limit, total)
    notes = [f"the pictures in {source.name} are grey, repeated over the channels"] if first[-1] == 1 else []

    def chunks(size: int) -> Iterator[np.ndarray]:
        left = count
        for file in files:
            for chunk in _rows(file, size):
                chunk = chunk[:left]
                left -= len(chunk)
                if len(chunk):
                    yield np.broadcast_to(chunk, (*chunk.shape[:3], 3))
                if not left:
                    return

    return Pictures(source, count, files, chunks, notes)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def array_shape(path: pathlib.Path) -> tuple[int, ...]:
    """The shape of `arr_0` in an .npz file, whose pictures are not read.

    Raises:
      UserError: the file is damaged, or `arr_0` is not uint8 [N, H, W, 1 or 3].
    """
    with _opened(path) as (_, shape):
        return shape


def _rows(path: pathlib.Path, size: int) -> Iterator[np.ndarray]:
    """The pictures of an .npz file, `size` at a time; the file may be larger than the memory."""
    with _opened(path) as (member, shape):
        each = int(np.prod(shape[1:]))
        for low in range(0, shape[0], size):
            count = min(size, shape[0] - low)
            data = member.read(count * each)
            if len(data) != count * each:
                raise UserError(f"the file ends early; {path}; write it again")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The numbers of `arr_0` in an .npz file, to be read in turn, and its shape."""
    try:
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, columns_first, dtype = readers[np.lib.format.read_magic(member)](member)
            if dtype != np.uint8 or columns_first or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
                raise UserError(f"arr_0 is {dtype} {shape}; {path}; expected pictures, uint8 [N, H, W, 3]")
            yield member, shape
    except (UserError, RunError):
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged files.
        raise UserError(
            f"cannot read the pictures ({type(error).__name__}: {error}); {path}; expected an .npz file with arr_0"
        ) from error


# ---- statistics -----------------------------------------------------------------------------------------------------


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

    for chunk in _in_batches(pictures, batch_size):
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
    for chunk in _in_batches(pictures, batch_size):
        patches = metrics.patches(images.from_uint8(chunk))
        if len(patches) < 2:
            raise UserError(f"pictures of {_size(chunk.shape[1:])}; {pictures.source}; patches need 12x12 at least")
        here = metrics.moments(patches)
        total = here if total is None else metrics.merge(total, here)
    return {"mu": total.mean, "sigma": total.covariance}


def _in_batches(pictures: Pictures, size: int) -> Iterator[np.ndarray]:
    what = f"{pictures.source.name}: {pictures.count} pictures"
    bar = iter(reporting.progress_bar(range(-(-pictures.count // size)), what))
    for chunk in pictures.chunks(size):
        next(bar, None)  # files that end with a short chunk make more of them
        yield chunk


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
    if given is not None and not _has_pictures(path):
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


def _has_pictures(path: pathlib.Path) -> bool:
    with zipfile.ZipFile(path) as file:
        return "arr_0.npy" in file.namelist()


# ---- numbers --------------------------------------------------------------------------------------------------------


def _moments(found: Statistics, suffix: str = "") -> metrics.Moments:
    return metrics.Moments(int(found["count"]), found["mu" + suffix], found["sigma" + suffix])


def _frechet(name: str, suffix: str, made: Statistics, real: Statistics) -> dict[str, float]:
    return {name: metrics.frechet_of_moments(_moments(made, suffix), _moments(real, suffix))}


def _score(made: Statistics, real: Statistics) -> dict[str, float]:
    return dict(zip(("inception_score", "inception_score_std"), map(float, made["score"]), strict=True))


def _precision_recall(made: Statistics, real: Statistics) -> dict[str, float]:
    return metrics.precision_recall(real["features"], made["features"], k=NEIGHBOUR)._asdict()


def _kid(made: Statistics, real: Statistics) -> dict[str, float]:
    size = min(KID_SUBSET, len(made["features"]), len(real["features"]))
    mean, deviation = metrics.kid(made["features"], real["features"], subset_size=size)
    return {"kid": mean, "kid_std": deviation, "kid_subset_size": size}


class Number(NamedTuple):
    """A row of the table: what it needs of A and of B, and the function of both that gives it."""

    of_made: tuple[str, ...]
    of_real: tuple[str, ...]
    compute: Callable[[Statistics, Statistics], dict[str, float]]


MOMENTS, SPATIAL_MOMENTS, FEATURES = ("mu", "sigma"), ("mu_s", "sigma_s"), ("features",)
NUMBERS: dict[str, dict[str, Number]] = {
    "inception": {
        "fid": Number(MOMENTS, MOMENTS, functools.partial(_frechet, "fid", "")),
        "sfid": Number(SPATIAL_MOMENTS, SPATIAL_MOMENTS, functools.partial(_frechet, "sfid", "_s")),
        "inception_score": Number(("score",), (), _score),
        "precision_recall": Number(FEATURES, FEATURES, _precision_recall),
        "kid": Number(FEATURES, FEATURES, _kid),
    },
    "patches": {"frechet_patches": Number(MOMENTS, MOMENTS, functools.partial(_frechet, "frechet_patches", ""))},
}


def compare(
    made: Statistics, real: Statistics, *, features: str = "inception", only: Sequence[str] = ()
) -> tuple[dict[str, float], list[str]]:
    """The numbers of samples beside real pictures.

    Args:
      made: statistics of the samples; real: of the real pictures.
      features: a key of `NUMBERS`.
      only: names of the numbers to compute; by default all that can be.

    Returns:
      {name: number}, and notes on what they are worth.

    Raises:
      UserError: the pictures are not of the same size, or a number that is asked for cannot be had.
    """
    sizes = [_size(found["size"]) for found in (made, real) if "size" in found]
    if len(set(sizes)) > 1:
        raise UserError(f"A has pictures of {sizes[0]} and B of {sizes[1]}; A and B; compare pictures of one size")
    wanted = {name: number for name, number in NUMBERS[features].items() if not only or name in only}
    if unknown := [name for name in only if name not in NUMBERS[features]]:
        raise UserError(f"no number {unknown[0]!r}; --only; there are {', '.join(NUMBERS[features])}")
    results, notes = {}, []
    for name, number in reporting.progress_bar(wanted.items(), "numbers"):
        sides = (("A", number.of_made, made), ("B", number.of_real, real))
        missing = [f"{side} has no {key}" for side, keys, found in sides for key in keys if key not in found]
        if missing and only:
            raise UserError(f"{name} cannot be had: {missing[0]}; --only; give the pictures")
        if missing:
            notes.append(f"{name} is left out: {missing[0]}")
            continue
        results |= number.compute(made, real)
    width = len(made["mu"])
    for side, found in (("A", made), ("B", real)):
        if features == "inception" and 0 < int(found["count"]) <= width:
            notes.append(
                f"{side} has {int(found['count'])} pictures, not more than the {width} features: its FID is too high; "
                "papers take 50,000"
            )
    return results, notes


def table(results: Mapping[str, float]) -> str:
    """The numbers as a Markdown table."""
    rows = [("", "value"), ("---", "---:"), *((name, f"{value:.6g}") for name, value in results.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


# ---- pictures and their captions ------------------------------------------------------------------------------------


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      UserError: it cannot be read, or there are none.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts ({error}); --prompts={path}; one a line, UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"there are no prompts; --prompts={path}; write one a line")
    return prompts


def clip_scorer(source: str | os.PathLike[str], *, batch_size: int) -> Callable[[Pictures, Sequence[str]], float]:
    """(pictures, prompts) -> `metrics.clip_score`, picture i against prompt i, prompts in turn.

    Pictures are cut to the square in their middle and resized by bicubic interpolation, as CLIP's were.

    Args:
      source: a workdir with a CLIP of clean pictures, or published weights of one, see `diffax.weights`.
      batch_size: pictures at once.

    Raises:
      UserError: there is no such CLIP, or several.
    """
    config, params = _clip_at(source)
    ((name, params),) = params.items()
    model = stages.build_clip(config, name)
    tokenize = pipeline.text_tokenizer(config[name])
    embed_image = parallel.map_batch(functools.partial(stages.embed_image, model))
    embed_text = parallel.map_batch(lambda params, ids: stages.embed_text(model, params, ids)["text_embedding"])

    def in_batches(embed: Callable, rows: np.ndarray) -> np.ndarray:
        """One program serves all batches: the last one is filled up."""
        filled = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), 0)])
        return np.asarray(embed(params, filled))[: len(rows)]

    def score(pictures: Pictures, prompts: Sequence[str]) -> float:
        ids = tokenize(list(prompts))
        text = [in_batches(embed_text, ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
        image = [
            in_batches(embed_image, images.from_uint8(_square(chunk))) for chunk in _in_batches(pictures, batch_size)
        ]
        image, text = np.concatenate(image), np.concatenate(text)
        return metrics.clip_score(image, text[np.arange(len(image)) % len(text)])

    return score


def _clip_at(source: str | os.PathLike[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(config, {section: parameters}) of the one CLIP of clean pictures in a workdir, or in published weights."""
    if weights.is_weights(source):
        config, params, _ = weights.load(source)
    else:
        config, params = configs.to_dict(configs.from_dict(pipeline.read_config(source))), {}
    sections = {name: c for name, c in config.items() if isinstance(c, Mapping) and "net" in c}
    names = [name for name, c in sections.items() if configs.is_clip(c) and not c["net"]["image"]["noised"]]
    if len(names) != 1:
        what = "several CLIPs" if names else "no CLIP of clean pictures"
        raise UserError(f"{what}; {source}; convert one: python -m diffax.weights ViT-B-16.pt runs/clip")
    return config, {names[0]: params[names[0]] if params else pipeline.load_params(config, names[0], source)[0]}


def _square(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, S, S, C], the middle."""
    height, width = pictures.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    p = _Parser(
        prog="python -m diffax.evaluation",
        description="Compares samples A with real pictures B: folders of images or of .npz files, or .npz files "
        "(arr_0, uint8 [N, H, W, 3]); also files of statistics, such as ADM's references (mu, sigma, mu_s, sigma_s). "
        "With --clip and --prompts, also A with the captions that it was made from.",
        allow_abbrev=False,
    )
    p.add_argument("samples", metavar="A")
    p.add_argument("reference", metavar="B", nargs="?", help="may be left out with --clip")
    p.add_argument(
        "--inception", metavar="FILE", help=f"weights of the FID's network (default: of ${inception_weights.VARIABLE})"
    )
    p.add_argument("--features", default="inception", help=f"{' or '.join(NUMBERS)} (default inception)")
    p.add_argument(
        "--clip",
        metavar="PATH",
        help="CLIP score of A: a CLIP's published weights, or a workdir (GLIDE: of ViT-B-16.pt)",
    )
    p.add_argument(
        "--prompts", metavar="FILE", help="the captions of A, one a line, in the order of the pictures' names"
    )
    p.add_argument("--num", type=int, help="at most so many pictures of A and of B, the first ones")
    p.add_argument("--only", default="", metavar="NAME,...", help="these numbers alone")
    p.add_argument("--batch_size", type=int, default=64, help="pictures at once (default 64)")
    p.add_argument("--output", metavar="FILE.json", help="also write the numbers here")
    p.add_argument("--no-cache", action="store_true", help=f"keep no statistics beside the pictures (*{MARK}*.npz)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def _checked(argv: Sequence[str]) -> argparse.Namespace:
    args = parser().parse_args(argv)
    if (args.clip is None) != (args.prompts is None):
        raise UserError("--clip and --prompts go together; command line; give both")
    if args.reference is None and not args.clip:
        raise UserError("the following arguments are required: B, or --clip and --prompts; command line; see --help")
    if args.features not in NUMBERS:
        raise UserError(f"unknown --features={args.features}; command line; use one of {', '.join(NUMBERS)}")
    if args.batch_size < 1 or (args.num is not None and args.num <= NEIGHBOUR):
        raise UserError(f"--batch_size and --num; command line; use at least 1 and {NEIGHBOUR + 1}")
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        raise UserError(f"no such folder; --output={args.output}; make it, or choose another")
    args.only = [name for name in args.only.split(",") if name]
    if unknown := [name for name in args.only if name not in NUMBERS[args.features]]:
        raise UserError(f"no number {unknown[0]!r}; --only; there are {', '.join(NUMBERS[args.features])}")
    return args


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Compares as the flags say; returns what --output holds."""
    found: dict[str, Any] = {"A": args.samples, "B": args.reference}
    results: dict[str, float] = {}
    notes: list[str] = []
    score = clip_scorer(args.clip, batch_size=args.batch_size) if args.clip else None
    prompts = read_prompts(args.prompts) if args.clip else []
    if args.reference is not None:
        about, measure = measurement(args.features, args.inception, batch_size=args.batch_size)
        options = dict(about=about, limit=args.num, cache=not args.no_cache)
        made, notes = statistics_of(args.samples, measure, **options)
        real, more = statistics_of(args.reference, measure, **options)
        results, last = compare(made, real, features=args.features, only=args.only)
        notes = notes + more + last
        found |= {**about, "pictures": int(made["count"]), "reference_pictures": int(real["count"]) or None}
    if score:
        pictures = open_pictures(args.samples, args.num)
        results |= {"clip_score": score(pictures, prompts)}
        found |= {"clip": args.clip, "prompts": args.prompts, "pictures": pictures.count}
        if pictures.count % len(prompts):
            notes = [*notes, f"{len(prompts)} prompts in turn for {pictures.count} pictures"]
    return found | {"results": results, "notes": notes}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _checked(argv)
        found = report(args)
        for note in found["notes"]:
            print(f"diffax: note: {note}", file=sys.stderr)
        print(table(found["results"]))
        if args.output:
            text = json.dumps(found, indent=2) + "\n"
            images.write_atomically(args.output, lambda file: file.write(text.encode()))
            print(f"report: {args.output}")
        return 0
    except (UserError, RunError) as error:
        if "--debug" in argv:
            traceback.print_exception(error)
        print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("diffax: interrupted", file=sys.stderr)
        return 130
