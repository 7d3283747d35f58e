"""Stages: every parameterisation trains and samples, examples are independent, a cascade is a fold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import config
from diffax.diffusion import schedules
from diffax.models import stages
from tests import micro


def build(*overrides: str) -> stages.Stage:
    c = config.load("quickstart", [*micro.OVERRIDES, *overrides])
    config.validate(c)
    return stages.build_stage(config.to_dict(c), "base")


def batch_of(n=4, size=8):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.uniform(-1, 1, (n, size, size, 1)), jnp.float32),
        "label": jnp.arange(n, dtype=jnp.int32),
    }


def keys_of(n=4, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


PARAMETERISATIONS = [
    ("eps", "fixed_large", "simple", "uniform"),
    ("x", "fixed_small", "simple", "stratified"),
    pytest.param("v", "0.3", "simple", "uniform", marks=pytest.mark.slow),
    ("previous_x", "learned_range", "vlb", "loss_second_moment"),
    ("eps", "learned_range", "hybrid", "uniform"),
    pytest.param("eps", "learned", "hybrid", "uniform", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("predicts", "variance", "loss", "timesteps"), PARAMETERISATIONS)
def test_every_parameterisation_trains_and_samples(predicts, variance, loss, timesteps):
    stage = build(
        f"config.base.predicts={predicts}",
        f"config.base.variance={variance}",
        f"config.base.loss.name={loss}",
        f"config.base.timesteps.name={timesteps}",
    )
    objective = stages.objective(stage)

    @jax.jit
    def both(key):
        params = objective.init(key)

        def total(params):
            value, metrics, feedback = objective.loss(
                params, objective.init_extra(), batch_of(), keys_of(), jnp.arange(4), 4
            )
            return jnp.mean(value), (value, metrics, feedback)

        (_, aux), grads = jax.value_and_grad(total, has_aux=True)(params)
        out = stages.sample_fn([stage])({"base": params}, keys_of(), label=jnp.arange(4))
        return aux, grads, out

    (value, metrics, feedback), grads, out = both(jax.random.key(0))
    chex.assert_shape(value, (4,))
    chex.assert_shape(out, (4, 8, 8, 1))
    chex.assert_tree_all_finite((value, grads, out))
    assert np.abs(grads["unet"]["conv_out"]["kernel"]).max() > 0
    assert float(metrics["loss"][1]) == 4
    quarters = sum(float(metrics[f"loss_q{q}"][1]) for q in range(4))
    assert quarters == 4, "every example falls into one quarter of the noise range"
    chex.assert_tree_all_finite(objective.update_extra(objective.init_extra(), feedback))


def test_continuous_schedule_trains_and_samples():
    stage = build("config.base.schedule.name=cosine_logsnr", "config.base.variance=0.3")
    assert stage.train_steps == 0 and len(stage.sampling.t.time) == 5
    objective = stages.objective(stage)
    params = jax.jit(objective.init)(jax.random.key(0))
    value, _, _ = jax.jit(objective.loss)(params, (), batch_of(), keys_of(), jnp.arange(4), 4)
    out = jax.jit(stages.sample_fn([stage]))({"base": params}, keys_of(), label=jnp.arange(4))
    chex.assert_tree_all_finite((value, out))
    assert np.abs(out).max() <= 1


def test_the_loss_of_an_example_does_not_depend_on_its_batch():
    """Cut any way, with dropout: what makes layouts and device counts agree."""
    stage = build("config.base.net.dropout=0.5", "config.base.timesteps.name=stratified")
    objective = stages.objective(stage)
    params = jax.tree.map(lambda a: a + 0.05, jax.jit(objective.init)(jax.random.key(0)))
    loss = jax.jit(lambda batch, keys, position: objective.loss(params, (), batch, keys, position, 4)[0])
    whole = loss(batch_of(), keys_of(), jnp.arange(4))
    halves = [
        loss(jax.tree.map(lambda a, s=s: a[s], batch_of()), keys_of()[s], jnp.arange(4)[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-5)


def test_the_first_loss_is_one():
    """A fresh network answers zero (its last layer starts there), so eps costs its variance."""
    objective = stages.objective(build())
    params = jax.jit(objective.init)(jax.random.key(0))
    n = 64
    value, _, _ = jax.jit(objective.loss)(
        params, (), jax.tree.map(lambda a: jnp.repeat(a, n // 4, 0), batch_of()), keys_of(n), jnp.arange(n), n
    )
    np.testing.assert_allclose(np.mean(value), 1, atol=0.05)


def test_sampling_is_exportable_and_compiles_once():
    stage = build()
    params = {"base": jax.jit(stages.objective(stage).init)(jax.random.key(0))}
    pure = stages.sample_fn([stage])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(params, keys, label):
        return pure(params, keys, label=label)

    first = sample(params, keys_of(4, seed=0), jnp.array([0, 1, 2, 3]))
    again = sample(params, keys_of(4, seed=0), jnp.array([0, 1, 2, 3]))
    other = sample(params, keys_of(4, seed=1), jnp.array([3, 3, 3, 3]))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    exported = jax.export.export(jax.jit(lambda p, data, label: pure(p, jax.random.wrap_key_data(data), label=label)))(
        params, jax.random.key_data(keys_of()), jnp.arange(4)
    )
    np.testing.assert_allclose(exported.call(params, jax.random.key_data(keys_of()), jnp.arange(4)), first, atol=1e-5)


def test_progressive_generation_ends_in_the_sample():
    stage = build()
    params = {"base": jax.jit(stages.objective(stage).init)(jax.random.key(0))}
    out, kept = jax.jit(stages.sample_fn([stage], keep=3))(params, keys_of(), label=jnp.arange(4))
    chex.assert_shape(kept, (3, 4, 8, 8, 1))
    np.testing.assert_allclose(kept[-1], out, atol=1e-6)


def test_bits_per_dim_of_a_fresh_network_is_that_of_a_blind_model():
    stage = build("config.base.steps=")
    params = jax.jit(stages.objective(stage).init)(jax.random.key(0))
    batch = batch_of()
    bound = jax.jit(stages.bits_per_dim_fn(stage))(params, batch["image"], keys_of(), label=batch["label"])
    chex.assert_shape(bound.terms, (4, 40))
    chex.assert_tree_all_finite(bound._asdict())
    np.testing.assert_allclose(bound.total, bound.prior + bound.terms.sum(1), rtol=1e-5)
    assert np.all(np.asarray(bound.total) > 5), "uniform pixels have 8 bits"


def test_a_cascade_is_a_fold():
    """The second stage sees the first one's picture, and only its own conditions."""
    c = config.config_defaults("cascade")
    with c.unlocked():
        c.up = config.stage_defaults()
    c.stages = ("base", "up")
    for name, size in (("base", 8), ("up", 16)):
        c[name].shape = (size, size, 1)
        c[name].net.update(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention=(), groups=4)
        c[name].schedule.update(name="cosine", steps=20)
        c[name].steps = "3"
    c.base.takes, c.base.num_classes, c.up.takes, c.up.low_res.factor = ("label",), 3, ("low_res",), 2
    config.validate(c)
    base, up = stages.build_stages(config.to_dict(c))
    params = {s.name: jax.jit(lambda k, s=s: stages.init_params(s, k))(jax.random.key(1)) for s in (base, up)}
    params = jax.tree.map(lambda a: a + 0.03, params)
    out = jax.jit(stages.sample_fn([base, up]))(params, keys_of(2), label=jnp.array([0, 1]))
    chex.assert_shape(out, (2, 16, 16, 1))
    small = jax.jit(stages.sample_fn([base]))(params, keys_of(2), label=jnp.array([0, 1]))
    chex.assert_shape(small, (2, 8, 8, 1))
    changed = jax.jit(stages.sample_fn([base, up]))(params, keys_of(2), label=jnp.array([0, 2]))
    np.testing.assert_allclose(out[0], changed[0], atol=1e-5)
    assert not np.allclose(out[1], changed[1], atol=1e-5)


def test_unknown_choices_list_what_there_is():
    c = config.to_dict(config.load("quickstart", micro.OVERRIDES))
    for field, value, known in (
        ("schedule", "linaer", "cosine"),
        ("loss", "l2", "hybrid"),
        ("sampler", "heun9", "ddim"),
    ):
        broken = {**c, "base": {**c["base"], field: {**c["base"][field], "name": value}}}
        with pytest.raises(ValueError, match=f"{value}.*{known}"):
            stages.build_stage(broken, "base")


def test_schedule_of_the_config():
    schedule, steps = schedules.build(config.to_dict(config.load("iddpm_cifar10"))["base"]["schedule"])
    assert steps == 4000
    np.testing.assert_allclose(schedule(np.array([1.0])).time, 999.75)
    betas = np.exp(schedules.respaced(schedule, steps)[::-1].max_logvar)
    np.testing.assert_allclose(betas, schedules.cosine_betas(4000), rtol=1e-5)
