"""Schedules against independent float64 numpy and their laws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.components import build, names, spec
from diffax.diffusion import schedules
from diffax.errors import UserError

CHAINS_BY_NAME = {
    "linear": schedules.linear_betas,
    "quad": schedules.quad_betas,
    "const": schedules.const_betas,
    "warmup10": lambda count: schedules.warmup_betas(count, fraction=0.1),
    "warmup50": lambda count: schedules.warmup_betas(count, fraction=0.5),
    "jsd": schedules.jsd_betas,
    "cosine": schedules.cosine_betas,
}


def reference(betas):
    """Posterior variances and coefficients straight from DDPM's equations, in float64."""
    ab = np.cumprod(1 - betas)
    prev = np.append(1.0, ab[:-1])
    return ab, prev, betas * (1 - prev) / (1 - ab)


@pytest.mark.parametrize("name", sorted(CHAINS_BY_NAME))
@pytest.mark.parametrize("steps", [40, 1000])
def test_tables_equal_the_papers_equations(name, steps):
    betas = CHAINS_BY_NAME[name](steps)
    assert betas.shape == (steps,) and betas.dtype == np.float64
    ab, _, posterior_variance = reference(betas)
    schedule = build(spec("schedule", name, num_timesteps=steps), "schedule")
    assert schedule.num_timesteps == steps
    table = schedules.build_steps(schedule, "")[::-1]
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
    host, device = schedule(u), jax.jit(schedule.level)(jnp.asarray(u, jnp.float32))
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


@pytest.mark.parametrize(
    "sections",
    [
        *["ddim300", "ddim70", "0", "1001", "500,501", "a", "5,", "ddim", "-3", "1e2"],
        *["trailing", "trailing0", "trailing-1", "trailing1001", "trailing10,10", "trailing1e2", "Trailing10"],
        *["quad", "quad0", "quad1001", "quad2.5", "quad 10", "10quad"],
        *["logsnr", "logsnr0", "logsnr10"],  # 'logsnr10' needs more than the number of steps
    ],
)
def test_space_timesteps_refuses(sections):
    with pytest.raises(ValueError, match="steps|stride"):
        schedules.space_timesteps(1000, sections)


# ---- named grids of steps


GRIDS = ("trailing", "quad", "logsnr")
STEPS = [(1000, n) for n in (1, 2, 3, 7, 10, 50, 333, 999, 1000)] + [(40, 13), (40, 39), (4000, 256), (1, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("betas", ["linear", "cosine", "const"])
@pytest.mark.parametrize("steps, count", STEPS)
def test_a_grid_keeps_different_steps_from_the_noisiest_down(betas, grid, steps, count):
    # Short chains take the first betas of a longer one: linear betas for so few steps would exceed 1.
    schedule = schedules.discrete(CHAINS_BY_NAME[betas](max(steps, 40))[:steps])
    table = schedules.build_steps(schedule, f"{grid}{count}")
    time = np.asarray(table.t.time)
    assert time.shape == (count,) and time[0] == steps - 1
    assert np.all(time == np.rint(time)) and np.all(np.diff(time) < 0) and time[-1] >= 0
    np.testing.assert_array_equal(table.s.time[:-1], time[1:])
    assert np.isposinf(table.s.logsnr[-1]) and np.isfinite(table.min_logvar).all()
    if grid == "trailing":
        assert abs(time[-1] + 1 - steps / count) <= 0.5, "as far from clean data as one step from the next"
    elif count > 1:
        assert time[-1] == 0, "both ends are kept"
    if count == steps:
        np.testing.assert_array_equal(time, np.arange(steps)[::-1])


@pytest.mark.parametrize(
    ("steps", "sections", "kept"),
    [
        (1000, "trailing10", range(99, 1000, 100)),
        (1000, "trailing4", [249, 499, 749, 999]),
        (1000, "trailing3", [332, 666, 999]),
        (1000, "trailing1", [999]),
        (10, "trailing10", range(10)),
        (1000, "quad5", [0, 62, 250, 562, 999]),  # 999 (k / 4)^2
        (1000, "quad1", [999]),
        (8, "quad6", [0, 1, 2, 3, 4, 7]),  # 0, 0.28, 1.12, 2.52, 4.48, 7, of which the first two are both 0
    ],
)
def test_named_grids_equal_lists_by_hand(steps, sections, kept):
    np.testing.assert_array_equal(schedules.space_timesteps(steps, sections), list(kept))


@pytest.mark.parametrize("count", [2, 5, 10, 25, 100])
def test_quadratic_steps_are_denser_near_the_data(count):
    kept = schedules.space_timesteps(1000, f"quad{count}")
    wanted, last = [], -1
    for k in range(count):
        last = max(round(999 * (k / (count - 1)) ** 2), last + 1)
        wanted.append(last)
    np.testing.assert_array_equal(kept, wanted)
    gaps = np.diff(kept)
    assert np.all(np.diff(gaps) >= -1), "gaps grow, but for rounding"
    assert count < 10 or np.sum(kept < 500) > 0.6 * count


def nearest_to_even_logsnr(betas, count):
    """Of a chain's log-SNRs in float64, those nearest to `count` evenly spaced ones."""
    ab = np.cumprod(1 - np.asarray(betas, np.float64))
    logsnr = np.log(ab / (1 - ab))
    wanted = np.linspace(logsnr[0], logsnr[-1], count)
    return np.abs(logsnr[None] - wanted[:, None]).argmin(1)


@pytest.mark.parametrize("name", ["linear", "cosine", "quad", "const"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_even_logsnr_of_a_chain_takes_the_nearest_steps(name, count):
    betas = CHAINS_BY_NAME[name](1000)
    nearest = nearest_to_even_logsnr(betas, count)
    assert len(set(nearest.tolist())) == count, "none collide"
    table = schedules.respaced(schedules.discrete(betas), 1000, f"logsnr{count}")
    np.testing.assert_array_equal(table.t.time[::-1], nearest)


def test_even_logsnr_of_a_chain_moves_what_collides():
    """Near the data and the noise the cosine chain has few steps for many evenly spaced log-SNRs."""
    betas = schedules.cosine_betas(1000)
    nearest = nearest_to_even_logsnr(betas, 100)
    assert len(set(nearest.tolist())) < 100
    kept = schedules.respaced(schedules.discrete(betas), 1000, "logsnr100").t.time[::-1]
    assert len(set(kept.tolist())) == 100 and kept[0] == 0 and kept[-1] == 999
    middle = slice(20, 50)  # where steps are not crowded
    np.testing.assert_array_equal(kept[middle], nearest[middle])


def cosine_logsnr_at(u):
    """-2 log tan(a u + b) between 20 and -20, in float64."""
    b = np.arctan(np.exp(-10.0))
    return -2 * np.log(np.tan((np.arctan(np.exp(10.0)) - b) * u + b))


@pytest.mark.parametrize("count", [2, 3, 10, 256])
def test_continuous_steps_equal_the_formulas(count):
    schedule, even = schedules.cosine_logsnr(), 1 - np.arange(count) / (count - 1)
    for choice, u in ((f"{count}", even), (f"quad{count}", even**2)):
        table = schedules.build_steps(schedule, choice)
        np.testing.assert_allclose(table.t.time, 1000 * u, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(table.t.logsnr, cosine_logsnr_at(u), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 10, 256])
def test_even_logsnr_of_a_continuous_schedule(count):
    table = schedules.build_steps(schedules.cosine_logsnr(), f"logsnr{count}")
    np.testing.assert_allclose(table.t.logsnr, np.linspace(-20, 20, count), rtol=0, atol=2e-3)
    # The clock is the one of these log-SNRs: tan is inverted by arctan, not read off a table.
    b = np.arctan(np.exp(-10.0))
    u = (np.arctan(np.exp(-np.linspace(-20, 20, count) / 2)) - b) / (np.arctan(np.exp(10.0)) - b)
    np.testing.assert_allclose(table.t.time, 1000 * u, rtol=0, atol=1e-2)


@pytest.mark.parametrize("choice", [1, 10, "1", "10", "quad1", "quad10", "logsnr1", "logsnr10"])
def test_continuous_steps_run_from_noise_to_the_cleanest_level_and_on_to_data(choice):
    table = schedules.continuous_steps(schedules.cosine_logsnr(-15, 12), choice)
    count = int(str(choice).lstrip("quadlogsnr"))
    assert table.t.time.shape == (count,) and table.t.time[0] == 1000
    np.testing.assert_allclose(table.t.logsnr[0], -15, rtol=1e-6)
    assert np.all(np.diff(table.t.logsnr) > 0) and np.isposinf(table.s.logsnr[-1])
    if count > 1:
        assert table.t.time[-1] == 0
        np.testing.assert_allclose(table.t.logsnr[-1], 12, rtol=1e-6)


def test_continuous_quadratic_steps_are_denser_near_the_data():
    time = schedules.continuous_steps(schedules.cosine_logsnr(), "quad20").t.time
    assert np.all(np.diff(-np.diff(time)) < 0), "every step is shorter than the one before"


@pytest.mark.parametrize(
    "choice",
    ["", "0", 0, -3, "-3", "1.5", "10,20", "ddim10", "fast27", "trailing10", "quad", "quad0", "logsnr", "logsnr0", "x"],
)
def test_continuous_steps_refuses(choice):
    with pytest.raises(ValueError, match="'N', 'quadN' or 'logsnrN' for a continuous schedule"):
        schedules.build_steps(schedules.cosine_logsnr(), choice)


@pytest.mark.parametrize(
    "choice", ["logsnr1001", "quad1001", "trailing1001", "logsnr0", "logsnr", "logsnr10,10", "lin10"]
)
def test_grids_of_a_chain_refuse(choice):
    with pytest.raises(ValueError, match="steps"):
        schedules.build_steps(schedules.discrete(schedules.linear_betas(1000)), choice)


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


# ---- a chain made continuous


SR3 = np.linspace(1e-6, 1e-2, 2000)
CHAINS = {"linear": schedules.linear_betas(100), "cosine": schedules.cosine_betas(50), "sr3": SR3}


def alphas_between(betas, u):
    """alpha at u in float64: sqrt of the cumulative products, 1 first, joined by straight lines."""
    alphas = np.append(1.0, np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64))))
    return np.interp(u, np.arange(len(alphas)) / len(betas), alphas)


@pytest.mark.parametrize("name", CHAINS)
def test_continuous_runs_straight_between_the_alphas_of_its_chain(name):
    betas = CHAINS[name]
    schedule, u = schedules.continuous(betas), np.random.default_rng(0).uniform(0, 1, 500)
    u = np.concatenate([u, [1.0], np.arange(1, len(betas) + 1) / len(betas)])
    alpha = alphas_between(betas, u)
    level = schedule(u)
    np.testing.assert_allclose(level.time, 1000 * alpha, rtol=1e-9)
    np.testing.assert_allclose(level.logsnr, np.log(alpha**2 / (1 - alpha**2)), rtol=1e-6, atol=1e-6)
    # at whole steps it is the chain
    steps = np.arange(1, len(betas) + 1) / len(betas)
    np.testing.assert_allclose(schedule(steps).logsnr, schedules.discrete(betas)(steps).logsnr, rtol=1e-6, atol=1e-6)
    dense = schedule(np.linspace(0, 1, 3001))
    assert np.all(np.diff(dense.logsnr[1:]) < 0) and np.all(np.diff(dense.time) < 0), "more u, more noise"


class ContinuousTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_host_and_device_agree(self):
        u = np.concatenate([[0.0, 1.0], np.random.default_rng(0).uniform(0, 1, 300)])
        for betas in CHAINS.values():
            schedule = schedules.continuous(betas)
            device = self.variant(schedule.level)(jnp.asarray(u, jnp.float32))
            host = schedule(np.float32(u).astype(np.float64))
            assert np.isposinf(host.logsnr[0]) and np.isposinf(device.logsnr[0]), "u = 0 is clean data"
            assert device.is_clean.tolist() == [True] + [False] * (len(u) - 1)
            np.testing.assert_allclose(device.time, host.time, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(device.logsnr[1:], host.logsnr[1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("choice", ["1", "2", "10", "100", "quad10", "quad100", "logsnr2", "logsnr10", "logsnr100"])
def test_steps_of_a_continuous_chain_end_clean(name, choice):
    betas = CHAINS[name]
    table = schedules.build_steps(schedules.continuous(betas), choice)
    count = int(choice.lstrip("quadlogsnr"))
    assert table.t.time.shape == (count,)
    np.testing.assert_allclose(table.t.time[0], 1000 * np.sqrt(np.prod(1 - betas)), rtol=1e-5)
    assert np.isposinf(table.s.logsnr[-1]) and np.isfinite(table.t.logsnr).all() and np.isfinite(table.min_logvar).all()
    np.testing.assert_array_equal(table.s.logsnr[:-1], table.t.logsnr[1:])
    assert np.all(np.diff(table.t.logsnr) > 0)
    assert np.all(np.diff(table.t.time) >= 0), "float32 tells no clocks apart beyond log-SNR 16"
    if choice.isdigit():
        np.testing.assert_allclose(
            table.t.time, 1000 * alphas_between(betas, np.arange(count, 0, -1) / count), rtol=1e-5
        )
    elif choice.startswith("quad"):
        u = (np.arange(count, 0, -1) / count) ** 2
        np.testing.assert_allclose(table.t.time, 1000 * alphas_between(betas, u), rtol=1e-5)
    else:
        gaps = np.diff(table.t.logsnr)
        assert np.median(np.abs(gaps / np.median(gaps) - 1)) < 0.01, "even, but for those next to clean data"


@pytest.mark.parametrize("betas", [[], [0.5, 1.0], [0.0, 0.1], [np.nan], [[0.1]], schedules.jsd_betas(10)])
def test_continuous_needs_betas_below_1(betas):
    with pytest.raises(ValueError, match="betas in"):
        schedules.continuous(betas)


def test_a_config_chooses_whether_a_chain_is_continuous():
    c = spec("schedule", "linear", num_timesteps=2000, beta_start=2e-6, beta_end=0.02, continuous=True)
    schedule = build(c, "schedule")
    assert schedule.num_timesteps == 0
    u = np.array([0.1234, 1.0])
    np.testing.assert_allclose(schedule(u).time, 1000 * alphas_between(SR3, u), rtol=1e-9)
    c.continuous = False
    schedule = build(c, "schedule")
    assert schedule.num_timesteps == 2000
    np.testing.assert_allclose(schedule(u).time, [246, 1999])


def test_every_schedule_has_a_component():
    assert names("schedule") == sorted([*CHAINS_BY_NAME, "cosine_logsnr"])
    schedule = build(spec("schedule", "cosine_logsnr", logsnr_min=-10.0), "schedule")
    assert schedule.num_timesteps == 0 and schedule.level(np.ones(1)).logsnr.round(6) == [-10]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("linear", {"beta_start": 0.5}, "stage.schedule: beta_start must not exceed beta_end, got 0.5 and 0.02"),
        ("quad", {"beta_end": 0.0}, r"stage.schedule.beta_end must be a number in \(0, 1\], got 0.0"),
        ("cosine", {"num_timesteps": 0}, "stage.schedule.num_timesteps must be a whole number in"),
        ("cosine_logsnr", {"logsnr_min": 20.0}, "stage.schedule: logsnr_min must be below logsnr_max"),
    ],
)
def test_fields_that_make_no_schedule_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        build(spec("schedule", name, **fields), "schedule", path="stage.schedule")


# ---- stopping on the way


@pytest.mark.parametrize("choice", ["", "50", "logsnr20"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_until_keeps_the_steps_before_a_level(name, choice):
    schedule = schedules.discrete(CHAINS_BY_NAME[name](1000))
    table = schedules.respaced(schedule, 1000, choice)
    for i in range(0, 1000, 111):
        logsnr = float(schedule(np.array([(i + 1) / 1000])).logsnr[0])
        if table.s.logsnr[0] > logsnr + 1e-3:
            with pytest.raises(ValueError, match="before its first step"):
                schedules.until(table, logsnr)
            continue
        kept = schedules.until(table, logsnr)
        count = len(kept.t.logsnr)
        chex.assert_trees_all_equal(kept, jax.tree.map(lambda a, n=count: a[:n], table))
        assert kept.s.logsnr[-1] <= logsnr + 1e-3 < table.s.logsnr[count], "no cleaner, and as near as the steps allow"
        if not choice:
            np.testing.assert_allclose([kept.s.time[-1], count], [i, 999 - i])


@pytest.mark.parametrize(("share", "count"), [(1, 10), (0.5, 5), (0.25, 2), (0.01, 1)])
def test_final_part_keeps_the_cleanest_steps(share, count):
    table = schedules.respaced(schedules.discrete(schedules.cosine_betas(100)), 100, 10)
    chex.assert_trees_all_equal(schedules.final_part(table, share), table[10 - count :])


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_final_part_refuses(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        schedules.final_part(schedules.respaced(schedules.discrete(schedules.cosine_betas(100)), 100, 10), share)


def test_until_the_end_keeps_all():
    table = schedules.respaced(schedules.discrete(schedules.cosine_betas(100)), 100)
    chex.assert_trees_all_equal(schedules.until(table, np.inf), table)
