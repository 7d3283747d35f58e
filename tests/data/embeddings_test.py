"""Image embeddings in files: what is written is read, interrupted jobs go on, other data and networks are refused."""

import dataclasses

import numpy as np
import pytest

from diffax import data
from diffax.data import Column, Loader, Source
from diffax.errors import UserError

SHAPE, SIZE, RECORDS = (4, 4, 3), 5, 23


def pictures(captions=True):
    """Records whose first pixel is 10 times their number; the third has two captions."""

    def read(index):
        image = np.full(SHAPE, 10 * index, np.uint8)
        texts = ("one", "another") if index == 2 else f"number {index}"
        return {"image": image, "caption": texts} if captions else {"image": image}

    return Source("pictures", RECORDS, read, ("caption",) if captions else ())


def embed(image):
    return np.stack([image[:, 0, 0, 0] * k for k in range(1, SIZE + 1)], 1).astype(np.float32)


def write(folder, source=None, embed=embed, **more):
    options = dict(shape=SHAPE, clip="a", batch_size=3, shard=6) | more
    return list(data.write_embeddings(folder, source or pictures(), Loader(), embed=embed, **options))


def want(index):
    return (np.float32(10 * index) / np.float32(127.5) - 1) * np.arange(1, SIZE + 1, dtype=np.float32)


def test_what_is_written_is_read(tmp_path):
    assert write(tmp_path / "e") == [(k, 4) for k in range(1, 5)]
    found = data.embedded(tmp_path / "e", clip="a", size=SIZE)
    assert len(found) == RECORDS and found.keys == ("image_embedding", "caption")
    for index in range(RECORDS):
        np.testing.assert_allclose(found[index]["image_embedding"], want(index), rtol=1e-6)
    assert found[2]["caption"] == ("one", "another") and found[22]["caption"] == "number 22"
    assert sorted(p.name for p in (tmp_path / "e").iterdir())[-1] == "embeddings.json", "nothing else is left"
    columns = {key: Column(key) for key in found.keys}
    stream = data.batches(found, Loader(), shape=(1, 1, 3), batch_size=RECORDS, seed=0, columns=columns)
    batch = next(stream)
    assert batch["image_embedding"].dtype == np.float32 and batch["image"].shape == (RECORDS, 1, 1, 3)
    assert sorted(batch["index"]) == list(range(RECORDS)), "an epoch"
    np.testing.assert_allclose(batch["image_embedding"], np.stack([want(i) for i in batch["index"]]), rtol=1e-6)


def test_beside_the_pictures_of_a_decoder(tmp_path):
    write(tmp_path)
    found = data.embedded(tmp_path, clip="a", size=SIZE)
    both = data.with_embeddings(pictures(), found)
    assert both.keys == ("caption", "image_embedding") and both[3]["image"][0, 0, 0] == 30
    np.testing.assert_allclose(both[3]["image_embedding"], want(3), rtol=1e-6)
    with pytest.raises(UserError, match="are of pictures with 23 records, the data are pictures with 22"):
        data.with_embeddings(dataclasses.replace(pictures(), size=22), found)


def test_an_interrupted_job_goes_on_and_processes_share_it(tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def stopping(image):
        seen.extend(np.round((image[:, 0, 0, 0] + 1) * 12.75).astype(int))
        if len(seen) > 10:
            raise Stop
        return embed(image)

    with pytest.raises(Stop):
        write(tmp_path, embed=stopping)
    assert len(list(tmp_path.glob("*.array_record"))) == 1 and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="3 of 4 files are missing; .*--mode=embed"):
        data.embedded(tmp_path, clip="a", size=SIZE)
    first = (tmp_path / "embeddings-000000.array_record").stat().st_mtime_ns
    assert write(tmp_path, process_index=1, process_count=2) == [(1, 2), (2, 2)]
    assert write(tmp_path, process_index=0, process_count=2) == [(1, 2), (2, 2)]
    assert (tmp_path / "embeddings-000000.array_record").stat().st_mtime_ns == first, "not embedded again"
    assert len(data.embedded(tmp_path, clip="a", size=SIZE)) == RECORDS


def test_other_embeddings_are_refused(tmp_path):
    with pytest.raises(UserError, match="there are no embeddings .*--mode=embed"):
        data.embedded(tmp_path / "nothing", clip="a", size=SIZE)
    write(tmp_path, pictures(captions=False))
    assert data.embedded(tmp_path, clip="a", size=SIZE).keys == ("image_embedding",)
    for call, words in (
        (lambda: data.embedded(tmp_path, clip="b", size=SIZE), "of clip 'a', not 'b'"),
        (lambda: write(tmp_path, pictures(captions=False), clip="b"), "of clip 'a', not 'b'"),
        (lambda: write(tmp_path), "of captions False, not True"),
        (lambda: write(tmp_path, pictures(captions=False), shard=7), "of shard 6, not 7"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    damaged = tmp_path / "embeddings-000001.array_record"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="embed"):
        data.embedded(tmp_path, clip="a", size=SIZE)
