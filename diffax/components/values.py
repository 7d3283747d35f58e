"""Plain values: whether they have a type, what a type allows in words, and reading them from text."""

import ast
import re
import types
import typing
from typing import Any, Literal

from diffax.components.marks import In, Length


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


def has_type(hint: Any, value: Any) -> bool:
    """Whether a value has a type; whole numbers count as numbers."""
    for option in _options(hint):
        if option is Any:
            return True
        if option in (None, type(None)):
            fits = value is None
        elif typing.get_origin(option) is Literal:
            fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(option))
        elif _is_tuple(option):
            fits = isinstance(value, tuple) and all(has_type(_item(option), item) for item in value)
        elif option is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif option is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, typing.get_origin(option) or option)
        if fits:
            return True
    return False


def choices(hint: Any) -> tuple[Any, ...]:
    """All values that a Literal in the type allows."""
    found = []
    for option in _options(hint):
        option = _item(option) if _is_tuple(option) else option
        for part in _options(option):
            found += typing.get_args(part) if typing.get_origin(part) is Literal else ()
    return tuple(found)


def in_words(hint: Any, bounds: In | None, length: Length | None) -> str:
    """What a type with bounds and a length allows."""
    parts = []
    for option in _options(hint):
        if option in (None, type(None)):
            parts.append("none")
        elif typing.get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif _is_tuple(option):
            count = f" of {length} items" if length else ""
            parts.append(f"a tuple{count}, each {in_words(_item(option), bounds, None)}")
        elif option in (int, float):
            number = "a whole number" if option is int else "a number"
            parts.append(f"{number} {bounds}" if bounds else number)
        else:
            known = {bool: "true or false", str: "text", Any: "anything"}
            parts.append(known.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(parts)


def parse(hint: Any, text: str) -> Any:
    """A plain value from the command line.

    Args:
      hint: its type.
      text: numbers may be written 1e3, tuples `1,2` or `(1, 2)`, the empty one `none` or `()`.

    Raises:
      ValueError: it is no such value.
    """
    text, errors = text.strip(), []
    for option in _options(hint):
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
        return parse(hint, text)
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
