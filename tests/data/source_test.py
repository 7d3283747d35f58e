"""Components of kind 'data': what they are named, what they refuse, and what importing them costs."""

import inspect
import pathlib
import subprocess
import sys

import pytest

from diffax import components
from diffax.components import build, spec
from diffax.data import Source, Splits
from diffax.errors import UserError
from tests.data.pipeline_test import toy

SHAPE = (6, 6, 3)
ROOT = pathlib.Path(__file__).parents[2]


def test_source_has_a_length_and_an_end():
    source = toy(3)
    assert [len(source), source[2]["label"], len(list(source))] == [3, 2, 3]
    with pytest.raises(IndexError, match="record 3 of 3; toy"):
        source[3]


def test_splits_open_what_they_are_named():
    def load(shape, split):
        return Source(f"{split} of {shape}", 1, lambda i: {})

    data = Splits(load, "train", "test")
    assert data.has_held_out and not Splits(load).has_held_out
    assert [data.open([4, 4, 1]).name, data.held_out((4, 4, 1)).name] == ["train of (4, 4, 1)", "test of (4, 4, 1)"]
    assert Splits(load, "some").held_out((4, 4, 1)).name == "some of (4, 4, 1)"
    with pytest.raises(ValueError, match="split must be the name of a split"):
        Splits(load, "")
    for shape in ((4, 4, 2), (4, 4)):
        with pytest.raises(UserError, match="images have 1 or 3 channels; shape=.4, 4"):
            data.open(shape)


SHAPES = "examples.shapes.data:shapes"


@pytest.mark.parametrize(
    "name, fields, text",
    [
        ("digit", {}, "must be one of 'captions', 'cifar10', 'digits', .* did you mean digits"),
        ("folder", {}, "path must name the folder of the images"),
        ("folder", {"path": "x", "split": ""}, "data: split must be the name of a split, such as 'train'"),
        ("folder", {"path": "/no/such"}, "no such folder; data.path='/no/such'"),
        ("captions", {"path": "/no/such"}, "no such folder; data.path='/no/such'"),
        ("tfds", {}, "path must name the folder of a prepared TFDS"),
        ("tfds", {"path": "/no/such"}, "no dataset_info.json below data.path; /no/such"),
        ("digits", {"data_dir": "gs://bucket/x"}, "data: data_dir must be a local folder, got 'gs://bucket/x'"),
        ("digits", {"path": "/x"}, "unknown field data digits.path; data digits has split, data_dir"),
        ("mix", {}, "data: not a part of a mix: ''; data.parts; separate parts by commas"),
        ("mix", {"parts": "digits, mix"}, "not a part of a mix: 'mix'"),
        ("mix", {"parts": "0.5 digits"}, "not a part of a mix: '0.5 digits'"),
        ("mix", {"parts": "0 digits"}, "not a part of a mix: '0 digits'"),
        ("mix", {"parts": "9999 digits"}, "a whole weight of 1 to 1000"),
        ("mix", {"parts": "digit"}, "data.parts must be one of .* did you mean digits"),
        ("mix", {"parts": "no.such:thing"}, "data.parts cannot import 'no.such' for a data"),
        ("mix", {"parts": "digits /x"}, "the data 'digits' have no path, got '/x'; data.parts"),
        ("mix", {"parts": "2 folder"}, "data.parts: path must name the folder"),
        ("mix", {"parts": "captions /no/such"}, "no such folder; data.path='/no/such'"),
        ("mix", {"parts": f"2 {SHAPES}", "data_dir": "gs://x"}, "data.parts: data_dir must be a local folder"),
        (SHAPES, {"holdout": ("red star",)}, "data: holdout has no combination 'red star'"),
        (SHAPES, {"split": "holdout"}, "data: split 'holdout' is empty"),
        (SHAPES, {"split": "train[:50%]", "single": True}, "data: holdout and single need a whole split"),
    ],
)
def test_bad_data_sections_are_refused_before_anything_is_prepared(name, fields, text, tmp_path):
    with pytest.raises(UserError, match=text) as caught:
        section = spec("data", name, **fields)
        if not section.get("data_dir", "x"):
            section["data_dir"] = str(tmp_path)
        build(section, "data").open(SHAPE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_are_the_data_sets():
    assert components.names("data") == ["captions", "cifar10", "digits", "folder", "mix", "mnist", "photos", "tfds"]


def test_moving_data_keeps_the_identity_and_other_data_change_it():
    for name in [*components.names("data"), SHAPES]:
        factory = components.find("data", name)
        fields = components.schema(factory)
        for field in fields.values():
            assert components.RUNTIME in field.marks if field.name in ("path", "data_dir") else True
            assert any(mark in field.marks for mark in (components.RUNTIME, components.TRAINING)), (name, field.name)
            assert field.doc, f"{name}.{field.name} has no line in the docstring"
        assert fields.keys() == inspect.signature(factory).parameters.keys()
        plain = components.identity(fields, spec("data", name), training=True)
        assert plain != components.identity(fields, spec("data", name, **{"split": "test"}), training=True)
        moved = spec("data", name, **{field: "/x" for field in ("path", "data_dir") if field in fields})
        assert plain == components.identity(fields, moved, training=True)


def test_modules_import_nothing_that_takes_time():
    """diffax itself is stubbed: what it imports is its own affair."""
    program = f"""
import pkgutil, sys, types
package = types.ModuleType("diffax")
package.__path__ = [{str(ROOT / "diffax")!r}]
sys.modules["diffax"] = package
import diffax.data
assert "numpy" not in sys.modules and "PIL" not in sys.modules
from diffax.data import Source, batches, write_embeddings
for found in pkgutil.iter_modules(diffax.data.__path__):
    __import__("diffax.data." + found.name)
heavy = "jax flax tensorflow_datasets grain array_record sklearn matplotlib orbax tensorflow"
print(*[name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
