"""Schemas: the fields of a factory, from its signature."""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffax.components.marks import WIRED, Each, Group, In, Length, Of
from diffax.components.registry import by_path, find
from diffax.components.values import has_type, in_words
from diffax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a schema.

    Attributes:
      name: of the argument.
      hint: its type without annotations.
      marks: what the annotation says besides.
      default: of the argument; `inspect.Parameter.empty` where a section has to be set or made.
      doc: its line in the docstring.
    """

    name: str
    hint: Any
    marks: tuple[Any, ...]
    default: Any
    doc: str = ""

    def mark(self, kind: type) -> Any:
        """The mark of a type; None if the annotation has none."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def nested(self) -> Of | Each | Group | None:
        """What the section below the field is; None of a plain field."""
        return self.mark(Of) or self.mark(Each) or self.mark(Group)

    @property
    def allowed(self) -> str:
        """What the field may hold, in words."""
        return in_words(self.hint, self.mark(In), self.mark(Length))

    def initial(self) -> Any:
        """The value of the field where a config says nothing."""
        nested = self.nested
        if isinstance(nested, Of):
            return spec(nested.kind, nested.default) if nested.default else Fields()
        if isinstance(nested, Each):
            return Fields({name: spec(nested.kind, name) for name in nested.default})
        if isinstance(nested, Group):
            return Fields(defaults(nested.fields))
        return self.default

    def accepts(self, value: Any) -> bool:
        """Whether a plain value has the type, range and length that the field wants."""
        if not has_type(self.hint, value):
            return False
        length, bounds = self.mark(Length), self.mark(In)
        items = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) and length and not length.low <= len(value) <= length.high:
            return False
        numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
        return all(math.isfinite(n) and (bounds is None or n in bounds) for n in numbers)


class Fields(ConfigDict):
    """A `ConfigDict` that keeps the order of its fields, and leaves their types to the schema."""

    def __init__(self, values: Mapping[str, Any] | None = None):
        super().__init__(type_safe=False, convert_dict=False, sort_keys=False)
        for name, value in (values or {}).items():
            self[name] = value

    def update(self, *others: Mapping[str, Any], **fields: Any) -> None:
        """Sets fields; of a field that is a group itself those that are given, while a component is replaced."""
        for name, value in [item for other in (*others, fields) for item in other.items()]:
            old = self.get(name)
            if isinstance(old, ConfigDict) and isinstance(value, Mapping | ConfigDict) and "name" not in value:
                old.update(value)
            else:
                self[name] = value

    def __repr__(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=repr)  # ConfigDict's own would sort the fields

    __str__ = __repr__


@functools.cache
def schema(factory: Callable | str) -> dict[str, Field]:
    """The fields of a factory, from its signature: {name: field}.

    Args:
      factory: a callable, or its import path.
    """
    factory = by_path("group", factory, "") if isinstance(factory, str) else factory
    parameters = inspect.signature(factory).parameters
    target = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(factory, include_extras=True) if inspect.isclass(factory) else {}
    hints |= typing.get_type_hints(target, include_extras=True)
    docs, fields = _argument_docs(factory), {}
    for name, parameter in parameters.items():
        of_flax = "parent" in parameters and name in ("parent", "name")  # every Flax module has these two
        if of_flax or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint, marks = hints.get(name, Any), ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        field = Field(name, hint, tuple(marks), parameter.default, docs.get(name, ""))
        if WIRED in field.marks or (parameter.default is parameter.empty and not field.nested):
            continue
        fields[name] = field
    return fields


def defaults(factory: Callable | str) -> dict[str, Any]:
    """The initial value of every field."""
    return {name: field.initial() for name, field in schema(factory).items()}


def spec(kind: str, name: str, /, **fields: Any) -> ConfigDict:
    """The section of a component, every field at its default or as given.

    Args:
      kind: such as 'network'.
      name: such as 'unet', or an import path.
      **fields: values that differ from the defaults.

    Raises:
      UserError: there is no such component or field.
    """
    factory = find(kind, name, f"{kind}")
    section = Fields({"name": name, **defaults(factory)})
    for field, value in fields.items():
        if field not in section:
            raise unknown(f"{kind} {name}", field, schema(factory))
        section[field] = value
    return section


def each(kind: str, /, *names: str, **named: str | ConfigDict) -> ConfigDict:
    """Components of one kind by name, in this order: what a field holds that is marked `Each`.

        stage.conditions = each("condition", "label", "low_res")
        stage.guidance = each("guidance", "clip_denoised", mine=spec("guidance", "my_lab:sharper", amount=0.2))

    Args:
      kind: such as 'condition'.
      *names: components that go by their own names; of an import path that is its last part.
      **named: a section, or the name of a component, under a name of the config's own.

    Raises:
      UserError: there is no such component.
    """
    found = {key_of(name): spec(kind, name) for name in names}
    return Fields(found | {key: spec(kind, its) if isinstance(its, str) else its for key, its in named.items()})


def key_of(name: str) -> str:
    """What a component is called among others of its kind: its name, or the last part of its import path."""
    return re.split("[:.]", name)[-1]


def _argument_docs(factory: Callable) -> dict[str, str]:
    """Lines of a docstring's Args or Attributes: {name: text}."""
    found: dict[str, str] = {}
    for kind in reversed(getattr(factory, "__mro__", (factory,))):
        doc, name = inspect.cleandoc(kind.__doc__ or ""), ""
        section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", doc + "\n", re.M)
        for line in section[1].splitlines() if section else ():
            if start := re.match(r"  (\w[\w, ]*?): (.*)", line):
                name = start[1]
                for part in name.split(", "):
                    found[part] = start[2]
            elif name and line.startswith("    "):
                for part in name.split(", "):
                    found[part] += " " + line.strip()
    return found


# What people type who come from other code, and the field that they mean.
_SYNONYMS = {
    "width": "channels",
    "model_channels": "channels",
    "depth": "num_res_blocks",
    "lr": "learning_rate",
    "bs": "batch_size",
    "batch": "batch_size",
    "microbatch": "accumulate",
    "ema_decay": "ema",
    "ema_rate": "ema",
    "num_steps": "num_train_steps",
    "iterations": "num_train_steps",
    "clip": "grad_clip",
    "warmup": "warmup_steps",
    "image_size": "shape",
    "resolution": "shape",
    "attention_resolutions": "attention",
    "num_heads": "heads",
    "num_head_channels": "head_channels",
    "resblock_updown": "resample",
    "timestep_respacing": "steps",
    "diffusion_steps": "num_timesteps",
    "noise_schedule": "schedule",
    "takes": "conditions",
    "class_cond": "conditions",
    "drop": "condition_dropout",
}


def unknown(path: str, name: str, fields: Mapping[str, Field]) -> UserError:
    """The error for a field that a section does not have, with the one that was probably meant."""
    there = {field: f"{path}.{field}" for field in fields}
    words = there | {word: there[field] for word, field in _SYNONYMS.items() if field in there}
    near = [words[word] for word in difflib.get_close_matches(str(name), words, n=1)]
    below = [f"{path}.{field}.{name}" for field, its in fields.items() if name in below_of(its)]
    wanted = _SYNONYMS.get(name, name)
    below += [f"{path}.{field}.{wanted}" for field, its in fields.items() if wanted in below_of(its) and wanted != name]
    if below and (not near or name not in there):
        near = below[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{path} has {', '.join(fields) or 'no fields'}"
    return UserError(f"unknown field {path}.{str(name)[:80]}; {hint}")


def below_of(field: Field) -> Mapping[str, Field]:
    """The fields of the default section below a field."""
    nested = field.nested
    if isinstance(nested, Of) and nested.default:
        return schema(find(nested.kind, nested.default))
    return schema(nested.fields) if isinstance(nested, Group) else {}
