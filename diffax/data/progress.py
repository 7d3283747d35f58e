"""One line on stderr that says how far a preparation has come."""

import sys


def progress(text: str, *, last: bool):
    """Overwrites the line on a terminal; elsewhere only the last state is printed."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + text + ("\n" if last else ""))
        sys.stderr.flush()
    elif last:
        print(text, file=sys.stderr, flush=True)
