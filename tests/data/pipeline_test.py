"""Batches by position: the laws of `diffax.data.batches`, on a source made of arithmetic."""

import itertools
import logging
import subprocess
import sys
import types

import numpy as np
import pytest

from diffax.components import defaults
from diffax.data import Column, Loader, Source, batches, captioned, examples
from diffax.data.image_ops import BadRecord
from diffax.errors import RunError, UserError

LABEL = {"label": Column("label")}
SHAPE = (6, 6, 3)


def toy(size, bad=()):
    """Record i: a random picture of its own, label i % 7, and unreadable if i is in `bad`."""

    def read(i):
        if i in bad:
            raise BadRecord("truncated")
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        return {"image": pixels, "label": np.int32(i % 7), "caption": f"number {i}"}

    return Source("toy", size, read, ("label", "caption"), tuple("abcdefg"), "img/{:05d}.png".format)


def take(count, source, *, loader=(), **kwargs):
    stream = batches(source, dict(loader), shape=SHAPE, **{"seed": 0} | kwargs)
    return list(itertools.islice(stream, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


RANDOM = {"flip": True, "crop": "random"}


def test_batch_holds_its_columns():
    (batch,) = take(1, toy(20), batch_size=8, columns=LABEL | {"caption": Column("caption")})
    assert {key: (value.shape, value.dtype.str[1:]) for key, value in batch.items()} == {
        "image": ((8, *SHAPE), "f4"),
        "index": ((8,), "i8"),
        "label": ((8,), "i4"),
        "caption": ((8,), "O"),
    }
    assert -1 <= batch["image"].min() < -0.7 and 0.7 < batch["image"].max() <= 1
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    assert list(batch["caption"]) == [f"number {i}" for i in batch["index"]]


def test_pixels_are_x_over_127_5_minus_1():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    source = Source("levels", 1, lambda i: {"image": levels})
    (batch,) = itertools.islice(batches(source, Loader(), shape=(16, 16, 1), batch_size=1, seed=0), 1)
    np.testing.assert_allclose(batch["image"].ravel(), np.arange(256) / 127.5 - 1, atol=1e-7)
    back = ((batch["image"] + 1) * np.float32(127.5)).clip(0, 255).round()
    np.testing.assert_array_equal(back.ravel(), np.arange(256))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("train", [True, False])
def test_processes_share_the_same_global_batch(processes, train):
    whole = take(5, toy(23), loader=RANDOM, batch_size=8, train=train)
    parts = [
        take(
            5,
            toy(23),
            loader=RANDOM,
            batch_size=8,
            process_index=p,
            process_count=processes,
            train=train,
        )
        for p in range(processes)
    ]
    joined = [{key: np.concatenate([part[k][key] for part in parts]) for key in whole[k]} for k in range(len(whole))]
    assert_same(whole, joined)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_resumed_stream_equals_the_straight_one(step):
    straight = take(10, toy(23), loader=RANDOM, batch_size=8)
    assert_same(straight[step:], take(10 - step, toy(23), loader=RANDOM, batch_size=8, start_step=step))


def test_far_step_is_reached_at_once():
    (batch,) = take(1, toy(23), batch_size=8, start_step=10**9)
    assert batch["image"].shape == (8, *SHAPE)


@pytest.mark.parametrize("workers", [1, 5])
def test_threads_do_not_change_batches(workers):
    assert_same(
        take(4, toy(23), loader=RANDOM, batch_size=12),
        take(4, toy(23), loader=RANDOM | {"workers": workers}, batch_size=12),
    )


def test_every_epoch_holds_each_record_once_in_another_order():
    ids = np.concatenate([batch["index"] for batch in take(10, toy(20), batch_size=6)])
    epochs = ids.reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_shuffle_seed():
    def ids(seed, shuffle_seed):
        (batch,) = take(1, toy(50), loader={"shuffle_seed": shuffle_seed}, batch_size=50, seed=seed)
        return tuple(batch["index"])

    assert ids(0, 0) == ids(0, 0)
    assert len({ids(0, 0), ids(1, 0), ids(0, 1)}) == 3


def test_flips_are_even_and_differ_between_epochs():
    flips = []
    (whole,) = take(1, toy(50), batch_size=50, train=False)
    for batch in take(20, toy(50), loader={"flip": True}, batch_size=50):
        plain = whole["image"][batch["index"]]
        is_flipped = (batch["image"] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(~is_flipped, (batch["image"] == plain).all(axis=(1, 2, 3)))
        flips.append(is_flipped[np.argsort(batch["index"])])
    assert 400 < np.sum(flips) < 600
    assert not np.array_equal(flips[0], flips[1])


def test_one_pass_is_in_order_unaugmented_and_ends_with_a_short_batch():
    passed = take(99, toy(23), loader=RANDOM, batch_size=8, train=False)
    assert [len(batch["index"]) for batch in passed] == [8, 8, 7]
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in passed]), np.arange(23))
    assert_same(passed, take(99, toy(23), batch_size=8, train=False, seed=5))


def test_every_process_gets_as_many_batches_in_one_pass():
    parts = [take(99, toy(17), batch_size=8, train=False, process_index=p, process_count=4) for p in range(4)]
    assert [[len(batch["index"]) for batch in part] for part in parts] == [
        [2, 2, 1],
        [2, 2, 0],
        [2, 2, 0],
        [2, 2, 0],
    ]
    assert parts[3][2]["image"].shape == (0, *SHAPE)


def test_bad_record_is_replaced_by_the_next_good_one_and_named_once(caplog):
    caplog.set_level(logging.WARNING, "diffax.data")
    good = take(6, toy(20), batch_size=10)
    some = take(6, toy(20, bad={12, 13}), batch_size=10)
    for a, b in zip(good, some, strict=True):
        np.testing.assert_array_equal(b["index"], np.where((a["index"] == 12) | (a["index"] == 13), 14, a["index"]))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(f"({n} bad so far, limit 100)" in line for n, line in enumerate(lines, 1))
    assert {line.split(": ")[0] for line in lines} == {
        "skipping img/00012.png",
        "skipping img/00013.png",
    }


def test_bad_records_are_skipped_alike_by_any_number_of_processes():
    bad = {0, 5, 19}
    whole = take(4, toy(20, bad), loader=RANDOM, batch_size=8)
    parts = [take(4, toy(20, bad), loader=RANDOM, batch_size=8, process_index=p, process_count=2) for p in range(2)]
    for k in range(4):
        np.testing.assert_array_equal(whole[k]["image"], np.concatenate([part[k]["image"] for part in parts]))


def test_more_bad_records_than_allowed_end_the_run():
    assert len(take(2, toy(20, bad={1, 2, 3}), loader={"max_bad": 3}, batch_size=20)) == 2
    with pytest.raises(
        RunError,
        match=r"4 unreadable records, limit loader.max_bad=3; toy, the last "
        r"img/0000[1-4].png \(truncated\); repair",
    ):
        take(2, toy(20, bad={1, 2, 3, 4}), loader={"max_bad": 3}, batch_size=20)


def test_data_without_one_good_record_ends_the_run():
    with pytest.raises(RunError, match="no record is readable; toy"):
        take(1, toy(5, bad=set(range(5))), batch_size=4)


def test_columns_convert_what_records_hold():
    rows = {"whole": 3, "real": 0.5, "row": np.ones(4, np.float64), "text": "abc", "yes": True}
    source = Source("all", 5, lambda i: {"image": np.zeros((6, 6, 3), np.uint8), **rows}, tuple(rows))
    assert set(take(1, source, batch_size=4)[0]) == {"image", "index"}
    columns = {key: Column(key) for key in rows} | {"twice": Column("whole", lambda values: 2 * np.array(values))}
    (batch,) = take(1, source, batch_size=4, columns=columns)
    found = {name: (batch[name].dtype, batch[name].shape) for name in columns if name != "twice"}
    assert found == {
        "whole": (np.int32, (4,)),
        "real": (np.float32, (4,)),
        "row": (np.float32, (4, 4)),
        "text": (object, (4,)),
        "yes": (np.bool_, (4,)),
    }
    assert batch["twice"].tolist() == [6] * 4 and batch["text"].tolist() == ["abc"] * 4


def test_loaders_are_mappings_or_objects():
    want = take(2, toy(20), loader=RANDOM, batch_size=8)
    settings = Loader(**RANDOM)
    assert defaults(Loader) == Loader().__dict__
    for loader in (settings, types.SimpleNamespace(**settings.__dict__)):
        stream = batches(toy(20), loader, shape=SHAPE, batch_size=8, seed=0)
        assert_same(want, list(itertools.islice(stream, 2)))


# ---- edits ----


def darker(pixels, rng):
    """Half as bright, in a window; and the pixel at a place that is drawn."""
    place = rng.integers(6, size=2)
    return pixels[:4, :5] // 2, {"pixel": pixels[tuple(place)][None, None]}


def test_edits_change_pictures_and_add_others():
    plain, edited = (take(3, toy(20), loader=RANDOM, batch_size=8, edit=edit) for edit in (None, darker))
    for before, after in zip(plain, edited, strict=True):
        assert after.keys() == {"image", "pixel", "index"} and before.keys() == {"image", "index"}
        assert after["image"].shape == (8, 4, 5, 3) and after["pixel"].shape == (8, 1, 1, 3)
        levels = np.round((before["image"] + 1) * 127.5).astype(int)
        np.testing.assert_allclose(after["image"], (levels[:, :4, :5] // 2) / 127.5 - 1, atol=1e-6)
        for picture, pixel in zip(before["image"], after["pixel"], strict=True):
            assert (picture == pixel).all(-1).any()
    assert len({after["pixel"].tobytes() for after in edited}) == 3
    assert_same(edited[1:], take(2, toy(20), loader=RANDOM, batch_size=8, edit=darker, start_step=1))


def test_batches_without_rows_have_edited_pictures_and_columns():
    kwargs = {"batch_size": 8, "train": False, "edit": darker, "columns": LABEL, "process_count": 4}
    parts = [take(99, toy(17), process_index=p, **kwargs) for p in range(4)]
    empty = parts[3][2]
    assert {name: (values.shape, values.dtype) for name, values in empty.items()} == {
        name: ((0, *values.shape[1:]), values.dtype) for name, values in parts[0][0].items()
    }


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"batch_size": 6, "process_count": 4}, "batch size 6 is not divisible by 4 processes"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 4, "columns": {"d": Column("depth")}}, r"no 'depth', only \['label', 'caption'\]; toy"),
        ({"batch_size": 4, "loader": {"crop": "middle"}}, "unknown crop 'middle'; loader.crop"),
    ],
)
def test_bad_requests_are_refused_at_once(kwargs, text):
    with pytest.raises(UserError, match=text):
        take(0, toy(8), **kwargs)


# ---- captions ----


def spelled(**more):
    return {"text": Column("caption", spell), **more}


def spell(captions):
    """A tokenizer of single characters: int32 [n, 12]."""
    rows = [[ord(c) for c in caption[:12]] for caption in captions]
    return np.array([row + [-1] * (12 - len(row)) for row in rows], np.int32).reshape(-1, 12)


def talkative(size):
    """Record i has i % 3 + 1 captions."""

    def read(i):
        texts = tuple(f"{i} {'abc'[k]}" for k in range(i % 3 + 1))
        return {"image": np.zeros((6, 6, 3), np.uint8), "caption": texts if len(texts) > 1 else texts[0]}

    return Source("talkative", size, read, ("caption",))


def read_back(batch):
    return ["".join(chr(c) for c in row if c >= 0) for row in batch["text"]]


def test_captions_become_text():
    for batch in take(3, toy(20), batch_size=8, columns=spelled()):
        assert set(batch) == {"image", "index", "text"}
        assert batch["text"].shape == (8, 12) and batch["text"].dtype == np.int32
        assert read_back(batch) == [f"number {i}" for i in batch["index"]]
    assert_same(
        [
            {k: v for k, v in batch.items() if k != "text"}
            for batch in take(3, toy(20), batch_size=8, columns=spelled())
        ],
        take(3, toy(20), batch_size=8),
    )


def test_one_of_several_captions_is_drawn_at_each_visit():
    seen = {i: [] for i in range(8)}
    stream = take(30, talkative(8), batch_size=8, columns=spelled(caption=Column("caption")))
    for batch in stream:
        assert batch["caption"].tolist() == read_back(batch)
        for i, text in zip(batch["index"], read_back(batch), strict=True):
            number, letter = text.split()
            assert number == str(i)
            seen[int(i)].append(letter)
    assert {i: set(letters) for i, letters in seen.items()} == {i: set("abc"[: i % 3 + 1]) for i in range(8)}
    assert all(3 < seen[i].count(letter) < 18 for i in (2, 5) for letter in "abc"), "even"
    assert_same(
        stream[7:9], take(2, talkative(8), batch_size=8, columns=spelled(caption=Column("caption")), start_step=7)
    )
    again = take(9, talkative(8), batch_size=8, columns=spelled(), seed=1)
    assert [sorted(read_back(batch)) for batch in again] != [sorted(read_back(batch)) for batch in stream[:9]]


def test_processes_share_captions_too():
    whole = take(4, talkative(17), batch_size=8, columns=spelled())
    parts = [
        take(4, talkative(17), batch_size=8, columns=spelled(), process_index=p, process_count=2) for p in range(2)
    ]
    assert_same(whole, [{k: np.concatenate([part[n][k] for part in parts]) for k in whole[n]} for n in range(4)])


def test_examples_have_first_captions_as_text_and_as_they_are():
    columns = spelled(caption=Column("caption"))
    batch = examples(talkative(5), Loader(), shape=SHAPE, limit=4, columns=columns)
    assert batch["caption"].tolist() == read_back(batch) == ["0 a", "1 a", "2 a", "3 a"]
    batch = examples(toy(5), Loader(), shape=SHAPE, limit=2, columns=LABEL)
    assert set(batch) == {"image", "index", "label"} and batch["label"].tolist() == [0, 1]
    assert set(examples(toy(5), Loader(), shape=SHAPE, limit=9)) == {"image", "index"}


def test_batches_without_rows_have_text_of_the_same_length():
    parts = [
        take(9, talkative(9), batch_size=8, train=False, columns=spelled(), process_index=p, process_count=2)
        for p in range(2)
    ]
    assert [[batch["text"].shape for batch in part] for part in parts] == [[(4, 12), (1, 12)], [(4, 12), (0, 12)]]


def classes(size, labels=(0, 1, 2)):
    read = lambda i: {"image": np.full((6, 6, 3), i, np.uint8), "label": np.int32(labels[i % len(labels)])}  # noqa: E731
    return Source("classes", size, read, ("label",), ("tabby_cat", "dog", "ring"))


def test_classes_are_captioned_by_their_names():
    (batch,) = take(1, classes(6), batch_size=6, columns=spelled() | LABEL, train=False)
    assert read_back(batch) == ["tabby cat", "dog", "ring"] * 2 and batch["label"].tolist() == [0, 1, 2] * 2
    assert captioned(classes(2, labels=(-1,)))[0]["caption"] == ""
    source = toy(3)
    assert captioned(source) is source


@pytest.mark.parametrize("keys", [(), ("label",)])
def test_data_that_nothing_captions_are_refused(keys):
    source = Source("plain", 5, lambda i: {"image": np.zeros((6, 6, 3), np.uint8), "label": 0}, keys)
    with pytest.raises(UserError, match="the data have neither captions nor named classes; plain; take other data"):
        batches(source, Loader(), shape=SHAPE, batch_size=1, seed=0, columns=spelled())


def test_reading_needs_no_tensorflow_and_a_live_iterator_lets_the_program_end(tmp_path):
    """Two programs prepare the same data at once: one does it, both read it, both end."""
    program = f"""
import sys
from diffax.components import build, spec
from diffax.data import Loader, batches
source = build(spec("data", "digits", data_dir={str(tmp_path)!r}), "data").open((8, 8, 1))
stream = batches(source, Loader(), shape=(8, 8, 1), batch_size=4, seed=0)
print(next(stream)['index'].tolist())
print([name for name in ('tensorflow', 'torch') if name in sys.modules])
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].splitlines()[1] == "[]"
    assert sorted("preparing" in errors for _, errors in outputs) == [False, True]
