"""Building what a section describes."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from diffax.components.marks import Each, Group, Section
from diffax.components.registry import find
from diffax.components.schema import Field, schema
from diffax.components.tree import check, refusal, sections, tuples
from diffax.errors import UserError

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
            its = tuples(its)
            check(schema(nested.fields), its, its_path)
            made[its_path] = types.SimpleNamespace(**its)
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
