"""States of a run as the tests of checkpoints save them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffax.training.checkpoints import Checkpoints

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


TARGET = target_of(make_state(0), make_ema(0))


def damage(path: pathlib.Path) -> None:
    """Flips one bit in the largest data file of a step's state."""
    file = max((path / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
