"""A config made real: the models of its sections, each built once, and how they follow on each other."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffax import components
from diffax.errors import UserError
from diffax.models.cascade import stop_of


class System:
    """The models of a config.

    Args:
      config: a whole config, any nested mapping.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self._built: dict[str, Any] = {}
        self._open: list[str] = []

    def model(self, name: str, path: str = "") -> Any:
        """The model of a section.

        Args:
          name: the section.
          path: of the field that names it, for errors.

        Raises:
          UserError: there is no such section, or it describes no model.
        """
        if name in self._built:
            return self._built[name]
        section = self.config.get(name) if isinstance(name, str) else None
        if not isinstance(section, Mapping) and not hasattr(section, "to_dict"):
            there = [key for key, value in self.config.items() if hasattr(value, "keys") and "train" in value]
            raise UserError(
                f"{path or 'config'} names the section {components.shown(name)}, but there is none"
                f"{components.closest(name, there) or '; there is ' + ', '.join(there)}"
            )
        if name in self._open:
            raise UserError(f"{path} and config.{self._open[-1]} need each other; let one of them go without")
        self._open.append(name)
        try:
            self._built[name] = components.build(
                section, "model", path=f"config.{name}", refer=self.model, name=name, number=self._number(name)
            )
        finally:
            self._open.pop()
        return self._built[name]

    def _number(self, name: str) -> int:
        """The place of a section among the stages that are sampled, whose factories take such a number."""
        numbered = [stage for stage in self.config["stages"] if self._takes_number(stage)]
        return numbered.index(name) if name in numbered else 0

    def _takes_number(self, name: str) -> bool:
        section = self.config.get(name)
        if not section:
            return False
        kind = components.find("model", section.get("name", ""), f"config.{name}.name")
        return "number" in inspect.signature(kind).parameters

    @functools.cached_property
    def stages(self) -> list[Any]:
        """The models that `config.stages` names, in order."""
        return [self.model(name, "config.stages") for name in self.config["stages"]]

    @functools.cached_property
    def generators(self) -> list[Any]:
        """Those of the stages that are sampled, in order."""
        return [model for model in self.stages if hasattr(model, "sample")]

    @functools.cached_property
    def trained(self) -> tuple[str, ...]:
        """The sections that the config trains or needs trained: what its stages need frozen, they, what guides them."""
        frozen = [name for model in self.stages for name in model.frozen]
        others = [name for model in self.stages for name in model.sections]
        return tuple(dict.fromkeys([*frozen, *self.config["stages"], *others]))

    def check(self) -> None:
        """Builds everything and checks how the stages follow on each other.

        Raises:
          UserError: the first problem.
        """
        for name in self.trained:
            self.model(name)
        before = None
        for model in self.generators:
            if len(model.shape) != 3:
                continue
            if before is not None:
                _check_follows(before, model)
            _check_truncated(before, model)
            before = model


def _check_follows(before: Any, model: Any) -> None:
    """Raises UserError if a model of pictures cannot take those of the one before it."""
    path = f"config.{model.name}"
    condition = model.conditions.get(before.output)
    if condition is None:
        raise UserError(
            f"{path}.conditions must have {before.output!r}, as {path} comes after config.{before.name}; add it by "
            f"{path}.conditions.{before.output}={before.output}"
        )
    if tuple(condition.small) != tuple(before.shape):
        raise UserError(
            f"{path}.conditions.{before.output}.factor {condition.factor} takes pictures of {tuple(condition.small)} "
            f"to {tuple(model.shape)}, but config.{before.name}.shape is {tuple(before.shape)}"
        )


def _check_truncated(before: Any, model: Any) -> None:
    """Raises UserError if the model before cannot stop at the noise level from which this one goes on."""
    name = next((key for key, condition in model.conditions.items() if condition.stops_before is not None), None)
    if name is None:
        return
    path = f"config.{model.name}.conditions.{name}"
    if before is None:
        raise UserError(f"{path}.truncated needs a stage before that stops early; set it to false")
    try:
        before.until(stop_of(before, model))
    except ValueError as error:
        raise UserError(f"{path}.level {model.conditions[name].stops_before:g}: {error}") from None
    u = np.arange(1, 9) / 8
    mine, its = (jax.tree.leaves(m.schedule(u)) for m in (model, before))
    if not np.allclose(mine, its):
        raise UserError(f"{path}.truncated needs the schedule of config.{before.name}; make them equal")
