"""Bytes to pixels, and pixels to the size a network needs: the recipe of ADM's data loader.

Everything here is a pure function of uint8 arrays [h, w, c]; randomness comes in as a numpy
generator.
"""

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

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
      height: of the target.
      width: of the target.

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
    return as_jpeg(small, jpeg_quality) if jpeg_quality else small


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """A uint8 image [h, w, 1 or 3] as it comes back from a JPEG file of this quality, 1 to 100."""
    stream = io.BytesIO()
    _to_pil(pixels).save(stream, "JPEG", quality=quality)
    stream.seek(0)
    return _to_array(Image.open(stream), pixels.shape[-1])


def jpeg_smaller(factor: int, quality_range: tuple[int, int], *, name: str = "low_res") -> Callable:
    """An `edit` of `diffax.data.pipeline`: adds the picture `factor` times smaller, as a JPEG file shows it.

    Args:
      factor: how much smaller.
      quality_range: lowest and highest quality, 1 to 100; drawn evenly for every picture.
      name: of the smaller picture in a batch.
    """
    low, high = quality_range

    def edit(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        quality = int(rng.integers(low, high + 1))
        return pixels, {name: smaller(pixels, factor, jpeg_quality=quality)}

    return edit


# ---- the degradations of BSRGAN --------------------------------------------------------------------------------------


class Degradation(NamedTuple):
    """How strong they are: the full ones, and the light ones of the latent diffusion models' code.

    Attributes:
      blurs: how many.
      blur_scale: of their standard deviations.
      half_sizes: fewest and most pixels from the middle of a kernel to its edge.
      noise: least and most, of 255.
      jpeg: lowest and highest quality.
    """

    blurs: int = 2
    blur_scale: float = 1.0
    half_sizes: tuple[int, int] = (3, 12)
    noise: tuple[int, int] = (2, 25)
    jpeg: tuple[int, int] = (30, 95)


DEGRADATIONS = {"bsr": Degradation(), "bsr_light": Degradation(1, 0.25, (2, 7), (1, 2), (80, 95))}


def degraded(factor: int, kind: str, crop: int = 0, *, name: str = "low_res") -> Callable:
    """An `edit` of `diffax.data.pipeline`: adds the picture `factor` times smaller, degraded; see `degrade`.

    Args:
      factor: how much smaller.
      kind: a key of `DEGRADATIONS`.
      crop: side of the window that the picture is first cut to, at random; 0 for all of it.
      name: of the degraded picture in a batch.
    """
    how = DEGRADATIONS[kind]

    def edit(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        # Degrading costs far more than cropping, so crop first.
        size = (crop, crop) if crop else pixels.shape[:2]
        top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(pixels.shape, size, strict=False))
        pixels = pixels[top : top + size[0], left : left + size[1]]
        return pixels, {name: degrade(pixels, factor, rng, how)}

    return edit


def degrade(pixels: np.ndarray, factor: int, rng: np.random.Generator, how: Degradation) -> np.ndarray:
    """The picture `factor` times smaller and made worse in an order drawn anew (BSRGAN, Zhang et al. 2021).

    Blurs, a resize to a size drawn at random and one to the final size, noise and JPEG in any order (but that of the
    two resizes), then JPEG once more. DALL-E 2 shows its second upsampler such pictures (section 2.1).

    Args:
      pixels: uint8 [h, w, 1 or 3], sides divisible by `factor`.
      factor: how much smaller.
      rng: draws all.
      how: how strong.

    Returns:
      uint8 [h / factor, w / factor, c].
    """
    x = pixels.astype(np.float32) / 255
    small = tuple(side // factor for side in pixels.shape[:2])
    if factor == 4 and rng.random() < 0.25:
        x, factor = _resize(x, tuple(side // 2 for side in x.shape[:2]), rng), 2

    def jpeg(x):
        return as_jpeg(_to_bytes(x), int(rng.integers(how.jpeg[0], how.jpeg[1] + 1))).astype(np.float32) / 255

    def resize_somehow(x):
        if rng.random() < 0.75:
            scale = rng.uniform(1, 2 * factor)
            return _resize(x, tuple(max(1, int(side / scale)) for side in x.shape[:2]), rng)
        return convolve(x, gaussian(12, *[rng.uniform(0.1, 0.6 * factor)] * 2))[::factor, ::factor]

    operations = [lambda x: _random_blur(x, factor, rng, how)] * how.blurs
    operations += [resize_somehow, lambda x: _resize(x, small, rng), lambda x: _random_noise(x, rng, how)]
    operations += [lambda x: jpeg(x) if rng.random() < 0.9 else x]
    order = list(rng.permutation(len(operations)))
    first, second = sorted((order.index(how.blurs), order.index(how.blurs + 1)))
    order[first], order[second] = how.blurs, how.blurs + 1
    for number in order:
        x = operations[number](x)
    return _to_bytes(jpeg(x))


def _to_bytes(x: np.ndarray) -> np.ndarray:
    return np.round(x.clip(0, 1) * 255).astype(np.uint8)


def _resize(x: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Floats [h, w, c] in another size, by the mean of areas or by interpolation that may alias, drawn at random."""
    how, target = rng.integers(3), size[::-1]
    scale = (x.shape[1] / target[0], 0, 0, 0, x.shape[0] / target[1], 0)
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

    def plane(channel):
        image = Image.fromarray(np.ascontiguousarray(channel))
        if how == 2:
            return image.resize(target, Image.Resampling.BOX)
        return image.transform(target, Image.Transform.AFFINE, scale, filters[how])

    return np.stack([np.asarray(plane(x[..., c])) for c in range(x.shape[-1])], -1)


def gaussian(half_size: int, sigma_1: float, sigma_2: float, angle: float = 0.0) -> np.ndarray:
    """A Gaussian kernel [2 half_size + 1] * 2 of these deviations along two axes, turned by an angle; its sum is 1."""
    place = np.arange(-half_size, half_size + 1)
    y, x = place[:, None], place[None]
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    kernel = np.exp(-0.5 * ((along / max(sigma_1, 1e-3)) ** 2 + (across / max(sigma_2, 1e-3)) ** 2))
    return kernel / kernel.sum()


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Floats [h, w, c] convolved with a kernel of odd sides, reflected at the edges."""
    height, width = x.shape[:2]
    pads = [side // 2 for side in kernel.shape]
    wide = np.pad(x, [(pads[0],) * 2, (pads[1],) * 2, (0, 0)], mode="symmetric")
    size = wide.shape[:2]
    spectrum = np.fft.rfft2(wide, axes=(0, 1)) * np.fft.rfft2(kernel, size)[..., None]
    full = np.fft.irfft2(spectrum, size, axes=(0, 1))
    # what has wrapped around lies in the first rows and columns
    return full[2 * pads[0] :, 2 * pads[1] :][:height, :width].astype(np.float32)


def _random_blur(x: np.ndarray, factor: int, rng: np.random.Generator, how: Degradation) -> np.ndarray:
    """Gaussian blur, in half of the cases with two different widths."""
    half = int(rng.integers(how.half_sizes[0], how.half_sizes[1] + 1))
    if rng.random() < 0.5:
        # variances along the axes
        sigmas = np.sqrt(rng.uniform(0, how.blur_scale * (4 + factor), 2))
        return convolve(x, gaussian(half, *sigmas, rng.uniform(0, np.pi)))
    return convolve(x, gaussian(half, *[how.blur_scale * rng.uniform(0, 2 + 0.2 * factor)] * 2))


def _random_noise(x: np.ndarray, rng: np.random.Generator, how: Degradation) -> np.ndarray:
    """Gaussian noise: of each channel (40%), of all together (40%), or correlated between them."""
    level, kind, channels = rng.integers(how.noise[0], how.noise[1] + 1) / 255, rng.random(), x.shape[-1]
    if kind < 0.4:
        return x + level * rng.standard_normal(x.shape, np.float32)
    if kind < 0.8:
        return x + level * rng.standard_normal((*x.shape[:2], 1), np.float32)
    turn, _ = np.linalg.qr(rng.standard_normal((channels, channels)))
    root = np.sqrt(rng.random(channels))[:, None] * turn
    return x + (level * rng.standard_normal(x.shape, np.float32) @ root).astype(np.float32)
