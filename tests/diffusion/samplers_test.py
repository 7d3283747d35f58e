"""Samplers judged on a Gaussian whose denoiser is known: moments, order of convergence, inversion."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.components import build, names, spec
from diffax.diffusion import guidance, process, samplers, schedules
from diffax.errors import UserError

MEAN, STD = 0.3, 0.5
CHAIN = schedules.discrete(schedules.cosine_betas(1000))


def gaussian_denoiser(variance="fixed_small"):
    """The exact denoiser of x ~ N(MEAN, STD^2): E[x | z] is linear in z."""

    def denoise(z, step, **cond):
        alpha, sigma = process.expand(step.t.alpha, z), process.expand(step.t.sigma, z)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return process.predict(MEAN + gain * (z - alpha * MEAN), z, step, predicts="x", variance=variance)

    return denoise


def made(name, **fields):
    name, _, solver_type = name.partition(":")
    fields |= {"solver_type": solver_type} if solver_type else {}
    return build(spec("sampler", name, **fields), "sampler")


def run(sampler, steps, *, n=4000, denoise=None, seed=0, keep=0):
    keys = jax.random.split(jax.random.key(seed), n)
    noise = samplers.picture_noise(keys, (2,))
    table = schedules.respaced(CHAIN, 1000, steps)
    denoise = denoise or gaussian_denoiser()
    return jax.jit(lambda: samplers.sample(denoise, noise(jnp.int32(-1)), noise, table, sampler, keep=keep))()


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(samplers.ddpm(), 250), (samplers.ddim(0.0), 100), (samplers.ddim(0.5), 100), (samplers.ddim(1.0), 250)],
)
def test_moments(sampler, steps):
    z = np.asarray(run(sampler, steps))
    np.testing.assert_allclose(z.mean(), MEAN, atol=0.02)
    np.testing.assert_allclose(z.std(), STD, atol=0.02)


def test_samplers_are_components():
    multistep = ["dpm_solver_2m", "dpm_solver_pp_2m", "dpm_solver_pp_3m"]
    assert names("sampler") == ["ddim", "ddpm", *multistep, "heun", "unipc"]
    chex.assert_trees_all_equal(run(made("ddim", eta=0.5), 10, n=8), run(samplers.ddim(0.5), 10, n=8))


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance():
    chex.assert_trees_all_close(run(samplers.ddim(1.0), 50, n=8), run(samplers.ddpm(), 50, n=8), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("heun", 2), ("dpm_solver_2m", 2), ("dpm_solver_pp_2m", 2), ("dpm_solver_pp_3m", 2), ("unipc", 2),
     ("dpm_solver_2m:heun", 2), ("dpm_solver_pp_2m:heun", 2)],
)  # fmt: skip
def test_order_of_convergence(name, order):
    """Against the exact solution of the probability flow: twice the steps leave 2^-order of the error.

    A multistep solver starts with one step of order 1, whose error of h^2 bounds what its later steps can reach.
    """
    noise = samplers.picture_noise(jax.random.split(jax.random.key(0), 8), (2,))
    z = noise(jnp.int32(-1))
    # evenly spaced in log-SNR, where the solvers' orders are proved; the last step, to clean data, is always exact here
    schedule = lambda u: schedules.NoiseLevel(time=u, logsnr=8 - 16 * u)  # noqa: E731
    first = schedule(np.array([1.0]))
    spread = np.sqrt(first.alpha**2 * STD**2 + first.sigma**2)
    last = schedule(np.array([0.0]))
    end_spread = np.sqrt(last.alpha**2 * STD**2 + last.sigma**2)
    exact = last.alpha * MEAN + end_spread * (z - first.alpha * MEAN) / spread
    errors = []
    for count in (20, 40, 80):
        steps = schedules.transitions(
            schedule, np.linspace(1, 0, count + 1)[:-1], end=jax.tree.map(lambda a: a[0], last)
        )
        errors.append(
            float(
                jnp.abs(
                    samplers.sample(gaussian_denoiser(), z, lambda i: jnp.zeros(()), steps, made(name)) - exact
                ).max()
            )
        )
    measured = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    assert errors[-1] < 5e-6 or max(measured) > order - 0.4, f"errors {errors}, orders {measured}"


@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc"])
@pytest.mark.parametrize("steps", ["10", "20", "50"])
def test_the_long_last_step_of_a_continuous_schedule_is_not_extrapolated(name, steps):
    """From u = 1 / N to u = 0 log-SNR leaps; a denoiser that is a little off there must not be magnified."""
    schedule = schedules.cosine_logsnr(-20, 20)
    z = jax.random.normal(jax.random.key(0), (64, 2))

    def rough(z, step, **cond):
        p = gaussian_denoiser()(z, step)
        wobble = 0.02 * jnp.sin(40 * process.expand(step.t.time, z) / 1000 + 7 * z)
        return process.predict(p.x + wobble, z, step, predicts="x", variance="fixed_small")

    def run(sampler):
        table = schedules.continuous_steps(schedule, steps)
        return samplers.sample(rough, z, lambda i: jnp.zeros(()), table, sampler)

    first = schedule(np.array([1.0]))
    exact = MEAN + STD * (z - first.alpha * MEAN) / np.sqrt(first.alpha**2 * STD**2 + first.sigma**2)
    error = np.abs(run(made(name)) - exact).mean()
    assert error < np.abs(run(samplers.ddim(0.0)) - exact).mean() + 0.02, error


@pytest.mark.parametrize("predicts", ["x", "eps"])
def test_the_heun_type_integrates_a_straight_line_exactly(predicts):
    """The second step of 2M in float64, by quadrature of the semi-linear solution (Lu et al. 2022b, equation 8)."""
    logsnr = np.array([-3.0, -1.5, 0.5, 1.0])
    levels = schedules.NoiseLevel(time=np.arange(4.0)[::-1], logsnr=logsnr)
    steps = schedules.between(*(jax.tree.map(lambda a, i=i: a[i : i + 3], levels) for i in (0, 1)))
    z, guesses = np.array([[0.7]]), np.array([0.9, -0.4])

    def denoise(z, step, **cond):
        guess = jnp.where(step.t.time == 3, guesses[0], guesses[1])[:, None] * jnp.ones_like(z)
        return process.predict(guess, z, step, predicts=predicts, variance="fixed_small")

    sampler = samplers.dpm_solver(2, predicts=predicts, solver_type="heun")
    memory, found = sampler.init(jnp.asarray(z), 3), [jnp.asarray(z, jnp.float32)]
    for i in range(2):
        step = jax.tree.map(lambda a, i=i: jnp.asarray(a[i : i + 1]), steps)
        out, _, memory = sampler.step(denoise, found[-1], step, None, memory)
        found.append(out)
    lam = logsnr / 2
    t = np.linspace(lam[1], lam[2], 200_001)
    line = guesses[1] + (guesses[1] - guesses[0]) / (lam[1] - lam[0]) * (t - lam[1])
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(sign * logsnr))) for sign in (-1, 1))
    if predicts == "x":
        start, weight, scale = sigma[2] / sigma[1], np.exp(t - lam[2]), alpha[2]
    else:
        start, weight, scale = alpha[2] / alpha[1], np.exp(lam[2] - t), -sigma[2]
    want = start * float(found[1][0, 0]) + scale * np.trapezoid(weight * line, t)
    np.testing.assert_allclose(found[2][0, 0], want, rtol=1e-5)


def test_solver_types_are_checked():
    with pytest.raises(UserError, match="sampler.solver_type must be one of 'midpoint', 'heun', got 'euler'"):
        made("dpm_solver_pp_2m", solver_type="euler")
    with pytest.raises(ValueError, match="solver_type must be"):
        samplers.dpm_solver(2, solver_type="euler")


def test_inversion_and_sampling_undo_each_other():
    x = jnp.asarray(np.random.default_rng(0).normal(MEAN, STD, (16, 2)), jnp.float32)
    errors = []
    for count in (50, 250):
        table = schedules.respaced(CHAIN, 1000, count)
        z = samplers.invert(gaussian_denoiser(), x, table)
        back = samplers.sample(gaussian_denoiser(), z, lambda i: jnp.zeros(()), table, samplers.ddim(0.0))
        errors.append(float(jnp.abs(back - x).max()))
    assert errors[1] < 0.05 and errors[1] < errors[0] / 2, errors
    np.testing.assert_allclose(z.std(), 1, atol=0.25)


def test_a_picture_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(0), 6)
    table = schedules.respaced(CHAIN, 1000, 20)

    def pictures(keys):
        noise = samplers.picture_noise(keys, (2,))
        return samplers.sample(gaussian_denoiser(), noise(jnp.int32(-1)), noise, table, samplers.ddpm())

    chex.assert_trees_all_close(pictures(keys)[2:4], pictures(keys[2:4]), atol=1e-6)


def test_progressive_estimates_become_the_sample():
    z, kept = run(samplers.ddpm(), 100, n=500, keep=5)
    chex.assert_shape(kept, (5, 500, 2))
    np.testing.assert_allclose(kept[-1], z, atol=1e-6)
    spread = np.asarray(kept).std(axis=(1, 2))
    assert np.all(np.diff(spread) > 0), "estimates start near the mean and spread out"


@pytest.mark.parametrize("sampler", [samplers.ddpm(), samplers.ddim(0.0)])
def test_classifier_guidance_samples_the_tilted_distribution(sampler):
    """With log p(y | x) linear in x, guided by its exact noised form, the mean moves by scale * slope * STD^2."""
    slope, scale = 0.8, 1.5

    def log_prob(z, t, **cond):
        alpha, sigma = process.expand(t.alpha, z), process.expand(t.sigma, z)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return jnp.sum(slope * gain * z, axis=-1)

    steered = guidance.classifier(log_prob, scale)(gaussian_denoiser())
    z = np.asarray(run(sampler, 250, denoise=steered))
    np.testing.assert_allclose(z.mean(), MEAN + scale * slope * STD**2, atol=0.03)
    plain = guidance.classifier(log_prob, 0.0)(gaussian_denoiser())
    chex.assert_trees_all_close(run(sampler, 50, n=8, denoise=plain), run(sampler, 50, n=8), atol=1e-5)


def test_one_program_for_every_seed():
    table = schedules.respaced(CHAIN, 1000, 10)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def pictures(keys):
        noise = samplers.picture_noise(keys, (2,))
        return samplers.sample(gaussian_denoiser(), noise(jnp.int32(-1)), noise, table, samplers.ddpm())

    for seed in range(3):
        pictures(jax.random.split(jax.random.key(seed), 4))


def test_thresholds():
    _, _, z = (jnp.zeros((2, 2)) for _ in range(3))
    step = jax.tree.map(lambda a: jnp.asarray(a[:2]), schedules.respaced(CHAIN, 1000, 10))

    def denoise(z, step, **cond):
        return process.predict(jnp.array([[0.5, 4.0], [0.2, -0.5]]), z, step, predicts="x", variance="fixed_small")

    clipped = guidance.clip_denoised()(denoise)(z, step)
    np.testing.assert_allclose(clipped.x, [[0.5, 1.0], [0.2, -0.5]])
    np.testing.assert_allclose(clipped.eps, process.eps_from_x(clipped.x, z, step.t))
    scaled = guidance.dynamic_threshold(100.0)(denoise)(z, step)
    np.testing.assert_allclose(scaled.x, [[0.125, 1.0], [0.2, -0.5]])
