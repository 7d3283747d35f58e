"""Guidance: the laws of its scales, the papers' algorithms in float64 numpy, and no recompiling."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.diffusion import augment, guidance, losses, process, samplers, schedules

CLASS_MEANS = np.array([-0.6, 0.1, 0.7])
NULL = len(CLASS_MEANS)
STD, WIDE = 0.25, 0.6  # of one class, and of all
CHAIN = schedules.discrete(schedules.cosine_betas(1000))


def denoiser(variance="fixed_small", predicts="eps"):
    """Exact for x | label ~ N(mean of the class, STD^2); for the null label x ~ N(0, WIDE^2)."""
    means, stds = jnp.append(jnp.asarray(CLASS_MEANS), 0.0), jnp.array([STD] * NULL + [WIDE])

    def denoise(z, step, *, label):
        mean, std = (process.expand(a[label], z) for a in (means, stds))
        alpha, sigma = process.expand(step.t.alpha, z), process.expand(step.t.sigma, z)
        x = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)
        out = {"x": x, "eps": process.eps_from_x(x, z, step.t)}[predicts]
        if variance == "learned_range":
            out = jnp.concatenate([out, jnp.cos(3 * z) * process.expand(label + 1, z)], -1)
        return process.predict(out, z, step, predicts=predicts, variance=variance)

    return denoise


def inputs(n=6):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(n, 4, 4, 1)), jnp.float32)
    step = jax.tree.map(lambda a: jnp.asarray(a[5 : 5 + n]), schedules.respaced(CHAIN, 1000, 25))
    return z, step, {"label": jnp.arange(n) % NULL}


def null_of(cond):
    return jax.tree.map(lambda a: jnp.full_like(a, NULL), cond)


class ClassifierFreeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_scale_1_is_the_conditional_and_0_the_unconditional_model(self):
        z, step, cond = inputs()
        for variance in ("fixed_small", "learned_range"):
            plain = denoiser(variance)
            guided = self.variant(
                lambda s, plain=plain: guidance.classifier_free(s, {"label": NULL})(plain)(z, step, **cond)
            )
            chex.assert_trees_all_close(guided(1.0), plain(z, step, **cond), atol=2e-6)
            without = plain(z, step, **null_of(cond))
            chex.assert_trees_all_close(guided(0.0)[:2], without[:2], atol=2e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_it_goes_on_beyond_the_conditional_prediction_and_keeps_its_variance(self):
        z, step, cond = inputs()
        plain = denoiser("learned_range")
        p, q = plain(z, step, **cond), plain(z, step, **null_of(cond))
        scale = jnp.array([0.0, 0.5, 1.0, 2.0, 3.0, 7.5])
        guided = self.variant(lambda s: guidance.classifier_free(s, {"label": NULL})(plain)(z, step, **cond))(scale)
        s = np.asarray(scale).reshape(-1, 1, 1, 1)
        # w = s - 1 of the paper's equation 6
        np.testing.assert_allclose(guided.eps, s * p.eps - (s - 1) * q.eps, atol=1e-5)
        np.testing.assert_allclose(guided.x, process.x_from_eps(guided.eps, z, step.t), atol=1e-4)
        chex.assert_trees_all_close((guided.variance, guided.logvar), (p.variance, p.logvar), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_call_of_twice_the_batch(self):
        z, step, cond = inputs()
        seen = []

        def spy(z, step, *, label, low_res):
            seen.append((z.shape, step.t.time.shape, label.shape, low_res.shape))
            chex.assert_trees_all_equal_shapes(low_res, z)
            return denoiser()(z, step, label=label)

        guided = guidance.classifier_free(2.0, {"label": NULL})(spy)
        self.variant(lambda z: guided(z, step, low_res=z, **cond))(z)
        assert set(seen) == {((12, 4, 4, 1), (12,), (12,), (12, 4, 4, 1))}


def algorithm_2(eps_of, z, noise, *, steps, w, v, label, low=-20.0, high=20.0):
    """Classifier-free guidance, algorithm 2, in float64; x is clipped, of which the paper does not speak."""
    b = np.arctan(np.exp(-high / 2))
    a = np.arctan(np.exp(-low / 2)) - b
    logsnr = -2 * np.log(np.tan(a * np.linspace(1, 0, steps) + b))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
    for i in range(steps):
        eps = (1 + w) * eps_of(z, alpha[i], sigma[i], label) - w * eps_of(z, alpha[i], sigma[i], None)
        x = np.clip((z - sigma[i] * eps) / alpha[i], -1, 1)
        if i == steps - 1:
            return x
        ratio = np.exp(logsnr[i] - logsnr[i + 1])
        mean = ratio * alpha[i + 1] / alpha[i] * z + (1 - ratio) * alpha[i + 1] * x
        small, large = (1 - ratio) * sigma[i + 1] ** 2, (1 - ratio) * sigma[i] ** 2
        z = mean + np.sqrt(small ** (1 - v) * large**v) * noise[i]


@pytest.mark.parametrize("w", [0.0, 0.3, 2.0])
def test_sampling_is_the_papers_algorithm(w):
    steps, v, n = 40, 0.3, 6
    rng = np.random.default_rng(1)
    z, noise, label = rng.normal(size=(n, 2, 2, 1)), rng.normal(size=(steps, n, 2, 2, 1)), np.arange(n) % NULL

    def eps_of(z, alpha, sigma, label):
        mean = 0.0 if label is None else CLASS_MEANS[label].reshape(-1, 1, 1, 1)
        std = WIDE if label is None else STD
        return sigma * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    want = algorithm_2(eps_of, z, noise, steps=steps, w=w, v=v, label=label)
    wraps = [guidance.classifier_free(1 + w, {"label": NULL}), guidance.clip_denoised()]
    table = schedules.continuous_steps(schedules.cosine_logsnr(-20, 20), steps)
    drawn = jnp.asarray(noise, jnp.float32)
    got = jax.jit(
        lambda z: samplers.sample(
            guidance.guided(denoiser(v), wraps),
            z,
            lambda i: drawn[i],
            table,
            samplers.ddpm(),
            label=jnp.asarray(label),
        )
    )(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(got, want, atol=3e-4)


def test_the_variance_between_the_bounds_is_the_papers():
    """Section 2: sigma_small^(2 (1 - v)) sigma_large^(2 v)."""
    steps = schedules.continuous_steps(schedules.cosine_logsnr(-20, 20), 16)
    z, step = jnp.zeros((15, 1)), jax.tree.map(lambda a: jnp.asarray(a[:-1]), steps)
    p = process.predict(jnp.zeros((15, 1)), z, step, predicts="eps", variance=0.3)
    low, high = np.float64(step.t.logsnr), np.float64(step.s.logsnr)
    beta = -np.expm1(low - high)
    small, large = beta / (1 + np.exp(high)), beta / (1 + np.exp(low))
    np.testing.assert_allclose(p.variance[:, 0], small**0.7 * large**0.3, rtol=1e-4)


def log_prob(z, t, *, label):
    """log p(label | z) of the three classes above, for equal shares."""
    means = process.expand(jnp.asarray(CLASS_MEANS), z[None])
    alpha, sigma = process.expand(t.alpha, z), process.expand(t.sigma, z)
    distance = (z - alpha * means.reshape(-1, *[1] * z.ndim)) ** 2 / (alpha**2 * STD**2 + sigma**2)
    logits = -0.5 * distance.reshape(NULL, z.shape[0], -1).sum(-1).T
    return -losses.cross_entropy(logits, label)


@pytest.mark.parametrize("sampler", [samplers.ddpm(), samplers.ddim(0.0), samplers.dpm_solver(2)])
def test_an_unconditional_model_is_steered_by_a_classifier(sampler):
    """The exact score of the three-class mixture is that of one class once log p(label | z) is added."""

    def mixture(z, step, **cond):
        parts = [denoiser()(z, step, label=jnp.full(len(z), k)) for k in range(NULL)]
        weights = jnp.stack([jnp.exp(log_prob(z, step.t, label=jnp.full(len(z), k))) for k in range(NULL)])
        x = sum(process.expand(w, z) * p.x for w, p in zip(weights, parts, strict=True))
        return process.predict(x, z, step, predicts="x", variance="fixed_small")

    n = 600
    label = jnp.arange(n) % NULL
    noise = samplers.picture_noise(jax.random.split(jax.random.key(0), n), (1,))
    table = schedules.respaced(CHAIN, 1000, 100)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(scale):
        steered = guidance.classifier(log_prob, scale)(mixture)
        return samplers.sample(steered, noise(jnp.int32(-1)), noise, table, sampler, label=label)

    hits = []
    for scale in (0.0, 1.0, 3.0):
        z = np.asarray(run(jnp.full(n, scale)))[:, 0]
        hits.append(np.mean(np.abs(z[:, None] - CLASS_MEANS).argmin(1) == label))
        if scale == 1.0:
            for k in range(NULL):
                np.testing.assert_allclose(z[label == k].mean(), CLASS_MEANS[k], atol=0.06)
    assert hits[0] < 0.45 and hits[1] > 0.75 and hits[2] > hits[1] + 0.1, hits


def test_scales_are_per_picture():
    z, step, cond = inputs(3)
    scale = jnp.array([0.0, 1.0, 4.0])
    both = {
        "free": lambda s: guidance.classifier_free(s, {"label": NULL})(denoiser())(z, step, **cond).eps,
        "classifier": lambda s: guidance.classifier(log_prob, s)(denoiser())(z, step, **cond).score,
    }
    for guided in both.values():
        chex.assert_trees_all_close(guided(scale), jnp.stack([guided(s)[i] for i, s in enumerate(scale)]), atol=1e-6)


class DropTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_share_is_dropped_together_and_by_example(self):
        n = 4000
        keys = jax.random.split(jax.random.key(0), n)
        cond = {"label": jnp.arange(n), "text": jnp.ones((n, 3), jnp.int32), "low_res": jnp.ones((n, 2))}
        null = {"label": -1, "text": jnp.zeros(3)}
        drop = self.variant(lambda cond, keys: augment.drop(cond, keys, rate=0.2, null=null))
        out = drop(cond, keys)
        gone = np.asarray(out["label"] == -1)
        np.testing.assert_allclose(gone.mean(), 0.2, atol=0.02)
        np.testing.assert_array_equal(gone, np.all(out["text"] == 0, axis=1))
        assert out["low_res"] is cond["low_res"] or np.all(out["low_res"] == 1)
        assert np.all(out["label"][~gone] == np.arange(n)[~gone])
        some = jax.tree.map(lambda a: a[10:20], cond)
        chex.assert_trees_all_equal(drop(some, keys[10:20]), jax.tree.map(lambda a: a[10:20], out))


@pytest.mark.parametrize("predicts", ["eps", "x"])
def test_a_plain_function_makes_a_denoiser(predicts):
    z, step, cond = inputs()
    exact = denoiser(0.3, predicts)(z, step, **cond)

    def network(z, time, *, label):
        chex.assert_trees_all_equal((time, label), (step.t.time, cond["label"]))
        return {"x": exact.x, "eps": exact.eps}[predicts]

    chex.assert_trees_all_equal(guidance.denoiser_from(network, predicts, 0.3)(z, step, **cond), exact)


def test_known_pixels_are_put_into_the_estimate():
    z, step, _ = inputs(2)
    picture, known = jnp.full(z.shape, -0.5), jnp.zeros(z.shape).at[:, 0, 0].set(1)

    def denoise(z, step, **cond):
        return process.predict(jnp.full_like(z, 0.9), z, step, predicts="x", variance="fixed_small")

    p = guidance.insert_known()(denoise)(z, step, inpaint=augment.masked(picture, known))
    np.testing.assert_allclose(p.x, jnp.where(known > 0, -0.5, 0.9), rtol=1e-6)
    np.testing.assert_allclose(process.diffuse(p.x, step.t, p.eps), z, atol=1e-5)


def test_cross_entropy_against_numpy():
    logits = np.random.default_rng(0).normal(size=(5, 4)) * 30
    label = np.array([0, 3, 1, 2, 2])
    want = [np.logaddexp.reduce(row) - row[k] for row, k in zip(logits, label, strict=True)]
    got = losses.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(label))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.isnan(losses.cross_entropy(jnp.zeros((1, 4)), jnp.array([4]))[0])
