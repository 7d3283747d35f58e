"""stub"""

from diffax.components import component


@component("evaluation", "svc")
def svc():
    """S."""


@component("evaluation", "network")
def network():
    """N."""
