"""A system of generators, sampled one after the other: a fold (CDM, section 3; GLIDE; DALL-E 2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax.models.base import Generator, Start, fold_in

Array = jax.Array
Params = Any


def cascade(models: Sequence[Generator], *, keep: int = 0, every: bool = False) -> Callable[..., Any]:
    """The pure sampler of generators in order, ready for `jax.jit` and `jax.export`.

    Args:
      models: what one makes is the condition `output` of those after it.
      keep: also return this many estimates of x on the way of the last model.
      every: return {name: sample} of all models in place of the last one's.

    Returns:
      (params {section: params}, keys [B], given {model: {condition: value}}, scales {model: scalar or [B]}, start) ->
      [B, ...] float32. Sample i depends on keys[i] and the i-th values alone.
    """
    first = first_of_pictures(models)

    def sample(params: Mapping[str, Params], keys: Array, given: Mapping, scales: Mapping = {}, start=None) -> Any:  # noqa: B006
        made: dict[str, tuple[Any, Any]] = {}
        samples = {}
        for i, model in enumerate(models):
            own = {name: c.made(*made[name][:1], given[model.name].get(name), made[name][1]) if name in made
                   else given[model.name][name] for name, c in model.given.items()}  # fmt: skip
            stop = stop_of(model, models[i + 1 : i + 2])
            its = start_of(model, start, first=model is first)
            count = keep if model is models[-1] else 0
            out = model.sample(
                params, fold_in(keys, model.number), own, scale=scales.get(model.name), start=its, stop=stop, keep=count
            )
            samples[model.name] = out
            if model is not models[-1]:
                made[model.output] = out, model.reached(stop) if stop is not None else None
        return samples if every else out

    return sample


def first_of_pictures(models: Sequence[Generator]) -> Generator | None:
    """The first model whose sample is a picture; None of a prior alone."""
    return next((model for model in models if len(model.shape) == 3), None)


def start_of(model: Generator, start: Start | None, *, first: bool) -> Start | None:
    """The start of one model of a cascade."""
    return None if start is None or len(model.shape) != 3 else start.at(model.shape, first=first)


def stop_of(model: Generator, after: Sequence[Generator]) -> float | None:
    """The log-SNR at which sampling stops because the model after it continues from noise; None: at clean data."""
    for other in after:
        condition = other.conditions.get(model.output)
        if condition is not None and condition.stops_before is not None:
            return float(other.schedule(np.array([condition.stops_before])).logsnr[0])
    return None


def resampled(models: Sequence[Generator], choices: Mapping[str, Any]) -> tuple[Generator, ...]:
    """Models with the sampling choices of {name: Sampling}."""
    return tuple(model.resampled(choices[model.name]) if model.name in choices else model for model in models)
