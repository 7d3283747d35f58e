"""Pictures: conversions, grids, files."""

import io
import os
import pickle
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from diffax.data import images
from diffax.errors import RunError, UserError
from tests.data.image_ops_test import cubic, resized

RNG = np.random.default_rng(0)


def test_bytes_survive_the_round_trip():
    # 2 * 127.5 * (b / 255) is b only up to rounding, and to_uint8 truncates.
    every = np.arange(256, dtype=np.uint8)
    x = images.from_uint8(every)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, every.astype(np.float64) / 127.5 - 1, atol=1e-7)
    assert np.abs(images.to_uint8(x).astype(int) - every).max() <= 1
    np.testing.assert_array_equal(images.to_uint8(x + 1e-4), every)


def test_to_uint8_clips_and_truncates():
    x = np.array([-5, -1, -0.999, 0, 0.5, 0.9999, 1, 5], np.float32)
    want = np.clip((x.astype(np.float64) + 1) * 127.5, 0, 255).astype(int)
    assert want.tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    np.testing.assert_array_equal(images.to_uint8(x), want)
    assert images.to_uint8(x).dtype == np.uint8
    with pytest.raises(ValueError, match="takes uint8, got float32"):
        images.from_uint8(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_sample(bad):
    x = np.zeros((4, 2, 2, 3), np.float32)
    images.check_finite(x, 0)
    x[1, 0, 1, 2] = x[3, 0, 0, 0] = bad
    with pytest.raises(RunError, match="^sample 1 is not finite; not written$"):
        images.check_finite(x)
    with pytest.raises(RunError, match="^sample 33 is not finite; not written$"):
        images.check_finite(x, 32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 8, 1), (5, 2, 3), (6, 3, 2), (3, 1, 3)])
def test_grid_holds_every_tile_in_order(channels, count, columns, rows):
    tiles = RNG.integers(0, 256, (count, 5, 7, channels), np.uint8)
    sheet = images.grid(tiles, columns, pad=2, scale=3)
    columns = min(columns, count)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (rows * (15 + 2) + 2, columns * (21 + 2) + 2, 3)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * 17 + 2, (i % columns) * 23 + 2
        cut = sheet[top : top + 15, left : left + 21]
        np.testing.assert_array_equal(cut[1::3, 1::3], np.broadcast_to(tile, (5, 7, 3)))
        assert (cut == np.kron(tile, np.ones((3, 3, 1), np.uint8))).all()
    assert (sheet[:2] == 255).all() and (sheet[:, :2] == 255).all()


def test_grid_labels_lie_under_their_tiles():
    tiles = np.zeros((3, 64, 64, 3), np.uint8)
    plain = images.grid(tiles, 2)
    labelled = images.grid(tiles, 2, ["seven", None, "a label that is too long for its tile"])
    assert labelled.shape[1] == plain.shape[1]
    line = images.grid(tiles, 2, ["seven", None, None]).shape[0] - plain.shape[0]  # a row is as high as its own labels
    text = labelled.shape[0] - plain.shape[0] - line
    assert 8 <= line <= 20 and 2 * line <= text <= 6 * line and text % line == 0
    second = 2 + 64 + line + 2
    strips = [
        labelled[66 : 66 + line, 2:66],
        labelled[66 : 66 + line, 68:132],
        labelled[second + 64 : second + 64 + text, 2:66],
    ]
    assert (strips[0] < 128).any() and (strips[1] == 255).all()
    assert (strips[2][:line] < 128).any() and (strips[2][-line:] < 128).any()
    assert (labelled[second : second + 64, 2:66] == 0).all() and (labelled[second + 64 + text :] == 255).all()
    assert (labelled[second:, 68:] == 255).all()
    np.testing.assert_array_equal(images.grid(tiles, 2, [None] * 3), plain)


@pytest.mark.parametrize(("side", "tile"), [(8, 48), (28, 56), (32, 64), (64, 64), (256, 256)])
def test_small_images_are_enlarged(side, tile):
    sheet = images.grid(np.zeros((1, side, side, 1), np.uint8), 1, pad=0)
    assert sheet.shape == (tile, tile, 3)


@pytest.mark.parametrize(
    ("array", "columns", "labels", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), 1, None, "takes uint8"),
        (np.zeros((1, 4, 4, 4), np.uint8), 1, None, "takes uint8"),
        (np.zeros((4, 4, 3), np.uint8), 1, None, "takes uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), 1, None, "needs an image"),
        (np.zeros((1, 4, 4, 3), np.uint8), 0, None, "columns >= 1"),
        (np.zeros((2, 4, 4, 3), np.uint8), 1, ["a"], "2 images and 1 labels"),
    ],
)
def test_bad_grids(array, columns, labels, message):
    with pytest.raises(ValueError, match=message):
        images.grid(array, columns, labels)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_round_trip(tmp_path, shape):
    array = RNG.integers(0, 256, shape, np.uint8)
    path = tmp_path / "new" / "picture.png"
    images.save_png(path, array)
    rgb = np.broadcast_to(array.reshape(5, 7, -1), (5, 7, 3))
    np.testing.assert_array_equal(images.read_image(path), rgb)
    assert os.listdir(path.parent) == ["picture.png"]


def test_save_png_refuses_other_arrays(tmp_path):
    for array in (np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="save_png takes uint8"):
            images.save_png(tmp_path / "x.png", array)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    images.save_png(path, np.zeros((2, 2), np.uint8))
    old = path.read_bytes()

    def fill_up(self, file, format):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(RunError, match=r"cannot write x\.png: No space left on device"):
        images.save_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["x.png"]


def test_read_image_converts_every_mode(tmp_path):
    grey = np.array([[0, 127, 255]], np.uint8)
    expected = {
        "L": Image.fromarray(grey),
        "P": Image.fromarray(grey).convert("RGB").quantize(8),
        "LA": Image.fromarray(np.stack([grey, np.full_like(grey, 255)], -1), "LA"),
        "RGBA": Image.fromarray(np.stack([grey] * 3 + [np.full_like(grey, 255)], -1), "RGBA"),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "1": Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1"),
    }
    for mode, image in expected.items():
        image.save(tmp_path / "x.png")
        got = images.read_image(tmp_path / "x.png")
        want = [[0, 255, 255]] if mode == "1" else grey
        np.testing.assert_array_equal(got, np.broadcast_to(np.array(want)[..., None], (1, 3, 3)), err_msg=mode)
    Image.fromarray(np.array([[[10, 20, 30, 0]]], np.uint8), "RGBA").save(tmp_path / "x.png")
    assert images.read_image(tmp_path / "x.png").tolist() == [[[255, 255, 255]]]
    Image.new("CMYK", (2, 2)).save(tmp_path / "x.jpg")
    assert images.read_image(tmp_path / "x.jpg").shape == (2, 2, 3)


def test_read_image_turns_photos_upright(tmp_path):
    array = np.zeros((2, 3, 3), np.uint8)
    array[0, 0] = 255
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # Turned by a quarter, clockwise.
    image.save(tmp_path / "x.png", exif=exif)
    got = images.read_image(tmp_path / "x.png")
    assert got.shape == (3, 2, 3) and got[0, 1].tolist() == [255] * 3 and got.sum() == 765


def test_read_image_errors(tmp_path):
    with pytest.raises(UserError, match="there is no image; .*none.png"):
        images.read_image(tmp_path / "none.png")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="cannot read image"):
        images.read_image(tmp_path / "x.png")
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(UserError, match="cannot read image"):
        images.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("side", [8100, 20_000])
def test_huge_images_are_refused_by_their_header(tmp_path, side):
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UserError, match="MP|exceeds limit"):
        images.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_in_the_layout_of_adm(tmp_path, channels):
    x = RNG.integers(0, 256, (5, 4, 6, channels), np.uint8)
    path = images.save_npz(tmp_path, x, np.arange(5, dtype=np.int32))
    assert path.name == "samples_5x4x6x3.npz"
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (5, 4, 6, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
    got, labels = images.load_npz(path)
    np.testing.assert_array_equal(got, np.broadcast_to(x, (5, 4, 6, 3)))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images.load_npz(images.save_npz(tmp_path / "new", x))[1] is None
    assert os.listdir(tmp_path / "new") == ["samples_5x4x6x3.npz"]


def test_npz_refuses_pickles_and_other_files(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "x.npz", arr_0=np.array([Trap()], object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    for name in ("x", "pickle", "text", "other"):
        with pytest.raises(UserError, match=r"cannot read sample file \(\w+\); .*no pickles"):
            images.load_npz(tmp_path / f"{name}.npz")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UserError, match="there is no sample file"):
        images.load_npz(tmp_path / "none.npz")
    ok = np.zeros((2, 4, 4, 3), np.uint8)
    for arrays, message in [
        (dict(arr_0=ok[0]), "arr_0 is uint8 (4, 4, 3)"),
        (dict(arr_0=ok * 1.0), "arr_0 is float64"),
        (dict(arr_0=ok, arr_1=np.zeros(3, int)), "arr_1 is int64 (3,)"),
    ]:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError, match=re.escape(message)):
            images.load_npz(tmp_path / "bad.npz")


def test_save_npz_refuses_bad_arrays(tmp_path):
    ok = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="save_npz takes uint8"):
        images.save_npz(tmp_path, ok.astype(np.float32))
    for labels in (np.zeros(3, int), np.zeros(2)):
        with pytest.raises(ValueError, match="labels must be int"):
            images.save_npz(tmp_path, ok, labels)


# ---- enlarging ----


@pytest.mark.parametrize(("factor", "size"), [(2, (9, 14)), (4, (8, 8)), (3, (5, 4))])
@pytest.mark.parametrize("channels", [1, 3])
def test_bicubic_is_the_kernel_and_what_pillow_makes_of_bytes(factor, size, channels):
    height, width = factor * size[0], factor * size[1]
    noise = RNG.integers(0, 256, (2, *size, channels), np.uint8)
    # Pillow rounds and clips bytes after each of its two passes, which shows where pictures are not smooth.
    smooth = np.stack([images.to_uint8(0.4 * np.cos(np.indices((*size, channels)).sum(0) / 3 + i)) for i in range(2)])
    for tiles in (noise, smooth):
        got = images.bicubic(images.from_uint8(tiles), factor)
        assert got.shape == (2, height, width, channels) and got.dtype == np.float32 and np.abs(got).max() <= 1
        want = [resized(tile.astype(np.float64), height, width, cubic, 2) for tile in tiles]
        np.testing.assert_allclose((got + 1) * 127.5, want, atol=1e-3)
    for tile, large in zip(smooth, got, strict=True):
        image = Image.fromarray(tile[..., 0] if channels == 1 else tile)
        bytes_ = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).reshape(large.shape)
        assert np.abs((large + 1) * 127.5 - bytes_).max() < 1.2, (
            "two roundings, the first of which the filter magnifies"
        )


SIZES = [(1, 1), (7, 30), (8, 8), (9, 8), (13, 21), (64, 17), (40, 40)]
TILES = [(8, 2), (8, 0), (6, 5), (16, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_tiles_of_a_picture_give_it_back(size, tile, overlap):
    picture = RNG.uniform(-1, 1, (*size, 3)).astype(np.float32)
    corners, covered = images.tile_corners(size, tile, overlap=overlap)
    extended = images.pad_reflecting(picture, covered)
    assert extended.shape == (*covered, 3)
    tiles = np.stack([extended[y : y + tile, x : x + tile] for y, x in corners])
    assert tiles.shape == (len(corners), tile, tile, 3), "every tile is whole"
    whole = images.blend_tiles(tiles, corners, overlap=overlap)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, extended, atol=1e-6)
    np.testing.assert_array_equal(extended[: size[0], : size[1]], picture)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_there_are_no_more_tiles_than_needed(size, tile, overlap):
    corners, covered = images.tile_corners(size, tile, overlap=overlap)
    assert len(set(corners)) == len(corners)
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in corners})
        assert starts == [i * (tile - overlap) for i in range(len(starts))]
        assert covered[axis] == starts[-1] + tile >= size[axis]
        assert len(starts) == 1 or starts[-2] + tile < size[axis], "the last one is needed"


@pytest.mark.parametrize("size", [(6, 4), (7, 10), (25, 31)])
def test_pictures_are_extended_by_their_mirror_image(size):
    picture = RNG.integers(0, 256, (6, 4, 3), np.uint8)
    got = images.pad_reflecting(picture, size)
    # A mirror image of the whole, and of that again: period 2 h, as often as it takes.
    twice = np.concatenate([picture, picture[::-1]])
    twice = np.concatenate([twice, twice[:, ::-1]], axis=1)
    want = np.tile(twice, (3, 4, 1))[: size[0], : size[1]]
    np.testing.assert_array_equal(got, want)


def test_neighbouring_tiles_fade_into_each_other():
    """Of a black and a white tile: a ramp over the overlap, with no step larger than its share."""
    tile, overlap = 16, 4
    corners, _ = images.tile_corners((tile, 28), tile, overlap=overlap)
    assert corners == [(0, 0), (0, 12)]
    tiles = np.stack([np.full((tile, tile, 1), value, np.float32) for value in (-1, 1)])
    blended = images.blend_tiles(tiles, corners, overlap=overlap)[..., 0]
    np.testing.assert_allclose(blended, np.broadcast_to(blended[:1], blended.shape), atol=1e-6)
    row = blended[0]
    assert (row[:12] == -1).all() and (row[16:] == 1).all()
    np.testing.assert_allclose(np.diff(row)[11:16], 2 / (overlap + 1), atol=1e-6)
