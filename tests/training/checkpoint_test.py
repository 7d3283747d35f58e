"""Checkpoints: exact on any topology, never silently wrong, never lost."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffax.errors import RunError, UserError
from diffax.training import checkpoint
from diffax.training.checkpoint import Checkpoints, config_difference, lock, verify

# Tensorstore finishes other reads of a damaged step after asyncio has left.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = {"config": {"base": {"net": {"channels": 64}}}, "note": "é", "lr": 2e-4}
EMA = "0.9999"


WHOLE, SPLIT = P(), P("data")


def sharding(devices: int, spec: P = WHOLE) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), spec)


def make_state(seed: int, devices: int = 4, width: int = 8):
    """A state like the trainer's, with every dtype in use, sharded as fsdp would."""
    split, whole = sharding(devices, SPLIT), sharding(devices)
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w0": jax.device_put(jax.random.normal(keys[0], (width, 6)), split),
        "conv": {"kernel": jax.device_put(jax.random.normal(keys[1], (3, 3, 4, 5)), whole)},
        "big": jax.device_put(jax.random.normal(keys[0], (64, 64)), split),
        "half": jax.device_put(jax.random.normal(keys[2], (width,)).astype(jnp.bfloat16), split),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jax.device_put(jnp.int32(seed), whole),
        "rng": jax.device_put(keys[3], whole),
        "rngs": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "counts": np.arange(seed, seed + 5, dtype=np.uint32),
        "mask": jnp.array([True, False, True]),
        "special": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    }


def make_ema(seed: int):
    return {
        EMA: {
            "w0": jax.random.normal(jax.random.key(seed + 1000), (8, 6)),
            "b": jnp.ones(3),
            "big": jax.random.normal(jax.random.key(seed), (64, 64)),
        }
    }


def target_of(state, ema, where=None):
    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return {"state": jax.tree.map(abstract, state), "ema": jax.tree.map(abstract, ema)}


def raw_bytes(tree) -> list[tuple]:
    """What must survive a round trip, down to the signs of zeros and the bits of NaNs."""
    out = []
    for leaf in jax.tree.leaves(tree):
        data = leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(leaf)
        out.append((str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()))
    return out


def save_steps(directory, steps=(10, 20, 30), **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), ema=make_ema(step), meta=META)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 10, 20 and 30; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


TARGET = target_of(make_state(0), make_ema(0))


def damage(path: pathlib.Path) -> None:
    """Flips one bit in the largest data file of a step's state."""
    file = max((path / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


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
    lazy = {str(i): checkpoint.LazyArray(*kind, functools.partial(make, i)) for i in range(8)}
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
    array = checkpoint.LazyArray((4,), np.dtype(np.float32), lambda: np.full(4, next(numbers), np.float32))
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
        with pytest.raises(UserError, match="checkpoint has no EMA, config asks for one"):
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


def test_damage_falls_back_quarantines_and_saves_again(copy):
    damage(copy / "30")
    warnings = []
    with Checkpoints(copy, warn=warnings.append) as checkpoints:
        found = checkpoints.restore(TARGET)
        assert found.step == 20
        assert raw_bytes(found.state) == raw_bytes(make_state(20))
        assert len(warnings) == 1
        assert re.fullmatch(
            r"step 30 is damaged \(.*(digest mismatch|unreadable.*)\): "
            r"moved to _corrupt/30; using step 20",
            warnings[0],
        )
        checkpoints.save(25, make_state(25), ema=make_ema(25), meta=META)
        checkpoints.save(30, make_state(31), ema=make_ema(31), meta=META)
        checkpoints.wait()
        damage(copy / "30")
        assert checkpoints.restore(TARGET).step == 25
        assert "moved to _corrupt/30.1; using step 25" in warnings[1]
        checkpoints.save(30, make_state(32), ema=make_ema(32), meta=META)
    assert verify(copy) == [(20, None), (25, None), (30, None)]


def test_explicit_step_and_read_only_move_nothing(copy):
    damage(copy / "30")
    warnings = []
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(UserError, match=r"step 30 is damaged \(.*choose another step"):
            checkpoints.restore(TARGET, step=30)
        assert checkpoints.restore(TARGET, step=20).step == 20
        with pytest.raises(UserError, match="there is no step 7;.*it has 10, 20, 30"):
            checkpoints.restore(TARGET, step=7)
    (copy / "40.orbax-checkpoint-tmp").mkdir()
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    with Checkpoints(copy, read_only=True, warn=warnings.append) as checkpoints:
        assert checkpoints.restore(TARGET).step == 20
        with pytest.raises(ValueError, match="read_only"):
            checkpoints.save(50, make_state(50), ema={}, meta={})
    assert len(warnings) == 1 and warnings[0].endswith("; using step 20")
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == before
    assert os.path.isdir(copy / "30")


def test_nothing_intact_is_an_error_for_ever(copy):
    for step in (10, 20, 30):
        damage(copy / str(step))
    for _ in range(2):  # Also when all were quarantined by an earlier run.
        with Checkpoints(copy, warn=lambda line: None) as checkpoints:
            with pytest.raises(UserError, match="no intact checkpoint is left"):
                checkpoints.restore(TARGET)


def test_empty_half_deleted_and_foreign_entries(copy):
    (copy / "500").mkdir()
    (copy / "600" / "state" / "d").mkdir(parents=True)
    shutil.rmtree(copy / "10" / "state")
    (copy / "10" / "meta" / "metadata").unlink()
    (copy / "400" / "state").mkdir(parents=True)
    (copy / "400" / "state" / "manifest.ocdbt").write_bytes(b"")
    (copy / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (copy / "notes.txt").write_text("mine")
    (copy / "700").write_text("a file")
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.latest() == 400
    with Checkpoints(copy, keep=2, warn=lambda line: None) as checkpoints:
        assert checkpoints.removed_unfinished == [40]
        assert checkpoints.restore(TARGET).step == 30
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        checkpoints.wait()
        assert checkpoints.steps() == [30, 40]
    assert sorted(os.listdir(copy)) == ["30", "40", "700", "_corrupt", "notes.txt"]


TWO = """
import shutil, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from diffax.training.checkpoint import Checkpoints, lock
from diffax.errors import RunError
port, me, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f'localhost:{port}', 2, me, heartbeat_timeout_seconds=10)
every = Mesh(np.array(jax.devices()), ('data',))
local = Mesh(np.array(jax.local_devices()), ('data',))
n = len(jax.devices())
assert n == 4 and len(jax.local_devices()) == 2
big = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)


def put(x, mesh, spec=P()):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def state(step):
    key = jax.jit(lambda: jax.random.key(step), out_shardings=NamedSharding(local, P()))()
    double = jax.pmap(lambda x, y: x * y, in_axes=(None, 0), out_axes=None)
    return {'pmapped': double(big + step, np.ones(2, np.float32)), 'pmap': put(big + step, local),
            'one': jnp.float32(step), 'fsdp': put(big + step, every, P('data')),
            'whole': put(big - step, every), 'rng': key, 'numpy': big * step}


def check(found, step):
    assert found.step == step and found.meta == {'step': step}
    want = {'pmapped': big + step, 'pmap': big + step, 'one': step, 'fsdp': big + step,
            'whole': big - step, 'numpy': big * step}
    for name, value in want.items():
        for shard in found.state[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.float32(value)[shard.index])
    np.testing.assert_array_equal(jax.random.key_data(found.state['rng']).addressable_shards[0].data,
                                  jax.random.key_data(jax.random.key(step)))


def target(mesh):
    return {'state': {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        every if name in ('fsdp', 'whole') else mesh, P('data') if name == 'fsdp' else P()))
        for name, x in state(0).items()}, 'ema': {}}


warnings = []
with lock(directory), Checkpoints(directory + '/c', warn=warnings.append) as c:
    assert c.restore(target(local)) is None
    for step in (1, 2, 3):
        c.save(step, state(step), ema={'0.9': {'w': state(step)['pmapped']}}, meta={'step': step})
        c.check()
    check(c.restore(target(local)), 3)
    check(c.restore(target(every)), 3)
    if me == 0:
        shutil.rmtree(directory + '/c/3/ema')
        with open(directory + '/c/3/meta/metadata', 'w') as f:
            f.write('{}')
    jax.experimental.multihost_utils.sync_global_devices('damaged')
    check(c.restore(target(local)), 2)
    assert len(warnings) == (me == 0), warnings
    c.save(3, state(3), ema={'0.9': {'w': state(3)['pmapped']}}, meta={'step': 3})
    c.wait()
    if me == 0:
        shutil.disk_usage = lambda path: type('Usage', (), {'free': 0})
    try:
        c.save(4, state(4), ema={}, meta={})
        raise SystemExit('no error')
    except RunError as error:
        assert 'step 3 is intact' in str(error), error
print('done', flush=True)
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, port, str(i), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=120)
            assert run.returncode == 0 and out.endswith("done\n"), err[-3000:]
    finally:
        for run in runs:
            run.kill()
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        step, params, _ = checkpoints.restore_ema()
        digests, _ = checkpoint._read_index(tmp_path / "c" / "3")
    assert step == 3 and params["w"].tolist() == np.arange(3.0, 27.0).reshape(8, 3).tolist()
    unverified = [name for name, record in digests["state"].items() if record["sha256"] is None]
    assert unverified == ["fsdp"]
    assert verify(tmp_path / "c") == [(1, None), (2, None), (3, None)]


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


def corrupt(path: pathlib.Path, rng: random.Random) -> str:
    """One random injury to a step; the name of it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choices(files, [p.stat().st_size + 64 for p in files])[0]
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "zero", "delete", "swap", "noise"])
    if kind == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == "zero":
        start = rng.randrange(len(data) + 1)
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == "noise":
        start = rng.randrange(len(data) + 1)
        data[start : start + 64] = rng.randbytes(len(data[start : start + 64]))
    elif kind == "swap":
        older = path.parent / "20" / file.relative_to(path)
        data = older.read_bytes() if older.exists() else b""
    file.write_bytes(data)
    if kind == "delete":
        file.unlink()
    return f"{kind} {file.relative_to(path)}"


def test_no_corruption_is_silent(saved, tmp_path):
    rng = random.Random(0)
    expected = {step: (raw_bytes(make_state(step)), raw_bytes(make_ema(step))) for step in (20, 30)}
    copies = int(os.environ.get("DIFFAX_CORRUPTIONS", 32))
    found_steps, mismatches = [], 0
    for i in range(copies):
        directory = tmp_path / str(i)
        for step in ("20", "30"):
            shutil.copytree(saved / step, directory / step)
        what = corrupt(directory / "30", rng)
        warnings = []
        with Checkpoints(directory, warn=warnings.append) as checkpoints:
            found = checkpoints.restore(TARGET)
        mismatches += "digest mismatch" in str(warnings)
        got = raw_bytes(found.state), raw_bytes(found.ema)
        assert got == expected[found.step] and found.meta == META, what
        assert (found.step == 20) == (directory / "_corrupt" / "30").exists(), what
        found_steps.append(found.step)
        shutil.rmtree(directory)
    # The rest hit copies and metadata that nothing reads.
    assert found_steps.count(20) > copies // 2
    assert mismatches > copies // 20


@pytest.mark.parametrize(("item", "leaf"), [("state", "params.w0"), ("ema", "ema.0.9999.w0")])
def test_verify_names_the_damaged_leaf(tmp_path, item, leaf, monkeypatch):
    save_steps(tmp_path, [10, 20])
    assert verify(tmp_path) == [(10, None), (20, None)]
    read = checkpoint._read_arrays

    def one_bit_off(path, names):
        arrays = read(path, names)
        name = leaf.removeprefix("ema.").replace(".", "/").replace("0/9999", EMA)
        if path.parts[-2:] == ("20", item) and name in arrays:
            arrays[name] = arrays[name].copy()
            arrays[name].view(np.uint8)[0, 0] ^= 1
        return arrays

    monkeypatch.setattr(checkpoint, "_read_arrays", one_bit_off)
    assert verify(tmp_path) == [(10, None), (20, f"{leaf}: digest mismatch")]


def test_verify_names_the_file_that_is_gone(copy):
    (copy / "20" / "meta" / "metadata").unlink()
    shutil.rmtree(copy / "30" / "ema")
    (ten, none), (_, twenty), (_, thirty) = verify(copy)
    assert (ten, none) == (10, None)
    assert twenty == "meta: file missing"
    assert thirty.startswith("ema.0.9999.")


def test_a_copied_step_under_another_number_is_damage(copy):
    shutil.copytree(copy / "20", copy / "40")
    assert verify(copy)[-1] == (40, "it holds step 20")


def test_disk_full_is_seen_before_writing(copy, monkeypatch):
    usage = shutil.disk_usage(copy)._replace(free=1000)
    with Checkpoints(copy) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(
                RunError,
                match=r"^cannot save step 40: disk full \(need 0\.3 MB, "
                r"0\.0 MB free\); step 30 is intact$",
            ):
                checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        assert checkpoints.steps() == [10, 20, 30]
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
    assert verify(copy)[-1] == (40, None)


def fail_in_background(monkeypatch, error):
    """Lets the next commit fail in Orbax's thread, as a full disk does."""
    handler = checkpoint.ocp.JsonCheckpointHandler
    original = handler._save_fn

    async def broken(self, x, directory):
        if "sha256" in x:
            await original(self, x, directory)
            raise error
        await original(self, x, directory)

    monkeypatch.setattr(handler, "_save_fn", broken)


@pytest.mark.parametrize("surfaces", ["check", "wait", "save", "close", "exit"])
def test_background_failure_ends_the_run(copy, monkeypatch, surfaces):
    checkpoints = Checkpoints(copy, keep=1)
    with monkeypatch.context() as patch:
        fail_in_background(patch, OSError(28, "No space left on device"))
        checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
        with pytest.raises(
            RunError,
            match=r"cannot save step 40: disk full \(need .* MB, .*; "
            "step 30 is intact",
        ):
            if surfaces == "check":
                for _ in range(2000):
                    checkpoints.check()
                    time.sleep(0.005)
            elif surfaces == "save":
                checkpoints.save(50, make_state(50), ema=make_ema(50), meta=META)
            elif surfaces == "exit":
                with checkpoints:
                    pass
            else:
                getattr(checkpoints, surfaces)()
    # keep=1, and still no older step went: the new one was never there.
    assert sorted(os.listdir(copy)) == ["10", "20", "30"]
    checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
    checkpoints.close()
    assert verify(copy) == [(40, None)]


def test_failed_save_does_not_hide_the_error_that_ended_the_run(copy, monkeypatch):
    fail_in_background(monkeypatch, OSError(5, "Input/output error"))
    warnings = []
    with pytest.raises(ZeroDivisionError):
        with Checkpoints(copy, warn=warnings.append) as checkpoints:
            checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)
            raise ZeroDivisionError
    assert len(warnings) == 1
    assert "cannot save step 40" in warnings[0] and "Input/output" in warnings[0]


def test_a_refused_save_is_an_error(copy, monkeypatch):
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda *a, **k: False)
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(RunError, match="cannot save step 40: refused.*step 30 is intact"):
            checkpoints.save(40, make_state(40), ema=make_ema(40), meta=META)


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("look_first", [True, False])
def test_really_full_disk(small_disk, monkeypatch, look_first):
    if not look_first:
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda path: None)
    noise = np.random.default_rng(0).random(600_000, np.float32)
    for _ in range(2):
        checkpoints = Checkpoints(small_disk)
        first = checkpoints.latest() or 0
        with pytest.raises(RunError, match=r"disk full \(need 2\.7 MB, .*step 1 is intact"):
            for step in range(first + 1, first + 4):
                checkpoints.save(step, {"w": noise + (step > 1)}, ema={}, meta={})
                checkpoints.wait()
        assert os.listdir(small_disk) == ["1"]
        assert verify(small_disk) == [(1, None)]


def test_lock_has_one_holder(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom diffax.training.checkpoint import lock\n"
            f'with lock({str(tmp_path)!r}):\n    print("held", flush=True)\n    sys.stdin.read()',
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"workdir is in use by pid {holder.pid} on host .+;"):
            with lock(tmp_path):
                pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with lock(tmp_path):
        with pytest.raises(UserError, match=f"workdir is in use by pid {os.getpid()} "):
            with lock(tmp_path):
                pass
    with lock(tmp_path):
        pass


def test_unwritable_places_are_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match="cannot write to workdir"):
        with lock(tmp_path / "file"):
            pass
    with pytest.raises(UserError, match="no mounted directory"):
        Checkpoints("gs://bucket/run")


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


KILLED = """
import sys
import jax
import numpy as np
from diffax.training.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2, warn=print) as c:
    w = np.zeros((64, 1024), np.float32)
    found = c.restore({'state': {'w': jax.ShapeDtypeStruct(w.shape, w.dtype)}, 'ema': {}})
    first = found.step if found else 0
    assert found is None or (np.asarray(found.state['w']) == first).all()
    print('from', first, c.removed_unfinished, flush=True)
    for step in range(first + 1, first + 400):
        c.check()
        c.save(step, {'w': w + step}, ema={'0.9': {'w': w - step}}, meta={'step': step})
        c.wait()
        print(step, flush=True)
"""


def test_kill_in_mid_save_loses_at_most_that_save(tmp_path):
    rng = random.Random(0)
    committed = 0
    for _ in range(int(os.environ.get("DIFFAX_KILLS", 3))):
        run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        line = run.stdout.readline()
        assert line.startswith("from "), line
        assert int(line.split()[1]) in (committed, committed + 1), line
        for _ in range(rng.randrange(1, 6)):
            committed = int(run.stdout.readline())
        time.sleep(rng.random() * 0.08)
        run.send_signal(signal.SIGKILL)
        committed = max([committed, *map(int, run.stdout.read().split())])
        run.wait()
        run.stdout.close()
        assert len(list(tmp_path.glob("*tmp*"))) <= 1
        assert all(problem is None for _, problem in verify(tmp_path))
