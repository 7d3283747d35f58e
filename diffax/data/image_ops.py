"""Bytes to pixels, and pixels to the size a network wants: the recipe of ADM's data loader.

Everything here is a pure function of uint8 arrays [h, w, c]; randomness comes in as a numpy
generator.
"""

import io
import math
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_MEGAPIXELS = 64
# Deflate packs at most 1032 bytes, of 8 one-bit pixels each, in a byte; LZW and JPEG pack less. A
# header that promises more is refused before its memory is taken. Lossless WebP knows no limit.
MAX_PIXELS_PER_BYTE = 8256


class BadRecord(ValueError):
    """One record cannot be read; the text is the reason alone, without the record's name."""


def decode(data: bytes, *, channels: int) -> np.ndarray:
    """Decodes one JPEG, PNG, WebP, BMP or GIF (its first frame) and turns it upright.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits, CMYK becomes RGB, and
    an EXIF orientation is applied. The header is checked before any pixel is decoded.

    Args:
      data: the encoded image.
      channels: 1 (grey, ITU-R 601 luma of a colour image) or 3 (RGB).

    Returns:
      uint8 [h, w, channels].

    Raises:
      BadRecord: the bytes are no complete image, or hold more than MAX_MEGAPIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = image.width * image.height
            _check_size(pixels)
            if image.format != "WEBP" and pixels > MAX_PIXELS_PER_BYTE * len(data):
                raise BadRecord("truncated")
            image.load()
            return _to_array(ImageOps.exif_transpose(image), channels)
    except BadRecord:
        raise
    except Image.DecompressionBombError as error:
        _check_size(int(re.search(r"\d+", str(error)).group()))
        raise BadRecord("image is too large") from None
    # Damaged bytes surface from Pillow's plugins as nearly every exception there is.
    except Exception as error:
        raise BadRecord(_reason(data, error)) from None


def _check_size(pixels: int):
    if pixels < 1:
        raise BadRecord("image has no pixels")
    if pixels > MAX_MEGAPIXELS * 10**6:
        raise BadRecord(f"image is {math.ceil(pixels / 1e6)} MP, limit {MAX_MEGAPIXELS} MP")


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return f"damaged ({text[:80]})"


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


def _to_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def cover(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrinks or grows an image until it just covers [height, width], keeping its aspect.

    Box-halved as often as it stays at least the target, then one bicubic resize (guided-diffusion,
    image_datasets.py): halving first keeps the bicubic step from aliasing.

    Args:
      pixels: uint8 [h, w, c], c in (1, 3).

    Returns:
      uint8 [h', w', c] with h' >= height, w' >= width, one of them equal.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    image = _to_pil(pixels)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    out = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return out[..., None] if out.ndim == 2 else out


def center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of the image, as large as the target's aspect allows: uint8 [height, width, c]."""
    pixels = cover(pixels, height, width)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def random_crop(
    pixels: np.ndarray,
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    min_fraction: float = 0.8,
) -> np.ndarray:
    """A window that keeps between `min_fraction` and all of the smaller side.

    With S the target's smaller side, the image is scaled to a smaller side drawn evenly from
    S..ceil(S / min_fraction), then cut anywhere (ADM's crop for training classifiers).

    Returns:
      uint8 [height, width, c].
    """
    small = min(height, width)
    drawn = int(rng.integers(small, math.ceil(small / min_fraction) + 1))
    pixels = cover(pixels, math.ceil(height * drawn / small), math.ceil(width * drawn / small))
    top = int(rng.integers(pixels.shape[0] - height + 1))
    left = int(rng.integers(pixels.shape[1] - width + 1))
    return pixels[top : top + height, left : left + width]


def encode_png(pixels: np.ndarray) -> io.BytesIO:
    """A uint8 image [h, w, 1 or 3] as a PNG stream at its start."""
    stream = io.BytesIO()
    _to_pil(pixels).save(stream, "PNG")
    stream.seek(0)
    return stream


def smaller(pixels: np.ndarray, factor: int, *, jpeg_quality: int = 0) -> np.ndarray:
    """The picture `factor` times smaller, as a file would hold it: the mean of each square, rounded, then perhaps JPEG.

    Args:
      pixels: uint8 [h, w, c], sides divisible by `factor`.
      factor: how much smaller.
      jpeg_quality: 1 to 100, what the picture is saved at and read back; 0: not at all.

    Returns:
      uint8 [h / factor, w / factor, c].
    """
    height, width, channels = pixels.shape
    squares = pixels.reshape(height // factor, factor, width // factor, factor, channels)
    small = np.round(squares.mean((1, 3))).astype(np.uint8)
    if not jpeg_quality:
        return small
    stream = io.BytesIO()
    _to_pil(small).save(stream, "JPEG", quality=jpeg_quality)
    stream.seek(0)
    return _to_array(Image.open(stream), channels)
