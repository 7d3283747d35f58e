"""Several data sets as one, in fixed proportions."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any

from diffax.components import RUNTIME, TRAINING, build, component, find, schema, spec
from diffax.data.source import Data, Source, can_caption, captioned
from diffax.errors import UserError

MAX_WEIGHT = 1000
_PART = re.compile(r"\s*(?:(\d+)\s+)?([A-Za-z_][\w.:]*)\s*(.*?)\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Mix:
    """`Data` that take turns.

    Attributes:
      parts: the data.
      weights: how many records of each there are in a round.
    """

    parts: Sequence[Data]
    weights: Sequence[int]

    @property
    def has_held_out(self) -> bool:
        """Whether all parts have a split that is never trained on."""
        return all(part.has_held_out for part in self.parts)

    def open(self, shape: Sequence[int]) -> Source:
        """The records to train on of all parts."""
        return mixed([part.open(shape) for part in self.parts], self.weights)

    def held_out(self, shape: Sequence[int]) -> Source:
        """The records that are never trained on, where all parts have some."""
        if not self.has_held_out:
            return self.open(shape)
        return mixed([part.held_out(shape) for part in self.parts], self.weights)


@component("data", "mix")
def mix(
    *,
    parts: Annotated[str, TRAINING] = "",
    split: Annotated[str, TRAINING] = "train",
    data_dir: Annotated[str, RUNTIME] = "",
) -> Data:
    """Several data in turn, each with its weight; records hold an image, and a caption if all parts can have one.

    Args:
      parts: '[WEIGHT] NAME [PATH], ...', such as '2 digits, photos, 3 captions /data/birds'; NAME can be an import
        path, and a PATH contains no comma.
      split: of every part.
      data_dir: where parts that diffax prepares lie.
    """
    shared = {"split": split, "data_dir": data_dir}
    weights, made = zip(*(_part(text, shared) for text in parts.split(",")), strict=True)
    return Mix(made, weights)


def _part(text: str, shared: dict[str, str]) -> tuple[int, Data]:
    """Weight and data of one part; it gets those of the shared fields that it has."""
    found = _PART.fullmatch(text)
    weight, name, path = found.groups() if found else ("", "", "")
    if name in ("", "mix") or not 0 < int(weight or 1) <= MAX_WEIGHT:
        raise UserError(
            f"not a part of a mix: {text.strip()!r}; data.parts; separate parts by commas, each [WEIGHT] NAME [PATH] "
            f"with a whole weight of 1 to {MAX_WEIGHT}, as in '2 digits, captions /birds'"
        )
    known = schema(find("data", name, "data.parts"))
    fields = {field: value for field, value in shared.items() if field in known}
    if path:
        if "path" not in known:
            raise UserError(f"the data {name!r} have no path, got {path!r}; data.parts; leave it out")
        fields["path"] = path
    return int(weight or 1), build(spec("data", name, **fields), "data", path="data.parts")


def mixed(sources: Sequence[Source], weights: Sequence[int]) -> Source:
    """Sources in rounds that hold `weights[k]` records of source k each, spread over the round.

    It ends with the round in which every record was there once, so that a source with more weight than its size would
    give it comes again from its start. Records hold an image, and a caption if all sources have or can be given one:
    what labels mean differs.

    Args:
      sources: not empty ones.
      weights: whole numbers above 0.
    """
    captions = all(map(can_caption, sources))
    if captions:
        sources = [captioned(source) for source in sources]
    keys = ("image", *(("caption",) * captions))
    places = sorted(((j + 0.5) / weight, k, j) for k, weight in enumerate(weights) for j in range(weight))
    rounds = max(-(-len(source) // weight) for source, weight in zip(sources, weights, strict=True))

    def locate(index: int) -> tuple[Source, int]:
        number, place = divmod(index, len(places))
        _, k, j = places[place]
        return sources[k], (number * weights[k] + j) % len(sources[k])

    def read(index: int) -> dict[str, Any]:
        source, number = locate(index)
        record = source.read(number)
        return {key: record[key] for key in keys}

    def where(index: int) -> str:
        source, number = locate(index)
        return f"{source.where(number)} of {source.name}"

    parts = ", ".join(f"{weight} {source.name}" for source, weight in zip(sources, weights, strict=True))
    return Source(f"mix of {parts}", rounds * len(places), read, keys[1:], (), where)
