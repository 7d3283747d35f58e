"""The process against independent float64 numpy, and the laws that tie its functions together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.diffusion import process, schedules

BETAS = schedules.linear_betas(1000)
TABLE = schedules.respaced(schedules.discrete(BETAS), 1000)[::-1]
T = np.array([1, 17, 400, 999])


def at(t):
    return jax.tree.map(jnp.asarray, TABLE[np.asarray(t)])


def draws(seed=0, shape=(4, 3, 5, 2)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]


class ProcessTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_diffuse_and_posterior_equal_numpy(self):
        x, eps, _ = draws()
        step = at(T)
        z = self.variant(process.diffuse)(x, step.t, eps)
        mean, logvar = self.variant(process.posterior)(x, z, step)
        ab = np.cumprod(1 - BETAS)
        prev, a, b = ab[T - 1], ab[T], BETAS[T]
        wide = lambda v: v.reshape(-1, 1, 1, 1)  # noqa: E731
        np.testing.assert_allclose(z, wide(np.sqrt(a)) * x + wide(np.sqrt(1 - a)) * eps, rtol=2e-5, atol=2e-6)
        want = wide(b * np.sqrt(prev) / (1 - a)) * x + wide((1 - prev) * np.sqrt(1 - b) / (1 - a)) * z
        np.testing.assert_allclose(mean, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(logvar).ravel(), b * (1 - prev) / (1 - a), rtol=1e-5)
        chex.assert_shape(logvar, (4, 1, 1, 1))

    @chex.variants(with_jit=True, without_jit=True)
    def test_predict_undoes_diffuse(self):
        """A network that answers its target exactly knows x and eps, whatever it predicts."""
        x, eps, _ = draws()
        step = at(T)
        z = process.diffuse(x, step.t, eps)
        for predicts in process.PREDICTS:
            out = process.target(predicts, x=x, z=z, eps=eps, step=step)
            p = self.variant(
                lambda out, z, predicts=predicts: process.predict(
                    out, z, at(T), predicts=predicts, variance="fixed_small"
                )
            )(out, z)
            # at t = 999 x is 1/160 of z, so x from eps keeps few digits; previous-x divides by 1e-4 at t = 17
            np.testing.assert_allclose(p.x, x, atol=2e-3)
            np.testing.assert_allclose(p.eps, eps, atol=5e-3)
            np.testing.assert_allclose(process.reverse(p, z, step).mean, process.posterior(x, z, step).mean, atol=1e-4)


def test_a_level_can_be_a_scalar():
    x, eps, _ = draws()
    one = jax.tree.map(lambda a: a[2], at(T))
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (4,)), one)
    chex.assert_trees_all_close(process.diffuse(x, one.t, eps), process.diffuse(x, many.t, eps))


def test_variances_lie_between_their_ends():
    _, _, z = draws()
    step = at([0, 1, 500, 999])
    values = jnp.stack([jnp.full(z.shape[:-1], v) for v in (-1.0, 1.0)], -1)  # one channel at each end
    learned = process.predict(jnp.concatenate([z, values], -1), z, step, predicts="eps", variance="learned_range")
    small = process.predict(z, z, step, predicts="eps", variance="fixed_small")
    large = process.predict(z, z, step, predicts="eps", variance="fixed_large")
    middle = process.predict(z, z, step, predicts="eps", variance=0.3)
    np.testing.assert_allclose(learned.logvar[..., 0], np.broadcast_to(step.min_logvar[:, None, None], (4, 3, 5)))
    np.testing.assert_allclose(learned.logvar[..., 1], np.broadcast_to(step.max_logvar[:, None, None], (4, 3, 5)))
    np.testing.assert_allclose(small.logvar.ravel(), step.min_logvar)
    np.testing.assert_allclose(large.logvar.ravel()[1:], step.max_logvar[1:])
    np.testing.assert_allclose(
        middle.logvar.ravel()[1:], 0.3 * step.max_logvar[1:] + 0.7 * step.min_logvar[1:], rtol=1e-6
    )
    # at the last step all constant choices take the clipped posterior, and the small one moves nothing
    for p in (small, large, middle):
        assert p.logvar.ravel()[0] == step.min_logvar[0]
    assert small.variance.ravel()[0] == 0 and large.variance.ravel()[0] > 0


@pytest.mark.parametrize(("channels", "variance"), [(2, "learned"), (4, "fixed_small"), (3, "learned_range")])
def test_wrong_channels_are_named(channels, variance):
    z = jnp.zeros((4, 3, 5, 2))
    with pytest.raises(ValueError, match=f"network output has {channels} channels"):
        process.predict(jnp.zeros((4, 3, 5, channels)), z, at(T), predicts="eps", variance=variance)


def test_v_survives_zero_signal():
    """With jsd betas the last level has no signal: v (and x) still say what x is."""
    table = schedules.respaced(schedules.discrete(schedules.jsd_betas(50)), 50)
    step = jax.tree.map(lambda a: jnp.asarray(a[:1]), table)
    x, eps, _ = draws(shape=(1, 2, 2, 1))
    z = process.diffuse(x, step.t, eps)
    v = process.target("v", x=x, z=z, eps=eps, step=step)
    p = process.predict(v, z, step, predicts="v", variance="fixed_large")
    np.testing.assert_allclose(p.x, x, atol=1e-6)
    assert np.isfinite(process.reverse(p, z, step).mean).all()
