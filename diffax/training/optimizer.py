from diffax.components import component


@component("optimizer", "adam")
def adam(*, b1: float = 0.9):
    """A."""
