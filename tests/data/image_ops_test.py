"""Decoding and the crop recipes, against float64 resampling written here from its definition."""

import io
import itertools
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffax.data import Loader, Source, batches, image_ops
from diffax.data.image_ops import BadRecord


def encoded(image, kind="PNG", **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def picture(height, width, channels=3, seed=0):
    """Smooth random colours, so that JPEG and resampling keep them."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)[..., :channels]


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


# ---- resampling, independently ----


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x < 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def matrix(old, new, kernel, support):
    """Rows of weights: the kernel stretched by the shrinking factor, normalised at the borders."""
    scale = old / new
    stretch = max(scale, 1)
    centres = (np.arange(new) + 0.5) * scale
    distance = (np.arange(old) + 0.5 - centres[:, None]) / stretch
    weights = np.where(np.abs(distance) <= support, kernel(distance), 0)
    return weights / weights.sum(1, keepdims=True)


def resized(image, height, width, kernel, support):
    rows = matrix(image.shape[0], height, kernel, support)
    columns = matrix(image.shape[1], width, kernel, support)
    tall = np.einsum("hwc,jw->hjc", image, columns, optimize=True)
    return np.einsum("ih,hjc->ijc", rows, tall, optimize=True).clip(0, 255)


def adm_center_crop(image, side):
    """guided-diffusion, image_datasets.py center_crop_arr, in float64."""
    image = image.astype(np.float64)
    while min(image.shape[:2]) >= 2 * side:
        image = resized(image, image.shape[0] // 2, image.shape[1] // 2, box, 0.5)
    scale = side / min(image.shape[:2])
    image = resized(image, round(image.shape[0] * scale), round(image.shape[1] * scale), cubic, 2)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize(
    "height, width, side",
    [(110, 150, 24), (150, 110, 24), (48, 48, 24), (47, 60, 24), (375, 500, 64), (20, 31, 24)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_is_the_adm_recipe(height, width, side, channels):
    image = picture(height, width, channels)
    got = image_ops.center_crop(image, side, side)
    assert got.shape == (side, side, channels) and got.dtype == np.uint8
    # Pillow rounds to bytes after every pass, of which there are two per resize.
    assert np.abs(got - adm_center_crop(image, side)).max() < 3


def test_halving_is_part_of_the_recipe():
    """On noise one bicubic resize gives another picture than the halvings do."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    got = image_ops.center_crop(noise, 24, 24).astype(float)
    assert np.abs(got - adm_center_crop(noise, 24)).max() < 3
    assert np.abs(got - resized(noise.astype(float), 24, 24, cubic, 2)).max() > 10


def test_image_of_the_right_size_stays_as_it_is():
    image = picture(24, 24)
    np.testing.assert_array_equal(image_ops.center_crop(image, 24, 24), image)


@pytest.mark.parametrize("height, width", [(16, 40), (40, 16), (24, 25)])
def test_targets_need_not_be_square(height, width):
    """A ramp keeps its slope in both directions: nothing is stretched, the middle is kept."""
    ramp = np.zeros((120, 160, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(160), np.arange(120)[:, None]
    got = image_ops.center_crop(ramp, height, width).astype(float)
    assert got.shape == (height, width, 3)
    step = 1 / max(height / 120, width / 160)
    across, down = np.diff(got[..., 0], axis=1).mean(), np.diff(got[..., 1], axis=0).mean()
    assert math.isclose(across, step, rel_tol=0.1) and math.isclose(down, step, rel_tol=0.1)
    assert abs(got[..., 0].mean() - 79.5) < 4 and abs(got[..., 1].mean() - 59.5) < 4


def test_random_crop_is_a_window_of_each_allowed_scale():
    image, side = picture(90, 70), 24
    drawn = set()
    for seed in range(60):
        got = image_ops.random_crop(image, side, side, np.random.default_rng(seed))
        matches = []
        for small in range(24, 31):
            scaled = image_ops.cover(image, small, small)
            assert min(scaled.shape[:2]) == small
            windows = np.lib.stride_tricks.sliding_window_view(scaled, (side, side, 3))
            if (windows[:, :, 0] == got).all(axis=(2, 3, 4)).any():
                matches.append(small)
        assert len(matches) == 1
        drawn.add(matches[0])
    assert drawn == set(range(24, 31))  # ceil(24 / 0.8) = 30


def test_random_crop_reaches_all_borders():
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60), np.arange(40)[:, None]
    crops = [image_ops.random_crop(ramp, 40, 40, np.random.default_rng(seed), min_fraction=1.0) for seed in range(200)]
    assert {crop[0, 0, 0] for crop in crops} == set(range(21))
    assert {crop[0, 0, 1] for crop in crops} == {0}


# ---- decoding ----


@pytest.mark.parametrize("kind, tolerance", [("PNG", 0), ("BMP", 0), ("JPEG", 20), ("WEBP", 30)])
def test_formats(kind, tolerance):
    image = picture(40, 30)
    kwargs = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    got = image_ops.decode(encoded(Image.fromarray(image), kind, **kwargs), channels=3)
    assert got.shape == image.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - image).max() <= tolerance


def test_first_frame_of_a_gif():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (image_ops.decode(data, channels=3) == (255, 0, 0)).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    got = image_ops.decode(encoded(Image.fromarray(levels)), channels=1)
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = image_ops.decode(data, channels=3).mean((0, 1))
    assert red > 225 and green < 60 and blue < 60


@pytest.mark.parametrize(
    "mode, opaque, clear",
    [("RGBA", (10, 20, 30, 255), (10, 20, 30, 0)), ("LA", (50, 255), (50, 0))],
)
def test_transparent_pixels_lie_over_white(mode, opaque, clear):
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), opaque)
    image.putpixel((1, 0), clear)
    got = image_ops.decode(encoded(image), channels=3)
    expected = opaque[:3] if mode == "RGBA" else (50, 50, 50)
    assert got[0].tolist() == [list(expected), [255, 255, 255]]


def test_half_transparent_is_half_white():
    data = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert abs(int(image_ops.decode(data, channels=3)[0, 0, 0]) - 127) <= 1


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((1, 0), 1)
    got = image_ops.decode(encoded(image, transparency=1), channels=3)
    assert got[0].tolist() == [[200, 10, 10], [255, 255, 255]]


def test_one_bit_images():
    image = Image.fromarray(np.array([[True, False]]))
    assert image_ops.decode(encoded(image), channels=1)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_exif_orientation_turns_the_image(orientation, corner):
    """`corner` is where a camera's top left pixel belongs, in halves of the upright image."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = image_ops.decode(encoded(Image.fromarray(image), "JPEG", exif=exif), channels=1)
    assert got.shape == ((16, 32, 1) if orientation in (1, 3) else (32, 16, 1))
    halves = got.reshape(2, got.shape[0] // 2, 2, got.shape[1] // 2).mean((1, 3))
    assert np.unravel_index(halves.argmax(), (2, 2)) == corner


def test_grey_and_colour_convert_both_ways():
    grey = encoded(Image.new("L", (2, 2), 77))
    assert (image_ops.decode(grey, channels=3) == 77).all()
    colour = encoded(Image.new("RGB", (2, 2), (200, 100, 50)))
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (image_ops.decode(colour, channels=1) == luma).all()


@pytest.mark.parametrize(
    "width, height, text",
    [
        (9000, 9000, "81 MP, limit 64 MP"),
        (12_000, 12_000, "144 MP, limit 64 MP"),
        (20_000, 20_000, "400 MP, limit 64 MP"),
        (60_000, 60_000, "3600 MP, limit 64 MP"),
        (8000, 8000, "truncated"),
        (0, 5, "not a JPEG|no pixels|damaged"),
    ],
)
def test_size_is_judged_by_the_header(width, height, text):
    with pytest.raises(BadRecord, match=text):
        image_ops.decode(png_header(width, height), channels=3)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "empty file"),
        (b"hello", "not a JPEG, PNG, WEBP, BMP or GIF image"),
        (encoded(Image.fromarray(picture(40, 40)))[:-400], "truncated"),
        (encoded(Image.fromarray(picture(40, 40)), "JPEG")[:-200], "truncated"),
        (encoded(Image.fromarray(picture(40, 40)), "TIFF"), "not a JPEG"),
    ],
)
def test_reasons(data, text):
    with pytest.raises(BadRecord, match=text):
        image_ops.decode(data, channels=3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_are_an_image_or_a_bad_record(kind):
    whole = encoded(Image.fromarray(picture(24, 20)), kind)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(6)):
            data[at] = rng.integers(256)
        data = bytes(data[: rng.integers(1, 2 * len(data))])
        try:
            got = image_ops.decode(data, channels=3)
            assert got.ndim == 3 and got.shape[2] == 3 and got.dtype == np.uint8
            outcomes.add("image")
        except BadRecord as error:
            assert "\n" not in str(error)
            outcomes.add("bad")
    assert outcomes == {"image", "bad"}


def test_png_round_trip():
    for channels in (1, 3):
        image = picture(7, 9, channels)
        data = image_ops.encode_png(image).read()
        np.testing.assert_array_equal(image_ops.decode(data, channels=channels), image)


# ---- smaller pictures ----


@pytest.mark.parametrize(("height", "width", "factor"), [(24, 24, 4), (12, 20, 2), (9, 15, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_smaller_is_the_rounded_mean_of_squares(height, width, factor, channels):
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    got = image_ops.smaller(image, factor)
    assert got.dtype == np.uint8 and got.shape == (height // factor, width // factor, channels)
    exact = resized(image.astype(float), *got.shape[:2], box, 0.5)
    assert np.abs(got - exact).max() <= 0.5 + 1e-9


def pale(height, width, channels=3, seed=0):
    """Like `picture`, in faint colours: a JPEG halves the resolution of colour."""
    colours = picture(height, width, seed=seed).astype(float)
    return (0.9 * colours.mean(-1, keepdims=True) + 0.1 * colours).astype(np.uint8)[..., :channels]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_smaller_picture_may_have_been_a_jpeg(channels):
    image = pale(64, 48, channels)
    plain = image_ops.smaller(image, 4).astype(float)
    errors = []
    for quality in (20, 60, 95):
        got = image_ops.smaller(image, 4, jpeg_quality=quality)
        assert got.dtype == np.uint8 and got.shape == (16, 12, channels)
        assert got.tobytes() == image_ops.smaller(image, 4, jpeg_quality=quality).tobytes()
        errors.append(np.sqrt(np.mean((got - plain) ** 2)))
    assert errors[0] > errors[1] > errors[2] > 0, "worse at lower quality, but never the same"
    assert errors[0] < 25 and errors[2] < 6, "and close"


def pairs(count, *, edit, workers=0, **kwargs):
    """Batches of pictures of 24 pixels and their smaller versions, from 10 smooth records of 40 by 30."""
    source = Source("toy", 10, lambda i: {"image": pale(40, 30, seed=i), "label": np.int32(i)}, ("label",))
    settings = {"shape": (24, 24, 3), "batch_size": 8, "seed": 3} | kwargs
    loader = Loader(flip=True, crop="random", max_bad=0, workers=workers)
    return list(itertools.islice(batches(source, loader, edit=edit, **settings), count))


def mean_of_squares(x, factor):
    n, height, width, channels = x.shape
    return x.reshape(n, height // factor, factor, width // factor, factor, channels).mean((2, 4))


@pytest.mark.parametrize(("factor", "jpeg"), [(2, (95, 95)), (4, (90, 95))])
def test_batches_hold_pictures_beside_their_smaller_versions(factor, jpeg):
    plain = pairs(3, edit=None)
    for batch, without in zip(pairs(3, edit=image_ops.jpeg_smaller(factor, jpeg)), plain, strict=True):
        assert batch["low_res"].shape == (8, 24 // factor, 24 // factor, 3) and batch["low_res"].dtype == np.float32
        assert np.abs(batch["low_res"]).max() <= 1 and "low_res" not in without
        np.testing.assert_array_equal(batch["image"], without["image"])
        # Of the same window, turned the same way: nearer to its own picture than to any other or to its mirror image.
        means = mean_of_squares(batch["image"], factor)
        distance = np.sqrt(np.mean((batch["low_res"][:, None] - means[None]) ** 2, axis=(2, 3, 4)))
        assert (distance.diagonal() < 0.1).all() and (distance.diagonal() > 0).all()
        mirrored = np.sqrt(np.mean((batch["low_res"] - means[:, :, ::-1]) ** 2, axis=(1, 2, 3)))
        assert (distance.diagonal() < mirrored / 2).all()


def test_smaller_versions_depend_on_seed_and_position_alone():
    edit = image_ops.jpeg_smaller(2, (20, 95))
    straight = pairs(6, edit=edit)
    for again in (pairs(3, edit=edit, start_step=3), pairs(6, edit=edit, workers=1)[3:]):
        for a, b in zip(straight[3:], again, strict=True):
            np.testing.assert_array_equal(a["low_res"], b["low_res"])
    halves = [pairs(6, edit=edit, process_index=i, process_count=2) for i in range(2)]
    for whole, *parts in zip(straight, *halves, strict=True):
        np.testing.assert_array_equal(whole["low_res"], np.concatenate([part["low_res"] for part in parts]))
    other = pairs(6, edit=edit, seed=4)
    assert any(not np.array_equal(a["low_res"], b["low_res"]) for a, b in zip(straight, other, strict=True))


def test_qualities_are_drawn_from_the_whole_range():
    batch = pairs(1, edit=image_ops.jpeg_smaller(2, (20, 22)), batch_size=40)[0]
    image = np.round((batch["image"] + 1) * 127.5).astype(np.uint8)
    small = np.round((batch["low_res"] + 1) * 127.5).astype(np.uint8)
    found = [
        {q for q in (19, 20, 21, 22, 23) if np.array_equal(image_ops.smaller(x, 2, jpeg_quality=q), y)}
        for x, y in zip(image, small, strict=True)
    ]
    assert all(found) and {min(f) for f in found if len(f) == 1} >= {20, 21, 22}
    assert not any(f <= {19, 23} for f in found)
