"""Micro systems whose networks change little with their input, so that the flow of their pictures is smooth."""

import dataclasses
import functools

import jax
import numpy as np

from diffax.models.system import System
from diffax.sampling import load
from diffax.sampling.sample_fn import SampleFn
from tests.models import systems


def sample_fn(system: System) -> SampleFn:
    """A system with small random parameters."""
    rng, params = np.random.default_rng(3), {}
    for name in dict.fromkeys(name for model in system.generators for name in model.sections):
        shapes = jax.eval_shape(system.model(name).init, jax.random.key(0))
        params[name] = jax.tree.map(lambda a: np.float32(0.1 * rng.standard_normal(a.shape)), shapes)
    return load.sample_fn_of(system.config, params, dict.fromkeys(params, 0), "tests")


@functools.cache
def unclip() -> SampleFn:
    """A CLIP, a prior and a decoder."""
    config = systems.dalle2().config.copy_and_resolve_references()
    config.prior.variance, config.decoder.predicts = "fixed_small", "v"
    tokenizers = (
        config.clip.tokenizer,
        config.prior.conditions.tokens.tokenizer,
        config.decoder.conditions.text.tokenizer,
    )
    for tokenizer in tokenizers:
        tokenizer.length = 12  # of the longest captions of shapes
    whole = sample_fn(System(config))
    return dataclasses.replace(whole, models=whole.models[:2])


@functools.cache
def glide(inpaint: bool = True) -> SampleFn:
    """A model of captioned pictures; with `inpaint` one that also fills them in."""
    config = systems.glide().config.copy_and_resolve_references()
    if not inpaint:
        del config.base.conditions["inpaint"], config.base.guidance["insert_known"]
    whole = sample_fn(System(config))
    return dataclasses.replace(whole, models=whole.models[:1])
