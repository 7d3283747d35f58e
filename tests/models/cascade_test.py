"""Cascades: the noise between stages on networks that know the answer, by the pure sampler and by `SampleFn`."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffax
from diffax.config import spec
from diffax.diffusion import process, schedules
from diffax.models import cascade
from diffax.models.base import Sampling
from diffax.sampling import sample_fn as sampling
from tests.models import micro, systems

MEAN, STD, LENGTH = 0.4, 0.3, 150


class Knows:
    """Stands for a network: answers the noise that belongs to the x that `x_of(z, level, conditions)` knows."""

    def __init__(self, x_of):
        self.net = types.SimpleNamespace(channel_mult=(1,))
        self.x_of = x_of
        self.levels = schedules.cosine(num_timesteps=LENGTH)

    def apply(self, variables, z, time, conditions):
        level = self.levels((time + 1) / LENGTH)
        return process.eps_from_x(self.x_of(z, level, conditions), z, level)


def mean_of_gaussian(z, level, conditions):
    """E[x | z] for x ~ N(MEAN, STD^2)."""
    alpha, sigma = process.expand(level.alpha, z), process.expand(level.sigma, z)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)


def what_it_sees(z, level, conditions):
    """The smaller picture, pixels repeated, but for the last channel: a thousandth of the time of its noise level."""
    low_res = conditions["low_res"]
    x = jnp.repeat(jnp.repeat(low_res["image"], 2, axis=1), 2, axis=2)
    return x.at[..., -1].set(process.expand(low_res["time"], x[..., 0]) / 1000)


def toy(**low_res):
    """A Gaussian of 2 x 2 pixels, and a model that shows what it was given."""
    low_res = dict(factor=2, noise=1.0, round=False) | low_res
    schedule = spec("schedule", "cosine", num_timesteps=LENGTH)
    both = dict(schedule=schedule, variance="fixed_small", guidance=micro.guidance(), steps="")
    base, up = micro.system(
        base=micro.section(shape=(2, 2, 3), **both),
        up=micro.section(shape=(4, 4, 3), conditions=micro.conditions(low_res=low_res), **both),
    ).generators
    return dataclasses.replace(base, net=Knows(mean_of_gaussian)), dataclasses.replace(up, net=Knows(what_it_sees))


def toy_fn(*models):
    return sampling.SampleFn(models, {m.name: np.zeros(1) for m in models}, {}, {m.name: 0 for m in models})


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("level", [0.2, 0.6])
def test_stopping_early_and_adding_noise_give_the_same_distribution(truncated, level):
    """CDM, section 3: both are draws of q(z_s), and the second time says which s."""
    base, up = toy(level=level, truncated=truncated)
    made = toy_fn(base, up)(0, 2000, every_stage=True, batch_size=2048)
    at = up.schedule(np.array([level]))
    alpha, sigma = float(at.alpha[0]), float(at.sigma[0])
    seen, time = made["up"][..., :2], made["up"][..., -1]
    np.testing.assert_allclose(seen.mean(), alpha * MEAN, atol=0.02)
    np.testing.assert_allclose(seen.std(), np.hypot(alpha * STD, sigma), atol=0.02)
    np.testing.assert_allclose(time, at.time[0] / 1000, atol=1e-4)
    small = seen[:, ::2, ::2]
    np.testing.assert_allclose(seen, small.repeat(2, 1).repeat(2, 2), atol=1e-3)
    # pixels are independent of each other, as are those of the Gaussian
    np.testing.assert_allclose(np.corrcoef(small.reshape(2000, -1).T), np.eye(8), atol=0.1)
    spread = np.hypot(alpha * STD, sigma) if truncated else STD
    np.testing.assert_allclose(made["base"].std(), spread, atol=0.02)


def test_an_early_stop_on_few_steps_says_which_level_it_reached():
    base, up = toy(level=0.5, truncated=True)
    base = base.resampled(Sampling(steps="4"))
    reached = [t for t in np.append(base.steps.s.time[:-1], -1) if (t + 1) / LENGTH >= 0.5][-1]
    made = toy_fn(base, up)(0, 4)
    assert reached > base.schedule(np.array([0.5])).time[0], "no step ends at that level"
    np.testing.assert_allclose(made[..., -1], reached / 1000, atol=1e-4)


def test_each_picture_has_its_own_level():
    base, up = toy(level=0.1)
    sample_fn = toy_fn(base, up)
    levels = [0.0, 0.3, 1.0, 0.1]
    made = sample_fn(0, level=levels, every_stage=True)
    time = up.schedule(np.array(levels)).time
    np.testing.assert_allclose(made["up"][..., -1], np.broadcast_to(time[:, None, None] / 1000, (4, 4, 4)), atol=1e-4)
    base_large = made["base"].repeat(2, 1).repeat(2, 2)[..., :2]
    np.testing.assert_allclose(made["up"][0, ..., :2], base_large[0], atol=1e-3)  # level 0: as it is
    assert all(np.abs(made["up"][i, ..., :2] - base_large[i]).max() > 0.1 for i in (1, 2, 3))
    # The config's level where none is given; the noise is that of the picture's key.
    np.testing.assert_allclose(sample_fn(0, 4)[3], made["up"][3], atol=1e-4)
    np.testing.assert_allclose(sample_fn(0, 4, level={"up": 0.3})[1], made["up"][1], atol=1e-4)


def test_a_smaller_picture_is_rounded_before_it_is_noised():
    _, up = toy(level=0.0, round=True)
    picture = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 3)).astype(np.float32)
    made = toy_fn(up)(0, image=picture)[:, ::2, ::2, :2]
    bytes_ = (made + 1) * 127.5
    np.testing.assert_allclose(bytes_, np.round(bytes_), atol=0.02)
    np.testing.assert_allclose(made, picture[..., :2], atol=0.5 / 127.5 + 1e-3)


def test_every_model_must_be_able_to_halve_what_it_gets():
    """Four times larger, 3 x 4 pixels are 12 x 16, of which the second network cannot make eighths."""
    _, up = toy(level=0.0)
    again = dataclasses.replace(up, name="up_again", net=Knows(what_it_sees))
    again.net.net.channel_mult = (1, 1, 1, 1)
    with pytest.raises(diffax.UserError, match="sides are multiples of 2"):
        toy_fn(up, again)(0, image=np.zeros((3, 4, 3)))
    assert toy_fn(up, again)(0, image=np.zeros((2, 4, 3))).shape == (1, 8, 16, 3)


# ---- real networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["noised", "truncated"])
def system(request):
    found = systems.cascade(request.param)
    return found, micro.params_of(found)


def test_a_cascade_is_a_fold(system):
    """Its models one by one: what the first makes is given to the second, with the noise level where it stopped."""
    system, params = system
    base, up = system.generators
    given, keys = micro.given_of([base, up]), micro.keys_of()
    made = jax.jit(cascade.cascade([base, up], every=True))(params, keys, given)
    stop = cascade.stop_of(base, up)
    assert (stop is None) == (up.conditions["low_res"].stops_before is None)

    @jax.jit
    def by_hand():
        small = base.sample(params, cascade.fold_in(keys, 0), given["base"], stop=stop)
        low_res = {"image": small} if stop is None else {"image": small, "reached": base.reached(stop)}
        return small, up.sample(params, cascade.fold_in(keys, 1), {**given["up"], "low_res": low_res})

    small, large = by_hand()
    np.testing.assert_allclose(made["base"], small, atol=1e-5)
    np.testing.assert_allclose(made["up"], large, atol=1e-3)
    changed = {**given, "up": {"label": (given["up"]["label"] + np.array([0, 1, 0, 1])) % 3}}
    other = jax.jit(cascade.cascade([base, up], every=True))(params, keys, changed)
    np.testing.assert_array_equal(other["base"], made["base"])
    np.testing.assert_allclose(other["up"][::2], made["up"][::2], atol=1e-4)
    assert np.abs(other["up"][1::2] - made["up"][1::2]).max() > 1e-3


def test_a_later_model_goes_on_from_pictures_that_were_made_before():
    """With the same key: the same noise on the smaller picture and in its own steps."""
    found = systems.cascade()
    sample_fn = sampling.SampleFn(
        tuple(found.generators), micro.params_of(found), found.config.to_dict(), {"base": 0, "up": 0}
    )
    assert [*sample_fn.arguments] == ["label"] and [*sample_fn.starting_at("up").arguments] == ["label", "image"]
    made = sample_fn(0, label=[1, 2, 0], every_stage=True)
    later = sample_fn.starting_at("up")(0, image=made["base"], label=[1, 2, 0])
    np.testing.assert_allclose(later, made["up"], atol=1e-3)
    chex.assert_shape(sample_fn.starting_at("up")(0, image=np.zeros((4, 10, 3)), label=1), (1, 8, 20, 3))


def test_pictures_are_known_in_every_model():
    """A start is made smaller for the earlier models, and its strength and noise are of the first alone."""
    from diffax.models.base import Start

    image = np.arange(16 * 16 * 3, dtype=np.float32).reshape(1, 16, 16, 3) / 400 - 1
    known = np.ones((1, 16, 16, 1), np.float32)
    known[:, 0, 0] = 0
    start = Start(image=image, known=known, noise=np.zeros((1, 8, 8, 3)), strength=0.5)
    base, up = systems.cascade().generators
    first = cascade.start_of(base, start, first=True)
    assert first.strength == 0.5 and first.noise is not None
    np.testing.assert_allclose(first.image, image.reshape(1, 8, 2, 8, 2, 3).mean((2, 4)), atol=1e-5)
    assert first.known[0, 0, 0, 0] == 0 and np.sum(first.known) == 63
    last = cascade.start_of(up, start, first=False)
    assert last.strength == 1 and last.noise is None
    np.testing.assert_array_equal(last.image, image)
    assert cascade.start_of(systems.dalle2().generators[0], start, first=True) is None
