"""Mixes of data: their order, captions and bad records, on sources made of arithmetic."""

import logging

import numpy as np
import pytest

from diffax.data import Source, mixed
from diffax.errors import UserError
from tests.data.pipeline_test import assert_same, classes, spelled, take, talkative, toy


def test_mix_holds_sources_by_weight_and_every_record():
    both = mixed([talkative(10), classes(4), toy(3)], [3, 1, 1])
    assert len(both) == 5 * 4 and both.keys == ("caption",) and both.class_names == ()
    where = [both.where(i) for i in range(20)]
    for start in range(0, 20, 5):
        assert [w.split(" of ")[1] for w in where[start : start + 5]].count("talkative") == 3
    assert [w.split(" of ")[1] for w in where[:5]] == ["talkative", "talkative", "classes", "toy", "talkative"]
    records = {
        name: [w.split(" of ")[0] for w in where if w.endswith(name)] for name in ("talkative", "classes", "toy")
    }
    assert records["talkative"] == [f"record {i % 10}" for i in range(12)]
    assert records["classes"] == [f"record {i}" for i in range(4)]
    assert records["toy"] == [f"img/{i % 3:05d}.png" for i in range(4)]
    captions = [record["caption"] for record in both]
    assert captions[:5] == ["0 a", ("1 a", "1 b"), "tabby cat", "number 0", ("2 a", "2 b", "2 c")]
    assert both[2].keys() == {"image", "caption"}
    np.testing.assert_array_equal(both[3]["image"], toy(3)[0]["image"])


def test_mix_of_one_is_that_one():
    both = mixed([toy(7)], [1])
    assert [record["caption"] for record in both] == [record["caption"] for record in toy(7)]


def test_mix_with_a_source_that_nothing_captions_has_pictures_only():
    plain = Source("plain", 5, lambda i: {"image": np.zeros((6, 6, 3), np.uint8)})
    both = mixed([toy(5), plain], [1, 1])
    assert both.keys == () and both[0].keys() == {"image"}
    (batch,) = take(1, both, batch_size=10, train=False)
    assert set(batch) == {"image", "index"}
    with pytest.raises(UserError, match="neither captions nor named classes; mix of 1 toy, 1 plain; "):
        take(1, both, batch_size=10, columns=spelled())


def test_mixed_batches_resume_and_name_bad_records(caplog):
    caplog.set_level(logging.WARNING, "diffax.data")
    both = mixed([toy(10, bad={4}), talkative(10)], [1, 1])
    straight = take(8, both, batch_size=6, columns=spelled())
    assert_same(straight[5:], take(3, both, batch_size=6, columns=spelled(), start_step=5))
    assert "skipping img/00004.png of toy: truncated" in caplog.text
