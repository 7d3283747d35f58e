"""Published archives: fetched once, checked, and read in memory without extracting."""

import dataclasses
import gzip
import hashlib
import math
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator

import numpy as np

from diffax.data.progress import progress
from diffax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file on the web and the checksum that its publisher gives: MD5, or where there is one, SHA-256."""

    url: str
    md5: str = ""
    sha256: str = ""

    @property
    def file_name(self) -> str:
        """The last part of its address."""
        return self.url.rsplit("/", 1)[-1]


CIFAR10 = Archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_MNIST_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST = {
    "train_images": Archive(_MNIST_MIRROR + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "train_labels": Archive(_MNIST_MIRROR + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    "test_images": Archive(_MNIST_MIRROR + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    "test_labels": Archive(_MNIST_MIRROR + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
}
# The largest member of any of these archives is MNIST's 47 MB of training images.
MAX_BYTES = 512 * 10**6
MAX_MEMBERS = 1000


def fetch(archive: Archive, folder: str) -> str:
    """The path of an archive in `folder`, downloaded there unless it is there already.

    An interrupted download leaves a `.part` file and is taken up again where it stopped.

    Raises:
      UserError: the file has another checksum, or cannot be had.
    """
    path = os.path.join(folder, archive.file_name)
    if not os.path.exists(path):
        _download(archive, path)
    kind, expected = ("sha256", archive.sha256) if archive.sha256 else ("md5", archive.md5)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise UserError(
            f"archive is damaged: {kind.upper()} {found}, expected {expected}; {path}; delete the file and run again"
        )
    return path


def _download(archive: Archive, path: str):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.status != 206:  # the server sends the whole file
                have = 0
            total = have + int(reply.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as out:
                while block := reply.read(1 << 20):
                    out.write(block)
                    have += len(block)
                    progress(
                        f"downloading {archive.file_name}: {have / 1e6:.1f} of {total / 1e6:.1f} MB",
                        last=False,
                    )
        progress(f"downloaded {archive.url} to {path}", last=True)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is the whole file already
            raise _no_download(archive, path, error) from error
    except OSError as error:
        raise _no_download(archive, path, error) from error
    os.replace(part, path)


def _no_download(archive: Archive, path: str, error: OSError) -> UserError:
    reason = getattr(error, "reason", None) or error
    return UserError(
        f"cannot download {archive.file_name} ({reason}); {archive.url}; fetch it by hand into {os.path.dirname(path)}"
    )


def tar_members(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file of a tar, read in memory in the archive's order.

    Raises:
      UserError: the file is no readable tar; or a member is a link or a device, leaves the
        archive's folder, comes twice, or the archive is larger than any we know.
    """
    seen, size = set(), 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name
                if member.isdir():
                    continue
                if not member.isfile():
                    raise _refuse(path, f"member {name!r} is a link or a device")
                if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise _refuse(path, f"member {name!r} leaves the archive")
                if name in seen:
                    raise _refuse(path, f"member {name!r} comes twice")
                seen.add(name)
                size += member.size
                if size > MAX_BYTES or len(seen) > MAX_MEMBERS:
                    raise _refuse(path, f"more than {MAX_BYTES // 10**6} MB or {MAX_MEMBERS} files")
                yield name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _refuse(path, f"not a readable tar ({error})") from error


def _refuse(path: str, why: str) -> UserError:
    return UserError(f"archive refused: {why}; {path}; fetch the published file again")


def read_cifar10(path: str, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images uint8 [32, 32, 3] and labels of 'train' (five batches in order) or 'test'.

    A batch is records of one label byte and 3x32x32 channel-first pixels.
    """
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    members = names[split]
    batches = {name.rsplit("/", 1)[-1]: data for name, data in tar_members(path) if name.rsplit("/", 1)[-1] in members}
    for name in members:
        data = batches.get(name, b"")
        if not data or len(data) % 3073:
            raise _refuse(path, f"{name} is missing or holds no whole number of records")
        records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
        if records[:, 0].max() > 9:
            raise _refuse(path, f"{name} has a label above 9")
        for record in records:
            yield record[1:].reshape(3, 32, 32).transpose(1, 2, 0), int(record[0])


def read_mnist(images_path: str, labels_path: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images uint8 [28, 28, 1] and labels of one pair of gzipped idx files."""
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) > 9:
        raise _refuse(images_path, f"{images.shape} images do not go with {labels.shape} labels")
    for image, label in zip(images, labels, strict=True):
        yield image[..., None], int(label)


def _read_idx(path: str, rank: int) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8, rank, then big-endian uint32 sizes, then the data."""
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise _refuse(path, f"not a readable gzip ({error})") from error
    head = 4 + 4 * rank
    if len(data) > MAX_BYTES or len(data) < head or data[:4] != bytes((0, 0, 8, rank)):
        raise _refuse(path, f"not an idx file of {rank}-d bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", rank, 4))
    if math.prod(shape) != len(data) - head:
        raise _refuse(path, f"the header promises {shape}, the file holds {len(data) - head} bytes")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
