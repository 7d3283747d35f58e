"""Checkpoints of two processes."""

import os
import socket
import subprocess
import sys

import numpy as np

from diffax.training.checkpoints import Checkpoints, integrity, verify

TWO = """
import shutil, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from diffax.training.checkpoints import Checkpoints, lock
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
        digests, _ = integrity.read_index(tmp_path / "c" / "3")
    assert step == 3 and params["w"].tolist() == np.arange(3.0, 27.0).reshape(8, 3).tolist()
    unverified = [name for name, record in digests["state"].items() if record["sha256"] is None]
    assert unverified == ["fsdp"]
    assert verify(tmp_path / "c") == [(1, None), (2, None), (3, None)]
