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

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from diffax.errors import UserError

# ---- what an annotation can say -------------------------------------------------------------------------------------


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
        return _in_words(self.hint, self.mark(In), self.mark(Length))

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
        if not _has_type(self.hint, value):
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


# ---- finding components ---------------------------------------------------------------------------------------------

# Where diffax's own components of a kind live; of a package all modules are looked through.
HOMES = {
    "model": "diffax.models",
    "network": "diffax.networks",
    "condition": "diffax.conditions",
    "tokenizer": "diffax.conditions",
    "schedule": "diffax.diffusion",
    "timesteps": "diffax.diffusion",
    "loss": "diffax.diffusion",
    "sampler": "diffax.diffusion",
    "guidance": "diffax.models",
    "data": "diffax.data",
    "optimizer": "diffax.training.optimizer",
    "evaluation": "diffax.evaluation.classifiers",
}
_REGISTRY: dict[tuple[str, str], Callable] = {}


def component(kind: str, name: str) -> Callable[[Callable], Callable]:
    """Names a factory, so that configs can: `@component('loss', 'hybrid')`."""

    def register(factory: Callable) -> Callable:
        _REGISTRY[kind, name] = factory
        return factory

    return register


@functools.cache
def _look_through(package: str) -> None:
    module = importlib.import_module(package)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not found.name.startswith("_"):
            importlib.import_module(f"{package}.{found.name}")


def names(kind: str) -> list[str]:
    """The components of a kind that have a name."""
    if kind in HOMES:
        _look_through(HOMES[kind])
    return sorted(name for its, name in _REGISTRY if its == kind)


def find(kind: str, name: str, path: str = "") -> Callable:
    """The factory of that name or import path.

    Args:
      kind: such as 'loss'.
      name: such as 'hybrid' or 'my_lab.losses:min_snr'.
      path: where the name stands, for the error.

    Raises:
      UserError: there is none, or it cannot be imported.
    """
    where = f"{path} " if path else ""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}must name {_article(kind)} or an import path, got {shown(name)}")
    if ":" in name:
        return _by_path(kind, name, where)
    if (kind, name) not in _REGISTRY and name not in (there := names(kind)):
        raise UserError(
            f"{where}must be one of {', '.join(map(repr, there))} or an import path such as 'my_lab:{kind}', got "
            f"{shown(name)}{closest(name, there)}"
        )
    return _REGISTRY[kind, name]


def _by_path(kind: str, name: str, where: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where}cannot import {module!r} for {_article(kind)} ({reason}); correct the path") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{where}{module!r} has no {attribute!r}{closest(attribute, there)}; correct the path")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{where}{name!r} is no factory of {_article(kind)}, but {shown(found)}; name a callable")
    return found


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


# ---- schemas --------------------------------------------------------------------------------------------------------


@functools.cache
def schema(factory: Callable | str) -> dict[str, Field]:
    """The fields of a factory, from its signature: {name: field}.

    Args:
      factory: a callable, or its import path.
    """
    factory = _by_path("group", factory, "") if isinstance(factory, str) else factory
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
            raise _unknown(f"{kind} {name}", field, schema(factory))
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


# ---- types ----------------------------------------------------------------------------------------------------------


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the type itself of another."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(hint) for option in _options(part))
    return (hint,)


def _item(hint: Any) -> Any:
    """The type of a tuple's items."""
    return (typing.get_args(hint) or (Any,))[0]


def _is_tuple(hint: Any) -> bool:
    return hint is tuple or typing.get_origin(hint) is tuple


def _has_type(hint: Any, value: Any) -> bool:
    for option in _options(hint):
        if option is Any:
            return True
        if option in (None, type(None)):
            fits = value is None
        elif typing.get_origin(option) is Literal:
            fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(option))
        elif _is_tuple(option):
            fits = isinstance(value, tuple) and all(_has_type(_item(option), item) for item in value)
        elif option is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif option is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, typing.get_origin(option) or option)
        if fits:
            return True
    return False


def _choices(hint: Any) -> tuple[Any, ...]:
    """All values that a Literal in the type allows."""
    found = []
    for option in _options(hint):
        option = _item(option) if _is_tuple(option) else option
        for part in _options(option):
            found += typing.get_args(part) if typing.get_origin(part) is Literal else ()
    return tuple(found)


def _in_words(hint: Any, bounds: In | None, length: Length | None) -> str:
    parts = []
    for option in _options(hint):
        if option in (None, type(None)):
            parts.append("none")
        elif typing.get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif _is_tuple(option):
            count = f" of {length} items" if length else ""
            parts.append(f"a tuple{count}, each {_in_words(_item(option), bounds, None)}")
        elif option in (int, float):
            number = "a whole number" if option is int else "a number"
            parts.append(f"{number} {bounds}" if bounds else number)
        else:
            known = {bool: "true or false", str: "text", Any: "anything"}
            parts.append(known.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(parts)


def parse(field: Field, text: str) -> Any:
    """A plain value from the command line.

    Args:
      field: whose type it has.
      text: numbers may be written 1e3, tuples `1,2` or `(1, 2)`, the empty one `none` or `()`.

    Raises:
      ValueError: it is no such value.
    """
    text, errors = text.strip(), []
    for option in _options(field.hint):
        try:
            return _parse(option, text)
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            errors.append(error)
    raise ValueError(str(errors[-1]))


def _parse(hint: Any, text: str) -> Any:
    if _is_tuple(hint):
        if text.lower() in ("none", "()", "[]", ""):
            return ()
        inner = re.sub(r"^[(\[](.*)[)\]]$", r"\1", text, flags=re.S).rstrip().removesuffix(",")
        return tuple(_parse(_item(hint), part) for part in _split(inner))
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if typing.get_origin(hint) is Literal:
        found = [choice for choice in typing.get_args(hint) if str(choice).lower() == text.lower()]
        if not found:
            raise ValueError(text)
        return found[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return parse(Field("", hint, (), None), text)
    if hint in (None, type(None)):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if hint is float:
        return float(text)
    if hint is int:
        number = int(text) if re.fullmatch(r"[+-]?\d{1,40}", text) else float(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    return text


def _split(text: str) -> list[str]:
    """`1, 'a,b'` -> ['1', 'a,b']; commas in quotes or brackets do not split."""
    try:
        literal = ast.literal_eval(f"({text},)") if len(text) < 10_000 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = None
    if literal is not None:
        return [item if isinstance(item, str) else str(item) for item in literal]
    return [part.strip() for part in text.split(",")]


# ---- walking a config -----------------------------------------------------------------------------------------------


def fields_of(nested: Of | Group, section: Mapping[str, Any], path: str) -> dict[str, Field]:
    """The schema of a section below a field.

    Raises:
      UserError: it is no section, or names no component.
    """
    if isinstance(nested, Group):
        return schema(nested.fields)
    if not isinstance(section, Mapping | ConfigDict):
        raise UserError(f"{path} must be a section of fields, got {shown(section)}")
    return schema(find(nested.kind, section.get("name", ""), path))


def sections(field: Field, value: Any, path: str) -> Iterator[tuple[str, Any, Of | Group]]:
    """(path, section, what it is) of every section right below a field."""
    nested = field.nested
    if not isinstance(nested, Each):
        yield path, value, nested
        return
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f"{path} must be {nested.kind}s by name, got {shown(value)}")
    for name, section in value.items():
        yield f"{path}.{name}", section, Of(nested.kind)


def check(fields: Mapping[str, Field], section: Any, path: str) -> None:
    """Checks a section and all below it against its schema.

    Raises:
      UserError: a field is unknown, missing, or holds what it may not.
    """
    if not isinstance(section, Mapping | ConfigDict):
        raise UserError(f"{path} must be a section of fields, got {shown(section)}")
    for name in section:
        if name not in fields and name != "name":
            raise _unknown(path, name, fields)
    for name, field in fields.items():
        here = f"{path}.{name}"
        if name not in section:
            raise UserError(f"{here} is missing; its default is {shown(field.initial())}")
        value = section[name]
        if field.nested:
            for its_path, its, nested in sections(field, value, here):
                check(fields_of(nested, its, its_path), its, its_path)
        elif not field.accepts(value):
            raise refusal(here, field, value)


def refusal(path: str, field: Field, value: Any) -> UserError:
    """The error for a value that a field cannot hold."""
    choices = [str(c) for c in _choices(field.hint)]
    items = value if isinstance(value, tuple) else (value,)
    wrong = [item for item in items if isinstance(item, str) and item not in choices]
    return UserError(
        f"{path} must be {field.allowed}, got {shown(value)}{closest(wrong[0], choices) if wrong and choices else ''}"
    )


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


def _unknown(path: str, name: str, fields: Mapping[str, Field]) -> UserError:
    there = {field: f"{path}.{field}" for field in fields}
    words = there | {word: there[field] for word, field in _SYNONYMS.items() if field in there}
    near = [words[word] for word in difflib.get_close_matches(str(name), words, n=1)]
    below = [f"{path}.{field}.{name}" for field, its in fields.items() if name in _below(its)]
    wanted = _SYNONYMS.get(name, name)
    below += [f"{path}.{field}.{wanted}" for field, its in fields.items() if wanted in _below(its) and wanted != name]
    if below and (not near or name not in there):
        near = below[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{path} has {', '.join(fields) or 'no fields'}"
    return UserError(f"unknown field {path}.{str(name)[:80]}; {hint}")


def _below(field: Field) -> Mapping[str, Field]:
    """The fields of the default section below a field."""
    nested = field.nested
    if isinstance(nested, Of) and nested.default:
        return schema(find(nested.kind, nested.default))
    return schema(nested.fields) if isinstance(nested, Group) else {}


def override(fields: Mapping[str, Field], section: ConfigDict, names: list[str], text: str, path: str) -> None:
    """Sets one field below a section, from the command line.

    Args:
      fields: the section's schema.
      section: changed in place.
      names: of the fields on the way, such as ['net', 'channels'].
      text: the value; of a field that holds a component its name, which brings that one's fields at their defaults; of
        one that holds several, their names, as in 'label,low_res'.
      path: of the section.

    Raises:
      UserError: an unknown field, or a value that it cannot hold.
    """
    name, *rest = names
    if name not in fields:
        raise _unknown(path, name, fields)
    field, here = fields[name], f"{path}.{name}"
    nested = field.nested
    if rest and nested is None:
        raise UserError(f"unknown field {'.'.join([path, *names])}; {here} holds a value and has no fields")
    if isinstance(nested, Each):
        _override_each(nested, section[name], rest, text, here)
    elif rest:
        override(fields_of(nested, section[name], here), section[name], rest, text, here)
    elif isinstance(nested, Of):
        section[name] = _named(nested.kind, section[name], text, here)
    elif isinstance(nested, Group):
        some = next(iter(schema(nested.fields)), "")
        raise UserError(f"{here} is a section; set one of its fields, such as {here}.{some}")
    else:
        try:
            value = parse(field, text)
        except ValueError:
            raise refusal(here, field, text) from None
        section[name] = value


def _named(kind: str, section: ConfigDict, name: str, path: str) -> ConfigDict:
    """The section of a component; what is there stays if it bears that name already."""
    find(kind, name, path)
    return section if section.get("name") == name else spec(kind, name)


def _override_each(nested: Each, section: ConfigDict, names: list[str], text: str, path: str) -> None:
    if not names:
        wanted = [part.strip() for part in text.split(",") if part.strip() and text.strip().lower() != "none"]
        kept = {
            key_of(name): section[name]
            if name in section
            else _named(nested.kind, section.get(key_of(name), {}), name, path)
            for name in wanted
        }
        for name in list(section):
            del section[name]
        for name, its in kept.items():
            section[name] = its
        return
    name, *rest = names
    here = f"{path}.{name}"
    if not rest:
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise UserError(f"{here} is no name of small letters, digits and '_'")
        if text.strip().lower() == "none":
            if name in section:
                del section[name]
        else:
            section[name] = _named(nested.kind, section.get(name, {}), text, here)
        return
    if name not in section:
        there = ", ".join(section) or "none"
        raise UserError(
            f"unknown {nested.kind} {here}{closest(name, section)}; there is {there}; add it by {here}=NAME"
        )
    override(fields_of(Of(nested.kind), section[name], here), section[name], rest, text, here)


def complete(fields: Mapping[str, Field], data: Mapping[str, Any], path: str) -> ConfigDict:
    """A section from plain data such as JSON: lists become tuples, and fields that are missing get their defaults.

    Raises:
      UserError: a field is unknown, or of the wrong type.
    """
    if not isinstance(data, Mapping | ConfigDict):
        raise UserError(f"{path} must be a section of fields, got {shown(data)}")
    section = {"name": data["name"]} if "name" in data else {}
    for name in data:
        if name not in fields and name != "name":
            raise _unknown(path, name, fields)
    for name, field in fields.items():
        here = f"{path}.{name}"
        if name not in data:
            section[name] = field.initial()
            continue
        value = tuples(data[name])
        if field.nested:
            found = {
                its_path: complete(fields_of(nested, its, its_path), its, its_path)
                for its_path, its, nested in sections(field, value, here)
            }
            if isinstance(field.nested, Each):
                value = Fields({its_path.rpartition(".")[2]: its for its_path, its in found.items()})
            else:
                value = found[here]
        elif not field.accepts(value):
            raise refusal(here, field, value)
        section[name] = value
    return Fields(section)


def tuples(value: Any) -> Any:
    """Lists, at any depth, as tuples."""
    if isinstance(value, Mapping | ConfigDict):
        return {name: tuples(item) for name, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def identity(fields: Mapping[str, Field], section: Mapping[str, Any], *, training: bool = False) -> dict[str, Any]:
    """What two sections must agree in for parameters to fit: all fields but those marked RUNTIME or TRAINING.

    Args:
      fields: the schema.
      section: complete.
      training: whether one run is to go on with the other's state: TRAINING fields count, too.

    Returns:
      {'net.channels': 64, ...} as JSON has it.
    """
    passed_over = (RUNTIME,) if training else (RUNTIME, TRAINING)
    found = {"name": section["name"]} if "name" in section else {}
    for name, field in fields.items():
        if any(mark in passed_over for mark in field.marks if isinstance(mark, str)):
            continue
        if not field.nested:
            found[name] = section[name]
            continue
        if isinstance(field.nested, Each):
            found[name] = list(section[name])  # sequences and planes are concatenated in this order
        for path, its, nested in sections(field, section[name], name):
            below = identity(fields_of(nested, its, path), its, training=training)
            found |= {f"{path}.{key}": value for key, value in below.items()}
    return json.loads(json.dumps(found))


# ---- building -------------------------------------------------------------------------------------------------------

Refer = Callable[[str, str], Any]


def build(section: Mapping[str, Any], kind: str, *, path: str = "", refer: Refer | None = None, **wired: Any) -> Any:
    """Makes what a section describes.

    Args:
      section: with 'name' and the fields of that component.
      kind: of the component.
      path: of the section, for errors.
      refer: (name of another section, path) -> its model, for fields that are `Section`s.
      **wired: what the config cannot say; the factory gets those of them that are in its signature.

    Raises:
      UserError: a field is wrong, or the factory raises a ValueError or TypeError; the line begins with the path.
    """
    path = path or kind
    return _call(find(kind, section.get("name", ""), path), section, path, refer, wired)


def _call(factory: Callable, section: Mapping[str, Any], path: str, refer: Refer | None, wired: Mapping) -> Any:
    fields, parameters = schema(factory), inspect.signature(factory).parameters
    arguments = {}
    for name, field in fields.items():
        here = f"{path}.{name}"
        if name not in section:
            value = field.initial()
        else:
            value = section[name]
        if field.nested:
            arguments[name] = _nested(field, value, here, refer)
        elif (reference := field.mark(Section)) and field.accepts(value):
            arguments[name] = _referred(reference, value, here, refer)
        elif not field.accepts(value := tuples(value)):
            raise refusal(here, field, value)
        else:
            arguments[name] = value
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments |= {name: value for name, value in wired.items() if takes_all or name in parameters}
    try:
        return factory(**arguments)
    except UserError as error:
        raise error if str(error).startswith(path.split(".")[0] + ".") else UserError(f"{path}: {error}") from error
    except (ValueError, TypeError) as error:
        if _is_bug(error):
            raise
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def _is_bug(error: Exception) -> bool:
    """Whether a TypeError comes from inside a factory, and not from what it was given."""
    return isinstance(error, TypeError) and "argument" not in str(error)


def _nested(field: Field, value: Any, path: str, refer: Refer | None) -> Any:
    made = {}
    for its_path, its, nested in sections(field, value, path):
        if isinstance(nested, Group):
            check(schema(nested.fields), its, its_path)
            made[its_path] = types.SimpleNamespace(**tuples(its))
            continue
        make = functools.partial(build, its, nested.kind, path=its_path, refer=refer)
        made[its_path] = make if field.nested.late else make()
    if isinstance(field.nested, Each):
        return {its_path.rpartition(".")[2]: its for its_path, its in made.items()}
    return made[path]


def _referred(reference: Section, name: str, path: str, refer: Refer | None) -> Any:
    if not name:
        return None
    if refer is None:
        raise UserError(f"{path} names the section {name!r}, but there is no config around; build the whole config")
    model = refer(name, path)
    if reference.needs and not hasattr(model, reference.needs):
        raise UserError(f"{path} must name the section of {reference.what}, got {name!r}, which is none")
    return model


# ---- in words -------------------------------------------------------------------------------------------------------


def closest(word: str, options: Iterable[str], count: int = 1) -> str:
    """`; did you mean a or b?`, or nothing where no option is near."""
    near = difflib.get_close_matches(str(word)[:100], [str(option) for option in options], n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: Any) -> str:
    """A value as errors show it, at most 80 characters."""
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def describe(kind: str, only: str = "") -> str:
    """The components of a kind and their fields, as text for --help=KIND or --help=KIND.NAME."""
    lines = []
    for name in [only] if only else names(kind):
        factory = find(kind, name, f"--help={kind}.{name}" if only else "")
        summary = inspect.cleandoc(factory.__doc__ or "").split("\n")[0]
        lines.append(f"{kind} {name}: {summary}")
        for field in schema(factory).values():
            lines.append(f"  {field.name} = {_default_in_words(field)}  ({_holds(field)}) {field.doc}".rstrip())
    return "\n".join(lines)


def table(kind: str) -> str:
    """The components of a kind and their fields as a Markdown table."""
    rows = ["| component | field | default | holds | meaning |", "|---|---|---|---|---|"]
    for name in names(kind):
        factory = find(kind, name)
        summary = inspect.cleandoc(factory.__doc__ or "").split("\n")[0]
        rows.append(f"| `{name}` | | | | {summary} |")
        rows += [
            f"| | `{field.name}` | `{_default_in_words(field)}` | {_holds(field)} | {field.doc} |"
            for field in schema(factory).values()
        ]
    return "\n".join(rows).replace("|  |", "| |")


def _holds(field: Field) -> str:
    nested, reference = field.nested, field.mark(Section)
    if isinstance(nested, Group):
        return "a group of fields"
    if nested:
        return f"{nested.kind}s by name" if isinstance(nested, Each) else _article(nested.kind)
    return f"the section of {reference.what}" if reference else field.allowed


def _default_in_words(field: Field) -> str:
    nested = field.nested
    if isinstance(nested, Group):
        return "..."
    if nested:
        return ",".join(nested.default) if isinstance(nested, Each) else nested.default
    return str(field.default) if not isinstance(field.default, str) else repr(field.default)
