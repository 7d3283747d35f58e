"""Pictures: float <-> uint8, enlarging and tiles, grids, PNG files, ADM's sample files."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffax.data.files import write_atomically
from diffax.errors import RunError, UserError

_TILE = 48  # Pixels; smaller images are enlarged to about this in a grid.
_MAX_PIXELS = 64_000_000


def to_uint8(x: np.ndarray, *, nearest: bool = False) -> np.ndarray:
    """Images in [-1, 1] as bytes: (x + 1) * 127.5, clipped and truncated, as OpenAI's samplers do.

    Args:
      x: float [...], nominally in [-1, 1]; values outside are clipped.
      nearest: round instead, as a stage does with the smaller picture that it enlarges.

    Returns:
      uint8 of the same shape.
    """
    scaled = np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255)
    return (np.round(scaled) if nearest else scaled).astype(np.uint8)


def from_uint8(x: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [-1, 1]: x / 127.5 - 1."""
    x = np.asarray(x)
    if x.dtype != np.uint8:
        raise ValueError(f"from_uint8 takes uint8, got {x.dtype}")
    return x.astype(np.float32) / np.float32(127.5) - 1


def as_floats(x: np.ndarray) -> np.ndarray:
    """Pictures as float32: uint8 are scaled to [-1, 1], other numbers stay as they are."""
    x = np.asarray(x)
    return from_uint8(x) if x.dtype == np.uint8 else x.astype(np.float32)


def bicubic(images: np.ndarray, factor: int) -> np.ndarray:
    """[N, h, w, C] floats in [-1, 1] -> [N, h * factor, w * factor, C], by Pillow's bicubic filter, clipped."""
    height, width = (factor * side for side in images.shape[1:3])

    def resize(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))

    planes = [[resize(image[..., c]) for c in range(image.shape[-1])] for image in np.asarray(images, np.float32)]
    return np.clip(np.moveaxis(np.asarray(planes), 1, -1), -1, 1)


def tile_corners(size: tuple[int, int], tile: int, *, overlap: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where tiles lie that cover a picture.

    Args:
      size: (height, width).
      tile: side of a tile.
      overlap: pixels that neighbours share.

    Returns:
      The (top, left) of every tile, and the (height, width) that they cover, at least `size`.
    """
    stride = tile - overlap
    counts = [max(1, -(-(side - overlap) // stride)) for side in size]
    corners = [(y * stride, x * stride) for y in range(counts[0]) for x in range(counts[1])]
    return corners, tuple((count - 1) * stride + tile for count in counts)


def pad_reflecting(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Extends [h, w, C] at the bottom and the right to `size` by mirror images of itself."""
    index = [
        np.pad(np.arange(old), (0, new - old), mode="symmetric") for old, new in zip(image.shape, size, strict=False)
    ]
    return image[index[0]][:, index[1]]


def blend_tiles(tiles: np.ndarray, corners: Sequence[tuple[int, int]], *, overlap: int) -> np.ndarray:
    """Puts tiles [N, t, t, C] back together, weights falling linearly to the edges over `overlap` pixels."""
    side = tiles.shape[1]
    ramp = np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).clip(max=overlap + 1) / (overlap + 1)
    weight = np.outer(ramp, ramp)[..., None]
    height, width = (max(corner[axis] for corner in corners) + side for axis in (0, 1))
    total, weights = np.zeros((height, width, tiles.shape[-1])), np.zeros((height, width, 1))
    for image, (y, x) in zip(tiles, corners, strict=True):
        total[y : y + side, x : x + side] += weight * image
        weights[y : y + side, x : x + side] += weight
    return (total / weights).astype(np.float32)


def check_finite(images: np.ndarray, first_index: int = 0) -> None:
    """Raises RunError that names the first image with a NaN or an infinity.

    Args:
      images: float [N, ...].
      first_index: number of `images[0]` among all samples.
    """
    finite = np.isfinite(np.asarray(images)).reshape(len(images), -1).all(1)
    if not finite.all():
        raise RunError(f"sample {first_index + int(np.argmin(finite))} is not finite; not written")


def grid(
    images: np.ndarray,
    columns: int,
    labels: Sequence[str | None] | None = None,
    *,
    pad: int = 2,
    scale: int | None = None,
) -> np.ndarray:
    """Tiles images row by row on white, each over its label.

    Args:
      images: uint8 [N, H, W, 1 or 3], N >= 1.
      columns: tiles in a row; a last row may be short.
      labels: N texts or None; what is wider than its tile goes on below, for up to six lines, and is cut then.
      pad: pixels of white around each tile.
      scale: integer nearest-neighbour enlargement; None makes small tiles about 48 pixels.

    Returns:
      uint8 [height, width, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"grid takes uint8 [N, H, W, 1 or 3], got {images.dtype} {images.shape}")
    count, height, width, _ = images.shape
    if not images.size or columns < 1 or (scale is not None and scale < 1) or pad < 0:
        raise ValueError(
            f"grid needs an image, columns >= 1, scale >= 1 and pad >= 0, got "
            f"{images.shape}, {columns}, {scale} and {pad}"
        )
    if labels is not None and len(labels) != count:
        raise ValueError(f"there are {count} images and {len(labels)} labels")
    columns = min(columns, count)
    scale = scale or max(1, round(_TILE / min(height, width)))
    images = np.broadcast_to(images, (count, height, width, 3))
    images = images.repeat(scale, 1).repeat(scale, 2)
    height, width = height * scale, width * scale
    labels = labels if labels and any(labels) else [None] * count
    font = ImageFont.load_default(size=10)
    lines = [_wrapped(label or "", font, width) for label in labels]
    line = sum(font.getmetrics())
    text = [line * max(map(len, lines[i : i + columns])) for i in range(0, count, columns)]  # of each row

    cells = np.cumsum([0, *(height + under + pad for under in text)])
    sheet = np.full((cells[-1] + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left, right = cells[row] + pad, column * (width + pad) + pad, (column + 1) * (width + pad)
        sheet[top : top + height, left:right] = image
        if lines[i]:
            size = (width, text[row])
            sheet[top + height : top + height + size[1], left:right] = _caption(lines[i], font, size)
    return sheet


def _wrapped(label: str, font: ImageFont.FreeTypeFont, width: int, most: int = 6) -> list[str]:
    """The lines of a text that is broken between words; a word that is too wide has a line of its own."""
    lines: list[str] = []
    for word in label.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:most]


def _caption(lines: Sequence[str], font: ImageFont.FreeTypeFont, size: tuple[int, int]) -> np.ndarray:
    """Black lines on white [h, w, 3], centred, cut at the end where they do not fit."""
    strip = Image.new("L", size, 255)
    draw, height = ImageDraw.Draw(strip), sum(font.getmetrics())
    for i, line in enumerate(lines):
        left = max(0, (size[0] - round(font.getlength(line))) // 2)
        draw.text((left, i * height), line, fill=0, font=font)
    return np.asarray(strip)[:, :, None].repeat(3, 2)


def save_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Writes uint8 [H, W, 1 or 3] (or [H, W]) as PNG, atomically; makes missing folders."""
    array = np.asarray(array)
    known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8 or not known:
        raise ValueError(f"save_png takes uint8 [H, W, 1 or 3], got {array.dtype} {array.shape}")
    image = Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
    write_atomically(path, lambda file: image.save(file, format="PNG"))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 3], upright as its EXIF data say.

    Transparent pixels are laid over white; 16-bit greys keep their 8 high bits.

    Raises:
      UserError: there is no such file, it is no image, or it has more than 64 megapixels.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            if pixels > _MAX_PIXELS:  # Before decoding: the header alone is read so far.
                raise UserError(
                    f"image is {pixels / 1e6:.0f} MP, limit {_MAX_PIXELS // 10**6} MP; {path}; make it smaller"
                )
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith("I"):
                # Pillow's own conversion clips 16-bit greys to 255.
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"there is no image; {path}; check the path") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"cannot read image ({reason}); {path}; use a PNG, JPEG or WebP file") from error


def save_npz(directory: str | os.PathLike[str], images: np.ndarray, labels: np.ndarray | None = None) -> pathlib.Path:
    """Writes `samples_{N}x{H}x{W}x3.npz` in ADM's layout, which its evaluation suites read.

    Args:
      directory: folder of the file.
      images: uint8 [N, H, W, 1 or 3] -> `arr_0` [N, H, W, 3].
      labels: int [N] -> `arr_1` int64; None leaves it out.

    Returns:
      Path of the file.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"save_npz takes uint8 [N, H, W, 1 or 3], got {images.dtype} {images.shape}")
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    arrays = {"arr_0": images}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be int [{len(images)}], got {labels.dtype} {labels.shape}")
        arrays["arr_1"] = labels.astype(np.int64)
    path = pathlib.Path(directory) / f"samples_{'x'.join(map(str, images.shape))}.npz"
    write_atomically(path, lambda file: np.savez(file, **arrays))
    return path


def load_npz(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads such a file: (uint8 [N, H, W, 3], int64 [N] or None); never unpickles.

    Raises:
      UserError: there is no such file, or it holds anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
            labels = file["arr_1"] if "arr_1" in file.files else None
    except FileNotFoundError:
        raise UserError(f"there is no sample file; {path}; check the path") from None
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged files.
        raise UserError(
            f"cannot read sample file ({type(error).__name__}); {path}; expected an .npz with arr_0, no pickles"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"arr_0 is {images.dtype} {images.shape}; {path}; expected uint8 [N, H, W, 3]")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UserError(f"arr_1 is {labels.dtype} {labels.shape}; {path}; expected int [{len(images)}]")
    return images, None if labels is None else labels.astype(np.int64)
