"""Components: the signature of a factory is the schema of its section of a config.

A component is any callable that makes a part of a model: a Flax module, a dataclass or a function. `@component(kind,
name)` names it; one that lies elsewhere is named by its import path, `my_lab.losses:min_snr`, and needs no decorator.
Its keyword arguments are the fields of a config section, their annotations say what the fields may hold:

    @component("loss", "hybrid")
    def hybrid(*, weight: Annotated[float, In(0)] = 1.0) -> Loss: ...

    section = spec("loss", "hybrid", weight=4.0)    # {'name': 'hybrid', 'weight': 4.0}
    loss = build(section, "loss")                   # hybrid(weight=4.0)

A section is a tree: a field can hold another component (`Of`), several by name (`Each`), a group of plain fields
(`Group`) or the name of another model's section (`Section`). All that a user can get wrong raises a `UserError` of one
line that begins with the path of the field.
"""

from diffax.components.building import build
from diffax.components.describing import describe, table
from diffax.components.marks import RUNTIME, TRAINING, WIRED, Each, Group, In, Length, Of, Section
from diffax.components.registry import HOMES, component, find, names
from diffax.components.schema import Field, Fields, defaults, each, key_of, schema, spec
from diffax.components.tree import check, complete, fields_of, identity, override, refusal, sections, tuples
from diffax.components.values import parse
from diffax.components.words import closest, shown

__all__ = [
    "Each",
    "Field",
    "Fields",
    "Group",
    "HOMES",
    "In",
    "Length",
    "Of",
    "RUNTIME",
    "Section",
    "TRAINING",
    "WIRED",
    "build",
    "check",
    "closest",
    "complete",
    "component",
    "defaults",
    "describe",
    "each",
    "fields_of",
    "find",
    "identity",
    "key_of",
    "names",
    "override",
    "parse",
    "refusal",
    "schema",
    "sections",
    "shown",
    "spec",
    "table",
    "tuples",
]
