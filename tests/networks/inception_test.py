"""The FID's Inception network and its weights: resizing, names in both published files, hostile files."""

import functools
import hashlib

import jax
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from diffax.errors import UserError
from diffax.evaluation import features
from diffax.networks import inception
from diffax.weights import files as weights
from diffax.weights import inception as convert
from diffax.weights import table as tables
from tests.parity import golden


@functools.cache
def state_dict():
    """Arrays under the names of PyTorch's file, drawn; those that are of no use included."""
    drawn = {name: golden.weight(name, shape) for name, shape in tables.torch_shapes(convert.table()).items()}
    drawn |= {name: np.abs(value) + 0.5 for name, value in drawn.items() if name.endswith("running_var")}
    return drawn | {
        "fc.bias": np.zeros(1008, np.float32),
        "Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), int),
    }


def test_the_extractor_gives_the_same_on_all_devices():
    params = convert.from_torch(state_dict())
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.float32)
    got = features.inception_extractor(params)(pictures)
    want = jax.jit(inception.Inception().apply)({"params": params}, pictures)
    for name, shape in {"2048": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008)}.items():
        assert got[name].shape == shape
        assert golden.deviation(got[name], want[name]) < 1e-4, name


@pytest.mark.parametrize(("height", "width", "side"), [(5, 3, 7), (9, 16, 4), (6, 6, 6), (1, 2, 3)])
def test_pictures_are_resized_as_in_tensorflow_1(height, width, side):
    pictures = np.random.default_rng(0).uniform(0, 255, (2, height, width, 3)).astype(np.float32)
    want = np.zeros((2, side, side, 3))
    for i, j in np.ndindex(side, side):
        y, x = i * height / side, j * width / side
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        above = pictures[:, y0, x0] * (1 - (x - x0)) + pictures[:, y0, x1] * (x - x0)
        below = pictures[:, y1, x0] * (1 - (x - x0)) + pictures[:, y1, x1] * (x - x0)
        want[:, i, j] = above * (1 - (y - y0)) + below * (y - y0)
    np.testing.assert_allclose(inception.resize(pictures, side), want, rtol=0, atol=1e-3)


def test_averages_leave_out_the_padding_and_the_last_block_takes_maxima():
    ones = np.ones((1, 4, 4, 1), np.float32)
    np.testing.assert_array_equal(inception.average_pool(ones), ones)
    np.testing.assert_array_equal(inception.max_pool(-ones), -ones)
    pools = {name: [s for s in inception.BLOCKS[name]["branch_pool"] if callable(s)] for name in inception.BLOCKS}
    assert pools["Mixed_7b"] == [inception.average_pool] and pools["Mixed_7c"] == [inception.max_pool]


# ---- names in the two files -----------------------------------------------------------------------------------------


def test_arrays_that_are_missing_or_unexpected_are_named():
    with pytest.raises(ValueError, match="1 missing: fc.weight; 1 unexpected: Mixed_8.bn.weight"):
        convert.from_torch({k: v for k, v in state_dict().items() if k != "fc.weight"} | {"Mixed_8.bn.weight": [1]})


def test_names_in_the_graph_by_hand():
    names = {entry.path: entry.keys[0] for entry in convert.graph_table()}
    for path, name in {
        "Conv2d_1a_3x3/kernel": "conv/conv2d_params",
        "Conv2d_4a_3x3/scale": "conv_4/batchnorm/gamma",
        "Mixed_5b/branch1x1/bias": "mixed/conv/batchnorm/beta",
        "Mixed_5b/branch5x5_2/mean": "mixed/tower/conv_1/batchnorm/moving_mean",
        "Mixed_5c/branch3x3dbl_3/kernel": "mixed_1/tower_1/conv_2/conv2d_params",
        "Mixed_5d/branch_pool/variance": "mixed_2/tower_2/conv/batchnorm/moving_variance",
        "Mixed_6a/branch3x3/kernel": "mixed_3/conv/conv2d_params",
        "Mixed_6a/branch3x3dbl_3/kernel": "mixed_3/tower/conv_2/conv2d_params",
        "Mixed_6b/branch7x7_3/kernel": "mixed_4/tower/conv_2/conv2d_params",
        "Mixed_6d/branch1x1/kernel": "mixed_6/conv/conv2d_params",
        "Mixed_6e/branch7x7dbl_5/kernel": "mixed_7/tower_1/conv_4/conv2d_params",
        "Mixed_7a/branch3x3_2/kernel": "mixed_8/tower/conv_1/conv2d_params",
        "Mixed_7a/branch7x7x3_1/kernel": "mixed_8/tower_1/conv/conv2d_params",
        "Mixed_7b/branch3x3_2a/kernel": "mixed_9/tower/mixed/conv/conv2d_params",
        "Mixed_7c/branch3x3dbl_2/kernel": "mixed_10/tower_1/conv_1/conv2d_params",
        "Mixed_7c/branch3x3dbl_3b/kernel": "mixed_10/tower_1/mixed/conv_1/conv2d_params",
        "Mixed_7c/branch_pool/kernel": "mixed_10/tower_2/conv/conv2d_params",
        "fc/kernel": "softmax/weights",
    }.items():
        assert names[tuple(path.split("/"))] == name
    assert len(names) == len(set(names.values())) == 94 * 5 + 1


@functools.cache
def graph_message():
    """The class of TensorFlow's GraphDef, as far as it concerns constants, made by the protobuf package."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="t", syntax="proto3")

    def message(name, *fields):
        found = file.message_type.add(name=name)
        for number, field, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            of = dict(type=kind) if isinstance(kind, int) else dict(type=kinds.TYPE_MESSAGE, type_name=f".t.{kind}")
            found.field.add(name=field, number=number, label=label, **of)

    text, integer, data = kinds.TYPE_STRING, kinds.TYPE_INT64, kinds.TYPE_BYTES
    message("Dim", (1, "size", integer, 0), (2, "name", text, 0))
    message("Shape", (2, "dim", "Dim", 1), (3, "unknown_rank", kinds.TYPE_BOOL, 0))
    message(
        "Tensor", (1, "dtype", kinds.TYPE_INT32, 0), (2, "tensor_shape", "Shape", 0), (3, "version", integer, 0),
        (4, "tensor_content", data, 0), (5, "float_val", kinds.TYPE_FLOAT, 1), (7, "int_val", kinds.TYPE_INT32, 1),
    )  # fmt: skip
    message("Value", (4, "f", kinds.TYPE_FLOAT, 0), (6, "type", kinds.TYPE_INT32, 0), (8, "tensor", "Tensor", 0))
    message("Attr", (1, "key", text, 0), (2, "value", "Value", 0))
    message(
        "Node", (1, "name", text, 0), (2, "op", text, 0), (3, "input", text, 1), (4, "device", text, 0),
        (5, "attr", "Attr", 1),
    )  # fmt: skip
    message("Graph", (1, "node", "Node", 1), (3, "version", kinds.TYPE_INT32, 0))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Graph"))


def graph(constants, *, as_list=(), version=8):
    """A serialised graph with these float32 constants among other nodes."""
    made = graph_message()(version=version)
    made.node.add(name="DecodeJpeg", op="DecodeJpeg", input=["DecodeJpeg/contents"])
    for name, value in constants.items():
        node = made.node.add(name=name, op="Const")
        node.attr.add(key="dtype").value.type = 1
        tensor = node.attr.add(key="value").value.tensor
        tensor.dtype = 1 if value.dtype == np.float32 else 3
        for size in value.shape:
            tensor.tensor_shape.dim.add(size=size)
        if name in as_list:
            tensor.float_val.extend(value.ravel().tolist())
        else:
            tensor.tensor_content = value.tobytes()
        norm = made.node.add(name=f"{name}/read", op="Identity", input=[name])
        norm.attr.add(key="variance_epsilon").value.f = 0.001
    return made.SerializeToString()


def test_constants_of_a_graph():
    rng = np.random.default_rng(0)
    sent = {
        "conv/conv2d_params": rng.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "list": rng.normal(size=(2, 3)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "integers": np.arange(3, dtype=np.int32),
    }
    got = dict(convert.read_constants(graph(sent, as_list=("list", "scalar"))))
    assert list(got) == ["conv/conv2d_params", "list", "scalar", "none"]
    for name, value in got.items():
        np.testing.assert_array_equal(value, sent[name])
    # One number stands for a whole array.
    one = graph_message().FromString(graph({"one": np.zeros((4, 5), np.float32)}))
    tensor = one.node[1].attr[1].value.tensor
    tensor.tensor_content = b""
    tensor.float_val.append(1.5)
    np.testing.assert_array_equal(dict(convert.read_constants(one.SerializeToString()))["one"], np.full((4, 5), 1.5))


def test_both_files_give_the_same_parameters(tmp_path, monkeypatch):
    params = convert.from_torch(state_dict())
    constants = tables.to_torch(params, convert.graph_table())
    data = graph(constants | {"pool_3/_reshape/shape": np.array([-1, 2048], np.int32)})
    (tmp_path / "classify_image_graph_def.pb").write_bytes(data)
    weights.write(tmp_path / "inception.safetensors", state_dict(), {})
    for name in ("classify_image_graph_def.pb", "inception.safetensors"):
        monkeypatch.setenv(convert.VARIABLE, str(tmp_path / name))
        got, digest = convert.load(convert.find())
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        jax.tree.map(np.testing.assert_array_equal, got, params)
    assert convert.find("other") == "other"
    short = {name: value for name, value in constants.items() if name != "conv/batchnorm/beta"}
    with pytest.raises(ValueError, match="1 missing: conv/batchnorm/beta"):
        convert.from_graph(graph(short))


def test_damaged_graphs_raise_nothing_but_valueerror():
    sent = {"conv/conv2d_params": np.ones((2, 2), np.float32), "b": np.arange(3, dtype=np.float32)}
    data = graph(sent, as_list=("b",))
    cut = 0
    for end in range(len(data)):
        try:
            for name, value in convert.read_constants(data[:end]):
                np.testing.assert_array_equal(value, sent[name])
        except ValueError:
            cut += 1
    assert cut > len(data) - 12  # but at the ends of its parts, where a shorter graph is whole
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            broken[at] = rng.integers(0, 256)
        try:
            list(convert.read_constants(bytes(broken)))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no TensorFlow graph"),
        (b"<html>not found</html>", "no TensorFlow graph"),
        (b"\x0a\xff\xff\xff\xff\x0f", "ends early"),
        (b"\xff" * 20, "no TensorFlow graph"),
    ],
)
def test_what_is_no_graph(data, match):
    with pytest.raises(ValueError, match=match):
        list(convert.read_constants(data))


def test_sizes_that_a_graph_cannot_keep():
    huge = graph_message().FromString(graph({"a": np.zeros(4, np.float32)}))
    huge.node[1].attr[1].value.tensor.tensor_shape.dim[0].size = 2**40
    with pytest.raises(ValueError, match=r"'a' has the shape \[1099511627776\]"):
        list(convert.read_constants(huge.SerializeToString()))
    huge.node[1].attr[1].value.tensor.tensor_shape.dim[0].size = 5
    with pytest.raises(ValueError, match="'a' holds 16 bytes, not 20"):
        list(convert.read_constants(huge.SerializeToString()))
    huge.node[1].attr[1].value.tensor.tensor_shape.dim[0].size = -1
    with pytest.raises(ValueError, match="'a' has the shape"):
        list(convert.read_constants(huge.SerializeToString()))


def test_errors_say_where_to_get_the_weights(tmp_path, monkeypatch):
    monkeypatch.delenv(convert.VARIABLE, raising=False)
    with pytest.raises(UserError, match="no Inception weights; --inception; fetch http.*SHA-256 6726825d"):
        convert.find()
    (tmp_path / "other.pb").write_bytes(graph({"a": np.zeros(4, np.float32)}))
    for name, match in {"gone.pb": "No such file", "other.pb": "no weights of the FID's .*471 missing"}.items():
        with pytest.raises(UserError, match=match) as error:
            convert.load(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
