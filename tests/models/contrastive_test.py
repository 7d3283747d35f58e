"""CLIP's loss, over any number of devices, and the guidance by its similarity."""

import functools
import math
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.diffusion import guidance, losses, process, schedules
from diffax.training import parallel
from diffax.training import step as step_room
from tests.networks.clip_test import images


def numpy_contrastive(image, text, logit_scale):
    """Both cross entropies with the diagonal of the whole table of pairs, in float64."""
    u, v = (np.float64(a) / np.linalg.norm(np.float64(a), axis=1, keepdims=True) for a in (image, text))
    logits = np.exp(np.float64(logit_scale)) * u @ v.T

    def cross_entropy(logits):
        return np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - np.diag(logits)

    accuracy = [np.argmax(table, 1) == np.arange(len(u)) for table in (logits, logits.T)]
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2, *accuracy


def pairs(n, seed=0):
    """Embeddings of captions that are near those of their images, of any length."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((n, 5)) * rng.uniform(0.1, 10, (n, 1))
    return np.float32(image), np.float32(image + 0.7 * rng.standard_normal((n, 5)))


class ContrastiveTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_it_is_the_papers_loss(self):
        for logit_scale in (0.0, 2.65926, math.log(100)):
            image, text = pairs(16)
            want, image_top1, text_top1 = numpy_contrastive(image, text, logit_scale)
            loss, terms = self.variant(losses.contrastive)(image, text, jnp.float32(logit_scale), jnp.arange(16) + 32)
            np.testing.assert_allclose(loss, want, rtol=2e-5, atol=2e-5)
            np.testing.assert_array_equal(terms["image_top1"], image_top1)
            np.testing.assert_array_equal(terms["text_top1"], text_top1)
            assert 0 < image_top1.mean() < 1 and 0 < text_top1.mean() < 1 and any(image_top1 != text_top1)


def test_pairs_that_are_all_alike_are_chance():
    loss, terms = losses.contrastive(jnp.ones((8, 5)), jnp.ones((8, 5)), jnp.float32(4.0), jnp.arange(8))
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
    assert float(jnp.sum(terms["image_top1"])) == float(jnp.sum(terms["text_top1"])) == 1


def test_bfloat16_embeddings_are_compared_in_float32():
    image, text = (jnp.asarray(a, jnp.bfloat16) for a in pairs(8))
    loss, _ = losses.contrastive(image, text, jnp.float32(4.6), jnp.arange(8))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, numpy_contrastive(image, text, 4.6)[0], rtol=1e-4, atol=1e-4)


def encoders():
    """Two linear encoders, the scale, and a batch of 16 pairs."""
    rng = np.random.default_rng(2)
    params = {name: np.float32(rng.standard_normal((6, 4))) for name in ("image", "text")}
    batch = {name: np.float32(rng.standard_normal((16, 6))) for name in ("image", "text")}
    return params | {"logit_scale": np.float32(2.0)}, batch


def step(params, batch, position, *, axis_name=None):
    """Loss, accuracies and gradients, averaged over devices after they were taken on each, as `train_step` does."""

    def gather(a):
        return jax.lax.all_gather(a, axis_name, tiled=True) if axis_name else a

    def mean_loss(params):
        image, text = (batch[name] @ params[name] for name in ("image", "text"))
        loss, terms = losses.contrastive(image, text, params["logit_scale"], position, gather=gather)
        return jnp.mean(loss), jax.tree.map(jnp.mean, terms)

    out = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return jax.lax.pmean(out, axis_name) if axis_name else out


@functools.cache
def whole_batch():
    """The same of one device, and its gradient by the loss's definition in float64."""
    params, batch = encoders()
    out = jax.jit(step)(params, batch, jnp.arange(16))

    def total(change):
        p = {name: np.float64(value) + change.get(name, 0) for name, value in params.items()}
        return numpy_contrastive(*(batch[name] @ p[name] for name in ("image", "text")), p["logit_scale"])[0].mean()

    for name in params:
        place = (1, 2)[: np.ndim(params[name])]
        change = np.zeros_like(params[name], np.float64)
        change[place] = 1e-5
        slope = (total({name: change}) - total({name: -change})) / 2e-5
        np.testing.assert_allclose(np.asarray(out[1][name])[place], slope, rtol=1e-4, atol=1e-6)
    return params, batch, out


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_gradients_do_not_depend_on_the_number_of_devices(devices):
    """By pmap over as many devices as there are, and by vmap, whose collectives are the same, over any number."""
    params, batch, want = whole_batch()
    mine = functools.partial(step, axis_name="data")
    maps = {"vmap": jax.jit(jax.vmap(mine, in_axes=(None, 0, 0), axis_name="data"))}
    if devices <= jax.device_count():
        maps["pmap"] = jax.pmap(mine, in_axes=(None, 0, 0), axis_name="data", devices=jax.devices()[:devices])
    assert devices > 4 or "pmap" in maps
    split = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), (batch, np.arange(16)))
    for mapped in maps.values():
        out = mapped(params, *split)
        for device in range(devices):
            chex.assert_trees_all_close(jax.tree.map(lambda a, i=device: a[i], out), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["jit", "fsdp"])
def test_gradients_are_the_same_in_one_program_of_all_devices(mode):
    """By `mean_gradient` on each device: sharded parameters are gathered, their gradients summed and divided."""
    params, batch, (_, want) = whole_batch()

    def loss(params, extra, batch, keys, position, total, gather):
        params = nn.meta.unbox(params)
        image, text = (batch[name] @ params[name] for name in ("image", "text"))
        value, _ = losses.contrastive(image, text, params["logit_scale"], position, gather=gather)
        return value, {}, ()

    model = types.SimpleNamespace(loss=loss)
    where = parallel.layout(mode)
    assert where.mesh.size == jax.device_count() > 1
    gradient = functools.partial(step_room.mean_gradient, model=model, accumulate=1, sam=0.0)
    got, _ = jax.jit(parallel.on_each_device(where, gradient))(params, batch, (), jax.random.key(0))
    sharded = [name for name, a in got.items() if not a.sharding.is_fully_replicated]
    assert sharded == (["image", "text"] if mode == "fsdp" else [])
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_pair_is_found_by_its_place_whatever_the_order():
    params, batch, want = whole_batch()
    order = np.random.default_rng(3).permutation(16)
    shuffled = jax.tree.map(lambda a: a[order].reshape(4, 4, -1), batch)
    position = (100 + 7 * np.arange(16))[order].reshape(4, 4)
    mine = functools.partial(step, axis_name="data")
    out = jax.jit(jax.vmap(mine, in_axes=(None, 0, 0), axis_name="data"))(params, shuffled, position)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], out), want, rtol=1e-6, atol=1e-6)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_unit_vectors_and_their_slope():
    a = jnp.array([[3.0, -4.0], [1e-9, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(guidance.unit(a), [[0.6, -0.8], [1.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    slope = jax.grad(lambda a: jnp.sum(guidance.unit(a)[:, 0]))(a)
    np.testing.assert_allclose(slope[0], [0.2 - 0.072, 0.096], rtol=1e-5)  # (1 - u u^T) / |a|
    assert np.isfinite(slope).all()


def test_similarity_is_the_logit_of_a_pair():
    image, text = pairs(6)
    u, v = (np.float64(a) / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))
    got = guidance.clip_similarity(image, text, math.log(100))
    np.testing.assert_allclose(got, 100 * np.sum(u * v, 1), rtol=1e-5)
    np.testing.assert_allclose(guidance.clip_similarity(5 * image, text / 9, math.log(100)), got, rtol=1e-5)


def test_clip_guidance_adds_to_a_score_and_scale_0_adds_nothing():
    caption = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12)), jnp.float32)
    z = images(shape=(2, 2, 3))
    level = schedules.NoiseLevel(time=jnp.array([10.0, 20.0]), logsnr=jnp.zeros(2))
    step = schedules.Transition(level, level, jnp.zeros(2), jnp.zeros(2))

    def similarity(z, t):
        return guidance.clip_similarity(z.reshape(2, -1) * t.time[:, None], caption, math.log(3))

    def denoise(z, step):
        return process.predict(z, z, step, predicts="eps", variance="fixed_small")._replace(score=jnp.ones_like(z))

    guided = guidance.clip_guided(similarity, jnp.array([0.0, 2.0]))(denoise)
    score = jax.jit(guided)(z, step).score - 1
    np.testing.assert_array_equal(score[0], 0)
    x, y = np.float64(z[1]).ravel(), np.float64(caption[1])
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    want = 2 * 3 * (y / np.linalg.norm(y) - cosine * x / np.linalg.norm(x)) / np.linalg.norm(x)
    np.testing.assert_allclose(score[1].ravel(), want, rtol=1e-4, atol=1e-6)
