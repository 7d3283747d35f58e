"""The latents of unCLIP on micro models: inversion, variations, interpolations, text diffs, bad input."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from diffax.diffusion import samplers, schedules
from diffax.diffusion.process import Prediction, expand
from diffax.errors import UserError
from diffax.sampling import latents
from tests.sampling import untrained


@pytest.fixture(scope="module")
def unclip():
    """A prior and a decoder."""
    return untrained.unclip()


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(-0.8, 0.8, (2, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def latents_of(monkeypatch):
    """A function that runs an edit and returns the latents that it would have decoded."""

    def run(edit, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(latents, "decode", lambda sample_fn, of, **call: of)
            return edit(*args, **kwargs)

    return run


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def test_slerp_walks_the_arc_evenly():
    rng = np.random.default_rng(0)
    a, b = unit(rng.standard_normal((2, 12)))
    weights = np.linspace(0, 1, 5)
    path = latents.slerp(a.reshape(2, 6), b.reshape(2, 6), weights)
    chex.assert_shape(path, (5, 2, 6))
    flat = path.reshape(5, 12)
    np.testing.assert_allclose(flat[[0, -1]], [a, b], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.arccos(flat @ a), weights * np.arccos(a @ b), atol=1e-3)
    np.testing.assert_allclose(latents.slerp(a, 2 * a, [0.25]), [1.25 * a], atol=1e-6)
    rotated = latents.slerp_embeddings(3 * a, 5 * b, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), [3, 4, 5], rtol=1e-6)


def test_inversion_is_ddim_backwards(unclip):
    """Of data N(0, 1/4), whose denoiser is known: the steps that `invert` walks are those of `samplers.invert`."""
    model = unclip.models[1]

    def denoise(z, step):
        x = z * expand(step.t.alpha / (step.t.alpha**2 + 4 * step.t.sigma**2), z)
        eps = (z - expand(step.t.alpha, z) * x) / expand(step.t.sigma, z)
        return Prediction(x=x, eps=eps, variance=0 * z, logvar=0 * z)

    x = jax.random.normal(jax.random.key(0), (3, 4)) / 2
    for steps in (None, "40"):
        back = model.climbing(steps)
        chain = model.steps if steps is None else schedules.build_steps(model.schedule, steps)
        got = samplers.sample(denoise, x, lambda i: 0 * x, back.steps, back.sampler)
        chex.assert_trees_all_close(got, samplers.invert(denoise, x, chain), atol=1e-5)
        assert not back.guidance and back.name == model.name


def test_latents_give_back_the_picture(unclip, pictures):
    error = {}
    for steps in (None, "40"):
        found = latents.encode(unclip, pictures, steps=steps)
        chex.assert_trees_all_close(found.embedding, unclip.embed(pictures), atol=1e-5)
        error[steps] = np.abs(latents.decode(unclip, found, steps=steps) - pictures).mean()
    assert error["40"] < 0.5 * error[None] and error["40"] < 0.1, error
    other = found._replace(noise=found.noise[::-1])
    assert np.abs(latents.decode(unclip, other, steps="40") - pictures).mean() > 3 * error["40"]
    larger = latents.encode(unclip, pictures.repeat(2, 1).repeat(2, 2), steps="40")
    chex.assert_trees_all_close(larger.noise, found.noise, atol=0.3)
    one = latents.decoder_of(unclip).invert(
        pictures[0], image_embedding=found.embedding[0], prompt="", steps="40", batch_size=2
    )
    chex.assert_trees_all_close(one, found.noise[0], atol=1e-4)


def test_variations_go_further_with_eta(unclip, pictures):
    back = latents.decode(unclip, latents.encode(unclip, pictures[0]))
    made = {eta: latents.variations(unclip, pictures[0], 3, eta=eta, guidance=1.0) for eta in (0.0, 1.0)}
    chex.assert_trees_all_close(made[0.0], np.repeat(back, 3, axis=0), atol=1e-5)
    assert min(np.abs(made[1.0][0] - other).max() for other in made[1.0][1:]) > 0.1


def test_interpolations_end_at_the_pictures(unclip, pictures, latents_of):
    ends = latents.decode(unclip, latents.encode(unclip, pictures))
    path = latents.interpolations(unclip, *pictures, weights=[0.0, 0.5, 1.0])
    chex.assert_trees_all_close(path[[0, -1]], ends, atol=1e-4)
    found = latents_of(latents.interpolations, unclip, *pictures, weights=[0.2, 0.8], between_noise=False)
    np.testing.assert_array_equal(*found.noise)
    own = unclip.embed(pictures)
    near = unit(found.embedding) @ unit(own).T
    assert near[0, 0] > near[1, 0] and near[1, 1] > near[0, 1]


def test_text_diffs_turn_towards_the_difference(unclip, pictures, latents_of):
    captions = ["a blue ring", "a red circle"]
    found = latents_of(latents.text_diffs, unclip, pictures[0], captions[0], source=captions[1], weights=[0, 0.3, 1])
    own, texts = unclip.embed(pictures[0]), unit(unclip.embed_text(captions))
    np.testing.assert_allclose(found.embedding[0], own, atol=1e-5)
    np.testing.assert_allclose(unit(found.embedding[2]), unit(texts[0] - texts[1]), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.embedding, axis=1), np.linalg.norm(own), rtol=1e-5)
    np.testing.assert_array_equal(found.noise[0], found.noise[2])
    alone = latents_of(latents.text_diffs, unclip, pictures[0], captions[0], weights=[1.0])
    np.testing.assert_allclose(unit(alone.embedding[0]), texts[0], atol=1e-4)


def test_all_components_are_the_embedding(unclip, pictures, latents_of):
    rng = np.random.default_rng(1)
    many = rng.standard_normal((50, 4)) * [4, 3, 2, 1]
    found = latents_of(latents.pca_reconstructions, unclip, pictures[0], many, [1, 4])
    own = unclip.embed(pictures[0])
    np.testing.assert_allclose(found.embedding[1], own, atol=1e-4)
    first = many.mean(0) + ((own - many.mean(0)) @ np.eye(4)[0]) * np.eye(4)[0]  # nearly an axis, by construction
    assert unit(found.embedding[0]) @ unit(first) > 0.9
    np.testing.assert_array_equal(*found.noise)


def test_captions_by_three_ways(unclip):
    made = latents.with_and_without_prior(unclip, ["a red circle", "a blue ring"], guidance={"prior": 1.0})
    assert tuple(made) == latents.WAYS
    chex.assert_shape([*made.values()], (2, 8, 8, 3))
    chex.assert_tree_all_finite(made)
    decoder = latents.decoder_of(unclip)
    embedding = unclip.embed_text(["a red circle", "a blue ring"])
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 3.0, rtol=1e-5)
    whole = decoder(0, image_embedding=embedding, prompt=["a red circle", "a blue ring"])
    chex.assert_trees_all_close(made["text embedding"], whole, atol=1e-5)
    assert np.abs(made["caption alone"] - whole).max() > 1e-4


def test_equal_keys_make_equal_pictures(unclip):
    decoder, embedding = latents.decoder_of(unclip), np.ones(4, np.float32)
    keys = jax.random.split(jax.random.key(0), 2)[np.array([0, 1, 0])]
    made = decoder(keys, image_embedding=embedding, prompt="")
    chex.assert_trees_all_close(made[0], made[2], atol=1e-6)
    assert np.abs(made[0] - made[1]).max() > 0.1


def test_bad_latents_get_one_line(unclip, pictures):
    decoder = latents.decoder_of(unclip)
    given = {"image_embedding": np.ones(4), "prompt": ""}
    alone = dataclasses.replace(unclip, models=unclip.models[:1])
    for call, words in (
        (lambda: decoder(0, **given, noise=np.zeros((4, 4, 3))), r"starts from \(8, 8, 3\)"),
        (lambda: decoder(0, **given, noise=pictures, n=3), "2 values of noise for 3"),
        (lambda: decoder(0, **given, noise=pictures[0], image=pictures[0], strength=0.5), "noise is for pictures"),
        (lambda: alone(0, prompt="", noise=pictures[0]), "noise is for pictures"),
        (lambda: decoder(jax.random.split(jax.random.key(0), 2), 3, **given), "2 keys for 3"),
        (lambda: decoder(0, **given, steps={"dekoder": 3}), "no stage 'dekoder'.*decoder"),
        (lambda: decoder(0, **given, sampler={"decoder": "dim"}), "got 'dim'; did you mean ddim"),
        (lambda: decoder.invert(pictures[:, :4], **given), "makes pictures of"),
        (lambda: decoder.invert(pictures + 3, **given), "outside"),
        (lambda: decoder.invert(pictures, **given, steps=1), "two steps"),
        (lambda: unclip.invert(pictures, prompt=""), "starting_at"),
        (lambda: unclip.embed_text([]), "no prompts"),
        (lambda: latents.encode(alone, pictures), "no stage is conditioned"),
        (lambda: latents.encode(unclip, pictures[:, :4]), "whole number of times"),
        (lambda: latents.text_diffs(unclip, pictures[0], "a red ring", source="a red ring"), "alike"),
        (lambda: latents.pca_reconstructions(unclip, pictures[0], np.eye(4), [9]), "no 9 components"),
        (lambda: latents.with_and_without_prior(decoder, "a red ring"), "no prior"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
