"""One training step: microbatches, numpy's numbers, clipping, averages."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffax.training import parallel
from diffax.training.step import train_step
from tests.training.regression import Regression, batches, make


def test_microbatches_are_averaged():
    """Four microbatches give the update of the whole batch."""
    for mode in ("pmap", "jit"):
        states = []
        for accumulate in (1, 4):
            run = make(mode, accumulate=accumulate)
            state = run.create()
            batch = parallel.put(run.where, next(batches(0)))
            state, metrics = run.step(state, batch)
            states.append((state.params, state.extra, metrics["loss"], metrics["place"]))
        chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-6)


def test_one_step_equals_numpy():
    """Adam's first step moves every weight by the learning rate against its gradient; averages follow."""
    run = make("jit", warmup_steps=0, grad_clip=0.0)
    state = run.create()
    before = jax.device_get((state.params, state.ema))
    batch = next(batches(0))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(state.rng, 0), i))(jnp.arange(16))
    noise = np.asarray(jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys), np.float64)
    state, metrics = run.step(state, parallel.put(run.where, batch))
    (params, ema) = jax.device_get((state.params, state.ema))
    w, x = before[0]["w"].astype(np.float64), batch["image"] + 0.1 * noise
    residual = x @ w - batch["label"][:, None]
    gradient = {"w": x.T @ residual * 2 / (16 * 8), "b": residual.sum(0) * 2 / (16 * 8)}
    for name, g in gradient.items():
        np.testing.assert_allclose(params[name], before[0][name] - 1e-2 * np.sign(g), atol=1e-5)
        for decay in (0.5, 0.9):
            want = decay * before[0][name] + (1 - decay) * params[name]
            np.testing.assert_allclose(ema[str(decay)][name], want, rtol=1e-6, atol=1e-7)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], np.mean(residual**2), rtol=1e-5)


def test_clipping_comes_after_the_mean_over_devices():
    """The clipped update is that of one device with the whole batch, which clipping per device would not give."""
    updates = []
    for mode in ("pmap", "jit"):
        run = make(mode, grad_clip=1e-3, optimizer={"name": "adam", "eps": 1.0}, warmup_steps=0)
        state, _ = run.step(run.create(), parallel.put(run.where, next(batches(0))))
        updates.append(state.params)
    chex.assert_trees_all_close(*updates, rtol=1e-6, atol=1e-8)


def test_ema_warmup_forgets_the_start():
    run = make("jit", ema=[0.9999], ema_warmup=True)
    state = run.create()
    for batch in itertools.islice(batches(0), 8):
        state, _ = run.step(state, parallel.put(run.where, batch))
    moved = np.abs(state.ema["0.9999"]["b"]).max()
    assert moved > 0.2 * np.abs(state.params["b"]).max()


def test_the_step_compiles_once():
    run = make("jit")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        rate = optax.constant_schedule(1.0)
        return train_step(state, batch, model=Regression(), tx=run.tx, schedule=rate)

    state = run.create()
    for batch in itertools.islice(batches(0), 3):
        state, _ = step(state, batch)
