"""Captioned scenes of one or two coloured shapes, drawn from their index alone.

A toy with the structure of a captioned photo set: objects with attributes and a relation between
them, and combinations that can be held out to test whether a model composes. The attributes travel
with the picture, so an evaluation classifier can be trained to read them back.

Configs name the data by import path: `spec("data", "examples.shapes.data:shapes", single=True)`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageDraw

from diffax.components import RUNTIME, TRAINING, Length
from diffax.data.builders import Recipe, built
from diffax.data.source import Data, Source, Splits

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (250, 145, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 80, 215),
    "purple": (150, 70, 200),
    "pink": (245, 130, 185),
}
SIZES = {"small": 0.13, "large": 0.22}  # radius, in image sides
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("top left", "top right", "bottom left", "bottom right")
UNCLEAR = 0.06  # a centre nearer to the middle than this, in image sides, is neither left nor right of it
BACKGROUNDS = {"black": (20, 20, 20), "grey": (128, 128, 128), "white": (240, 240, 240)}
# Chosen for a like area; none reaches further from its centre than its size.
RADII = {
    "circle": 0.95,
    "square": 0.85,
    "triangle": 1.15,
    "diamond": 1.0,
    "cross": 1.0,
    "ring": 1.0,
}
OVERSAMPLING = 4

# Class names of every attribute a record carries; objects that are not there are 'none'.
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "shape2": (*SHAPES, "none"),
    "colour2": (*COLOURS, "none"),
    "size2": (*SIZES, "none"),
    "relation": (*RELATIONS, "none"),
    "place": (*PLACES, "none"),
    "background": tuple(BACKGROUNDS),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object; `x` and `y` are its centre in image sides, from the left and the top."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things on a plain background; `things[0]` stands `relation` `things[1]`."""

    things: tuple[Thing, ...]
    relation: str
    background: str

    @property
    def caption(self) -> str:
        """For example 'a small red circle left of a large blue square', or 'a large pink ring at the top left'."""
        where = "" if self.place == "none" else f" at the {self.place}"
        return f" {self.relation} ".join(str(thing) for thing in self.things) + where

    @property
    def place(self) -> str:
        """The quarter of the picture in which a single thing clearly stands, else 'none'."""
        thing = self.things[0]
        if len(self.things) > 1 or min(abs(thing.x - 0.5), abs(thing.y - 0.5)) < UNCLEAR:
            return "none"
        return PLACES[2 * (thing.y > 0.5) + (thing.x > 0.5)]

    @property
    def attributes(self) -> dict[str, str]:
        """Every name of ATTRIBUTES with its value in this scene."""
        first, second = (*self.things, None)[:2]
        out = {"relation": self.relation, "place": self.place, "background": self.background}
        for key in ("shape", "colour", "size"):
            out[key] = getattr(first, key)
            out[f"{key}2"] = getattr(second, key) if second else "none"
        return out


@functools.cache
def _shuffled(number: int) -> np.ndarray:
    return np.random.default_rng(2020).permutation(number)


def _nth_thing(number: int) -> tuple[str, str, str]:
    number, shape = divmod(number, len(SHAPES))
    size, colour = divmod(number, len(COLOURS))
    return SHAPES[shape], tuple(COLOURS)[colour], tuple(SIZES)[size]


def scene(index: int) -> Scene:
    """The scene of an index: one of 96 single things or 36,864 pairs, with a jitter of its own.

    Every third index is a single thing. Each kind goes through all its combinations in a shuffled
    order before it repeats one; places and background are drawn from the index.
    """
    rng = np.random.default_rng((2020, index))
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    kinds = len(SHAPES) * len(COLOURS) * len(SIZES)
    third, place = divmod(index, 3)
    if place == 0:
        kind = _nth_thing(int(_shuffled(kinds)[third % kinds]))
        margin = SIZES[kind[2]] + 0.03
        x, y = rng.uniform(margin, 1 - margin, size=2)
        return Scene((Thing(*kind, x, y),), "none", background)
    pairs = kinds * kinds * len(RELATIONS)
    number, relation = divmod(int(_shuffled(pairs)[(2 * third + place - 1) % pairs]), len(RELATIONS))
    first, second = map(_nth_thing, divmod(number, kinds))
    along, across = _two_places(rng, SIZES[first[2]], SIZES[second[2]])
    relation = RELATIONS[relation]
    if relation in ("right of", "below"):
        along = 1 - along
    x, y = (along, across) if relation in ("left of", "right of") else (across, along)
    things = (Thing(*first, x[0], y[0]), Thing(*second, x[1], y[1]))
    return Scene(things, relation, background)


def _two_places(rng, radius1: float, radius2: float) -> tuple[np.ndarray, np.ndarray]:
    """Places along the axis of a relation, the first thing's nearer 0, and across that axis."""
    edge, gap = 0.025, 0.04
    slack = 1 - 2 * (edge + radius1 + radius2) - gap
    start, stretch = np.sort(rng.uniform(0, slack, size=2))
    along = np.array([edge + radius1 + start, edge + 2 * radius1 + gap + radius2 + stretch])
    # Half as far apart across as along, at most: nobody would name the other relation.
    reach = min(0.16, (along[1] - along[0]) / 4)
    across = rng.uniform(0.4, 0.6) + rng.uniform(-reach, reach, size=2)
    return along, across


def draw(scene_: Scene, size: int) -> np.ndarray:
    """Paints a scene, anti-aliased: drawn four times larger, then box-averaged.

    Returns:
      uint8 [size, size, 3].
    """
    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene_.background])
    pen = ImageDraw.Draw(image)
    for thing in scene_.things:
        _draw_thing(pen, thing, side, BACKGROUNDS[scene_.background])
    return np.asarray(image.reduce(OVERSAMPLING))


def described(caption: str) -> dict[str, str]:
    """What a caption says: its names of ATTRIBUTES with their values; those that it leaves open are not there.

    Args:
      caption: like those of `Scene.caption`; size and place may be left out, as in 'a red circle'.

    Raises:
      ValueError: it is no such caption.
    """
    words = "|".join
    thing = rf"a (?:({words(SIZES)}) )?({words(COLOURS)}) ({words(SHAPES)})"
    pattern = rf"{thing}(?: ({words(RELATIONS)}) {thing}| at the ({words(PLACES)}))?"
    found = re.fullmatch(pattern, caption)
    if not found:
        raise ValueError(f"{caption!r} describes no shapes; write it like 'a small red circle at the top left'")
    names = ("size", "colour", "shape", "relation", "size2", "colour2", "shape2", "place")
    said = {name: value for name, value in zip(names, found.groups(), strict=True) if value}
    return said if "relation" in said else {**said, "shape2": "none"}


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, background):
    fill = COLOURS[thing.colour]
    r = SIZES[thing.size] * RADII[thing.shape] * side
    x, y = thing.x * side, thing.y * side
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
        if thing.shape == "ring":
            r *= 0.5
            pen.ellipse((x - r, y - r, x + r, y + r), background)
    elif thing.shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill)
    elif thing.shape == "cross":
        arm = r / 3
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill)
    else:
        corners = {"triangle": 3, "diamond": 4}[thing.shape]
        y += r / 4 if thing.shape == "triangle" else 0  # its box is centred, not its circumcircle
        angles = [2 * math.pi * k / corners for k in range(corners)]
        pen.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a in angles], fill)


# ---- as data --------------------------------------------------------------------------------------------------------

RANGES = {"train": range(20_000), "test": range(1_000_000, 1_002_000)}  # indices of the scenes of a split


def shapes(
    *,
    split: Annotated[str, TRAINING] = "train",
    holdout: Annotated[tuple[str, ...], Length(0, 48), TRAINING] = (),
    single: Annotated[bool, TRAINING] = False,
    label: Annotated[str, TRAINING] = "label",
    data_dir: Annotated[str, RUNTIME] = "",
) -> Data:
    """Captioned pictures of one or two coloured shapes; the label is the first one's shape.

    Args:
      split: 'train', 'test', or 'holdout' for the scenes of 'train' that show a combination of `holdout`; slices such
        as 'train[:10%]' without `holdout` and `single`.
      holdout: combinations such as 'red circle' to leave out of every split but 'holdout'.
      single: leave out scenes of two things.
      label: the attribute that is the label, such as 'colour'.
      data_dir: where TFDS data lie; '' is TFDS's own default.

    Raises:
      ValueError: no such combination, or a split that cannot be limited.
    """
    for pair in holdout:
        if pair not in {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}:
            raise ValueError(
                f"holdout has no combination {pair!r}; write '<colour> <shape>' of {', '.join(COLOURS)} and "
                f"{', '.join(SHAPES)}"
            )
    if split == "holdout" and not holdout:
        raise ValueError("split 'holdout' is empty; name combinations such as 'red circle' in holdout")
    limited = holdout or single
    if limited and split not in (*RANGES, "holdout"):
        raise ValueError(f"holdout and single need a whole split, 'train', 'test' or 'holdout', got {split!r}")

    whole = built(RECIPE, data_dir=data_dir, label=label)

    def load(shape: Sequence[int], split: str) -> Source:
        source = whole.load(shape, "train" if split == "holdout" else split)
        return _limited(source, split, holdout, single) if limited else source

    return Splits(load, split, "test")


def _limited(source: Source, split: str, holdout: Sequence[str], single: bool) -> Source:
    """Scenes without the held-out combinations, or, of the split 'holdout', only those; single: of one thing."""
    only = split == "holdout"

    def is_kept(things: Sequence[Thing]) -> bool:
        held_out = any(f"{thing.colour} {thing.shape}" in holdout for thing in things)
        return only == held_out and not (single and len(things) > 1)

    kept = [number for number, i in enumerate(RANGES["train" if only else split]) if is_kept(scene(i).things)]
    limits = [f"{'only' if only else 'without'} {', '.join(holdout)}"] * bool(holdout) + ["single"] * single
    return dataclasses.replace(
        source,
        name=f"{source.name} {' '.join(limits)}",
        size=len(kept),
        read=lambda i: source.read(kept[i]),
        where=lambda i: source.where(kept[i]),
    )


def _examples(side: int, archive_dir: str) -> dict[str, Iterator[dict[str, Any]]]:
    del archive_dir
    return {split: (_example(index, side) for index in indices) for split, indices in RANGES.items()}


def _example(index: int, side: int) -> dict[str, Any]:
    drawn = scene(index)
    label = drawn.things[0].shape
    return {"image": draw(drawn, side), "caption": drawn.caption, "label": label, **drawn.attributes}


RECIPE = Recipe(
    "shapes",
    "One or two coloured shapes with their attributes and a caption.",
    (16, 32, 64, 128, 256),
    {"label": SHAPES, **ATTRIBUTES},
    _examples,
    has_captions=True,
    version="1.1.0",  # the pictures of 1.0.0; captions also name the place of a single thing
)
