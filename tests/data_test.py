"""Batches by position: the laws of `diffax.data.batches`, on a source made of arithmetic."""

import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest

from diffax.data import Source, batches, load_source, names
from diffax.data.image_ops import BadRecord
from diffax.errors import RunError, UserError

DATA = {
    "name": "toy",
    "path": "",
    "data_dir": "",
    "split": "train",
    "flip": False,
    "crop": "center",
    "max_bad": 100,
    "workers": 0,
    "shuffle_seed": 0,
}
SHAPE = (6, 6, 3)


def toy(size, bad=()):
    """Record i: a random picture of its own, label i % 7, and unreadable if i is in `bad`."""

    def read(i):
        if i in bad:
            raise BadRecord("truncated")
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        return {"image": pixels, "label": np.int32(i % 7), "caption": f"number {i}"}

    return Source("toy", size, read, ("label", "caption"), tuple("abcdefg"), "img/{:05d}.png".format)


def take(count, source, *, data=(), **kwargs):
    stream = batches(source, DATA | dict(data), shape=SHAPE, **{"seed": 0} | kwargs)
    return list(itertools.islice(stream, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


RANDOM = {"flip": True, "crop": "random"}


def test_batch_holds_what_was_asked_for():
    (batch,) = take(1, toy(20), batch_size=8, keys=("label", "caption"))
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
    (batch,) = itertools.islice(batches(source, DATA, shape=(16, 16, 1), batch_size=1, seed=0), 1)
    np.testing.assert_allclose(batch["image"].ravel(), np.arange(256) / 127.5 - 1, atol=1e-7)
    back = ((batch["image"] + 1) * np.float32(127.5)).clip(0, 255).round()
    np.testing.assert_array_equal(back.ravel(), np.arange(256))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("train", [True, False])
def test_processes_share_the_same_global_batch(processes, train):
    whole = take(5, toy(23), data=RANDOM, batch_size=8, train=train)
    parts = [
        take(
            5,
            toy(23),
            data=RANDOM,
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
    straight = take(10, toy(23), data=RANDOM, batch_size=8)
    assert_same(straight[step:], take(10 - step, toy(23), data=RANDOM, batch_size=8, start_step=step))


def test_far_step_is_reached_at_once():
    (batch,) = take(1, toy(23), batch_size=8, start_step=10**9)
    assert batch["image"].shape == (8, *SHAPE)


@pytest.mark.parametrize("workers", [1, 5])
def test_threads_do_not_change_batches(workers):
    assert_same(
        take(4, toy(23), data=RANDOM, batch_size=12),
        take(4, toy(23), data=RANDOM | {"workers": workers}, batch_size=12),
    )


def test_every_epoch_holds_each_record_once_in_another_order():
    ids = np.concatenate([batch["index"] for batch in take(10, toy(20), batch_size=6)])
    epochs = ids.reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_shuffle_seed():
    def ids(seed, shuffle_seed):
        (batch,) = take(1, toy(50), data={"shuffle_seed": shuffle_seed}, batch_size=50, seed=seed)
        return tuple(batch["index"])

    assert ids(0, 0) == ids(0, 0)
    assert len({ids(0, 0), ids(1, 0), ids(0, 1)}) == 3


def test_flips_are_even_and_differ_between_epochs():
    flips = []
    (whole,) = take(1, toy(50), batch_size=50, train=False)
    for batch in take(20, toy(50), data={"flip": True}, batch_size=50):
        plain = whole["image"][batch["index"]]
        is_flipped = (batch["image"] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(~is_flipped, (batch["image"] == plain).all(axis=(1, 2, 3)))
        flips.append(is_flipped[np.argsort(batch["index"])])
    assert 400 < np.sum(flips) < 600
    assert not np.array_equal(flips[0], flips[1])


def test_one_pass_is_in_order_unaugmented_and_ends_with_a_short_batch():
    passed = take(99, toy(23), data=RANDOM, batch_size=8, train=False)
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
    whole = take(4, toy(20, bad), data=RANDOM, batch_size=8)
    parts = [take(4, toy(20, bad), data=RANDOM, batch_size=8, process_index=p, process_count=2) for p in range(2)]
    for k in range(4):
        np.testing.assert_array_equal(whole[k]["image"], np.concatenate([part[k]["image"] for part in parts]))


def test_more_bad_records_than_allowed_end_the_run():
    assert len(take(2, toy(20, bad={1, 2, 3}), data={"max_bad": 3}, batch_size=20)) == 2
    with pytest.raises(
        RunError,
        match=r"4 unreadable records, limit data.max_bad=3; toy, the last "
        r"img/0000[1-4].png \(truncated\); repair",
    ):
        take(2, toy(20, bad={1, 2, 3, 4}), data={"max_bad": 3}, batch_size=20)


def test_data_without_one_good_record_ends_the_run():
    with pytest.raises(RunError, match="no record is readable; toy"):
        take(1, toy(5, bad=set(range(5))), batch_size=4)


def test_labels_come_by_default_where_there_are_any():
    assert "label" in take(1, toy(5), batch_size=4)[0]
    plain = Source("plain", 5, lambda i: {"image": np.zeros((6, 6, 3), np.uint8)})
    assert set(take(1, plain, batch_size=4)[0]) == {"image", "index"}


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"batch_size": 6, "process_count": 4}, "batch size 6 is not divisible by 4 processes"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 4, "keys": ("depth",)}, r"no 'depth', only \['label', 'caption'\]; toy"),
        ({"batch_size": 4, "data": {"crop": "middle"}}, "unknown crop 'middle'; data.crop"),
    ],
)
def test_bad_requests_are_refused_at_once(kwargs, text):
    with pytest.raises(UserError, match=text):
        take(0, toy(8), **kwargs)


def test_source_has_a_length_and_an_end():
    source = toy(3)
    assert [len(source), source[2]["label"], len(list(source))] == [3, 2, 3]
    with pytest.raises(IndexError, match="record 3 of 3; toy"):
        source[3]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"name": "digit"}, "unknown data 'digit', there is digits, .*did you mean 'digits'"),
        ({"name": "zzz"}, "unknown data 'zzz'.*choose one of them"),
        ({"name": "folder"}, "no folder given; data.path"),
        ({"name": "folder", "path": "/no/such"}, "no such folder; data.path='/no/such'"),
        ({"name": "captions", "path": "/no/such"}, "no such folder; data.path='/no/such'"),
        ({"name": "tfds"}, "no folder given; data.path"),
        ({"name": "tfds", "path": "/no/such"}, "no dataset_info.json below data.path; /no/such"),
        ({"name": "digits", "data_dir": "gs://bucket/x"}, "not a local folder; data.data_dir"),
        ({"name": "shapes", "holdout": ("red star",)}, "no such combination 'red star'"),
        ({"name": "shapes", "split": "holdout"}, "split 'holdout' is empty; data.holdout"),
    ],
)
def test_bad_data_sections_are_refused_before_anything_is_prepared(change, text, tmp_path):
    with pytest.raises(UserError, match=text) as caught:
        load_source(DATA | {"data_dir": str(tmp_path)} | change, shape=SHAPE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_shapes_with_other_channels_are_refused():
    with pytest.raises(UserError, match="images have 1 or 3 channels, got 4"):
        load_source(DATA | {"name": "digits"}, shape=(8, 8, 4))


def test_names_are_the_datasets():
    assert names() == [
        "digits",
        "shapes",
        "photos",
        "cifar10",
        "mnist",
        "folder",
        "captions",
        "tfds",
    ]


def test_reading_needs_no_tensorflow_and_a_live_iterator_lets_the_program_end(tmp_path):
    """Two programs prepare the same data at once: one does it, both read it, both end."""
    program = f"""
import sys
from diffax.data import batches, load_source
data = {DATA | {"name": "digits", "data_dir": str(tmp_path)}!r}
stream = batches(load_source(data, shape=(8, 8, 1)), data, shape=(8, 8, 1), batch_size=4, seed=0)
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
