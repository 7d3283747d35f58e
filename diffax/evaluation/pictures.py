"""Reading sets of pictures: folders, .npz files, or those that a section is trained on."""

import concurrent.futures
import contextlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from diffax.components import build
from diffax.data import images
from diffax.data.folders import SUFFIXES
from diffax.data.pipeline import batches
from diffax.errors import RunError, UserError
from diffax.training import reporting

MARK = ".statistics-"  # in the names of files that this module leaves beside the pictures
THREADS = 8


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
                            f"pictures of two sizes: {files[0].name} is {size_in_words(first)}, {file.name} "
                            f"{size_in_words(picture.shape)}; {source}; crop or resize them to one"
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
                f"pictures of two sizes: {files[0].name} has {size_in_words(first[1:])}, {file.name} "
                f"{size_in_words(shape[1:])}; {source}; compare them apart"
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


def size_in_words(shape: Sequence[int]) -> str:
    """Height x width."""
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


def in_batches(pictures: Pictures, size: int) -> Iterator[np.ndarray]:
    """Their chunks, with a progress bar."""
    what = f"{pictures.source.name}: {pictures.count} pictures"
    bar = iter(reporting.progress_bar(range(-(-pictures.count // size)), what))
    for chunk in pictures.chunks(size):
        next(bar, None)  # files that end with a short chunk make more of them
        yield chunk


def has_pictures(path: pathlib.Path) -> bool:
    """Whether an .npz file holds pictures, and not statistics alone."""
    with zipfile.ZipFile(path) as file:
        return "arr_0.npy" in file.namelist()


def square(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, S, S, C], the middle."""
    height, width = pictures.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]


def training_pictures(section: Mapping[str, Any], source: pathlib.Path) -> Pictures:
    """All pictures that a section is trained on, in order, in its size, never flipped nor cropped at random.

    Args:
      section: of the config.
      source: what to call them; their statistics are kept beside it.
    """
    shape = tuple(section["shape"])
    opened = build(section["data"], "data").open(shape)

    def chunks(size: int) -> Iterator[np.ndarray]:
        for batch in batches(opened, section["loader"], shape=shape, batch_size=size, seed=0, train=False):
            found = images.to_uint8(batch["image"], nearest=True)
            yield np.broadcast_to(found, (*found.shape[:3], 3))

    return Pictures(source, len(opened), (), chunks, [])
