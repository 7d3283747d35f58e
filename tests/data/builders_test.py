"""The TFDS builders: what they write, what they draw, what they refuse."""

import gzip
import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffax.components import build, spec
from diffax.data import archives, builders, downloads, image_ops, scikit
from diffax.errors import RunError, UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module", autouse=True)
def small():
    """Datasets of hundreds, not thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scikit, "CROPS", {"train": 40, "test": 20})
        yield


def load(root, name, side, channels=3, **fields):
    return build(spec("data", name, data_dir=root, **fields), "data").open((side, side, channels))


def load_tfds(path, channels=1, **fields):
    return build(spec("data", "tfds", path=str(path), **fields), "data").open((8, 8, channels))


# ---- digits ----


def test_digits_are_those_of_scikit_learn(root):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    both = load(root, "digits", 8, 1, split="train+test")
    assert len(both) == 1797
    got = sorted((int(r["label"]), r["image"].tobytes()) for r in both)
    levels = (images * (255 / 16)).round().astype(np.uint8)
    want = sorted((int(label), level.tobytes()) for label, level in zip(labels, levels, strict=True))
    assert got == want


def test_digits_are_split_by_class(root):
    train, test = load(root, "digits", 8, 1), load(root, "digits", 8, 1, split="test")
    assert len(train) + len(test) == 1797 and train.class_names == tuple("0123456789")
    counts = [np.bincount([r["label"] for r in source], minlength=10) for source in (train, test)]
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.1, atol=0.006)


def test_large_digits_show_the_small_ones(root):
    small_, large = load(root, "digits", 8, 1), load(root, "digits", 32, 1)
    assert large[0]["image"].shape == (32, 32, 1)
    for i in range(0, 100, 7):
        assert small_[i]["label"] == large[i]["label"]
        averaged = large[i]["image"].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(averaged.ravel(), small_[i]["image"].ravel())[0, 1] > 0.97


def test_grey_digits_fill_three_equal_channels(root):
    image = load(root, "digits", 8, 3)[5]["image"]
    assert image.shape == (8, 8, 3) and (image == image[..., :1]).all()


def test_only_one_size_is_prepared(tmp_path):
    load(str(tmp_path), "digits", 8)
    assert os.listdir(tmp_path / "diffax_digits").count("8") == 1
    assert not {"16", "32"} & set(os.listdir(tmp_path / "diffax_digits"))


@pytest.mark.parametrize(
    "recipe, side, size",
    [
        (scikit.DIGITS, 8, 8),
        (scikit.DIGITS, 12, 16),
        (scikit.DIGITS, 64, 32),
        (scikit.PHOTOS, 200, 256),
        (downloads.CIFAR10, 64, 32),
        (downloads.MNIST, 32, 28),
    ],
)
def test_the_smallest_size_that_suffices_is_taken(recipe, side, size):
    assert recipe.pick_size(side) == size


def test_records_cannot_be_changed_in_the_cache(root):
    source = load(root, "digits", 8)
    with pytest.raises(ValueError):
        source[0]["image"][:] = 0


def test_splits_that_are_not_there(root):
    with pytest.raises(UserError, match="no split 'val' with data, there is .*; data.split"):
        load(root, "digits", 8, split="val")
    with pytest.raises(UserError, match=r"no split 'train\[:0\]' with data"):
        load(root, "digits", 8, split="train[:0]")
    assert len(load(root, "digits", 8, split="train[:50%]+test")) > 900


def test_missing_scikit_learn_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(builders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data 'digits' need the package sklearn; .*pip install 'diffax\[demo\]'"):
        load(str(tmp_path), "digits", 8)
    assert not list(tmp_path.iterdir())


def test_unfinished_copies_are_removed(tmp_path):
    stale = tmp_path / "diffax_digits/8/incomplete.ABCDEF_1.0.0"
    stale.mkdir(parents=True)
    (stale / "part").write_text("x")
    assert len(load(str(tmp_path), "digits", 8)) == 1621
    assert not stale.exists()


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot prepare 'digits' .*; set data.data_dir"):
        load(str(tmp_path / "file"), "digits", 8)


def test_full_disk_is_a_failed_run(tmp_path, monkeypatch):
    def full(builder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builders, "_write", full)
    with pytest.raises(RunError, match="No space left on device"):
        load(str(tmp_path), "digits", 8)


# ---- photos ----


def test_photos_are_distinct_crops_of_both(root):
    train, test = load(root, "photos", 16), load(root, "photos", 16, split="test")
    assert [len(train), len(test)] == [40, 20] and train.class_names == ("temple", "flower")
    assert [int(r["label"]) for r in test] == [0, 1] * 10
    images = {r["image"].tobytes() for source in (train, test) for r in source}
    assert len(images) == 60
    assert train[0]["image"].shape == (16, 16, 3)


def test_train_and_test_photos_come_from_opposite_sides(monkeypatch, tmp_path):
    """Photos that are red in one part tell where a crop was taken."""
    ramp = np.zeros((427, 640, 3), np.uint8)
    ramp[:, 384:, 0] = 255
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: type("Bunch", (), {"images": [ramp, ramp]}))
    monkeypatch.setattr(scikit, "CROPS", {"train": 400, "test": 400})
    reds = {
        split: [r["image"][..., 0] for r in load(str(tmp_path), "photos", 16, split=split)]
        for split in ("train", "test")
    }
    assert np.max(reds["train"]) == 0 and np.min(reds["test"]) == 255


# ---- archives ----


def cifar_archive(path, records=7):
    rng = np.random.default_rng(0)
    data = {f"data_batch_{i}.bin": rng.integers(0, 256, (records, 3073), dtype=np.uint8) for i in range(1, 6)}
    data["test_batch.bin"] = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
    with tarfile.open(path, "w:gz") as tar:
        for name, rows in data.items():
            rows[:, 0] %= 10
            add(tar, f"cifar-10-batches-bin/{name}", rows.tobytes())
        add(tar, "cifar-10-batches-bin/readme.html", b"hello")
    return data


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def at(path):
    """What is expected of a file in place of a published one."""
    return archives.Archive("http://localhost:1/" + path.name, hashlib.md5(path.read_bytes()).hexdigest())


def test_cifar10_from_its_binary_archive(tmp_path, monkeypatch):
    path = tmp_path / "tiny.tar.gz"
    data = cifar_archive(path)
    monkeypatch.setattr(archives, "CIFAR10", at(path))
    kwargs = {"path": str(tmp_path)}
    train = load(str(tmp_path / "d"), "cifar10", 32, **kwargs)
    test = load(str(tmp_path / "d"), "cifar10", 32, split="test", **kwargs)
    assert [len(train), len(test), train.class_names[3]] == [35, 3, "cat"]
    for record, row in zip(train, np.concatenate([data[f"data_batch_{i}.bin"] for i in range(1, 6)]), strict=True):
        assert record["label"] == row[0]
        assert record["image"][2, 5].tolist() == [row[1 + c * 1024 + 2 * 32 + 5] for c in range(3)]


def test_mnist_from_its_idx_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "downloads"
    folder.mkdir()
    want = {}
    for split, count in (("train", 9), ("test", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        want[split] = images, labels
        for kind, array in (("images", images), ("labels", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            with gzip.open(folder / f"{split}_{kind}.gz", "wb") as file:
                file.write(head + array.tobytes())
    names = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    monkeypatch.setattr(archives, "MNIST", {name: at(folder / f"{name}.gz") for name in names})
    for split in ("train", "test"):
        source = load(str(tmp_path), "mnist", 28, 1, split=split)
        images, labels = want[split]
        np.testing.assert_array_equal([r["image"][..., 0] for r in source], images)
        np.testing.assert_array_equal([r["label"] for r in source], labels)


def test_published_checksums_are_as_published():
    assert archives.CIFAR10.md5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert archives.CIFAR10.file_name == "cifar-10-binary.tar.gz"
    assert sorted(archives.MNIST) == sorted(f"{s}_{k}" for s in ("train", "test") for k in ("images", "labels"))


def test_archive_with_another_checksum_is_refused(tmp_path):
    path = tmp_path / archives.CIFAR10.file_name
    cifar_archive(path)
    with pytest.raises(UserError, match="archive is damaged: MD5 .*; delete the file"):
        load(str(tmp_path / "d"), "cifar10", 32, path=str(tmp_path))
    assert path.exists()


@pytest.mark.parametrize(
    "name, fields, text",
    [
        ("../evil", {}, "leaves the archive"),
        ("/evil", {}, "leaves the archive"),
        ("a/../../evil", {}, "leaves the archive"),
        ("a\\..\\evil", {}, "leaves the archive"),
        ("evil", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link or a device"),
        ("evil", {"type": tarfile.LNKTYPE, "linkname": "../x"}, "is a link or a device"),
        ("evil", {"type": tarfile.CHRTYPE}, "is a link or a device"),
        ("evil", {"type": tarfile.FIFOTYPE}, "is a link or a device"),
        ("cifar-10-batches-bin/data_batch_1.bin", {}, "comes twice"),
    ],
)
def test_hostile_tars_are_refused_and_leave_nothing(tmp_path, name, fields, text):
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    path = folder / "x.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/data_batch_1.bin", b"x" * 3073)
        add(tar, name, **fields)
    with pytest.raises(UserError, match=f"archive refused: member .*{text}"):
        list(archives.read_cifar10(str(path), "train"))
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["in/side/x.tar.gz"]


def test_tar_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "a", bytes(10**6))
    monkeypatch.setattr(archives, "MAX_BYTES", 10**6 - 1)
    with pytest.raises(UserError, match="archive refused: more than"):
        list(archives.tar_members(str(path)))
    monkeypatch.setattr(archives, "MAX_BYTES", 10**6)
    assert [name for name, _ in archives.tar_members(str(path))] == ["a"]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 0)
    with pytest.raises(UserError, match="archive refused: more than"):
        list(archives.tar_members(str(path)))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "half record", "label"])
def test_damaged_cifar_archives_are_refused(tmp_path, damage):
    path = tmp_path / "x.tar.gz"
    cifar_archive(path)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage in ("text", "empty"):
        path.write_bytes(b"<html>" * (damage == "text"))
    else:
        with tarfile.open(path, "w:gz") as tar:
            for i in range(1, 6):
                add(
                    tar,
                    f"data_batch_{i}.bin",
                    bytes([10]) * 3073 if damage == "label" else bytes(3000),
                )
    with pytest.raises(UserError, match="archive refused"):
        list(archives.read_cifar10(str(path), "train"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08\x03",
        bytes((0, 0, 13, 3)) + bytes(12),
        bytes((0, 0, 8, 3, 0, 0, 0, 9)) + bytes(8),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content):
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb") as file:
        file.write(content)
    with pytest.raises(UserError, match="archive refused"):
        list(archives.read_mnist(str(path), str(path)))
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="archive refused: not a readable gzip"):
        list(archives.read_mnist(str(path), str(path)))


# ---- downloading ----


class Server(BaseHTTPRequestHandler):
    content = bytes(range(256)) * 5000
    requests: list = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.requests.append(wanted)
        start = int(wanted[6:-1]) if wanted else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(Server, "requests", [])
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/file.bin"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("have", [0, 1000, len(Server.content)])
def test_downloads_go_on_where_they_stopped(tmp_path, url, have):
    archive = archives.Archive(url, hashlib.md5(Server.content).hexdigest())
    folder = tmp_path / "downloads"
    folder.mkdir()
    if have:
        (folder / "file.bin.part").write_bytes(Server.content[:have])
    path = archives.fetch(archive, str(folder))
    with open(path, "rb") as file:
        assert file.read() == Server.content
    assert os.listdir(folder) == ["file.bin"]
    assert Server.requests == [f"bytes={have}-" if have else None]
    archives.fetch(archive, str(folder))
    assert len(Server.requests) == 1


def test_download_that_fails_says_what_to_do(tmp_path):
    archive = archives.Archive("http://127.0.0.1:1/file.bin", "0" * 32)
    with pytest.raises(
        UserError,
        match=r"cannot download file.bin \(.*refused.*\); "
        r"http://127.0.0.1:1/file.bin; fetch it by hand",
    ):
        archives.fetch(archive, str(tmp_path))


# ---- prepared by others ----


def test_any_prepared_dataset_is_read_from_its_folder(root):
    want = load(root, "digits", 8, 1)
    for path in ("diffax_digits/8/1.0.0", "diffax_digits/8"):
        got = load_tfds(os.path.join(root, path))
        assert len(got) == len(want) and got.class_names == want.class_names
        np.testing.assert_array_equal(got[7]["image"], want[7]["image"])
        assert got[7]["label"] == want[7]["label"]


def test_folder_of_many_datasets_is_refused(root):
    load(root, "digits", 8), load(root, "digits", 16)
    with pytest.raises(UserError, match="[2-9] datasets below data.path"):
        load_tfds(root)


def test_tfrecord_says_how_to_convert(root, tmp_path):
    load(root, "digits", 8)
    info = os.path.join(root, "diffax_digits/8/1.0.0")
    for name in os.listdir(info):
        if name.endswith(".json"):
            with open(os.path.join(info, name)) as file:
                text = file.read()
            (tmp_path / name).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError,
        match="stored as tfrecord.*tfds convert_format --dataset_version_dir=.* --out_file_format=array_record",
    ):
        load_tfds(tmp_path)


def test_dataset_info_that_is_damaged(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not a dataset that TFDS can read"):
        load_tfds(tmp_path)


def test_prepared_data_with_several_captions(tmp_path):
    """As MS-COCO has them: a list of texts for each picture."""

    class Captioned(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
            texts = tfds.features.Sequence(tfds.features.Text())
            features = tfds.features.FeaturesDict({"image": image, "captions": texts})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, texts in enumerate((["a cat", "é"], ["one"], [])):
                pixels = np.zeros((8, 8, 3), np.uint8)
                yield i, {"image": image_ops.encode_png(pixels), "captions": texts}

    Captioned(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    source = load_tfds(tmp_path, 3)
    assert source.keys == ("caption",)
    assert [record["caption"] for record in source] == [("a cat", "é"), ("one",), ""]


def test_dataset_without_images(tmp_path):
    class Numbers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"number": 1}

    Numbers(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    with pytest.raises(UserError, match=r"no image among the features \['number'\]"):
        load_tfds(tmp_path)
