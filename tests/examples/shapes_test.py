"""Captioned shapes: the laws of scenes and captions, and the data set that holds them."""

import zlib

import numpy as np
import pytest

from diffax.components import build, names, spec
from diffax.data import Column, Loader, batches, examples
from diffax.errors import UserError
from examples.shapes import data as shapes

NAME = "examples.shapes.data:shapes"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module", autouse=True)
def small():
    """Data sets of hundreds, not thousands; of photos, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "RANGES", {"train": range(150), "test": range(10**6, 10**6 + 30)})
        patch.setattr("diffax.data.scikit.CROPS", {"train": 40, "test": 20})
        yield


def load(root, side, **fields):
    return build(spec("data", NAME, data_dir=root, **fields), "data").open((side, side, 3))


# ---- scenes ----


def test_scenes_follow_from_their_index():
    assert shapes.scene(77) == shapes.scene(77)
    picture = shapes.draw(shapes.scene(77), 32)
    np.testing.assert_array_equal(picture, shapes.draw(shapes.scene(77), 32))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8


def test_scenes_are_distinct_and_balanced():
    scenes = [shapes.scene(i) for i in range(9000)]
    assert len(set(scenes)) == 9000
    assert len({scene.caption for scene in scenes}) > 5000 + 90
    for thing in range(2):
        pairs = [scene for scene in scenes if len(scene.things) > thing]
        for attribute, values in (
            ("shape", shapes.SHAPES),
            ("colour", tuple(shapes.COLOURS)),
            ("size", tuple(shapes.SIZES)),
        ):
            counts = [sum(getattr(s.things[thing], attribute) == v for s in pairs) for v in values]
            assert min(counts) > 0.9 * len(pairs) / len(values)


def test_relations_hold_and_things_lie_apart_inside_the_picture():
    for scene in map(shapes.scene, range(3000)):
        for thing in scene.things:
            radius = shapes.SIZES[thing.size]
            assert radius < min(thing.x, thing.y) and max(thing.x, thing.y) < 1 - radius
        if scene.relation == "none":
            assert len(scene.things) == 1
            continue
        a, b = scene.things
        right, down = b.x - a.x, b.y - a.y
        along, across = {
            "left of": (right, down),
            "right of": (-right, down),
            "above": (down, right),
            "below": (-down, right),
        }[scene.relation]
        assert along > shapes.SIZES[a.size] + shapes.SIZES[b.size]
        assert abs(across) <= along / 2


def test_caption_names_every_attribute():
    for scene in map(shapes.scene, range(300)):
        values = scene.attributes
        words = f"a {values['size']} {values['colour']} {values['shape']}"
        if values["relation"] != "none":
            words += f" {values['relation']} a {values['size2']} {values['colour2']} {values['shape2']}"
        if values["place"] != "none":
            words += f" at the {values['place']}"
        assert scene.caption == words
        said = shapes.described(scene.caption)
        assert said.items() <= values.items()
        unsaid = {k for k in values if k not in said}
        assert unsaid == {k for k in values if k == "background" or (k != "shape2" and values[k] == "none")}
        assert all(value in shapes.ATTRIBUTES[key] for key, value in values.items())
        assert values.keys() == shapes.ATTRIBUTES.keys()


def test_captions_may_leave_size_and_place_open():
    assert shapes.described("a red ring") == {"colour": "red", "shape": "ring", "shape2": "none"}
    two = shapes.described("a red ring above a small blue cross")
    assert two["relation"] == "above" and two["size2"] == "small" and "size" not in two
    for caption in ("", "red ring", "a red ring at the top", "a red ring above", "two red rings"):
        with pytest.raises(ValueError, match="describes no shapes"):
            shapes.described(caption)


@pytest.mark.parametrize("place", shapes.PLACES)
def test_places_are_where_the_paint_is(place):
    scenes = [s for s in map(shapes.scene, range(600)) if s.place == place]
    assert len(scenes) > 20
    for scene in scenes:
        x, y = scene.things[0].x, scene.things[0].y
        assert (y < 0.5) == place.startswith("top") and (x < 0.5) == place.endswith("left")


@pytest.mark.parametrize("side", [32, 128])
def test_pixels_show_the_caption(side):
    """Paint is where and of the colour that a scene says, and as much as its shape covers."""
    palette = {**shapes.COLOURS, **shapes.BACKGROUNDS}
    # Share of the square around a thing of radius 1 that its shape fills.
    r = shapes.RADII
    areas = {
        "circle": np.pi * r["circle"] ** 2,
        "square": 4 * r["square"] ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * r["triangle"] ** 2,
        "diamond": 2.0,
        "cross": 4 * (2 / 3 - 1 / 9),
        "ring": np.pi * 0.75,
    }
    for scene in map(shapes.scene, range(200)):
        picture = shapes.draw(scene, side).astype(int)
        names = [scene.background, *{thing.colour for thing in scene.things}]
        assert (picture[0, 0] == palette[scene.background]).all()
        painted = np.abs(picture - palette[scene.background]).sum(-1) > 60
        exact = {name: (picture == palette[name]).all(-1) for name in names}
        for thing in scene.things:
            if len(scene.things) > 1 and len(names) < 3:
                continue
            radius = shapes.SIZES[thing.size]
            y, x = (np.argwhere(exact[thing.colour]).mean(0) + 0.5) / side
            # A triangle's centre of mass lies below the middle of its box.
            below = radius * r["triangle"] / 4 if thing.shape == "triangle" else 0
            assert abs(x - thing.x) < 0.03 and abs(y - thing.y - below) < 0.03
            covered = exact[thing.colour].sum() / (radius * side) ** 2
            if side == 128:
                assert 0.75 * areas[thing.shape] < covered < 1.02 * areas[thing.shape]
        if side == 128:
            edges = painted & ~np.any([exact[name] for name in names], axis=0)
            assert edges.any(), "the outline is not anti-aliased"


# ---- as data ----


def test_shapes_dataset_carries_scene_and_attributes(root):
    source = load(root, 32)
    assert len(source) == 150 and source.class_names == shapes.SHAPES
    assert set(source.keys) == {"label", "caption", *shapes.ATTRIBUTES}
    for i in (0, 1, 77, 149):
        record, scene = source[i], shapes.scene(i)
        assert record["caption"] == scene.caption
        np.testing.assert_array_equal(record["image"], shapes.draw(scene, 32))
        assert shapes.SHAPES[record["label"]] == scene.things[0].shape
        for key, value in scene.attributes.items():
            assert shapes.ATTRIBUTES[key][record[key]] == value
    test = load(root, 32, split="test")
    assert [r["caption"] for r in test] == [shapes.scene(10**6 + i).caption for i in range(30)]


def test_attributes_come_in_batches(root):
    columns = {"caption": Column("caption"), "colour2": Column("colour2")}
    batch = next(batches(load(root, 32), Loader(), shape=(16, 16, 3), batch_size=8, seed=0, columns=columns))
    for caption, colour in zip(batch["caption"], batch["colour2"], strict=True):
        name = shapes.ATTRIBUTES["colour2"][colour]
        assert (
            name == "none"
            if " of " not in caption and "above" not in caption and ("below" not in caption)
            else caption.split(" at the ")[0].split()[-2] == name
        )


def test_held_out_combinations_are_in_their_split_alone(root):
    holdout = ("red circle", "blue square", "green ring")
    kept = load(root, 32, holdout=holdout)
    held = load(root, 32, holdout=holdout, split="holdout")
    test = load(root, 32, holdout=holdout, split="test")
    assert len(kept) + len(held) == 150 and len(held) > 5 and len(test) < 30
    for source, any_of in ((kept, False), (test, False), (held, True)):
        for record in source:
            assert any(pair in record["caption"] for pair in holdout) == any_of
    captions = [record["caption"] for source in (kept, held) for record in source]
    assert sorted(captions) == sorted(shapes.scene(i).caption for i in range(150))
    with pytest.raises(UserError, match="data: holdout and single need a whole split"):
        load(root, 32, holdout=holdout, split="train[:50%]")


def words(captions):
    """A tokenizer of whole words, numbered by their hash."""
    ids = np.full((len(captions), 16), -1, np.int32)
    for row, caption in zip(ids, captions, strict=True):
        numbers = [zlib.crc32(word.encode()) % 2**31 for word in caption.split()]
        row[: len(numbers)] = numbers
    return ids


def test_held_out_combinations_have_captions(root):
    source = load(root, 32, holdout=("red circle", "blue square"), split="holdout")
    columns = {"caption": Column("caption"), "text": Column("caption", words)}
    batch = examples(source, Loader(), shape=(32, 32, 3), limit=99, columns=columns)
    assert 1 < len(batch["caption"]) == len(source)
    assert all("red circle" in caption or "blue square" in caption for caption in batch["caption"])
    np.testing.assert_array_equal(batch["text"], words(batch["caption"]))


def test_mix_of_prepared_data(root):
    data = build(spec("data", "mix", parts=f"2 {NAME}, photos", data_dir=root), "data")
    assert data.has_held_out
    assert not build(spec("data", "mix", parts=f"{NAME}, folder /x"), "data").has_held_out
    mixed, columns = data.open((16, 16, 3)), {"caption": Column("caption")}
    assert len(mixed) == 3 * 75
    batch = examples(mixed, Loader(), shape=(16, 16, 3), limit=6, columns=columns)
    scenes = [shapes.scene(i).caption for i in range(4)]
    assert batch["caption"].tolist() == [scenes[0], "temple", *scenes[1:3], "flower", scenes[3]]
    tests = examples(data.held_out((16, 16, 3)), Loader(), shape=(16, 16, 3), limit=1, columns=columns)
    assert tests["caption"].tolist() == [shapes.scene(10**6).caption]


def test_a_column_can_be_the_label(root):
    source = load(root, 16, label="colour", single=True)
    assert source.class_names == tuple(shapes.COLOURS) and len(source) == 50
    assert source[5]["label"] == source[5]["colour"]
    with pytest.raises(UserError, match="no column 'color' of classes.*colour"):
        load(root, 16, label="color")


def test_no_table_of_diffax_knows_them():
    assert "shapes" not in names("data")
    with pytest.raises(UserError, match="data must be one of"):
        spec("data", "shapes")
