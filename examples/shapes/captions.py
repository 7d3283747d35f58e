"""stub"""


def captions():
    """C."""
