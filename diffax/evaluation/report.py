"""Tables of scores in files, for people and for programs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diffax.data import images


def write_report(
    workdir: pathlib.Path, rows: list[dict], header: Mapping[str, Any], *, name: str = "evaluation"
) -> str:
    """Writes NAME.json and NAME.md.

    Args:
      workdir: where.
      rows: {name: value} each; values whose names begin with '_' are left out.
      header: what all rows have in common.
      name: of the files.

    Returns:
      The table, in Markdown.
    """
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    text = json.dumps({**header, "rows": kept}, indent=2) + "\n"
    images.write_atomically(workdir / f"{name}.json", lambda f: f.write(text.encode()))
    names = list(dict.fromkeys(k for row in kept for k in row))

    def show(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [names, ["---"] * len(names)] + [[show(row.get(k)) for k in names] for row in kept]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    images.write_atomically(workdir / f"{name}.md", lambda f: f.write((table + "\n").encode()))
    return table
