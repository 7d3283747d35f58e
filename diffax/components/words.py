"""How errors and help put things."""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict


def closest(word: str, options: Iterable[str], count: int = 1) -> str:
    """`; did you mean a or b?`, or nothing where no option is near."""
    near = difflib.get_close_matches(str(word)[:100], [str(option) for option in options], n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: Any) -> str:
    """A value as errors show it, at most 80 characters."""
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def article(kind: str) -> str:
    """The kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
