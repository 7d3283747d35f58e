"""Priors: embeddings of captions, candidates, the variance that is measured, and rows of codes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.diffusion import guidance, schedules
from diffax.models import analytic, cascade, codes
from diffax.models.analytic import analytic_variance
from diffax.models.base import Sampling
from diffax.models.best_of import nearest
from tests.models import micro, systems
from tests.models.protocol_test import statistics_of


@pytest.fixture(scope="module")
def dalle2():
    system = systems.dalle2()
    return system, statistics_of(system, micro.params_of(system))


def given_ids(model, prompts):
    return {name: c.from_user(prompts, len(prompts)) for name, c in model.given.items()}


PROMPTS = ["a red circle", "a large blue ring", "a green cross", ""]


def test_a_prior_alone(dalle2):
    """Guidance 0 forgets the caption, and a network that answers zero makes the mean of what is scaled."""
    system, params = dalle2
    mean, std = np.arange(4, dtype=np.float32), np.full(4, 2, np.float32)
    first = system.generators[0].generator
    scaled = dataclasses.replace(first.target.clip, scale=codes.Scale(mean, std))
    prior = dataclasses.replace(first, target=first.target._replace(clip=scaled))
    run = jax.jit(cascade.cascade([prior]))
    given = [{"prior": given_ids(prior, p)} for p in (PROMPTS, ["a blue square"] * 4)]
    free, steered = ([run(params, micro.keys_of(), g, {"prior": s}) for g in given] for s in (0.0, 2.0))
    np.testing.assert_allclose(free[0], free[1], atol=1e-4)
    assert np.abs(steered[0] - steered[1]).max() > 1e-3
    assert np.abs(free[0][0] - free[0][1]).max() > 1e-3, "another number, another embedding"
    zero = {**params, "prior": jax.tree.map(np.zeros_like, params["prior"])}
    np.testing.assert_allclose(run(zero, micro.keys_of(), given[0], {"prior": 2.0}), [mean] * 4, atol=1e-5)


def test_the_nearest_candidate_is_kept(dalle2):
    rng = np.random.default_rng(0)
    candidates, wanted = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 4))
    best = [max(some, key=lambda e, w=w: e @ w) for some, w in zip(candidates, wanted, strict=True)]
    got = nearest(jnp.asarray(candidates.reshape(15, 4)), jnp.asarray(wanted))
    np.testing.assert_allclose(got, np.stack(best), rtol=1e-5)

    system, params = dalle2
    both = system.generators[0]
    assert both.count == 2 and both.name == "prior" and both.scale == 2.0 and both.output == "image_embedding"
    given, keys = given_ids(both, PROMPTS), micro.keys_of()

    @jax.jit
    def run():
        every = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
        single = [both.generator.sample(params, every[:, i], given) for i in range(2)]
        clip = system.model("clip")
        wanted = clip.embed_text(params["clip"], given["text_embedding"]).embedding
        return both.sample(params, keys, given), jnp.stack(single, 1), wanted

    kept, single, wanted = run()
    best = np.argmax(np.einsum("bne,be->bn", single, wanted), 1)
    np.testing.assert_allclose(kept, np.asarray(single)[np.arange(4), best], rtol=1e-3, atol=1e-4)
    assert both.resampled(Sampling(steps="2")).num_steps == 2


# ---- the variance of the diffusion prior ----------------------------------------------------------------------------


def test_the_analytic_variance_is_that_of_a_gaussian():
    """Of x ~ N(0, s^2) the reverse step is a normal, whose variance follows from the joint of z_s and z_t."""
    s2 = 0.3
    steps = schedules.build_steps(schedules.cosine(num_timesteps=1000), "10")
    a_t, a_s = (np.asarray(jax.nn.sigmoid(jnp.asarray(level.logsnr)), np.float64) for level in (steps.t, steps.s))
    var_t, var_s = (a * s2 + 1 - a for a in (a_t, a_s))
    want = var_s - (np.sqrt(a_t / a_s) * var_s) ** 2 / var_t
    want[-1] = 0
    residual = s2 * (1 - a_t) / var_t
    got = analytic_variance(jnp.zeros((10, 3)), jax.tree.map(jnp.asarray, steps), jnp.asarray(residual))
    np.testing.assert_allclose(got[:, 0], want, rtol=2e-3, atol=1e-6)
    assert (want[:-1] > 1.05 * np.exp(steps.min_logvar[:-1])).sum() >= 5, "more than the small fixed variance"


def test_what_the_prior_leaves_open_is_measured(dalle2, monkeypatch):
    """E[x^2] - E[f^2] by noise level, of as many batches as are enough."""
    system, params = dalle2
    model = system.generators[0].generator
    assert model.analytic and model.variance == "fixed_small"
    monkeypatch.setattr(analytic, "EXAMPLES", 12)
    own, asked = micro.drawn(model), []

    def batches():
        for seed in itertools.count():
            asked.append(seed)
            yield {**micro.batch_of(model, 8, seed), "more": np.zeros(8)}

    def run(compute):
        jitted = jax.jit(compute)
        return lambda batch, keys: jitted(own, batch, keys)

    found = model.measure_after(run, batches())
    assert asked == [0, 1] and set(found) == set(model.statistics_example())
    assert {key: value.shape for key, value in found.items()} == {"logsnr": (25,), "residual": (25,)}
    assert (np.diff(found["logsnr"]) > 0).all() and (found["residual"] >= 0).all()

    batch, keys = micro.batch_of(model, 8), jax.random.split(jax.random.key(0), 8)
    got = jax.jit(lambda: model.residual(own, batch, keys, np.array([1.0, 0.5])))()[:, 1]
    x = model.target.to_x(jnp.asarray(batch["image_embedding"]))
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (4,)))(keys)
    level = model.schedule(np.array([0.5]))
    z = np.sqrt(jax.nn.sigmoid(level.logsnr)) * x + np.sqrt(jax.nn.sigmoid(-level.logsnr)) * eps
    inputs = {name: batch[name] for name in model.conditions}
    f = jax.jit(model.net.apply)({"params": own}, z, jnp.full(8, level.time[0]), inputs)
    np.testing.assert_allclose(got, np.mean(x**2, 1) - np.mean(np.asarray(f, np.float64) ** 2, 1), rtol=1e-3, atol=1e-4)
    assert micro.model().measure_after(run, batches()) is None is micro.model().statistics_example()


# ---- the autoregressive prior ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ar():
    """(model, its parameters and the CLIP's, a codec that is fitted to embeddings of unit length)."""
    system = systems.dalle2("code_prior")
    model, params = system.generators[0], micro.params_of(system)
    rng = np.random.default_rng(0)

    def batches():
        while True:
            rows = np.float32(rng.standard_normal((2, 8, 4)))
            rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
            yield {"image_embedding": rows[0], "text_embedding": rows[1]}

    statistics = model.measure_before(batches())
    own = {**params["prior"], "statistics": statistics}
    return model.with_statistics(statistics), {**params, "prior": own}, statistics


def test_the_codec_is_fitted_before_training(ar):
    model, _, statistics = ar
    example = model.statistics_example()
    assert {k: np.shape(v) for k, v in statistics.items()} == {k: v.shape for k, v in example.items()}
    rows = np.eye(4, dtype=np.float32)
    batches = itertools.repeat({"image_embedding": rows, "text_embedding": rows})
    assert "of the variance of embeddings" in model.describe_statistics(statistics, batches)
    np.testing.assert_array_equal(model.init_extra().edges, statistics["edges"])
    many = dataclasses.replace(model, codec=codes.blank_codec(4, 3, 9), examples=8)
    with pytest.raises(ValueError, match="8 values are too few for 9 buckets"):
        many.measure_before(batches)


def test_the_code_prior_makes_embeddings(ar):
    model, params, statistics = ar
    run = jax.jit(cascade.cascade([model]))
    given = {"prior": given_ids(model, PROMPTS * 6)}
    made = run(params, micro.keys_of(24), given, {"prior": 2.0})
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 3.0, rtol=1e-5)
    # each is the codec's reading of one of the 5^3 rows of codes
    every = np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)
    there = guidance.unit(codes.read(every, codes.Codec(**statistics)))
    assert (np.max(made / 3 @ np.asarray(there).T, axis=1) > 1 - 1e-5).all()
    alone = run(params, micro.keys_of(1), {"prior": given_ids(model, PROMPTS[:1])}, {"prior": 2.0})
    np.testing.assert_allclose(alone, made[:1], atol=1e-5)
    others = {"prior": given_ids(model, ["a blue square"] * 24)}
    free, steered = ([run(params, micro.keys_of(24), g, {"prior": s}) for g in (given, others)] for s in (0.0, 4.0))
    np.testing.assert_allclose(*free, atol=1e-5)
    assert np.abs(steered[0] - steered[1]).max() > 1e-2


def test_the_loss_of_codes_is_their_cross_entropy(ar):
    model, params, statistics = ar
    codec, own = codes.Codec(**statistics), micro.drawn(model)
    bare = dataclasses.replace(model, nulls={})
    batch, keys = micro.batch_of(model, 6), micro.keys_of(6)
    x, text = batch["image_embedding"], batch["text_embedding"]

    @jax.jit
    def both():
        got = bare.loss(own, codec, batch, keys, jnp.arange(6), 6)
        similarity = jnp.searchsorted(codec.similarity_edges, jnp.sum(x * text, 1), side="right")
        conditions = {"text": batch["text"], "text_embedding": text, "similarity": similarity}
        wanted = codes.write(x, codec)
        return got, wanted, bare.net.apply({"params": own}, wanted, None, conditions)

    (loss, metrics, feedback), wanted, logits = both()
    coordinates = (x - codec.mean).astype(np.float64) @ codec.directions
    by_hand = (coordinates[..., None] >= codec.edges[None]).sum(-1)
    np.testing.assert_array_equal(wanted, by_hand)
    p = np.exp(np.asarray(logits, np.float64))
    each = -np.log(np.take_along_axis(p, by_hand[..., None], -1)[..., 0] / p.sum(-1))
    np.testing.assert_allclose(loss, each.mean(1), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_q1"][0] / metrics["loss_q1"][1], each[:, 1].mean(), rtol=1e-4)
    assert feedback == ()


def test_pictures_that_fit_are_wanted(ar, monkeypatch):
    """The buckets of the upper half of the products in training, 5 at quantiles: from the third on."""
    model, params, _ = ar
    from diffax.models import code_prior

    wanted = []

    def sample_codes(net, params, context, keys, *, dropped, **_):
        wanted.extend((context.sequence[:, -1], dropped.sequence[:, -1]))
        return jnp.zeros((len(keys), 3), int)

    monkeypatch.setattr(code_prior, "sample_codes", sample_codes)
    model.sample(params, micro.keys_of(60), micro.filled({n: c.given_example() for n, c in model.given.items()}, 60))
    table = params["prior"]["similarity"]["embed"]["embedding"]
    found = [{int(np.abs(table - row).sum(1).argmin()) for row in np.asarray(rows)} for rows in wanted]
    assert found == [{2, 3, 4}, {5}], "given, and dropped with the caption"
