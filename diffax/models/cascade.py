"""A system of generators, sampled one after the other: a fold (CDM, section 3; GLIDE; DALL-E 2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffax.diffusion.schedules import NoiseLevel
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

    def sample(params: Mapping[str, Params], keys: Array, given: Mapping, scales: Mapping | None = None, start=None):
        made: dict[str, Made] = {}
        samples = {}
        for model, after in zip(models, (*models[1:], None), strict=True):
            stop = stop_of(model, after)
            samples[model.name] = model.sample(
                params,
                fold_in(keys, model.number),
                inputs_of(model, given.get(model.name, {}), made),
                scale=(scales or {}).get(model.name),
                start=start_of(model, start, first=model is first),
                stop=stop,
                keep=0 if after else keep,
            )
            made[model.output] = Made(samples[model.name], None if stop is None else model.reached(stop))
        return samples if every else samples[models[-1].name]

    return sample


class Made(NamedTuple):
    """A sample, and the noise level at which it was left; None: it is clean."""

    sample: Any
    reached: NoiseLevel | None


def inputs_of(model: Generator, given: Mapping[str, Any], made: Mapping[str, Made]) -> dict[str, Any]:
    """{condition: what the model is given for it}, of a call's values and what earlier models made."""
    return {
        name: condition.made(made[name].sample, given.get(name), made[name].reached) if name in made else given[name]
        for name, condition in model.given.items()
    }


def first_of_pictures(models: Sequence[Generator]) -> Generator | None:
    """The first model whose sample is a picture; None of a prior alone."""
    return next((model for model in models if len(model.shape) == 3), None)


def start_of(model: Generator, start: Start | None, *, first: bool) -> Start | None:
    """The start of one model of a cascade."""
    return None if start is None or len(model.shape) != 3 else start.at(model.shape, first=first)


def stop_of(model: Generator, after: Generator | None) -> float | None:
    """The log-SNR at which sampling stops because the model after it continues from noise; None: at clean data."""
    condition = after.conditions.get(model.output) if after is not None else None
    if condition is None or condition.stops_before is None:
        return None
    return float(after.schedule(np.array([condition.stops_before])).logsnr[0])


def resampled(models: Sequence[Generator], choices: Mapping[str, Any]) -> tuple[Generator, ...]:
    """Models with the sampling choices of {name: Sampling}."""
    return tuple(model.resampled(choices[model.name]) if model.name in choices else model for model in models)
