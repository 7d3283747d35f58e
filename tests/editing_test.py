"""Compression and interpolation, on models that are known exactly; unCLIP's latents, on micro models."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffax import config as configs
from diffax import main
from diffax.diffusion import losses, samplers, schedules
from diffax.diffusion.process import Prediction, expand
from diffax.errors import UserError
from diffax.models import stages
from diffax.sampling import latents as editing
from diffax.sampling import pipeline
from tests import dalle2_test
from tests.stages_test import build


def test_rate_distortion_adds_up():
    rng = np.random.default_rng(0)
    terms, x_mse = rng.uniform(0, 1, (3, 5)), rng.uniform(0, 0.1, (3, 5))
    bound = losses.BitsPerDim(terms.sum(1) + 0.1, np.full(3, 0.1), terms, x_mse, x_mse)
    curve = editing.rate_distortion(bound)
    np.testing.assert_allclose(curve.rate[0], 0.1)
    np.testing.assert_allclose(curve.rate[-1] + terms[:, -1].mean(), np.mean(bound.total))
    np.testing.assert_allclose(curve.distortion[2], 127.5 * np.sqrt(x_mse[:, 2]).mean())
    assert np.all(np.diff(curve.rate) > 0)


@pytest.fixture(scope="module")
def model():
    stage = build("config.base.steps=")
    params = jax.jit(stages.objective(stage).init)(jax.random.key(0))
    return stage, jax.tree.map(lambda a: a + 0.02, params)


def run(model, depth, weights=(0.0, 0.5, 1.0)):
    stage, params = model
    first, second = jnp.full(stage.shape, -0.7), jnp.full(stage.shape, 0.6)
    label = jnp.zeros(len(weights), jnp.int32)
    walk = jax.jit(
        lambda params, weights: editing.interpolate(
            stage, params, first, second, jax.random.key(3), weights=weights, depth=depth, label=label
        )
    )
    return np.asarray(walk(params, jnp.asarray(weights)))


def test_shallow_interpolation_returns_its_ends(model):
    out = run(model, 1 / 40)
    chex.assert_shape(out, (3, 8, 8, 1))
    np.testing.assert_allclose(out[0].mean(), -0.7, atol=0.05)
    np.testing.assert_allclose(out[2].mean(), 0.6, atol=0.05)
    assert out[0].mean() < out[1].mean() < out[2].mean()


def test_the_noise_is_shared_by_all_weights(model):
    out = run(model, 0.5, weights=(0.3, 0.3, 0.3))
    np.testing.assert_allclose(out[0], out[1], atol=1e-6)
    chex.assert_tree_all_finite(out)


def test_bad_arguments(model):
    stage, params = model
    picture = jnp.zeros(stage.shape)
    for depth in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share of the steps must be"):
            editing.interpolate(stage, params, picture, picture, jax.random.key(0), weights=jnp.zeros(1), depth=depth)
    with pytest.raises(ValueError, match="stage's shape"):
        editing.interpolate(stage, params, picture[1:], picture, jax.random.key(0), weights=jnp.zeros(1), depth=0.5)


# ---- the latents of unCLIP ------------------------------------------------------------------------------------------


def untrained(spec, *overrides):
    """A system of a micro config, whose networks say little, so that the flow of its pictures is smooth."""
    config = configs.to_dict(configs.load(spec, overrides))
    rng, params = np.random.default_rng(3), {}
    built = stages.build_stages(config)
    for name in dict.fromkeys(name for stage in built for name in stage.sections):
        shapes = jax.eval_shape(functools.partial(stages.init_params, stages.build(config, name)), jax.random.key(0))
        params[name] = jax.tree.map(lambda a: np.float32(0.1 * rng.standard_normal(a.shape)), shapes)
    return pipeline.SampleFn(tuple(built), params, config, dict.fromkeys(params, 0))


@pytest.fixture(scope="module")
def unclip():
    """A prior and a decoder."""
    whole = untrained("dalle2:tiny", *dalle2_test.OVERRIDES, "config.prior.variance=fixed_small")
    return dataclasses.replace(whole, stages=whole.stages[:2])


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(-0.8, 0.8, (2, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def latents_of(monkeypatch):
    """A function that runs an edit and returns the latents that it would have decoded."""

    def run(edit, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(editing, "decode", lambda sample_fn, latents, **call: latents)
            return edit(*args, **kwargs)

    return run


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def test_slerp_walks_the_arc_evenly():
    rng = np.random.default_rng(0)
    a, b = unit(rng.standard_normal((2, 12)))
    weights = np.linspace(0, 1, 5)
    path = editing.slerp(a.reshape(2, 6), b.reshape(2, 6), weights)
    chex.assert_shape(path, (5, 2, 6))
    flat = path.reshape(5, 12)
    np.testing.assert_allclose(flat[[0, -1]], [a, b], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.arccos(flat @ a), weights * np.arccos(a @ b), atol=1e-3)
    np.testing.assert_allclose(editing.slerp(a, 2 * a, [0.25]), [1.25 * a], atol=1e-6)
    turned = editing.turned(3 * a, 5 * b, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), [3, 4, 5], rtol=1e-6)


def test_inversion_is_ddim_backwards(unclip):
    """Of data N(0, 1/4), whose denoiser is known: the steps that `invert` walks are those of `samplers.invert`."""
    stage = unclip.stages[1]

    def denoise(z, step):
        x = z * expand(step.t.alpha / (step.t.alpha**2 + 4 * step.t.sigma**2), z)
        eps = (z - expand(step.t.alpha, z) * x) / expand(step.t.sigma, z)
        return Prediction(x=x, eps=eps, variance=0 * z, logvar=0 * z)

    x = jax.random.normal(jax.random.key(0), (3, 4)) / 2
    for steps in (None, "40"):
        back = pipeline._climbing(stage, steps)
        chain = stage.sampling if steps is None else schedules.build_steps(stage.schedule, stage.train_steps, steps)
        got = samplers.sample(denoise, x, lambda i: 0 * x, back.sampling, back.sampler)
        chex.assert_trees_all_close(got, samplers.invert(denoise, x, chain), atol=1e-5)
        assert back.guidance == () and back.name == stage.name


def test_latents_give_back_the_picture(unclip, pictures):
    error = {}
    for steps in (None, "40"):
        found = editing.encode(unclip, pictures, steps=steps)
        chex.assert_trees_all_close(found.embedding, unclip.embed(pictures), atol=1e-5)
        error[steps] = np.abs(editing.decode(unclip, found, steps=steps) - pictures).mean()
    assert error["40"] < 0.5 * error[None] and error["40"] < 0.1, error
    other = found._replace(noise=found.noise[::-1])
    assert np.abs(editing.decode(unclip, other, steps="40") - pictures).mean() > 3 * error["40"]
    larger = editing.encode(unclip, pictures.repeat(2, 1).repeat(2, 2), steps="40")
    chex.assert_trees_all_close(larger.noise, found.noise, atol=0.3)
    one = editing.decoder_of(unclip).invert(
        pictures[0], image_embedding=found.embedding[0], prompt="", steps="40", batch_size=2
    )
    chex.assert_trees_all_close(one, found.noise[0], atol=1e-4)


def test_variations_go_further_with_eta(unclip, pictures):
    back = editing.decode(unclip, editing.encode(unclip, pictures[0]))
    made = {eta: editing.variations(unclip, pictures[0], 3, eta=eta, guidance=1.0) for eta in (0.0, 1.0)}
    chex.assert_trees_all_close(made[0.0], np.repeat(back, 3, axis=0), atol=1e-5)
    assert min(np.abs(made[1.0][0] - other).max() for other in made[1.0][1:]) > 0.1


def test_interpolations_end_at_the_pictures(unclip, pictures, latents_of):
    ends = editing.decode(unclip, editing.encode(unclip, pictures))
    path = editing.interpolations(unclip, *pictures, weights=[0.0, 0.5, 1.0])
    chex.assert_trees_all_close(path[[0, -1]], ends, atol=1e-4)
    found = latents_of(editing.interpolations, unclip, *pictures, weights=[0.2, 0.8], between_noise=False)
    np.testing.assert_array_equal(*found.noise)
    own = unclip.embed(pictures)
    near = unit(found.embedding) @ unit(own).T
    assert near[0, 0] > near[1, 0] and near[1, 1] > near[0, 1]


def test_text_diffs_turn_towards_the_difference(unclip, pictures, latents_of):
    captions = ["a blue ring", "a red circle"]
    found = latents_of(editing.text_diffs, unclip, pictures[0], captions[0], shown=captions[1], weights=[0, 0.3, 1])
    own, texts = unclip.embed(pictures[0]), unit(unclip.embed_text(captions))
    np.testing.assert_allclose(found.embedding[0], own, atol=1e-5)
    np.testing.assert_allclose(unit(found.embedding[2]), unit(texts[0] - texts[1]), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.embedding, axis=1), np.linalg.norm(own), rtol=1e-5)
    np.testing.assert_array_equal(found.noise[0], found.noise[2])
    alone = latents_of(editing.text_diffs, unclip, pictures[0], captions[0], weights=[1.0])
    np.testing.assert_allclose(unit(alone.embedding[0]), texts[0], atol=1e-4)


def test_all_components_are_the_embedding(unclip, pictures, latents_of):
    rng = np.random.default_rng(1)
    many = rng.standard_normal((50, 4)) * [4, 3, 2, 1]
    found = latents_of(editing.component_views, unclip, pictures[0], many, [1, 4])
    own = unclip.embed(pictures[0])
    np.testing.assert_allclose(found.embedding[1], own, atol=1e-4)
    first = many.mean(0) + ((own - many.mean(0)) @ np.eye(4)[0]) * np.eye(4)[0]  # nearly an axis, by construction
    assert unit(found.embedding[0]) @ unit(first) > 0.9
    np.testing.assert_array_equal(*found.noise)


def test_captions_by_three_ways(unclip):
    made = editing.with_and_without_prior(unclip, ["a red circle", "a blue ring"], guidance={"prior": 1.0})
    assert tuple(made) == editing.PRIORS
    chex.assert_shape([*made.values()], (2, 8, 8, 3))
    chex.assert_tree_all_finite(made)
    decoder = editing.decoder_of(unclip)
    embedding = unclip.embed_text(["a red circle", "a blue ring"])
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 3.0, rtol=1e-5)
    told = decoder(0, image_embedding=embedding, prompt=["a red circle", "a blue ring"])
    chex.assert_trees_all_close(made["text embedding"], told, atol=1e-5)
    assert np.abs(made["caption alone"] - told).max() > 1e-4


def test_equal_keys_make_equal_pictures(unclip):
    decoder, embedding = editing.decoder_of(unclip), np.ones(4, np.float32)
    keys = jax.random.split(jax.random.key(0), 2)[np.array([0, 1, 0])]
    made = decoder(keys, image_embedding=embedding, prompt="")
    chex.assert_trees_all_close(made[0], made[2], atol=1e-6)
    assert np.abs(made[0] - made[1]).max() > 0.1


def test_bad_latents_get_one_line(unclip, pictures):
    decoder = editing.decoder_of(unclip)
    given = {"image_embedding": np.ones(4), "prompt": ""}
    alone = dataclasses.replace(unclip, stages=unclip.stages[:1])
    for call, words in (
        (lambda: decoder(0, **given, noise=np.zeros((4, 4, 3))), r"starts from \(8, 8, 3\)"),
        (lambda: decoder(0, **given, noise=pictures, n=3), "2 values of noise for 3"),
        (lambda: decoder(0, **given, noise=pictures[0], image=pictures[0], strength=0.5), "noise is for pictures"),
        (lambda: alone(0, prompt="", noise=pictures[0]), "noise is for pictures"),
        (lambda: decoder(jax.random.split(jax.random.key(0), 2), 3, **given), "2 keys for 3"),
        (lambda: decoder(0, **given, steps={"dekoder": 3}), "no stage 'dekoder'.*decoder"),
        (lambda: decoder(0, **given, sampler={"decoder": "dim"}), "unknown sampler 'dim'.*ddim"),
        (lambda: decoder.invert(pictures[:, :4], **given), "makes pictures of"),
        (lambda: decoder.invert(pictures + 3, **given), "outside"),
        (lambda: decoder.invert(pictures, **given, steps=1), "two steps"),
        (lambda: unclip.invert(pictures, prompt=""), "starting_at"),
        (lambda: unclip.embed_text([]), "no prompts"),
        (lambda: editing.encode(alone, pictures), "no stage takes image embeddings"),
        (lambda: editing.encode(unclip, pictures[:, :4]), "whole number of times"),
        (lambda: editing.text_diffs(unclip, pictures[0], "a red ring", shown="a red ring"), "no difference"),
        (lambda: editing.component_views(unclip, pictures[0], np.eye(4), [9]), "no 9 components"),
        (lambda: editing.with_and_without_prior(decoder, "a red ring"), "no prior"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_edits_from_the_command_line(unclip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "load_trained", lambda job: unclip)
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (12, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    one, two = str(tmp_path / "a.png"), f"{tmp_path / 'a.png'},{tmp_path / 'b.png'}"
    flags = [*dalle2_test.flags(tmp_path, "--mode=edit", "--count=3"), "--config.stages=clip,prior,decoder"]
    for edit, more, grid in (
        ("reconstruct", [f"--input={two}"], (3, 2)),
        ("variations", [f"--input={one}", "--prompt=a red ring", "--strength=1"], (4, 1)),
        ("interpolate", [f"--input={two}"], (5, 1)),
        ("diff", [f"--input={two}", "--to=a red ring", "--prompt=a blue ring", "--strength=0.4"], (4, 2)),
        ("pca", [f"--input={one}"], (4, 1)),
        ("prior", ["--prompt=a red ring"], (3, 3)),
    ):
        assert main.run([*flags, f"--edit={edit}", *more]) == 0, capsys.readouterr().err
        width, height = Image.open(tmp_path / f"{edit}.png").size
        assert width == 2 + 50 * grid[0] and height >= 2 + grid[1] * 62, edit
    (tmp_path / "there.png").touch()
    capsys.readouterr()
    for more, words in (
        ([], "unknown --edit=None"),
        (["--mode=sample", "--edit=pca"], "pass --mode=edit"),
        (["--edit=interpolat"], "did you mean interpolate"),
        (["--edit=interpolate", f"--input={one}"], "takes two pictures, got 1"),
        (["--edit=prior", f"--input={one}", "--prompt=a"], "takes no picture, got 1"),
        (["--edit=prior"], "pass --prompt"),
        (["--edit=variations"], "one or more pictures, got 0"),
        (["--edit=variations", f"--input={one}", "--strength=2"], "strength is 2"),
        (["--edit=reconstruct", f"--input={one}", "--strength=1"], "takes no --strength"),
        (["--edit=diff", f"--input={one}"], "takes --to"),
        (["--edit=pca", f"--input={one}", "--count=1"], "two pictures in a row"),
        (["--edit=pca", "--input=/no/such.png"], "there is no image"),
        (["--edit=pca", f"--input={one}", f"--output={tmp_path / 'there.png'}"], "the output exists"),
    ):
        assert main.run([*flags, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert words in line, line
