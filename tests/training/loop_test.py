"""The training loop: agreement of layouts, exact resume, faults, callbacks."""

import functools
import itertools
import os
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.errors import RunError, UserError
from diffax.training import checkpoints, loop, reporting
from tests.training.regression import Regression, batches, make, train


def fit(run, workdir, **kwargs):
    return loop.fit(run, workdir, batches=kwargs.pop("batches", batches), **kwargs)


def final_state(run, workdir):
    with checkpoints.Checkpoints(workdir / "checkpoints", read_only=True) as found:
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


def test_fsdp_shards_the_parameters():
    state = make("fsdp").create()
    assert state.params["w"].addressable_shards[0].data.shape == (4, 2)
    assert make("pmap").create().params["w"].addressable_shards[0].data.shape == (4, 8)


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
@pytest.mark.parametrize("end", [1, 5, 11])
def test_an_interrupted_run_ends_bit_equal(tmp_path, mode, end):
    whole, parts = make(mode), make(mode, save_every=1, keep=100)
    fit(whole, tmp_path / "whole")

    def until(first):
        """Batches that end after `end` steps, as if the machine had died."""
        for k, batch in zip(itertools.count(first), batches(first), strict=False):
            if k > end:  # reached while step `end` runs: batches are moved ahead of their use
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path / "parts", batches=until)
    fit(parts, tmp_path / "parts")
    chex.assert_trees_all_equal(final_state(whole, tmp_path / "whole"), final_state(parts, tmp_path / "parts"))
    rows = reporting.read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12], "every row once"


def test_resume_on_another_layout(tmp_path):
    whole, first, then = make("pmap"), make("pmap", num_train_steps=5), make("fsdp")
    fit(whole, tmp_path / "whole")
    fit(first, tmp_path / "parts")
    fit(then, tmp_path / "parts")
    a, b = final_state(whole, tmp_path / "whole"), final_state(then, tmp_path / "parts")
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_compiling_left_behind_is_given_back_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop.parallel, "trim_memory", lambda: calls.append(1))
    fit(make(num_train_steps=3), tmp_path)
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

    whole, stopped = make(), make()
    fit(whole, tmp_path / "whole")
    with pytest.raises(loop.Preempted, match="preempted at step .: saved; rerun the same command"):
        fit(stopped, tmp_path / "stopped", batches=interrupting)
    fit(stopped, tmp_path / "stopped")
    chex.assert_trees_all_equal(final_state(whole, tmp_path / "whole"), final_state(stopped, tmp_path / "stopped"))


def test_another_config_is_refused_and_nothing_is_lost(tmp_path):
    fit(make(), tmp_path)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(
        UserError, match="^checkpoint was trained with base.train.learning_rate=0.01, config says 0.5; "
    ):
        fit(make(learning_rate=0.5), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before
    fit(make(num_train_steps=13), tmp_path)  # longer is fine


def test_a_finished_run_is_left_alone(tmp_path):
    fit(make(), tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text()
    drawn = []
    fit(make(), tmp_path, on_sample=lambda params, step: drawn.append(step))
    assert (tmp_path / "metrics.jsonl").read_text() == rows and not drawn


def test_pictures_are_drawn_with_the_first_average(tmp_path):
    drawn = []
    params = fit(make(sample_every=5), tmp_path, on_sample=lambda params, step: drawn.append((step, params["b"].sum())))
    assert [step for step, _ in drawn] == [5, 10, 12]
    np.testing.assert_allclose(drawn[-1][1], np.asarray(params["b"]).sum(), rtol=1e-6)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_every_row_of_the_log_reaches_the_caller(tmp_path):
    seen = {}
    fit(make(), tmp_path, on_step=lambda step, metrics: seen.update({step: metrics}))
    assert list(seen) == [4, 8, 12]
    rows = {row["step"]: row for row in reporting.read_metrics(tmp_path / "metrics.jsonl")}
    for step, metrics in seen.items():
        assert metrics == {name: rows[step][name] for name in metrics} and {"loss", "grad_norm"} <= set(metrics)


def test_a_callback_can_end_the_run_and_it_goes_on_later(tmp_path):
    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(save_every=2), tmp_path, on_step=stop)
    fit(make(save_every=2), tmp_path)
    fit(make(), tmp_path / "whole")
    chex.assert_trees_all_equal(final_state(make(), tmp_path), final_state(make(), tmp_path / "whole"))


def test_checkpoints_say_what_a_run_must_agree_in(tmp_path):
    section = {"name": "regression", "train": {"batch_size": 16}}
    run = loop.Run(
        Regression(), train(), seed=3, mode="jit", identity={"net.channels": 64}, name="base", section=section
    )
    fit(run, tmp_path)
    with checkpoints.Checkpoints(tmp_path / "checkpoints", read_only=True) as found:
        assert found.read_meta() == {"section": section, "identity": {"net.channels": 64}, "seed": 3}
    for identity, seed, message in (
        ({"net.channels": 128}, 3, "base.net.channels=64, config says 128"),
        ({"net.channels": 64}, 4, "seed=3, config says 4"),
    ):
        other = loop.Run(Regression(), train(), seed=seed, mode="jit", identity=identity, name="base")
        with pytest.raises(UserError, match=f"^checkpoint was trained with {message}; .*another --workdir$"):
            fit(other, tmp_path)


def test_a_checkpoint_of_no_run_is_refused(tmp_path):
    with checkpoints.Checkpoints(tmp_path / "checkpoints") as store:
        store.save(1, {"params": {"w": np.ones(2, np.float32)}}, ema={}, meta={})
    with pytest.raises(UserError, match="checkpoint holds no run to resume"):
        fit(make(), tmp_path)


def test_batches_that_end_are_named(tmp_path):
    with pytest.raises(UserError, match="the batches end before step 4"):
        fit(make(), tmp_path, batches=lambda first: itertools.islice(batches(first), 3 - first))


def test_a_run_starts_from_other_parameters(tmp_path):
    start = {"w": np.full((4, 8), 2.0, np.float32), "b": np.zeros(8, np.float32)}
    params = fit(make(num_train_steps=1, ema=(0.9,)), tmp_path, start_from=lambda: start)
    np.testing.assert_allclose(params["w"], start["w"], atol=0.01)
    with pytest.raises(UserError, match="the parameters to start from are of another network"):
        fit(make(), tmp_path / "other", start_from=lambda: {"w": start["w"]})


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    """As of a server or a notebook's worker, where Python lets nobody handle them."""
    failures = []

    def work():
        try:
            fit(make(num_train_steps=2), tmp_path)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and (tmp_path / "metrics.jsonl").exists()
