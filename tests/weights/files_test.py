"""Reading files of weights without PyTorch: its own files, hand-made ones, hostile ones and damaged ones."""

import io
import json
import pathlib
import pickle
import re
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from diffax.errors import UserError
from diffax.weights import files as weights
from tests.weights.torch_files import archive, call, name, program, state_dict, storage, tensor, value

FOLDER = pathlib.Path(__file__).parent
REBUILD = name("torch._utils", "_rebuild_tensor_v2")

BASE, SHARED = np.arange(24, dtype=np.float32) / 8, np.arange(6, dtype=np.float32)
ARRAYS = dict(
    float32=BASE.reshape(2, 3, 4),
    transposed=BASE.reshape(4, 6).T,
    window=BASE.reshape(4, 6)[1:3, 2:5],
    reversed_columns=SHARED.reshape(2, 3)[:, ::2],
    shared=SHARED[2:],
    float64=BASE[:3].astype(np.float64),
    float16=BASE[:5].astype(np.float16),
    bfloat16=BASE[:5].astype(ml_dtypes.bfloat16),
    int64=np.array([-1, 2**40]),
    int32=np.array([-7, 7], np.int32),
    int16=np.array([-300], np.int16),
    int8=np.array([-3], np.int8),
    uint8=np.array([200], np.uint8),
    bool=np.array([True, False, True]),
    scalar=np.float32(2.5),
    empty=np.zeros((0, 4), np.float32),
    parameter=np.array([1, 2], np.float32),
)


def write(tmp_path, data, suffix=".pt"):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    return path


def refusal(path, which=None):
    """The message for a file that cannot be read: one line that names the file, with what to do."""
    with pytest.raises(UserError) as error:
        for array in weights.read(path, which).values():
            np.asarray(array)
    message = str(error.value)
    assert "\n" not in message and f"; {path}; " in message, message
    return message


# ---- what PyTorch wrote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["arrays.pt", "arrays_legacy.pt"])
def test_a_file_of_pytorch(file):
    found = weights.read(FOLDER / file)
    assert list(found) == list(ARRAYS)
    for key, want in ARRAYS.items():
        array = np.asarray(found[key])
        assert (found[key].shape, found[key].dtype) == (array.shape, array.dtype) == (np.shape(want), want.dtype), key
        np.testing.assert_array_equal(array, want, err_msg=key)


@pytest.mark.parametrize("file", ["nested.pt", "nested_legacy.pt"])
def test_a_training_state_of_pytorch(file):
    """The average is taken, and the optimizer's arrays, which bear numbers, are not taken for a state dict."""
    for which, number in ((None, 2), ("ema", 2), ("model", 1)):
        found = weights.read(FOLDER / file, which)
        assert weights.shapes(found) == {"weight": (2, 2), "bias": (2,)}
        assert all((np.asarray(array) == number).all() for array in found.values())
    assert "it holds no state dict 'optimizer'; " in refusal(FOLDER / file, "optimizer")


def test_a_program_of_pytorch():
    """The tensors of `torch.jit.save`, under the names of its state_dict(); its code is not looked at."""
    found = weights.read(FOLDER / "script.pt")
    want = {"scale": np.float32(2.5), "low": np.ones(3, np.float16), "input_resolution": np.int64(8)}
    for i in range(2):
        want |= {f"visual.{i}.mask": np.ones(2, np.float32), f"visual.{i}.fc.bias": np.float32([i, i + 0.5])}
        want |= {f"visual.{i}.fc.weight": np.arange(4, dtype=np.float32).reshape(2, 2) / 8 + i}
    assert set(found) == set(want)
    for key, array in want.items():
        np.testing.assert_array_equal(np.asarray(found[key]), array, err_msg=key, strict=True)


MODULE, CODE = name("__torch__.net", "Net") + b")\x81", [("archive/code/net.py", b"")]


def module(**attributes):
    """The instructions for an object of a TorchScript class."""
    return MODULE + value(attributes) + b"b"


def test_programs_by_hand(tmp_path):
    inner = module(weight=tensor(), training=b"\x89", note=value("x"))
    found = weights.read(write(tmp_path, archive(module(a=inner, b=module(w=tensor())), more=CODE)))
    assert list(found) == ["a.weight", "b.w"]
    looped = MODULE + b"q\x00" + value({"w": tensor(), "self": b"h\x00"}) + b"b"
    assert list(weights.read(write(tmp_path, archive(looped, more=CODE)))) == ["w"]
    deep = module(w=tensor())
    for _ in range(200):
        deep = module(a=deep, w=tensor())
    assert list(weights.read(write(tmp_path, archive(deep, more=CODE))))[-1] == "w"


@pytest.mark.parametrize(
    "contents, match",
    [
        (lambda canary: module(x=call(name("posix", "system"), f"touch {canary}")), "posix.system, and only tensors"),
        (lambda canary: name("posix", "system") + value((f"touch {canary}",)) + b"\x81", "posix.system"),
        (lambda canary: REBUILD + value((f"touch {canary}",)) + b"\x81", "damaged"),
        (lambda canary: MODULE + value("state") + b"b", "an object of it has no attributes"),
        (lambda canary: name("__torch__", "Net") + value({"w": 1}) + b"b", "damaged"),  # the class itself is changed
        (lambda canary: module(x=value("no tensor")), "it holds no state dict"),
    ],
)
def test_hostile_programs(tmp_path, contents, match):
    canary = tmp_path / "canary"
    message = refusal(write(tmp_path, archive(contents(str(canary)), more=CODE)))
    assert re.search(match, message), message
    assert not canary.exists()


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {key: np.ascontiguousarray(array) for key, array in ARRAYS.items()}
    weights.write(path, arrays, {"step": "7"})
    found = weights.read(path)
    assert set(found) == set(arrays) and [p.name for p in tmp_path.iterdir()] == [path.name]
    for key, want in arrays.items():
        array = np.asarray(found[key])
        assert (found[key].shape, found[key].dtype, array.dtype) == (want.shape, want.dtype, want.dtype)
        np.testing.assert_array_equal(array, want)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"step": "7"}


def test_a_safetensors_header_may_have_any_length(tmp_path):
    """Its length comes first in the file, and may begin like a pickle (0x80) or a web page ('<')."""
    text = json.dumps({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 8])}).encode()
    for length in range(256, 512):
        path = write(tmp_path, length.to_bytes(8, "little") + text.ljust(length) + bytes(8), ".safetensors")
        np.testing.assert_array_equal(np.asarray(weights.read(path)["a"]), [0, 0], err_msg=f"{length}")


@pytest.mark.parametrize("kind", ["list", "tuple"])
def test_a_file_that_is_a_list_of_tensors(kind, tmp_path):
    def wrap(found):
        return tuple(found.values()) if kind == "tuple" else b"](" + b"".join(map(value, found.values())) + b"e"

    arrays = {str(i): np.full(3, i, np.float32) for i in range(2)}
    found = weights.read(write(tmp_path, state_dict(arrays, wrap=wrap)))
    assert set(found) == {"0", "1"}
    for key, want in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[key]), want)


# ---- where the state dict is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "contents, which, place",
    [
        ({"state_dict": 1, "epoch": 3}, None, 1),
        ({"state_dict": 1, "model_ema": 2}, None, 2),
        ({"state_dict": 1, "loss": 2}, None, 1),
        ({"a": {"model": 1}, "b": 2}, None, 1),
        ({"a": {"b": 1}}, None, 1),
        ({"a": 1, "b": {"c": 2}}, "b.c", 2),
        ({"a": 1, "b": 2}, None, "it holds 2 state dicts; .*; choose one of 'a', 'b' with --ema=NAME"),
        ({"ema_0.9": 1, "ema_0.99": 2}, None, "it holds 2 state dicts"),
        ({"a": 1}, "c", "it holds no state dict 'c'; .*; choose one of 'a'"),
        ({"a": 3.5}, None, "it holds no state dict"),
    ],
)
def test_nested_state_dicts(tmp_path, contents, which, place):
    def instructions(x):
        if isinstance(x, dict):
            return value({key: instructions(item) for key, item in x.items()})
        return value({"w": tensor(source=storage(str(x)))}) if x in (1, 2) else value(int(x))

    file = write(tmp_path, archive(instructions(contents), [bytes(24), bytes([1] * 24), bytes([2] * 24)]))
    if isinstance(place, str):
        with pytest.raises(UserError, match=place):
            weights.read(file, which)
    else:
        (array,) = weights.read(file, which).values()
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.full((2, 12), place))


def test_names_of_data_parallel_training(tmp_path):
    arrays = {"module.a": np.ones(2, np.float32), "module.b.module.c": np.ones(2, np.float32)}
    assert list(weights.read(write(tmp_path, state_dict(arrays)))) == ["a", "b.module.c"]
    arrays["d"] = np.ones(2, np.float32)
    assert list(weights.read(write(tmp_path, state_dict(arrays)))) == list(arrays)


def test_a_dictionary_that_holds_itself(tmp_path):
    """The walk ends, though the pickle's containers do not."""
    looped = b"}q\x00(" + value("self") + b"h\x00" + value("model") + value({"w": tensor()}) + b"u"
    assert list(weights.read(write(tmp_path, archive(looped)))) == ["w"]


# ---- nothing is executed ---------------------------------------------------------------------------------------------

ORDERED_DICT = name("collections", "OrderedDict")
EVIL = {
    "os.system": (lambda canary: call(name("posix", "system"), f"touch {canary}"), "posix.system, and only tensors"),
    "builtins.eval": (lambda canary: call(name("builtins", "eval"), f"open({canary!r}, 'w')"), "builtins.eval"),
    "torch.load": (lambda canary: call(name("torch", "load"), canary), "needs torch.load"),
    "storage called": (lambda canary: call(name("torch", "FloatStorage"), canary), "calls FloatStorage"),
    "instance": (lambda canary: b"(" + value(f"touch {canary}") + b"iposix\nsystem\n", "instruction INST"),
    "extension": (lambda canary: b"\x82\x01", "instruction EXT1"),
    "new object": (lambda canary: ORDERED_DICT + b")\x81", "instruction NEWOBJ"),
    "duplicate": (lambda canary: b"}20", "instruction DUP"),
    "byte array": (lambda canary: b"\x96" + (2**60).to_bytes(8, "little"), "cut short|instruction|damaged"),
    "memo": (lambda canary: b"}r\xff\xff\xff\x7f", "numbers more objects than it has"),
    "function changed": (lambda canary: REBUILD + value({"call": 1}) + b"b", "changes an object"),
    "tensor changed": (lambda canary: tensor() + value({"shape": (2**40,)}) + b"b", "changes an object"),
    "storage changed": (lambda canary: storage() + value({"size": 2**40}) + b"b", "damaged"),
    "dictionary of something": (lambda canary: call(ORDERED_DICT, ("a",)), "OrderedDict is made of something"),
    "no storage": (lambda canary: tensor(source=value(("storage", 1, "0", "cpu", 6)) + b"Q"), "storage that is not"),
    "another object": (lambda canary: value(("module", "a", "b", "c", 1)) + b"Q", "something that is no storage"),
    "path as key": (lambda canary: tensor(source=storage("../../0")), "storage that is not valid"),
    "parameter": (lambda canary: call(name("torch._utils", "_rebuild_parameter"), 1, 2, 3), "parameter is no tensor"),
}


@pytest.mark.parametrize("wrapped", ["zip", "legacy"])
@pytest.mark.parametrize("case", EVIL)
def test_hostile_pickles(tmp_path, case, wrapped):
    canary = tmp_path / "canary"
    make, match = EVIL[case]
    contents = {"model": value({"w": tensor()}), "x": make(str(canary))}
    data = archive(value(contents)) if wrapped == "zip" else legacy(value(contents))
    message = refusal(write(tmp_path, data))
    assert re.search(match, message), message
    assert not canary.exists()


@pytest.mark.parametrize(
    "bad",
    [
        dict(shape=(2, 4), strides=(3, 1)),
        dict(shape=(6,), strides=(2,)),
        dict(shape=(2, 3), offset=1),
        dict(shape=(2**31, 2**31), strides=(0, 0)),
        dict(shape=(100,), strides=(0,)),
        dict(shape=(5, 5), strides=(1, 1)),  # it fits in, and has more numbers than there are
        dict(shape=(6,), strides=(-1,), offset=5),
        dict(shape=(-6,), strides=(1,)),
        dict(shape=(6,), strides=(1, 1)),
        dict(shape=(2**70,), strides=(1,)),
        dict(shape=("6",), strides=(1,)),
        dict(shape=(1,) * 40, strides=(1,) * 40),
        dict(shape=6, strides=(1,)),
        dict(shape=(1,), offset=None),
        dict(source=value(3), shape=(1,)),
    ],
)
def test_views_outside_of_their_storage(tmp_path, bad):
    refusal(write(tmp_path, archive({"w": tensor(**{"source": storage(size=6), **bad})})))


def test_deep_nesting_ends_in_a_message(tmp_path):
    deep = b"]" * 200_000 + b"a" * 199_999
    assert "no state dict" in refusal(write(tmp_path, archive({"a": deep})))
    deep = value({"w": tensor()})
    for _ in range(300):
        deep = value({"a": deep})
    assert "no state dict" in refusal(write(tmp_path, archive(deep)))


# ---- damaged archives ------------------------------------------------------------------------------------------------

GOOD = archive({"w": tensor()})


def renamed(data, old, new):
    assert data.count(old) == 2 and len(old) == len(new)  # beside the member, and in the table of contents
    return data.replace(old, new)


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"\n <?xml version='1.0'?><Error><Code>BlobNotFound</Code></Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "a Git LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(100), "begins with"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "begins with"),
        (b"no weights at all", "begins with"),
        (b"PK", "begins with"),
        (pickle.dumps({"a": 1}), "none of PyTorch|instruction"),
        (pickle.dumps(1), "none of PyTorch"),
        (b"\x80\x02", "cut short"),
        (GOOD[:-1], "table of contents|cut short|damaged"),
        (GOOD[: len(GOOD) // 2], "table of contents"),
        (archive({"w": tensor()}, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive({"w": tensor()}, [bytes(20)]), "storage 0 has 20 bytes, not 6 numbers"),
        (archive({"w": tensor()}, []), "storage 0 is missing"),
        (archive({"w": tensor()}, more=[("other/data.pkl", program(1))]), "2 pickles of PyTorch"),
        (archive(name("__torch__", "Net") + b")\x81}b"), "instruction NEWOBJ"),  # there is no code beside it
        (renamed(GOOD, b"archive/data.pkl", b"archive/data.pkx"), "0 pickles of PyTorch"),
        (renamed(GOOD, b"archive/version", b"archive/data/00"[:15]), None),
        (GOOD.replace(b"archive/data/0", b"archive/data/9", 1), "not where the table of contents says"),
        (GOOD.replace(b"little", b"bigbig"), "big-endian|damaged"),
        (GOOD.replace(bytes(24), b"\x01" + bytes(23), 1), "another checksum"),
        (archive(b"\x80"), "damaged|cut short|instruction"),
    ],
    ids=range(24),
)
def test_files_of_another_kind(tmp_path, data, match):
    path = write(tmp_path, data)
    if match is None:
        assert list(weights.read(path)) == ["w"]  # a member that nothing refers to
        return
    message = refusal(path)
    assert re.search(match, message), message


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_there_twice(tmp_path):
    assert "there twice" in refusal(write(tmp_path, archive({"w": tensor()}, more=[("archive/data.pkl", program(1))])))


def test_members_that_are_larger_than_the_file(tmp_path):
    """All members of an overlapping bomb are the same bytes."""
    data, entry = GOOD, GOOD.index(b"PK\x01\x02", GOOD.index(b"PK\x01\x02") + 1)
    lie = struct.pack("<II", 2**30, 2**30)
    assert "larger than the file" in refusal(write(tmp_path, data[: entry + 20] + lie + data[entry + 28 :]))


def test_big_endian(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", program({"w": tensor()}))
        out.writestr("a/byteorder", b"big")
        out.writestr("a/data/0", bytes(24))
    assert "big-endian" in refusal(write(tmp_path, file.getvalue()))


def test_missing_files_and_folders(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.pt")
    assert "a folder" in refusal(tmp_path)


def test_numbers_are_read_when_asked_for(tmp_path):
    """Names and shapes of a file are known, whose second array is damaged."""
    data = state_dict({"a": np.arange(3.0), "b": np.array([5.0, 6.0, 7.0])})
    found = weights.read(write(tmp_path, data.replace(np.float64(6).tobytes(), np.float64(9).tobytes(), 1)))
    np.testing.assert_array_equal(np.asarray(found["a"]), np.arange(3.0))
    with pytest.raises(UserError, match="another checksum"):
        np.asarray(found["b"])


# ---- the legacy format -----------------------------------------------------------------------------------------------


def legacy(
    contents, *, magic=0x1950A86A20F9469CFC6C, version=1001, little=b"\x88", keys=("0",), size=6, data=bytes(24)
):
    system = b"\x80\x02}(" + value("little_endian") + little + b"u."
    listed = b"\x80\x02](" + b"".join(map(value, keys)) + b"e."
    pickles = program(magic) + program(version) + system + program(contents) + listed
    return pickles + struct.pack("<q", size) + data


def test_legacy_by_hand(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    (array,) = weights.read(write(tmp_path, legacy({"w": tensor()}, data=numbers.tobytes()))).values()
    np.testing.assert_array_equal(array, numbers.reshape(2, 3))


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(magic=5), "none of PyTorch"),
        (dict(version=1000), "unknown version"),
        (dict(little=b"\x89"), "big-endian"),
        (dict(keys=()), "list of storages"),
        (dict(keys=("0", "1")), "list of storages"),
        (dict(size=7), "has not 6 numbers"),
        (dict(data=bytes(23)), "cut short"),
    ],
)
def test_damaged_legacy_files(tmp_path, options, match):
    assert match in refusal(write(tmp_path, legacy({"w": tensor()}, **options)))


def test_a_legacy_storage_of_two_sizes(tmp_path):
    both = {"a": tensor(), "b": tensor((2,), source=storage(size=2))}
    assert "described in two ways" in refusal(write(tmp_path, legacy(both)))


# ---- safetensors -----------------------------------------------------------------------------------------------------


def header(described, data=b""):
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data, match",
    [
        (header({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 8])}, bytes(7)), "damaged"),
        (header({"a": dict(dtype="F32", shape=[3], data_offsets=[0, 8])}, bytes(8)), "damaged"),
        (header({"a": dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])}, bytes(8)), "damaged"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged"),
        ((10).to_bytes(8, "little") + b"{nonsense}", "damaged"),
        (
            header({"a": dict(dtype="F8_E5M2", shape=[8], data_offsets=[0, 8])}, bytes(8)),
            "a is F8_E5M2; .*; save it in",
        ),
        (header({}), "no state dict"),
    ],
)
def test_damaged_safetensors(tmp_path, data, match):
    message = refusal(write(tmp_path, data, ".safetensors"))
    assert re.search(match, message), message


def test_the_package_safetensors_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    weights.write(path, {"a": np.ones(2, np.float32)}, {})
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert "needs the package safetensors; " in refusal(path)
    with pytest.raises(UserError, match="pip install 'diffax.weights.'"):
        weights.write(path, {}, {})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the weights"):
        weights.write(tmp_path / "file" / "a.safetensors", {"a": np.ones(2, np.float32)}, {})


# ---- mutants ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("file", ["arrays.pt", "arrays_legacy.pt", "nested.pt", "nested_legacy.pt", "script.pt"])
def test_mutants_are_refused_or_read(tmp_path, file):
    """One changed, lost or added stretch of bytes: one error that names the file, or arrays.

    In the zip format no changed number is read: everything has a checksum there.
    """
    original, path = (FOLDER / file).read_bytes(), tmp_path / "mutant.pt"
    want = {key: np.asarray(array) for key, array in weights.read(FOLDER / file).items()}
    rng, refused = np.random.default_rng(0), 0
    for i in range(400):
        data, at = bytearray(original), int(rng.integers(len(original)))
        match i % 4:
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at] = int(rng.integers(256))
            case 2:
                del data[at : at + int(rng.integers(1, 40))]
            case 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        path.write_bytes(data)
        try:
            found = {key: np.asarray(array) for key, array in weights.read(path).items()}
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        if not file.endswith("legacy.pt"):
            for key in found:
                np.testing.assert_array_equal(found[key], want[key])
    assert refused > 100
