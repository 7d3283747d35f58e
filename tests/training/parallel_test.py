"""Layouts over four virtual devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.networks import sharding
from diffax.training import parallel


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_map_batch_pads_and_trims(n):
    run = parallel.map_batch(lambda shared, x, tree: {"y": shared * x + tree["z"]})
    x = np.arange(n * 2.0).reshape(n, 2)
    out = run(jnp.asarray(2.0), x, {"z": x})
    chex.assert_shape(out["y"], (n, 2))
    np.testing.assert_allclose(out["y"], 3 * x)


def test_map_batch_uses_every_device():
    out = parallel.map_batch(lambda shared, x: x + shared)(np.float32(1), np.zeros(8, np.float32))
    assert len(out.devices()) == 4


def test_unknown_layout():
    with pytest.raises(ValueError, match="unknown parallel 'dpp'; use one of pmap, jit, fsdp"):
        parallel.layout("dpp")


@pytest.mark.parametrize("mode", parallel.MODES)
def test_prefetch_keeps_the_order_and_ends(mode):
    where = parallel.layout(mode)
    batches = [{"x": np.full((8, 2), i, np.float32)} for i in range(5)]
    got = list(parallel.prefetch(where, batches))
    assert [int(host["x"][0, 0]) for host, _ in got] == [0, 1, 2, 3, 4]
    for host, device in got:
        np.testing.assert_array_equal(np.asarray(device["x"]).reshape(8, 2), host["x"])


def test_fetch_reads_replicated_values():
    where = parallel.layout("pmap")
    tree = jax.device_put({"a": jnp.arange(3.0)}, where.replicated)
    np.testing.assert_array_equal(parallel.fetch(tree)["a"], [0, 1, 2])


def test_only_large_arrays_are_cut(monkeypatch):
    monkeypatch.undo()
    where = parallel.layout("fsdp")
    tree = {"w": np.zeros((3, 256, 512)), "odd": np.zeros((257, 1025)), "b": np.zeros(512)}
    found = {name: sharding.spec for name, sharding in parallel.shardings(where, tree).items()}
    assert found["w"] == jax.P(None, None, sharding.AXIS)
    assert found["odd"] == found["b"] == jax.P()


def test_a_shard_follows_its_axis():
    """Through Flax's transformations, which put an axis in and take it out again."""
    shard = sharding.Shard(np.zeros((2, 3, 4)), 1)
    for index, axis in [(0, 2), (1, 2), (2, 1)]:
        more = shard.add_axis(index, {})
        assert more.axis == axis and more.remove_axis(index, {}).axis == 1
