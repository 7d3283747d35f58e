"""Optimizers as components, learning rates, the fields of training."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffax import components
from diffax.errors import UserError
from diffax.training import loop, optimizer, parallel, settings
from tests.training.regression import Regression, batches, make, train

PARAMS = {
    "text": {"block": np.ones((2, 3)), "proj": np.ones(3)},
    "conv": {"kernel": np.ones((3, 3)), "bias": np.ones(3)},
}


def updates(tx, params=PARAMS):
    return tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)[0]


def built(name, **fields):
    return components.build(components.spec("optimizer", name, **fields), "optimizer")(optax.constant_schedule(0.1))


def test_learning_rate():
    for anneal, late in (("none", 2.0), ("linear", 1.0), ("cosine", 1.0)):
        rate = optimizer.learning_rate(2.0, warmup_steps=10, anneal=anneal, num_train_steps=100)
        np.testing.assert_allclose(rate(0), 0)
        np.testing.assert_allclose(rate(50), late, rtol=1e-6)
    assert float(optimizer.learning_rate(2.0, warmup_steps=10, anneal="linear", num_train_steps=100)(100)) == 0


def test_adam_moves_by_the_learning_rate_and_adamw_decays_besides():
    adam = updates(built("adam"))
    chex.assert_trees_all_close(adam, jax.tree.map(lambda a: np.full_like(a, -0.1), PARAMS), rtol=1e-5)
    chex.assert_trees_all_close(updates(built("adamw")), adam)
    every = updates(built("adamw", weight_decay=0.5))
    chex.assert_trees_all_close(every, jax.tree.map(lambda a: a - 0.05, adam), rtol=1e-6)
    kernels = updates(built("adamw", weight_decay=0.5, decay="kernels"))
    expected = jax.tree.map(lambda a: a - 0.05 * (a.ndim > 1), adam)
    chex.assert_trees_all_close(kernels, expected, rtol=1e-6)


def test_a_part_of_the_parameters_may_learn_more_slowly():
    """Such as a text transformer, all but its projection."""
    adam = optimizer.adam()
    schedule = optax.constant_schedule(0.1)
    plain = updates(optimizer.transformation(adam, schedule))
    slow = updates(optimizer.transformation(adam, schedule, rates={"text/(?!proj)": 0.25, "text": 1.0, "conv/b": 2.0}))
    expected = {
        "text": {"block": plain["text"]["block"] / 4, "proj": plain["text"]["proj"]},
        "conv": {"kernel": plain["conv"]["kernel"], "bias": plain["conv"]["bias"] * 2},
    }
    chex.assert_trees_all_close(slow, expected)
    assert np.abs(expected["text"]["block"]).min() > 0


def test_rates_reach_the_step():
    moved = []
    for rates in ({}, {"w": 0.0}):
        run = make("fsdp", rates=rates, warmup_steps=0)
        state = run.create()
        before = jax.device_get(state.params)
        state, _ = run.step(state, parallel.put(run.where, next(batches(0))))
        moved.append(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params)))
    assert moved[0]["w"] > 0 and moved[1]["w"] == 0 and moved[0]["b"] == moved[1]["b"] > 0


def test_a_rate_for_no_parameter_is_refused():
    with pytest.raises(UserError, match="no parameter's path begins with 'txt/'"):
        make(rates={"txt/": 0.5})


def lion(*, b1: float = 0.9):
    """An optimizer of another file."""
    return lambda learning_rate: optax.lion(learning_rate, b1=b1)


def test_an_optimizer_from_outside(tmp_path):
    run = make("jit", optimizer={"name": f"{__name__}:lion", "b1": 0.5}, num_train_steps=2, warmup_steps=0)
    assert run.identity["base"]["train.optimizer.b1"] == 0.5
    before = np.asarray(run.create().params["b"])
    after = loop.fit(run, tmp_path, batches=batches)
    assert jnp.any(after["b"] != before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"train.batch_size must be .*, got 0"),
        ({"anneal": "linaer"}, "train.anneal must be .* did you mean linear"),
        ({"lr": 1e-3}, "unknown field train.lr; did you mean train.learning_rate"),
        ({"optimizer": {"name": "adma"}}, "train.optimizer must be one of .* did you mean adam"),
        ({"optimizer": {"name": "adam", "b1": 1.0}}, r"train.optimizer.b1 must be .*\[0, 1\), got 1.0"),
        ({"optimizer": {"name": "adam", "weight_decay": 0.1}}, "train.optimizer.weight_decay"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        loop.Run(Regression(), train(**changes), seed=0, mode="jit", identity={})


def test_fields_are_at_their_defaults_and_come_as_a_namespace_too():
    run = loop.Run(Regression(), {}, seed=0, mode="jit", identity={})
    assert run.settings.batch_size == 128 and run.meta["section"]["train"]["optimizer"]["name"] == "adam"
    group = types.SimpleNamespace(**components.tuples(components.defaults(settings.train)))
    again = loop.Run(Regression(), group, seed=0, mode="jit", identity={})
    assert again.meta == run.meta


def test_what_a_resumed_run_may_change():
    section = components.complete(components.schema(settings.train), {}, "train")
    same = components.identity(components.schema(settings.train), section, training=True)
    free = {"num_train_steps", "log_every", "save_every", "sample_every", "keep", "max_nonfinite", "start_from"}
    assert {key.split(".")[0] for key in same} == set(components.schema(settings.train)) - free
    assert components.identity(components.schema(settings.train), section) == {}
    loader = components.complete(components.schema(settings.loader), {}, "loader")
    assert set(components.identity(components.schema(settings.loader), loader, training=True)) == {
        "flip",
        "crop",
        "shuffle_seed",
    }


def test_batches_are_divided_among_devices_and_processes():
    section = components.complete(components.schema(settings.train), {"batch_size": 12}, "train")
    settings.check(section, "base.train", device_count=4, process_count=2)
    with pytest.raises(UserError, match=r"global batch 12 .* by 8 devices \(use 8 or 16\); base.train.batch_size"):
        settings.check(section, "base.train", device_count=8, process_count=1)
    section.accumulate = 4
    with pytest.raises(UserError, match=r"4 devices x 4 accumulated parts \(use 16\)"):
        settings.check(section, "base.train", device_count=4, process_count=1)
    section.update(accumulate=1, ema=(0.9, 0.9))
    with pytest.raises(UserError, match="base.train.ema must be different decays"):
        settings.check(section, "base.train", device_count=4, process_count=1)
