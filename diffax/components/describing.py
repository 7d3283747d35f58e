"""Components in words: --help=KIND and the tables of the documentation."""

import inspect

from diffax.components.marks import Each, Group, Section
from diffax.components.registry import find, names
from diffax.components.schema import Field, schema
from diffax.components.words import article


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
        return f"{nested.kind}s by name" if isinstance(nested, Each) else article(nested.kind)
    return f"the section of {reference.what}" if reference else field.allowed


def _default_in_words(field: Field) -> str:
    nested = field.nested
    if isinstance(nested, Group):
        return "..."
    if nested:
        return ",".join(nested.default) if isinstance(nested, Each) else nested.default
    return str(field.default) if not isinstance(field.default, str) else repr(field.default)
