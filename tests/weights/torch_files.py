"""Files of weights as `torch.save` writes them, put together by hand: pickle instructions, and zip members.

`tests/weights` holds a few that PyTorch itself wrote.
"""

import io
import math
import pickle
import zipfile

import ml_dtypes
import numpy as np

KINDS = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def name(module: str, attribute: str) -> bytes:
    """The instruction for a name."""
    return f"c{module}\n{attribute}\n".encode()


def value(x) -> bytes:
    """The instructions for text, a number, None or a tuple; bytes are instructions already."""
    match x:
        case bytes():
            return x
        case str():
            return b"X" + len(x.encode()).to_bytes(4, "little") + x.encode()
        case int():
            long = pickle.encode_long(x)
            return b"\x8a" + bytes([len(long)]) + long
        case None:
            return b"N"
        case tuple():
            return b"(" + b"".join(map(value, x)) + b"t"
        case dict():
            return b"}(" + b"".join(value(k) + value(v) for k, v in x.items()) + b"u"
    raise TypeError(x)


def call(function: bytes, *args) -> bytes:
    return function + value(args) + b"R"


def storage(key="0", size=6, kind="FloatStorage") -> bytes:
    return value(("storage", name("torch", kind), key, "cpu", size)) + b"Q"


def tensor(shape=(2, 3), strides=None, offset=0, source=None) -> bytes:
    """A tensor; by default one that fills storage 0."""
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    source = storage(size=math.prod(shape)) if source is None else source
    args = (source, offset, shape, strides, b"\x89", call(name("collections", "OrderedDict")))
    return call(name("torch._utils", "_rebuild_tensor_v2"), *args)


def program(x) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + value(x) + b"."


def archive(contents, storages=(bytes(24),), *, more=(), compression=zipfile.ZIP_STORED) -> bytes:
    """A zip file of `torch.save`: contents, storages in their order, and `more` members (name, bytes)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        members = [("data.pkl", program(contents)), ("byteorder", b"little")]
        members += [(f"data/{i}", data) for i, data in enumerate(storages)] + [("version", b"3\n")]
        for member, data in (*((f"archive/{m}", data) for m, data in members), *more):
            out.writestr(zipfile.ZipInfo(member), data, compression)  # of no particular date
    return file.getvalue()


def state_dict(arrays, *, wrap=lambda contents: contents) -> bytes:
    """{name: array} as a zip file."""
    tensors, storages = {}, []
    for key, array in arrays.items():
        array = np.asarray(array)
        source = storage(str(len(storages)), array.size, KINDS[array.dtype.name])
        tensors[key] = tensor(array.shape, source=source)
        storages.append(array.tobytes())
    return archive(wrap(tensors), storages)
