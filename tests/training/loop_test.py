"""The training step and loop: agreement of layouts, exact resume, averages, accumulation, faults.

A small regression stands for a network: `train` knows only an `Objective`. What a diffusion stage adds is in
stages_test and main_test.
"""

import functools
import itertools
import os
import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffax import config
from diffax.errors import RunError, UserError
from diffax.models.stages import Objective
from diffax.training import checkpoint, loop, reporting


def regression(poison=None) -> Objective:
    """Least squares with noise from each example's key; `poison` makes the loss NaN where the batch says so."""

    def loss(params, extra, batch, keys, position, total, gather=None):
        params = nn.meta.unbox(params)  # as a layer would
        noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys)
        out = (batch["image"] + 0.1 * noise) @ params["w"] + params["b"]
        value = jnp.mean((out - batch["label"][:, None]) ** 2, axis=-1)
        if poison:
            value = jnp.where(batch["index"] < 0, jnp.nan, value)
        n = jnp.asarray(len(value), jnp.float32)
        return value, {"loss": (jnp.sum(value), n), "place": (jnp.sum(position / total), n)}, value

    return Objective(
        init=lambda key: {"w": jax.random.normal(key, (4, 8)), "b": jnp.zeros(8)},
        init_extra=lambda: jnp.zeros(16),
        loss=loss,
        update_extra=lambda extra, feedback: 0.9 * extra + feedback,
    )


def section(**changes):
    c = config.to_dict(config.config_defaults("test"))["base"]
    c["train"] |= dict(
        steps=12,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=3,
        clip=1.0,
        ema=[0.5, 0.9],
        log_every=4,
        save_every=100,
        sample_every=0,
    )
    c["train"] |= changes
    return c


def batches(first, bad=()):
    for k in itertools.count(first):
        rng = np.random.default_rng(k)
        index = np.full(16, -1) if k in bad else np.arange(16)
        yield {
            "image": rng.standard_normal((16, 4)).astype(np.float32),
            "label": rng.standard_normal(16).astype(np.float32),
            "index": index,
        }


def make(mode="pmap", poison=None, **changes):
    return loop.Run(regression(poison), section(**changes), seed=0, mode=mode)


def fit(run, workdir, **kwargs):
    return loop.fit(run, workdir, batches=kwargs.pop("batches", batches), **kwargs)


def final_state(run, workdir):
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as found:
        return jax.tree.map(
            lambda a: np.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a),
            run.restore(found),
        )


@pytest.mark.parametrize("changes", [{}, {"sam": 0.05, "accumulate": 2}], ids=str)
def test_pmap_jit_and_fsdp_agree(tmp_path, changes):
    assert jax.device_count() == 4
    states = {}
    for mode in ("pmap", "jit", "fsdp"):
        run = make(mode, **changes)
        fit(run, tmp_path / mode)
        states[mode] = final_state(run, tmp_path / mode)
    chex.assert_trees_all_close(states["pmap"], states["jit"], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(states["pmap"], states["fsdp"], rtol=1e-6, atol=1e-6)


def test_fsdp_cuts_the_parameters():
    state = make("fsdp").create()
    assert state.params["w"].addressable_shards[0].data.shape == (4, 2)
    assert make("pmap").create().params["w"].addressable_shards[0].data.shape == (4, 8)


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_cut_run_ends_bit_equal(tmp_path, mode, cut):
    whole, parts = make(mode), make(mode, save_every=1, keep=100)
    fit(whole, tmp_path / "whole")

    def until(first):
        """Batches that end after `cut` steps, as if the machine had died."""
        for k, batch in zip(itertools.count(first), batches(first), strict=False):
            if k > cut:  # asked for while step `cut` runs: batches are moved ahead of their use
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path / "parts", batches=until)
    fit(parts, tmp_path / "parts")
    chex.assert_trees_all_equal(final_state(whole, tmp_path / "whole"), final_state(parts, tmp_path / "parts"))
    rows = reporting.read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12], "every row once"


def test_resume_on_another_layout(tmp_path):
    whole, first, then = make("pmap"), make("pmap", steps=5), make("fsdp")
    fit(whole, tmp_path / "whole")
    fit(first, tmp_path / "parts")
    fit(then, tmp_path / "parts")
    a, b = final_state(whole, tmp_path / "whole"), final_state(then, tmp_path / "parts")
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)


def test_microbatches_are_averaged():
    """Four microbatches give the update of the whole batch."""
    for mode in ("pmap", "jit"):
        states = []
        for accumulate in (1, 4):
            run = make(mode, accumulate=accumulate)
            state = run.create()
            batch = loop.parallel.put(run.where, next(batches(0)))
            state, metrics = run.step(state, batch)
            states.append((state.params, state.extra, metrics["loss"], metrics["place"]))
        chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-6)


def test_one_step_equals_numpy():
    """Adam's first step moves every weight by the learning rate against its gradient; averages follow."""
    run = make("jit", warmup_steps=0, clip=0.0)
    state = run.create()
    before = jax.device_get((state.params, state.ema))
    batch = next(batches(0))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(state.rng, 0), i))(jnp.arange(16))
    noise = np.asarray(jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys), np.float64)
    state, metrics = run.step(state, loop.parallel.put(run.where, batch))
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
        run = make(mode, clip=1e-3, eps=1.0, warmup_steps=0)
        state, _ = run.step(run.create(), loop.parallel.put(run.where, next(batches(0))))
        updates.append(state.params)
    chex.assert_trees_all_close(*updates, rtol=1e-6, atol=1e-8)


def test_learning_rate():
    c = section(learning_rate=2.0, warmup_steps=10, steps=100)["train"]
    for anneal, late in (("none", 2.0), ("linear", 1.0), ("cosine", 1.0)):
        rate = loop.learning_rate(c | {"anneal": anneal})
        np.testing.assert_allclose(rate(0), 0)
        np.testing.assert_allclose(rate(50), late, rtol=1e-6)
    assert float(loop.learning_rate(c | {"anneal": "linear"})(100)) == 0


def test_a_text_transformer_may_learn_more_slowly():
    params = {"text": {"block": np.ones(3), "proj": np.ones(3)}, "conv": {"kernel": np.ones(3)}}
    updates = {}
    for rate in (1.0, 0.25):
        tx = loop.optimizer(section(text_rate=rate, warmup_steps=0)["train"])
        updates[rate], _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    expected = {**updates[1.0], "text": {**updates[1.0]["text"], "block": updates[1.0]["text"]["block"] / 4}}
    chex.assert_trees_all_close(updates[0.25], expected)
    assert np.abs(expected["text"]["block"]).min() > 0


def test_ema_warmup_forgets_the_start():
    run = make("jit", ema=[0.9999], ema_warmup=True)
    state = run.create()
    for batch in itertools.islice(batches(0), 8):
        state, _ = run.step(state, loop.parallel.put(run.where, batch))
    moved = np.abs(state.ema["0.9999"]["b"]).max()
    assert moved > 0.2 * np.abs(state.params["b"]).max()


def test_the_step_compiles_once():
    run = make("jit")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        rate = optax.constant_schedule(1.0)
        return loop.train_step(state, batch, objective=regression(), tx=run.tx, schedule=rate)

    state = run.create()
    for batch in itertools.islice(batches(0), 3):
        state, _ = step(state, batch)


def test_what_compiling_left_behind_is_given_back_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop.parallel, "trim_memory", lambda: calls.append(1))
    fit(make(steps=3), tmp_path)
    assert calls == [1]


def test_memory_is_trimmed_where_the_c_library_can(monkeypatch):
    loop.parallel.trim_memory()
    monkeypatch.setattr(loop.parallel.ctypes, "CDLL", lambda _: object())  # one without malloc_trim
    loop.parallel.trim_memory()


@pytest.mark.parametrize("mode", ["pmap", "jit"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path, mode, capfd):
    run = make(mode, poison=True)
    state = run.create()
    before = jax.device_get(state.replace(rng=0))
    state, metrics = run.step(state, loop.parallel.put(run.where, next(batches(0, bad=[0]))))
    after = jax.device_get(state.replace(rng=0))
    assert (after.step, after.skipped) == (1, 1) and metrics["finite"][0] == 0
    chex.assert_trees_all_equal(before.replace(step=0, skipped=0), after.replace(step=0, skipped=0))
    fit(run, tmp_path, batches=functools.partial(batches, bad=[3]))
    assert "loss is nan at step 4 (learning rate" in capfd.readouterr().err
    for leaf in jax.tree.leaves(final_state(run, tmp_path)):
        assert np.isfinite(leaf).all()


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    run = make(poison=True, max_nonfinite=3, save_every=2)
    with pytest.raises(RunError, match="at step 8 .*3 steps in a row were not finite"):
        fit(run, tmp_path, batches=functools.partial(batches, bad=[1, 2, 5, 6, 7, 8, 9]))
    for leaf in jax.tree.leaves(final_state(run, tmp_path)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    def interrupting(first):
        for k, batch in zip(itertools.count(first), batches(first), strict=False):
            if k == 6:
                os.kill(os.getpid(), number)
            yield batch

    whole, cut = make(), make()
    fit(whole, tmp_path / "whole")
    with pytest.raises(loop.Preempted, match="preempted at step .: saved; rerun the same command"):
        fit(cut, tmp_path / "cut", batches=interrupting)
    fit(cut, tmp_path / "cut")
    chex.assert_trees_all_equal(final_state(whole, tmp_path / "whole"), final_state(cut, tmp_path / "cut"))


def test_another_config_is_refused_and_nothing_is_lost(tmp_path):
    fit(make(), tmp_path)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(UserError, match="learning_rate=0.01, config says 0.5"):
        fit(make(learning_rate=0.5), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before
    fit(make(steps=13), tmp_path)  # longer is fine


def test_a_finished_run_is_left_alone(tmp_path):
    fit(make(), tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text()
    drawn = []
    fit(make(), tmp_path, draw=lambda params, step: drawn.append(step))
    assert (tmp_path / "metrics.jsonl").read_text() == rows and not drawn


def test_pictures_are_drawn_with_the_first_average(tmp_path):
    drawn = []
    params = fit(make(sample_every=5), tmp_path, draw=lambda params, step: drawn.append((step, params["b"].sum())))
    assert [step for step, _ in drawn] == [5, 10, 12]
    np.testing.assert_allclose(drawn[-1][1], np.asarray(params["b"]).sum(), rtol=1e-6)
    assert (tmp_path / "loss.png").stat().st_size > 1000
