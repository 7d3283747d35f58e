"""Finding components by name or import path."""

import functools
import importlib
import pkgutil
from collections.abc import Callable

from diffax.components.words import article, closest, shown
from diffax.errors import UserError

# Where diffax's own components of a kind live; of a package all modules are looked through.
HOMES = {
    "model": "diffax.models",
    "network": "diffax.networks",
    "condition": "diffax.conditions",
    "tokenizer": "diffax.conditions",
    "schedule": "diffax.diffusion",
    "timesteps": "diffax.diffusion",
    "loss": "diffax.diffusion",
    "sampler": "diffax.diffusion",
    "guidance": "diffax.models",
    "data": "diffax.data",
    "optimizer": "diffax.training.optimizer",
    "evaluation": "diffax.evaluation.classifiers",
}
_REGISTRY: dict[tuple[str, str], Callable] = {}


def component(kind: str, name: str) -> Callable[[Callable], Callable]:
    """Names a factory, so that configs can: `@component('loss', 'hybrid')`."""

    def register(factory: Callable) -> Callable:
        _REGISTRY[kind, name] = factory
        return factory

    return register


@functools.cache
def _look_through(package: str) -> None:
    module = importlib.import_module(package)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not found.name.startswith("_"):
            importlib.import_module(f"{package}.{found.name}")


def names(kind: str) -> list[str]:
    """The components of a kind that have a name."""
    if kind in HOMES:
        _look_through(HOMES[kind])
    return sorted(name for its, name in _REGISTRY if its == kind)


def find(kind: str, name: str, path: str = "") -> Callable:
    """The factory of that name or import path.

    Args:
      kind: such as 'loss'.
      name: such as 'hybrid' or 'my_lab.losses:min_snr'.
      path: where the name stands, for the error.

    Raises:
      UserError: there is none, or it cannot be imported.
    """
    where = f"{path} " if path else ""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}must name {article(kind)} or an import path, got {shown(name)}")
    if ":" in name:
        return by_path(kind, name, where)
    if (kind, name) not in _REGISTRY and name not in (there := names(kind)):
        raise UserError(
            f"{where}must be one of {', '.join(map(repr, there))} or an import path such as 'my_lab:{kind}', got "
            f"{shown(name)}{closest(name, there)}"
        )
    return _REGISTRY[kind, name]


def by_path(kind: str, name: str, where: str) -> Callable:
    """The callable at an import path such as 'my_lab.losses:min_snr'.

    Raises:
      UserError: it cannot be imported, or is no callable; the line begins with `where`.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{where}cannot import {module!r} for {article(kind)} ({reason}); correct the path") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{where}{module!r} has no {attribute!r}{closest(attribute, there)}; correct the path")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{where}{name!r} is no factory of {article(kind)}, but {shown(found)}; name a callable")
    return found
