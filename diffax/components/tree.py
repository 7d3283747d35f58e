"""Walking the sections of a config: checking, overriding, completing, and what identifies parameters."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffax.components.marks import RUNTIME, TRAINING, Each, Group, Of
from diffax.components.registry import find
from diffax.components.schema import Field, Fields, key_of, schema, spec, unknown
from diffax.components.values import choices, parse
from diffax.components.words import closest, shown
from diffax.errors import UserError


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
            raise unknown(path, name, fields)
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
    there = [str(choice) for choice in choices(field.hint)]
    items = value if isinstance(value, tuple) else (value,)
    wrong = [item for item in items if isinstance(item, str) and item not in there]
    return UserError(
        f"{path} must be {field.allowed}, got {shown(value)}{closest(wrong[0], there) if wrong and there else ''}"
    )


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
        raise unknown(path, name, fields)
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
            value = parse(field.hint, text)
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
            raise unknown(path, name, fields)
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
