"""Schedules against independent float64 numpy and their laws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import schedules


def reference(betas):
    """Posterior variances and coefficients straight from DDPM's equations, in float64."""
    ab = np.cumprod(1 - betas)
    prev = np.append(1.0, ab[:-1])
    return ab, prev, betas * (1 - prev) / (1 - ab)


@pytest.mark.parametrize("name", sorted(schedules.BETAS))
@pytest.mark.parametrize("steps", [40, 1000])
def test_tables_equal_the_papers_equations(name, steps):
    betas = schedules.BETAS[name](steps, 1e-4, 0.02)
    assert betas.shape == (steps,) and betas.dtype == np.float64
    ab, _, posterior_variance = reference(betas)
    table = schedules.respaced(schedules.discrete(betas), steps)[::-1]
    np.testing.assert_allclose(jax.nn.sigmoid(table.t.logsnr), ab, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(np.exp(table.max_logvar), betas, rtol=2e-6)
    np.testing.assert_allclose(np.exp(table.min_logvar[1:]), posterior_variance[1:], rtol=5e-6)
    assert table.min_logvar[0] == table.min_logvar[1], "the last step takes the value of the one before"
    np.testing.assert_array_equal(table.t.time, np.arange(steps))


def test_published_numbers_of_linear_and_cosine():
    for betas, first, second_last, last_ab in (
        (schedules.linear_betas(1000), 1e-4, 0.01998008, 4.0358298e-5),
        (schedules.linear_betas(4000), 2.5e-5, 0.00499876, 4.2466523e-5),
        (schedules.cosine_betas(1000), 4.1284225e-5, 0.7499994, 2.4287671e-9),
        (schedules.cosine_betas(4000), 9.8658188e-6, 0.75, 1.5179805e-10),
    ):
        np.testing.assert_allclose([betas[0], betas[-2]], [first, second_last], rtol=1e-6)
        np.testing.assert_allclose(np.cumprod(1 - betas)[-1], last_ab, rtol=1e-6)


def test_time_runs_over_1000_when_rescaled():
    level = schedules.discrete(schedules.cosine_betas(4000), rescale_time=True)(np.array([1 / 4000, 1.0]))
    np.testing.assert_allclose(level.time, [0, 999.75])


@pytest.mark.parametrize("betas", [[], [0.5, 1.5], [0.0, 0.1], [np.nan], schedules.linear_betas(10)])
def test_betas_outside_the_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be"):
        schedules.discrete(betas)


@pytest.mark.parametrize("make", [lambda: schedules.discrete(schedules.linear_betas(100)), schedules.cosine_logsnr])
def test_host_and_device_agree(make):
    schedule, u = make(), np.arange(1, 101) / 100
    host, device = schedule(u), jax.jit(schedule)(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(host.logsnr, device.logsnr, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(host.time, device.time, rtol=1e-5)
    assert np.all(np.diff(host.logsnr) < 0), "more u, more noise"


def test_cosine_logsnr_is_the_cosine_schedule():
    """alpha = cos(a u + b), sigma = sin(a u + b), between the two ends."""
    schedule = schedules.cosine_logsnr(-20, 20)
    np.testing.assert_allclose(schedule(np.array([0.0, 1.0])).logsnr, [20, -20], rtol=1e-9)
    angle = 1.570705527 * 0.3 + 4.539993e-5
    level = schedule(np.array([0.3]))
    np.testing.assert_allclose([level.alpha[0], level.sigma[0]], [np.cos(angle), np.sin(angle)], rtol=1e-5)


class LevelTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_alpha_and_sigma(self):
        @self.variant
        def both(logsnr):
            level = schedules.NoiseLevel(time=logsnr, logsnr=logsnr)
            return level.alpha, level.sigma, level.is_clean

        alpha, sigma, clean = both(jnp.array([jnp.inf, 3.0, 0.0, -25.0, -jnp.inf]))
        np.testing.assert_allclose(alpha**2 + sigma**2, np.ones_like(alpha), rtol=1e-6)
        np.testing.assert_allclose(sigma.reshape(-1)[:3], [0, np.sqrt(1 / (1 + np.exp(3.0))), np.sqrt(0.5)], rtol=1e-6)
        assert clean.reshape(-1).tolist() == [True, False, False, False, False]


def test_respacing_keeps_the_marginals():
    """A shorter chain visits the same levels: only the steps between them change."""
    schedule = schedules.discrete(schedules.cosine_betas(1000))
    full = schedules.respaced(schedule, 1000)[::-1]
    short = schedules.respaced(schedule, 1000, "10,20,30")[::-1]
    kept = schedules.space_timesteps(1000, "10,20,30")
    chex.assert_trees_all_equal(short.t, jax.tree.map(lambda a: a[kept], full.t))
    betas = np.exp(np.float64(short.max_logvar))
    np.testing.assert_allclose(np.cumprod(1 - betas), jax.nn.sigmoid(short.t.logsnr), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "sections", "start", "end", "count"),
    [
        (1000, "250", [0, 4, 8, 12, 16, 20], [987, 991, 995, 999], 250),
        (1000, "ddim25", [0, 40, 80], [960], 25),
        (1000, 25, [0, 42, 83, 125, 166], [957, 999], 25),
        (4000, "100", [0, 40, 81, 121, 162, 202], [3999], 100),
        (1000, "90,60,60,20,20", [0, 2, 4, 7, 9, 11], [968, 978, 989, 999], 250),
        (300, [10, 15, 20], [0, 11, 22, 33, 44, 55], [299], 45),
        (7, "", [0, 1, 2], [5, 6], 7),
        (10, "1", [0], [0], 1),
    ],
)
def test_space_timesteps(steps, sections, start, end, count):
    kept = schedules.space_timesteps(steps, sections).tolist()
    assert kept[: len(start)] == start and kept[-len(end) :] == end and len(kept) == count
    assert kept == sorted(set(kept)) and 0 <= kept[0] and kept[-1] < steps


@pytest.mark.parametrize("sections", ["ddim300", "ddim70", "0", "1001", "500,501", "a", "5,", "ddim", "-3", "1e2"])
def test_space_timesteps_refuses(sections):
    with pytest.raises(ValueError, match="steps|stride"):
        schedules.space_timesteps(1000, sections)


@pytest.mark.parametrize("u", [[0.5, 0.6], [0.5, 0.5], [], [1.2, 0.1], [0.5, -0.1]])
def test_transitions_must_go_from_noisy_to_clean(u):
    with pytest.raises(ValueError, match="steps must"):
        schedules.transitions(schedules.cosine_logsnr(), np.array(u))


def test_transitions_must_end_clean():
    with pytest.raises(ValueError, match="steps must end clean"):
        schedules.transitions(schedules.discrete(schedules.linear_betas(100)), np.array([1.0, 0.0]))


def test_a_chain_of_one_step_has_finite_numbers():
    one = schedules.respaced(schedules.discrete(schedules.cosine_betas(100)), 100, 1)
    assert np.isfinite(one.min_logvar).all() and np.isposinf(one.s.logsnr).all()
