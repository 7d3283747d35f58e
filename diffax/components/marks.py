"""What the annotation of a field can say."""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class In:
    """A number, or every number of a tuple, lies between two bounds, which `above` and `below` exclude."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high) and not math.isinf(self.low):
            return f"{'above' if self.above else 'at least'} {self.low:.10g}"
        return f"in {'(' if self.above else '['}{self.low:.10g}, {self.high:.10g}{')' if self.below else ']'}"


@dataclasses.dataclass(frozen=True)
class Length:
    """A tuple has this many items."""

    low: int = 0
    high: int = 64

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class Of:
    """The field holds a component of a kind.

    Attributes:
      kind: such as 'loss'.
      default: the component's name where a config says nothing; '' if the field is to be set.
      late: the factory gets a function that makes the component, and passes it what the config cannot say.
    """

    kind: str
    default: str = ""
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Each:
    """The field holds components of a kind by name, in order; `default` names components that are there by default."""

    kind: str
    default: tuple[str, ...] = ()
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """The field holds a group of plain fields: the arguments of a function, given or named by its import path."""

    fields: Callable | str


@dataclasses.dataclass(frozen=True)
class Section:
    """The field names another section of the config, whose model the factory gets; '' for none.

    Attributes:
      needs: an attribute that the model must have, such as 'embed_text'.
      what: what has it, in words, such as 'a CLIP'.
    """

    needs: str = ""
    what: str = "a model"


RUNTIME = "RUNTIME"  # the field changes neither the parameters nor their training
TRAINING = "TRAINING"  # the field changes the training, not what the parameters mean
WIRED = "WIRED"  # not a field: whoever builds the component passes it
