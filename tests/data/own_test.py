"""Data of a researcher's own: a factory in this file, named by its import path."""

import itertools
from typing import Annotated

import numpy as np
import pytest

from diffax.components import TRAINING, In, build, find, override, schema, spec
from diffax.data import Column, Data, Loader, Source, Splits, batches
from diffax.errors import UserError

NAME = "tests.data.own_test:squares"
SHAPE = (8, 8, 1)


def squares(
    *,
    count: Annotated[int, In(1), TRAINING] = 12,
    split: Annotated[str, TRAINING] = "train",
) -> Data:
    """White squares on black, captioned by their side.

    Args:
      count: how many.
      split: 'train' or 'test'.
    """

    def load(shape, split):
        def read(index: int):
            side = index % 4 + 1
            image = np.zeros(shape, np.uint8)
            image[:side, :side] = 255
            return {"image": image, "side": side, "corner": np.float64(side / 2), "caption": f"{side} {split}"}

        return Source(f"squares {split}", count, read, ("side", "corner", "caption"))

    return Splits(load, split, test="test")


def test_they_are_opened_by_build():
    data = build(spec("data", NAME, count=5), "data")
    assert data.has_held_out and len(data.open(SHAPE)) == 5
    assert [data.open(SHAPE)[1]["caption"], data.held_out(SHAPE)[1]["caption"]] == ["2 train", "2 test"]
    section = spec("data", NAME)
    override(schema(find("data", NAME)), section, ["count"], "7", "config.data")
    assert len(build(section, "data").open(SHAPE)) == 7
    with pytest.raises(UserError, match="^config.base.data.count must be .*at least 1, got 0"):
        build(spec("data", NAME, count=0), "data", path="config.base.data")


def test_they_are_batched():
    columns = {"side": Column("side"), "y": Column("corner"), "text": Column("caption", lambda texts: np.array(texts))}
    source = build(spec("data", NAME), "data").open(SHAPE)
    for batch in itertools.islice(batches(source, Loader(), shape=SHAPE, batch_size=6, seed=0, columns=columns), 4):
        assert batch["image"].shape == (6, *SHAPE)
        np.testing.assert_array_equal(batch["side"], batch["index"] % 4 + 1)
        np.testing.assert_array_equal(((batch["image"] + 1) / 2).sum((1, 2, 3)), batch["side"] ** 2)
        np.testing.assert_array_equal(batch["y"], batch["side"] / np.float32(2))
        assert batch["y"].dtype == np.float32 and batch["side"].dtype == np.int32
        assert batch["text"].tolist() == [f"{side} train" for side in batch["side"]]


def test_they_are_mixed(tmp_path):
    parts = f"2 {NAME}, digits,{NAME}"
    data = build(spec("data", "mix", parts=parts, data_dir=str(tmp_path)), "data")
    assert data.has_held_out
    source = data.open(SHAPE)
    assert [record["caption"] for record in itertools.islice(source, 4)] == [
        "1 train",
        source[1]["caption"],
        "1 train",
        "2 train",
    ]
    assert len(source) == 4 * 1621 and source.keys == ("caption",)
    assert [where.split(" of ")[1] for where in map(source.where, range(4))] == [
        "squares train",
        "diffax_digits/8/1.0.0[train]",
        "squares train",
        "squares train",
    ]
    assert data.held_out(SHAPE)[0]["caption"] == "1 test"
    test = build(spec("data", "mix", parts=NAME, split="test"), "data").open(SHAPE)
    assert test[0]["caption"] == "1 test"
