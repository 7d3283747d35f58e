"""Losses and bounds against independent float64 numpy, and on data whose bound is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffax.components import build, names, spec
from diffax.diffusion import guidance, losses, process, samplers, schedules

CHAIN = schedules.discrete(schedules.linear_betas(100))
TABLE = schedules.respaced(CHAIN, 100)


def batch(t, seed=0, shape=(3, 4, 4, 1)):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(0, 256, shape) / 127.5 - 1, jnp.float32)
    eps = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    step = jax.tree.map(lambda a: jnp.asarray(a[::-1][np.asarray(t)]), TABLE)
    return losses.noised(x, eps, step)


class GaussianTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_normal_kl(self):
        rng = np.random.default_rng(0)
        m1, v1, m2, v2 = (rng.standard_normal((5, 7)) for _ in range(4))
        got = self.variant(losses.normal_kl)(
            process.Gaussian(jnp.asarray(m1, jnp.float32), jnp.asarray(v1, jnp.float32)),
            process.Gaussian(jnp.asarray(m2, jnp.float32), jnp.asarray(v2, jnp.float32)),
        )
        want = (v2 - v1) / 2 + (np.exp(v1) + (m1 - m2) ** 2) / (2 * np.exp(v2)) - 0.5
        np.testing.assert_allclose(np.asarray(got).reshape(5, 7), want, rtol=1e-5, atol=1e-6)


def test_discretized_likelihood_is_a_distribution():
    """The 256 pixel values have all the mass, and nearly that of the exact normal."""
    x = jnp.arange(256) / 127.5 - 1
    for mean, std in ((0.0, 0.01), (-0.97, 0.05), (1.3, 0.3), (0.2, 2.0)):
        p = process.Gaussian(jnp.full(256, mean), jnp.full(256, 2 * np.log(std)))
        mass = np.exp(np.float64(losses.discretized_gaussian_log_likelihood(x, p)))
        np.testing.assert_allclose(mass.sum(), 1, atol=2e-3)
        low, high = np.asarray(x) - 1 / 255, np.asarray(x) + 1 / 255
        low[0], high[-1] = -np.inf, np.inf
        np.testing.assert_allclose(mass, norm.cdf(high, mean, std) - norm.cdf(low, mean, std), atol=2e-3)


def test_published_likelihoods():
    x = jnp.array([0, 0, 1, -1, 0.5])
    p = process.Gaussian(jnp.array([0, 0.1, 0.9, -0.95, 0.5]), 2 * jnp.log(jnp.array([0.01, 0.05, 0.1, 0.1, 1])))
    want = [-1.1874, -4.7608, -1.7810, -1.1316, -5.7670]
    np.testing.assert_allclose(losses.discretized_gaussian_log_likelihood(x, p), want, atol=2e-4)


@pytest.mark.parametrize("predicts", process.PREDICTS)
def test_simple_is_zero_for_the_target_and_else_the_squared_error(predicts):
    b = batch([0, 30, 99])
    out = process.target(predicts, x=b.x, z=b.z, eps=b.eps, step=b.step)
    loss, _ = losses.simple()(out, b, predicts=predicts, variance="fixed_small")
    np.testing.assert_array_equal(loss, 0)
    loss, terms = losses.simple()(out + 0.5, b, predicts=predicts, variance="fixed_small")
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)
    chex.assert_shape(terms["mse"], (3,))


@pytest.mark.parametrize(
    ("name", "fields", "required"),
    [("simple", {}, None), ("vlb", {"weight": 1.0}, (True, True, False)), ("hybrid", {"weight": 1.0}, (True,) * 3)],
)
def test_a_loss_says_what_it_requires(name, fields, required):
    assert names("loss") == ["hybrid", "simple", "vlb"]
    section = spec("loss", name)
    assert dict(section) == {"name": name} | fields
    loss = build(section, "loss")
    if required is None:
        assert not hasattr(loss, "discrete")
    else:
        assert (loss.discrete, loss.trains_variance, loss.needs_variance) == required


def test_hybrid_trains_the_mean_by_simple_alone_and_the_variance_by_the_bound_alone():
    b = batch([5, 30, 99])
    rng = np.random.default_rng(1)
    out = jnp.asarray(rng.standard_normal((3, 4, 4, 2)), jnp.float32)

    def grad(loss):
        def total(out):
            return jnp.sum(loss(out, b, predicts="eps", variance="learned_range")[0])

        return jnp.split(jax.grad(total)(out), 2, axis=-1)

    (hybrid_mean, hybrid_var), (simple_mean, simple_var), (vlb_mean, vlb_var) = map(
        grad, (losses.hybrid(4.0), losses.simple(), losses.vlb(4.0))
    )
    np.testing.assert_allclose(hybrid_mean, simple_mean, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(hybrid_var, vlb_var, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(simple_var, 0)
    assert np.abs(vlb_mean).max() > 1e-4


def test_the_bound_is_tight_for_the_true_posterior():
    """A model that knows x has KL 0 at every step but the last, whose term is the decoder's."""
    b = batch([1, 50, 99])
    p = process.predict(b.x, b.z, b.step, predicts="x", variance="fixed_small")
    np.testing.assert_allclose(losses.vlb_term(p, b), 0, atol=1e-5)


class BoundTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_bits_per_dim_of_a_known_model(self):
        """Total = prior + terms; each term equals that of a separate call; the right model beats a wrong one."""
        steps = schedules.respaced(CHAIN, 100, 10)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.integers(0, 256, (2, 4, 4, 1)) / 127.5 - 1, jnp.float32)
        noise = samplers.picture_noise(jax.random.split(jax.random.key(0), 2), (4, 4, 1))

        def bound(shift):
            def denoise(z, step, **cond):
                return process.predict(x + shift, z, step, predicts="x", variance="fixed_large")

            denoise = guidance.clip_denoised()(denoise)
            return self.variant(lambda x: losses.bits_per_dim(denoise, x, noise, steps))(x), denoise

        right, denoise = bound(0.0)
        wrong, _ = bound(0.2)
        chex.assert_shape(right.terms, (2, 10))
        np.testing.assert_allclose(right.total, right.prior + right.terms.sum(1), rtol=1e-6)
        assert np.all(right.total < wrong.total)
        step = jax.tree.map(lambda a: jnp.broadcast_to(a[3], 2), steps)
        b = losses.noised(x, noise(jnp.int32(3)), step)
        np.testing.assert_allclose(right.terms[:, 3], losses.vlb_term(denoise(b.z, step), b), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(right.x_mse, 0, atol=1e-10)


def test_prior_bpd():
    level = schedules.discrete(schedules.linear_betas(1000))(np.array([1.0]))
    level = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), level)
    np.testing.assert_allclose(losses.prior_bpd(jnp.ones((1, 2, 2, 1)), level), 2.911e-5, rtol=1e-2)
    np.testing.assert_allclose(losses.prior_bpd(jnp.zeros((1, 2, 2, 1)), level), 0, atol=1e-7)
