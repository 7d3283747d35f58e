"""How training draws noise levels: distributions, weights, and independence of how a batch is sharded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.components import build, names, spec
from diffax.diffusion import timesteps
from diffax.errors import UserError


def draw(sampler, n, state=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), n)
    state = sampler.init() if state is None else state
    return sampler.draw(state, keys, jnp.arange(n), n)


def made(name, num_timesteps):
    return build(spec("timesteps", name), "timesteps", num_timesteps=num_timesteps)


@pytest.mark.parametrize("name", ["uniform", "stratified", "loss_second_moment"])
def test_every_step_is_drawn_equally_often_at_first(name):
    u, weight = draw(made(name, 10), 20_000)
    index = np.rint(np.asarray(u) * 10).astype(int)
    counts = np.bincount(index, minlength=11)[1:]
    assert counts.sum() == 20_000 and counts.min() > 1700 and counts.max() < 2300
    np.testing.assert_allclose(weight, 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_continuous_draws_fill_the_interval(name):
    u = np.sort(draw(made(name, 0), 4000)[0])
    assert 0 <= u[0] < 0.01 and 0.99 < u[-1] <= 1
    assert abs(u.mean() - 0.5) < 0.02


def test_stratified_puts_one_draw_into_each_part():
    u, _ = draw(timesteps.stratified(0), 64)
    np.testing.assert_array_equal(np.floor(np.asarray(u) * 64), np.arange(64))


@pytest.mark.parametrize("name", ["uniform", "stratified", "loss_second_moment"])
def test_draws_do_not_depend_on_how_the_batch_is_sharded(name):
    sampler = made(name, 50)
    keys = jax.random.split(jax.random.key(3), 8)
    whole = sampler.draw(sampler.init(), keys, jnp.arange(8), 8)
    parts = [sampler.draw(sampler.init(), keys[i : i + 2], jnp.arange(i, i + 2), 8) for i in range(0, 8, 2)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *a: jnp.concatenate(a), *parts))


class HistoryTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_importance_weights_keep_the_expectation(self):
        """After warm-up p follows sqrt(E[L^2]), and E_p[weight * f] is the uniform mean of f."""
        steps, history = 5, 3
        sampler = timesteps.loss_second_moment(steps, history=history)
        state, update = sampler.init(), self.variant(sampler.update)
        rng = np.random.default_rng(0)
        pushed = {t: [] for t in range(steps)}
        for _ in range(20):
            t = rng.integers(0, steps, 4)
            loss = (t + 1) * rng.uniform(0.5, 1.5, 4)
            for i, value in zip(t, loss, strict=True):
                pushed[i].append(value)
            state = update(state, jnp.asarray((t + 1) / steps, jnp.float32), jnp.asarray(loss, jnp.float32))
        weights = np.array([np.sqrt(np.mean(np.square(pushed[t][-history:]))) for t in range(steps)])
        want = weights / weights.sum() * 0.999 + 0.001 / steps
        np.testing.assert_allclose(timesteps.probabilities(state, 0.001), want, rtol=1e-5)
        u, weight = draw(sampler, 40_000, state)
        index = np.rint(np.asarray(u) * steps).astype(int) - 1
        np.testing.assert_allclose(np.bincount(index) / len(index), want, atol=0.01)
        f = np.array([3.0, -1.0, 2.0, 0.0, 5.0])
        np.testing.assert_allclose(np.mean(f[index] * np.asarray(weight)), f.mean(), atol=0.06)


def test_components_have_no_field_for_the_length_of_the_chain():
    assert names("timesteps") == ["loss_second_moment", "stratified", "uniform"]
    assert dict(spec("timesteps", "uniform")) == {"name": "uniform"}
    assert dict(spec("timesteps", "loss_second_moment")) == {
        "name": "loss_second_moment", "history": 10, "uniform_prob": 0.001,
    }  # fmt: skip


def test_a_history_needs_discrete_steps():
    with pytest.raises(UserError, match="timesteps: loss_second_moment needs a schedule of discrete steps"):
        made("loss_second_moment", 0)


def test_uniform_until_every_step_has_its_history():
    sampler = timesteps.loss_second_moment(4, history=2)
    state = sampler.update(sampler.init(), jnp.array([0.25, 0.5, 0.5]), jnp.array([9.0, 1.0, 1.0]))
    np.testing.assert_allclose(timesteps.probabilities(state, 0.001), 0.25)
    assert state.counts.tolist() == [1, 2, 0, 0]
