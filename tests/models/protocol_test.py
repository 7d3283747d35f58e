"""What every model keeps, whatever it is: finite losses that fall, examples on their own, shapes that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffax.models import base, cascade
from tests.models import micro, systems

MODELS = {
    f"{lineage}, {name}": (lineage, name)
    for lineage, names in {
        "classes": ("base",),
        "classifier-guided": ("classifier",),
        "cascade": ("up",),
        "GLIDE": ("base",),
        "CLIP-guided": ("clip",),
        "DALL-E 2": ("prior", "decoder"),
        "DALL-E 2, autoregressive": ("prior",),
        "karlo": ("prior", "decoder"),
    }.items()
    for name in names
}


def model_of(which):
    lineage, name = MODELS[which]
    system = systems.EVERY[lineage]()
    return system, system.model(name)


@pytest.mark.parametrize("which", MODELS)
def test_a_loss_is_finite_falls_and_is_of_each_example(which):
    _, model = model_of(which)
    n, batch, keys = 4, micro.batch_of(model), micro.keys_of()
    extra, tx = extra_of(model), optax.adam(1e-2)

    def total(params):
        value, metrics, feedback = model.loss(params, extra, batch, keys, jnp.arange(n), n)
        return jnp.mean(value), (value, metrics, feedback)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            (mean, aux), gradient = jax.value_and_grad(total, has_aux=True)(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), (mean, aux, optax.tree.norm(gradient))

        return jax.lax.scan(step, (params, tx.init(params)), length=20)[1]

    params = micro.drawn(model)
    means, (values, metrics, feedback), slopes = train(params)
    assert np.isfinite(means).all() and np.isfinite(slopes).all() and (slopes > 0).all()
    assert means[-1] < means[0], means
    assert values.shape == (20, n) and set(model.curve) <= set(metrics)
    value, count = (np.asarray(a)[0] for a in metrics["loss"])
    np.testing.assert_allclose(value / count, means[0], rtol=1e-4)
    quarters = [float(metrics[f"loss_q{q}"][1][0]) for q in range(4) if f"loss_q{q}" in metrics]
    assert sum(quarters) == count, "every term falls into one quarter"
    first = jax.tree.map(lambda a: a[0], feedback)
    updated = model.update_extra(extra, first)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updated))
    if which != "CLIP-guided, clip":  # a contrastive loss is of a pair among the others
        half = jax.jit(lambda p, b, k, i: model.loss(p, extra, b, k, i, n)[0])
        found = [
            half(params, jax.tree.map(lambda a, s=s: a[s], batch), keys[s], jnp.arange(n)[s])
            for s in (slice(0, 2), slice(2, 4))
        ]
        np.testing.assert_allclose(np.concatenate(found), values[0], rtol=1e-4, atol=1e-5)


def extra_of(model):
    """What belongs to the training state; codes that are about normal in place of blank ones."""
    extra, rng = model.init_extra(), np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.sort(jnp.asarray(rng.standard_normal(a.shape), a.dtype)), extra)


@pytest.mark.parametrize("which", MODELS)
def test_example_shapes_are_those_of_what_there_really_is(which):
    system, model = model_of(which)
    data = {"image": micro.filled(jax.ShapeDtypeStruct(model.data_shape, jnp.float32), 2)}
    for name, column in model.columns().items():
        values = ["a red circle", ""] if column.key == "caption" else [0, 1]
        data[name] = column.convert(values) if column.convert else np.asarray(values, np.int32)
    frozen = {name: micro.drawn(system.model(name)) for name in model.frozen}
    batch = jax.jit(model.prepare)(frozen, data)
    assert shapes(batch) == shapes(base.add_batch(model.batch_example(), 2))
    trained = model.with_frozen(frozen)
    value = jax.jit(lambda p, b: trained.loss(p, extra_of(model), b, micro.keys_of(2), jnp.arange(2), 2)[0])
    assert np.isfinite(value(micro.drawn(model), batch)).all()
    for name, null in getattr(trained, "nulls", {}).items():
        wanted = {**model.conditions, **getattr(model, "_every", {})}[name].example()
        assert shapes(jax.tree.map(np.asarray, null)) == shapes(wanted), name


def shapes(tree):
    return jax.tree.map(lambda a: (tuple(a.shape), np.dtype(a.dtype)), dict(tree) if isinstance(tree, dict) else tree)


def values_for(condition):
    """(a value that a user may give, for one picture)."""
    return {"prompt": "a red circle", "label": 1}.get(
        condition.argument, np.zeros(next(iter(jax.tree.leaves(condition.given_example()))).shape, np.float32)
    )


@pytest.mark.parametrize("lineage", systems.EVERY)
def test_what_users_give_has_the_shape_of_the_example(lineage):
    for model in systems.EVERY[lineage]().generators:
        for condition in model.given.values():
            found = condition.absent(3)
            if found is None:
                value = values_for(condition)
                found = condition.from_user(value, 3)
                assert condition.count(value) is None
                assert condition.count([value] * 3 if isinstance(value, str) else np.stack([value] * 3)) == 3
            want = base.add_batch({"x": condition.given_example()}, 3)["x"]
            assert shapes(found) == shapes(want), condition.name


def statistics_of(system, params):
    """Parameters with what is measured on the data, drawn."""
    found = dict(params)
    for model in system.generators:
        example = model.statistics_example() if hasattr(model, "statistics_example") else None
        if example:
            drawn = jax.tree.map(lambda a: np.sort(np.abs(a[0]), -1), micro.filled(example, 1))
            found[model.name] = {**found[model.name], "statistics": drawn}
    return found


@pytest.mark.parametrize("lineage", systems.EVERY)
def test_a_sample_depends_on_its_own_key_and_values(lineage):
    """And on the scale: 2 of the own guidance, 1 and 0 of a call."""
    system = systems.EVERY[lineage]()
    models, params = system.generators, statistics_of(system, micro.params_of(system))
    run = jax.jit(cascade.cascade(models, every=True))
    given, keys = micro.given_of(models), micro.keys_of()
    scales = {model.name: np.full(4, model.scale, np.float32) for model in models if model.scale is not None}
    out = run(params, keys, given, scales)
    assert set(out) == {model.name for model in models}
    for model in models:
        assert out[model.name].shape == (4, *model.shape) and np.isfinite(out[model.name]).all(), model.name
        assert np.std(out[model.name], axis=0).max() > 1e-3
    order = np.array([0, 3, 2, 1])
    there = jax.tree.map(lambda a: a[order], given)
    again = run(params, keys[order], there, scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[order], atol=2e-4), again, out)
    if scales:
        some = jax.tree.map(lambda a: a * np.array([1, 1, 0, 0], np.float32), scales)
        mixed = run(params, keys, given, some)
        last = models[-1].name
        np.testing.assert_allclose(mixed[last][:2], out[last][:2], atol=2e-4)
        guided = next(iter(scales))
        assert np.abs(mixed[guided][2:] - out[guided][2:]).max() > 1e-5


def test_absence_is_never_nan():
    """With `jax_debug_nans` the whole of karlo trains with dropped conditions and samples without them."""
    system = systems.karlo()
    params = micro.params_of(system)
    with jax.debug_nans(True):
        for name in ("prior", "decoder"):
            model = system.model(name).with_frozen({"clip": params["clip"]})
            batch, keys = micro.batch_of(model, 8), micro.keys_of(8)
            gradient = jax.jit(jax.grad(lambda p, m=model, b=batch, k=keys: jnp.mean(micro.loss_of(m, p, b, k)[0])))
            jax.block_until_ready(gradient(params[name]))
        models, given = system.generators, micro.given_of(system.generators, 2)
        scales = {model.name: np.zeros(2, np.float32) for model in models if model.scale is not None}
        out = jax.jit(cascade.cascade(models))(params, micro.keys_of(2), given, scales)
    assert np.isfinite(out).all()
