"""Checkpoints: exact on any topology, and of the right config."""

import functools
import json
import os
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.errors import RunError, UserError
from diffax.training.checkpoints import Checkpoints, LazyArray, config_difference, verify
from tests.training.states import (
    EMA,
    META,
    SPLIT,
    TARGET,
    WHOLE,
    make_ema,
    make_state,
    raw_bytes,
    sharding,
    target_of,
)

# Tensorstore finishes other reads of a damaged step after asyncio has left.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("spec", [WHOLE, SPLIT])
def test_round_trip_on_other_topologies(saved, devices, spec):
    state, ema = make_state(30), make_ema(30)
    whole = sharding(devices)

    def abstract(leaf):
        fits = leaf.ndim and leaf.shape[0] % devices == 0
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(devices, spec) if fits else whole)

    target = {"state": jax.tree.map(abstract, state), "ema": jax.tree.map(abstract, ema)}
    with Checkpoints(saved, read_only=True) as checkpoints:
        found = checkpoints.restore(target)
    assert (found.step, found.meta) == (30, META)
    assert raw_bytes(found.state) == raw_bytes(state)
    assert raw_bytes(found.ema) == raw_bytes(ema)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    wanted = [(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(target["state"])]
    for leaf, (want, ndim) in zip(jax.tree.leaves(found.state), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(want, ndim)


def test_restored_keys_draw_the_same_numbers(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        state = checkpoints.restore(TARGET).state
    for name, key in (("rng", state["rng"]), ("rngs", state["rngs"][1])):
        original = make_state(30)[name]
        original = original if name == "rng" else original[1]
        np.testing.assert_array_equal(jax.random.normal(key, (4,)), jax.random.normal(original, (4,)))


def test_save_survives_donation_right_after(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    whole = sharding(4)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            params = {"w": jax.device_put(jnp.full((256, 1024), float(step)), whole)}
            checkpoints.save(step, {"params": params}, ema={}, meta={})
            jax.block_until_ready(overwrite(overwrite(params)))
            checkpoints.wait()
        for step in (1, 2, 3):
            _, params, _ = checkpoints.restore_ema(step=step, raw=True)
            assert (params["w"] == step).all()


def test_lazy_arrays_are_made_one_at_a_time(tmp_path):
    """They are saved as arrays are, byte for byte, beside those, and no two of them are there at once."""
    alive, most, made = 0, 0, []

    def gone():
        nonlocal alive
        alive -= 1

    def make(i):
        nonlocal alive, most
        made.append(i)
        array = np.full((64, 1024), i, np.float32)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(array, gone)
        return array

    kind = (64, 1024), np.dtype(np.float32)
    lazy = {str(i): LazyArray(*kind, functools.partial(make, i)) for i in range(8)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, ema={}, meta={})
        checkpoints.save(2, {"w": jnp.ones(2)}, ema={"0.9": lazy}, meta={})
        checkpoints.save(3, {"params": lazy, "w": np.ones(2, np.float32)}, ema={}, meta={})
        checkpoints.wait()
        assert sorted(made) == sorted(4 * [*range(8)])
        assert most < 4  # of 8; the last one may be on its way to the disk
        want = {str(i): np.full((64, 1024), i, np.float32) for i in range(8)}
        assert raw_bytes(checkpoints.restore_ema(step=2)[1]) == raw_bytes(want)
        assert raw_bytes(checkpoints.restore_ema(step=3, raw=True)[1]) == raw_bytes(want)
        found = checkpoints.restore(target_of({"params": lazy, "w": jnp.ones(2)}, {}), step=3)
        assert raw_bytes(found.state) == raw_bytes({"params": want, "w": np.ones(2, np.float32)})
    assert verify(tmp_path) == [(1, None), (2, None), (3, None)]


def test_a_lazy_array_that_is_another_one_the_second_time(tmp_path):
    """What is on disk is not what was digested, and that does not go unseen."""
    numbers = iter(range(2))
    array = LazyArray((4,), np.dtype(np.float32), lambda: np.full(4, next(numbers), np.float32))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": array}, ema={}, meta={})
    assert verify(tmp_path) == [(1, "w: digest mismatch")]


def test_training_may_donate_what_was_restored(saved):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpoints(saved, read_only=True) as checkpoints:
        params = checkpoints.restore(target_of(make_state(0), {}, sharding(4))).state["params"]
    before = jax.tree.map(lambda x: np.array(x), params)
    after = step(params)
    same = jax.tree.map(lambda a, b: np.array_equal(a + 1, b), before, after)
    assert all(jax.tree.leaves(same))


def test_ema_reads_without_a_target(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        step, params, meta = checkpoints.restore_ema()
        assert checkpoints.read_meta() == meta == META
        assert checkpoints.restore_ema(step=10, decay=EMA)[0] == 10
        raw = checkpoints.restore_ema(raw=True)[1]
    assert step == 30
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert raw_bytes(params) == raw_bytes(make_ema(30)[EMA])
    assert raw_bytes(raw) == raw_bytes(make_state(30)["params"])


def test_ema_defaults_to_the_longest_and_names_what_is_there(tmp_path):
    w = {"w": jnp.ones(2)}
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, {"params": w}, ema={"0.99": {"w": jnp.zeros(2)}, "0.9999": w}, meta={})
        assert checkpoints.restore_ema()[1]["w"].tolist() == [1, 1]
        assert checkpoints.restore_ema(decay="0.99")[1]["w"].tolist() == [0, 0]
        with pytest.raises(UserError, match=r"no EMA 0\.5; it has 0\.99, 0\.9999"):
            checkpoints.restore_ema(decay="0.5")
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(1, {"params": w}, ema={}, meta={})
        with pytest.raises(UserError, match="checkpoint has no EMA;"):
            checkpoints.restore_ema()
        with pytest.raises(UserError, match="checkpoint has no EMA, config builds one"):
            checkpoints.restore(target_of({"params": w}, {EMA: w}))


def test_no_checkpoint_is_none_for_training_and_an_error_for_sampling(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(TARGET) is None
        assert checkpoints.latest() is None
        assert checkpoints.steps() == []
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints.restore_ema()
        with pytest.raises(UserError, match="there is no step 3;.*it has none"):
            checkpoints.restore(TARGET, step=3)
    with pytest.raises(UserError, match="there is no checkpoint"):
        verify(tmp_path / "new")


def test_keep_and_keep_every(tmp_path):
    w = {"w": jnp.ones(2)}
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in (10, 20, 30, 40, 50):
            checkpoints.save(step, w, ema={}, meta={})
    assert checkpoints.steps() == [20, 40, 50]
    assert sorted(os.listdir(tmp_path)) == ["20", "40", "50"]


def test_steps_only_go_up_unless_forced(tmp_path):
    w = {"w": jnp.ones(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, w, ema={}, meta={"n": 1})
        checkpoints.save(20, w, ema={}, meta={"n": 2}, force=True)
        for step in (10, 20):
            with pytest.raises(RunError, match=f"cannot save step {step}: step 20 is there"):
                checkpoints.save(step, w, ema={}, meta={})
        checkpoints.save(10, w, ema={}, meta={}, force=True)
        assert checkpoints.read_meta() == {"n": 1}
        assert checkpoints.steps() == [10, 20]


def change(tree, path, value):
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "params.conv.kernel",
            jax.ShapeDtypeStruct((3, 3, 4, 9), jnp.float32),
            "checkpoint has params.conv.kernel of shape (3,3,4,5), config says (3,3,4,9)",
        ),
        (
            "params.w0",
            jax.ShapeDtypeStruct((8, 6), jnp.bfloat16),
            "checkpoint has params.w0 of dtype float32, config says bfloat16",
        ),
        ("counts", jax.ShapeDtypeStruct((5,), jnp.int32), "checkpoint has counts of dtype uint32, config says int32"),
        (
            "rngs",
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3)),
            "checkpoint has rngs of dtype key<rbg>, config says key<fry>",
        ),
        ("params.w0", None, "checkpoint has params.w0, config builds none"),
        ("params.extra", jax.ShapeDtypeStruct((1,), jnp.float32), "checkpoint has no params.extra, config builds one"),
    ],
)
def test_mismatch_names_the_leaf_and_is_no_damage(saved, path, value, message):
    target = target_of(make_state(0), make_ema(0))
    change(target["state"], path, value)
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=re.escape(message)):
            checkpoints.restore(target)


def test_ema_mismatch_is_named_with_its_decay(saved):
    target = target_of(make_state(0), {EMA: make_ema(0)[EMA] | {"w0": jnp.ones((8, 7))}})
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"ema\.0\.9999\.w0 of shape \(8,6\)"):
            checkpoints.restore(target)


def test_config_difference():
    saved = {
        "name": "a",
        "base": {"net": {"channels": 64, "mult": [1, 2]}, "old": 1},
        "train": {"steps": 5, "seed": 0},
        "trained": 1,
    }
    current = {
        "name": "a",
        "base": {"net": {"channels": 128, "mult": (1, 2)}, "new": None},
        "train": {"steps": 9, "seed": 1},
        "trained": 2,
    }
    assert config_difference(saved, saved) == []
    assert config_difference(saved, current, ["train.steps"]) == [
        "checkpoint was trained with base.net.channels=64, config says 128",
        "checkpoint was trained without base.new, config says None",
        "checkpoint was trained with base.old=1, config has no such field",
        "checkpoint was trained with train.seed=0, config says 1",
        "checkpoint was trained with trained=1, config says 2",
    ]
    assert [line.split()[4] for line in config_difference(saved, current, ["base", "train"])] == ["trained=1,"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be >= 1"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, {"w": jnp.ones(2)}, ema={}, meta={"lr": float("nan")})
        with pytest.raises(ValueError, match='"/"'):
            checkpoints.save(1, {"a/b": jnp.ones(2)}, ema={}, meta={})
        with pytest.raises(ValueError, match="^w.t is float64 and would come back as float32"):
            checkpoints.save(1, {"w": {"t": np.ones(2)}}, ema={}, meta={})
        assert checkpoints.restore(TARGET) is None


def test_no_pickle_on_disk(saved):
    for file in saved.rglob("*"):
        if file.is_file():
            assert not file.name.endswith((".pkl", ".pickle"))
            assert not file.read_bytes().startswith(b"\x80\x04")
    for item in ("meta", "digests"):
        json.loads((saved / "30" / item / "metadata").read_text())
