"""Folders of images with labels or captions."""

import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from diffax.components import build, spec
from diffax.data import Column, Loader, batches
from diffax.data.folders import MAX_CAPTION, MAX_CAPTIONS, clean_caption
from diffax.errors import UserError

CAPTION = {"caption": Column("caption")}


def write(root, name, colour="red", kind=None, size=(12, 10)):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, kind)


def load(path, name="folder", split="train", channels=3):
    return build(spec("data", name, path=str(path), split=split), "data").open((8, 8, channels))


def test_labels_are_the_sorted_sub_folders(tmp_path):
    for name in (
        "dog/b.png",
        "dog/deep/er/a.JPG",
        "cat/z.webp",
        "emu/1.bmp",
        "emu/2.jpeg",
        "cat/y.gif",
    ):
        write(tmp_path, name)
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / "cat/.hidden.png").write_text("no image")
    source = load(tmp_path)
    assert source.class_names == ("cat", "dog", "emu") and source.keys == ("label",)
    assert [source.where(i) for i in range(6)] == [
        "cat/y.gif",
        "cat/z.webp",
        "dog/b.png",
        "dog/deep/er/a.JPG",
        "emu/1.bmp",
        "emu/2.jpeg",
    ]
    assert [int(record["label"]) for record in source] == [0, 0, 1, 1, 2, 2]
    assert all(record["image"].shape == (10, 12, 3) for record in source)


def test_images_at_the_top_have_no_labels(tmp_path):
    for name in ("1.png", "sub/2.png"):
        write(tmp_path, name)
    source = load(tmp_path, channels=1)
    assert source.keys == () and source.class_names == () and len(source) == 2
    assert source[0].keys() == {"image"} and source[0]["image"].shape == (10, 12, 1)
    with pytest.raises(UserError, match="the data have no 'label'"):
        batches(source, Loader(), shape=(8, 8, 1), batch_size=1, seed=0, columns={"label": Column("label")})


def test_folders_called_like_splits_are_splits(tmp_path):
    write(tmp_path, "train/a/1.png")
    write(tmp_path, "train/b/1.png")
    write(tmp_path, "test/b/2.png")
    assert [len(load(tmp_path)), len(load(tmp_path, split="test"))] == [2, 1]
    assert load(tmp_path).class_names == ("a", "b")
    with pytest.raises(UserError, match="no split 'val', there is test, train"):
        load(tmp_path, split="val")


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, "train/1.png")
    write(tmp_path, "plane/1.png")
    assert load(tmp_path).class_names == ("plane", "train")
    with pytest.raises(UserError, match="no split 'test': the folder has no sub-folders"):
        load(tmp_path, split="test")


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write(tmp_path, "real/a/1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "real/a")
    (tmp_path / "data/again").symlink_to(tmp_path / "real/a")
    (tmp_path / "real/a/loop").symlink_to(tmp_path / "data")
    assert [record["label"] for record in load(tmp_path / "data")] == [0]


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no image \(.jpg, .*\); .*check data.path"):
        load(tmp_path)


def test_batches_of_a_folder_skip_what_is_damaged(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "diffax.data")
    for i in range(6):
        write(tmp_path, f"{i}.png", (40 * i, 0, 0))
    Image.effect_noise((12, 10), 50).save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.png").write_bytes(b"")
    stream = batches(load(tmp_path), Loader(), shape=(8, 8, 3), batch_size=6, seed=0, train=False)
    (batch,) = stream
    assert batch["index"].tolist() == [0, 1, 3, 3, 5, 5]
    reds = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert reds == [0, 40, 120, 120, 200, 200]
    assert sorted(record.getMessage().rsplit(" (", 1)[0] for record in caplog.records) == [
        "skipping 2.png: truncated",
        "skipping 4.png: empty file",
    ]


# ---- captions ----


def test_captions_from_metadata(tmp_path):
    write(tmp_path, "img/1.png", "red")
    write(tmp_path, "2.png", "blue")
    rows = [
        {"file_name": "img/1.png", "text": "a red\n field"},
        {"file_name": "2.png", "caption": "blue", "extra": 1},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = load(tmp_path, "captions")
    assert source.keys == ("caption",)
    assert [record["caption"] for record in source] == ["a red field", "blue"]
    assert [record["image"][0, 0].tolist() for record in source] == [[255, 0, 0], [0, 0, 255]]
    (batch,) = batches(source, Loader(), shape=(8, 8, 3), batch_size=2, seed=0, columns=CAPTION, train=False)
    assert batch["caption"].tolist() == ["a red field", "blue"]


def test_pictures_with_several_captions(tmp_path):
    for name in "abcde":
        write(tmp_path, f"{name}.png")
    (tmp_path / "a.txt").write_text("one\r\n \n  two\tlines \n")
    (tmp_path / "b.txt").write_text("\none\n")
    (tmp_path / "c.txt").write_text("\n \0\n")
    (tmp_path / "d.txt").write_text("x\n" * 10**6)
    (tmp_path / "e.txt").write_bytes(b"")
    want = [("one", "two lines"), "one", "", ("x",) * MAX_CAPTIONS, ""]
    assert [record["caption"] for record in load(tmp_path, "captions")] == want
    texts = [["one", " ", "two\nlines"], "one", [], ["x"] * 10**3, [""]]
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in zip("abcde", texts, strict=True)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [record["caption"] for record in load(tmp_path, "captions")] == want


def test_mix_of_folders(tmp_path):
    """Captions, names of classes, and paths of their own with blanks in them."""
    for i in range(4):
        write(tmp_path / "with text", f"{i}.png", (i, 0, 0))
        (tmp_path / "with text" / f"{i}.txt").write_text(f"number {i}")
    write(tmp_path / "sorted", "big_dog/1.png", (9, 0, 0))
    parts = f"2 captions {tmp_path}/with text,folder {tmp_path / 'sorted'} "
    data = build(spec("data", "mix", parts=parts), "data")
    source = data.open((8, 8, 3))
    assert len(source) == 6 and source.keys == ("caption",)
    want = ["number 0", "big dog", "number 1", "number 2", "big dog", "number 3"]
    assert [record["caption"] for record in source] == want
    assert [int(record["image"][0, 0, 0]) for record in source] == [0, 9, 1, 2, 9, 3]
    assert not data.has_held_out
    assert source.where(1) == f"big_dog/1.png of {tmp_path / 'sorted'}"


def test_captions_from_text_files(tmp_path):
    write(tmp_path, "a/1.png")
    write(tmp_path, "b.jpg")
    (tmp_path / "a/1.txt").write_bytes("\ufeffein Straße".encode())
    (tmp_path / "b.txt").write_bytes(b"bad \xff byte")
    assert [record["caption"] for record in load(tmp_path, "captions")] == [
        "ein Straße",
        "bad \ufffd byte",
    ]
    write(tmp_path, "c.png")
    with pytest.raises(UserError, match="1 of 3 images have no caption, first c.txt"):
        load(tmp_path, "captions")


@pytest.mark.parametrize(
    "line, text",
    [
        ('{"file_name": "1.png"}', "not an image and its caption; .*metadata.jsonl:2"),
        ("not json", "metadata.jsonl:2"),
        ("[]", "metadata.jsonl:2"),
        ('{"file_name": "1.png", "text": 5}', "metadata.jsonl:2"),
        ('{"file_name": "1.png", "text": ["x", 5]}', "metadata.jsonl:2"),
        ('{"file_name": "1.png", "text": {"x": "y"}}', "metadata.jsonl:2"),
        ("[" * 100_000, "metadata.jsonl:2"),
        ('{"file_name": "../1.png", "text": ""}', "leads out of the folder; .*metadata.jsonl:2"),
        ('{"file_name": "/etc/1.png", "text": ""}', "leads out of the folder"),
        ('{"file_name": "a\\\\..\\\\1.png", "text": ""}', "leads out of the folder"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, line, text):
    write(tmp_path, "1.png")
    good = '{"file_name": "1.png", "text": "x"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=text) as caught:
        load(tmp_path, "captions")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines, text",
    [("", "no image listed"), ('{"file_name": "9.png", "text": "x"}', "no such image 9.png")],
)
def test_metadata_without_images(tmp_path, lines, text):
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match=text):
        load(tmp_path, "captions")


def test_listed_image_that_is_not_there_is_skipped(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "diffax.data")
    write(tmp_path, "1.png")
    rows = [{"file_name": name, "text": name} for name in ("1.png", "2.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = batches(load(tmp_path, "captions"), Loader(), shape=(8, 8, 3), batch_size=2, seed=0, columns=CAPTION)
    for batch in itertools.islice(stream, 2):
        assert batch["caption"].tolist() == ["1.png", "1.png"]
    assert [r.getMessage() for r in caplog.records] == [
        "skipping 2.png: No such file or directory (1 bad so far, limit 100)"
    ]


@pytest.mark.parametrize(
    "text, clean",
    [
        ("", ""),
        ("  a\tb\r\n c\0d ", "a b c d"),
        ("e\u0301", "é"),
        ("\ud800x", "\ufffdx"),
        ("שלום 👩‍👩‍👧", "שלום 👩‍👩‍👧"),
        ("a" * 10**6, "a" * MAX_CAPTION),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_clean_caption(text, clean):
    assert clean_caption(text) == clean


def test_any_caption_is_clean_after_one_pass():
    rng = np.random.default_rng(0)
    ranges = [(0, 128), (0x300, 0x370), (0x590, 0x700), (0xD800, 0xE000), (0x1F300, 0x1FA00)]
    for _ in range(500):
        low, high = ranges[rng.integers(len(ranges))]
        text = "".join(chr(c) for c in rng.integers(low, high, size=rng.integers(40)))
        clean = clean_caption(text)
        assert clean_caption(clean) == clean and "\0" not in clean
        assert clean.encode("utf-8").decode("utf-8") == clean
