"""`SampleFn` on micro systems: what a call gives, edits, embeddings, and what it refuses."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import diffax
from diffax.diffusion import guidance
from diffax.models import cascade
from diffax.sampling import sample_fn as sampling
from diffax.sampling.enlarge import enlarge
from diffax.training import parallel
from tests.models import micro, systems
from tests.models.cascade_test import toy, toy_fn
from tests.models.protocol_test import statistics_of

PROMPTS = ["a red circle", "a large blue ring", "a red circle"]


def sample_fn_of(system):
    params = statistics_of(system, micro.params_of(system))
    steps = {model.name: 0 for model in system.generators}
    return sampling.SampleFn(tuple(system.generators), params, system.config.to_dict(), steps)


@pytest.fixture(scope="module")
def cdm():
    return sample_fn_of(systems.cascade())


@pytest.fixture(scope="module")
def glide():
    return sample_fn_of(systems.glide())


@pytest.fixture(scope="module")
def dalle2():
    return sample_fn_of(systems.dalle2())


# ---- cascades -------------------------------------------------------------------------------------------------------


def test_a_call_makes_the_pictures_of_all_stages_or_of_the_last(cdm):
    assert [*cdm.arguments] == ["label"] and cdm.num_classes == 3 and not cdm.enlarges and not cdm.reads_text
    made = cdm(0, label=[1, 2, 0], every_stage=True)
    chex.assert_shape((made["base"], made["up"]), [(3, 8, 8, 3), (3, 16, 16, 3)])
    np.testing.assert_allclose(cdm(0, label=[1, 2, 0]), made["up"], atol=1e-4)
    more = cdm(0, label=[1, 0, 0, 2], every_stage=True)
    for name, pictures in made.items():
        np.testing.assert_allclose(more[name][[0, 2]], pictures[[0, 2]], atol=1e-3)
        assert np.abs(more[name][1] - pictures[1]).max() > 1e-3, "both stages read the label"
    out, kept = cdm(0, label=[1, 2, 0], keep=2)
    chex.assert_shape((out, kept), [(3, 16, 16, 3), (3, 2, 16, 16, 3)])
    np.testing.assert_allclose(kept[:, -1], out, atol=1e-5)
    np.testing.assert_allclose(cdm(0, 1, first=2, label=0), made["up"][2:], atol=1e-3)
    np.testing.assert_allclose(cdm(0, 5, label=1, batch_size=2)[4], cdm(0, 5, label=1)[4], atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_a_later_stage_enlarges_pictures_of_other_sizes(cdm, size):
    up = cdm.starting_at("up")
    assert [*up.arguments] == ["label", "image"] and up.enlarges
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    made = up(0, image=image, label=[1, 2])
    chex.assert_shape(made, (2, 2 * size[0], 2 * size[1], 3))
    assert np.isfinite(made).all() and np.abs(made).max() <= 1 + 1e-5
    one = up(0, image=np.float32(image[0] / 127.5 - 1), label=[1, 2])  # for all, as floats
    np.testing.assert_allclose(one[0], made[0], atol=1e-3)
    assert not np.allclose(one[1], made[1], atol=1e-3)


def test_levels_labels_and_keys_share_one_program(cdm, monkeypatch):
    made, pure_of = [], cascade.cascade

    def counted(*args, **kwargs):
        made.append(chex.assert_max_traces(pure_of(*args, **kwargs), n=1))
        return made[-1]

    monkeypatch.setattr(cascade, "cascade", counted)
    sampling._compiled.cache_clear()
    chex.clear_trace_counter()
    own, labels = cdm.models[-1].conditions["low_res"].level, [1, 2, 0]
    plain = cdm(0, label=labels)
    chex.assert_trees_all_close(cdm(0, label=labels, level=own), plain, atol=1e-5)
    other = cdm(0, label=labels, level=[own, 0.0, 1.0])
    chex.assert_trees_all_close(cdm(0, label=labels, level={"up": [own, 0.0, 1.0]}), other, atol=1e-5)
    np.testing.assert_allclose(other[0], plain[0], atol=1e-3)
    assert all(np.abs(other[i] - plain[i]).max() > 1e-3 for i in (1, 2))
    cdm(1, label=[0, 0, 0], level=0.5)
    assert len(made) == 1
    sampling._compiled.cache_clear()


def test_no_level_is_chosen_where_sampling_stops_early():
    truncated = sample_fn_of(systems.cascade(True))
    assert np.isfinite(truncated(0, label=[1, 2])).all()
    with pytest.raises(diffax.UserError, match="no stage has a noised smaller picture"):
        truncated(0, label=[1, 2], level=0.1)


@pytest.mark.parametrize(
    ("start", "kwargs", "message"),
    [
        ("up", {}, "condition 'image' is missing"),
        ("up", {"image": np.zeros((8, 8, 1))}, "pass one picture .h, w, 3."),
        ("up", {"image": np.full((8, 8, 3), 1.5)}, "outside"),
        ("up", {"image": np.zeros((3, 8, 8, 3))}, "values of (image|label) for"),
        ("up", {"image": np.zeros((8, 8, 3)), "level": 1.5}, "level is 1.5.*from 0 to 1"),
        ("base", {"image": np.zeros((8, 8, 3))}, "no condition 'image'"),
        ("base", {"level": 1.5}, "level is 1.5"),
        ("base", {"level": "much"}, "level is 'much'"),
        ("base", {"level": [0.1, 0.2, 0.3]}, "values of l"),
        ("base", {"level": {"base": 0.1}}, "no stage 'base' has level"),
        ("base", {"guidance": 2.0}, "this model has no guidance"),
        ("base", {"keep": 2, "every_stage": True}, "keep"),
        ("base", {"steps": "41"}, "steps"),
        ("base", {"sampler": "heun9"}, "heun9"),
        ("base", {"sampler": "ddpm", "eta": 0.5}, "has no eta"),
        ("base", {"eta": 0.5}, "eta is of a sampler"),
        ("base", {"n": 0}, "nothing to sample"),
        ("base", {"laebl": 1}, "no condition 'laebl'"),
    ],
)
def test_bad_arguments_get_one_line(cdm, start, kwargs, message):
    with pytest.raises(diffax.UserError, match=message) as caught:
        cdm.starting_at(start)(0, **{"label": [1, 2]} | kwargs)
    assert "\n" not in str(caught.value)


def test_bad_starts_and_pictures_get_one_line(cdm):
    for call, message in (
        (lambda: cdm.starting_at("down"), "unknown stage 'down'.*base, up"),
        (lambda: enlarge(cdm, np.zeros((8, 8, 3)), label=1), "base enlarges no picture"),
        (lambda: enlarge(cdm.starting_at("up"), np.zeros((2, 8, 8, 3)), label=1), "one picture"),
        (lambda: enlarge(cdm.starting_at("up"), np.zeros((8, 8, 3))), "'label' is missing"),
        (lambda: cdm.embed(np.zeros((8, 8, 3))), "no stage has a CLIP"),
        (lambda: cdm.invert(np.zeros((4, 4, 3)), label=1), "makes pictures of"),
        (lambda: cdm.starting_at("up").invert(np.zeros((16, 16, 3)), label=1), "no pictures from noise alone"),
    ):
        with pytest.raises(diffax.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 7), (5, 9), (13, 4)])
@pytest.mark.parametrize("tile", [0, 5])
def test_a_picture_of_any_size_is_enlarged_tile_by_tile(size, tile):
    _, up = toy(level=0.0)
    picture = np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32)
    made = enlarge(toy_fn(up), picture, tile=tile)
    assert made.shape == (2 * size[0], 2 * size[1], 3)
    np.testing.assert_allclose(made[..., :2], picture.repeat(2, 0).repeat(2, 1)[..., :2], atol=2e-3)


def test_a_picture_may_be_enlarged_by_several_stages():
    _, up = toy(level=0.0)
    twice = dataclasses.replace(up, name="up_again")
    picture = np.random.default_rng(0).uniform(-1, 1, (5, 9, 3)).astype(np.float32)
    made = enlarge(toy_fn(up, twice), picture, tile=4)
    assert made.shape == (20, 36, 3)
    np.testing.assert_allclose(made[..., :2], picture.repeat(4, 0).repeat(4, 1)[..., :2], atol=4e-3)


# ---- captions and edits ---------------------------------------------------------------------------------------------


def test_pictures_depend_on_prompt_key_and_number(glide):
    assert [*glide.arguments] == ["prompt"] and glide.reads_text
    made = glide(0, prompt=PROMPTS)
    chex.assert_shape(made, (3, 16, 16, 3))
    chex.assert_trees_all_close(glide(0, 2, prompt=PROMPTS[:2]), made[:2], atol=1e-3)
    assert np.abs(glide(0, 1, prompt="a blue ring") - made[:1]).max() > 1e-3
    assert np.abs(made[0] - made[2]).max() > 1e-3, "the same prompt, another number"
    chex.assert_trees_all_close(glide(0, 1, prompt=PROMPTS[0], guidance=2.0), made[:1], atol=1e-3)


def test_known_pixels_are_returned_bit_by_bit(glide):
    rng = np.random.default_rng(0)
    picture = rng.uniform(-1, 1, glide.models[-1].shape).astype(np.float32)
    mask = rng.random(picture.shape[:2]) < 0.5
    made = glide(0, 2, prompt="a red circle", image=picture, mask=mask)
    assert (made[:, mask] == picture[mask]).all() and (np.abs(made - picture)[:, ~mask] > 0).mean() > 0.9
    full = glide(0, 1, prompt="a red circle", image=picture, mask=np.ones(picture.shape[:2]))
    np.testing.assert_array_equal(full[0], picture)


def test_bad_edits_get_one_line(glide):
    picture = np.zeros(glide.models[-1].shape, np.float32)
    good = {"prompt": "a red circle", "image": picture}
    for kwargs, words in (
        ({"prompt": []}, "no prompts"),
        ({}, "pass prompt="),
        ({"prompt": "a", "strength": 0.5}, "no picture to edit"),
        ({**good, "strength": 0.0}, "strength is 0.0"),
        ({**good, "strength": 1.5}, "strength is 1.5"),
        ({**good, "mask": np.ones((3, 3))}, r"mask is \(3, 3\)"),
        ({**good, "mask": np.full((16, 16), 0.5)}, "values besides 0 and 1"),
        ({**good, "image": picture[:8], "strength": 0.5}, "image is"),
        ({**good, "image": picture + 3, "strength": 0.5}, "outside"),
        ({**good, "strength": 0.5, "noise": np.zeros((8, 8, 3))}, "noise is for pictures made of noise alone"),
        ({"prompt": ["a", "b"], "n": 3}, "2 values of prompt for 3"),
        ({"prompt": ["a", 3]}, "a list of texts"),
    ):
        with pytest.raises(diffax.UserError, match=words) as caught:
            glide(0, **kwargs)
        assert "\n" not in str(caught.value)


def test_inversion_gives_noise_for_the_same_picture():
    sample_fn = sample_fn_of(systems.classes())
    picture = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    found = sample_fn.invert(picture, steps="5", label=[1, 2])
    chex.assert_shape((found, sample_fn.invert(picture[0], steps="5", label=1)), [(2, 8, 8, 3), (8, 8, 3)])
    np.testing.assert_allclose(sample_fn.invert(picture[0], steps="5", label=1), found[0], rtol=1e-2, atol=1e-2)
    made = sample_fn(0, noise=found, label=[1, 2], sampler="ddim", steps="5")
    np.testing.assert_array_equal(made, sample_fn(7, noise=found, label=[1, 2], sampler="ddim", steps="5"))


# ---- embeddings -----------------------------------------------------------------------------------------------------


def test_one_call_goes_from_prompt_to_the_largest_picture(dalle2):
    assert [*dalle2.arguments] == ["prompt"]
    made = dalle2(0, prompt=PROMPTS, every_stage=True)
    chex.assert_shape([made[n] for n in ("prior", "decoder", "up")], [(3, 4), (3, 8, 8, 3), (3, 16, 16, 3)])
    chex.assert_tree_all_finite(made)
    other = dalle2(0, prompt=["a blue square"] * 3, every_stage=True)
    assert all(np.abs(other[name] - made[name]).max() > 1e-3 for name in made)


def test_variations_of_a_picture(dalle2):
    decoder = dalle2.alone("decoder")
    assert [*decoder.arguments] == ["prompt", "image_embedding"]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    embedding = decoder.embed(pictures)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 3.0, rtol=1e-5)
    chex.assert_trees_all_close(decoder.embed(pictures[0]), embedding[0], atol=1e-5)
    chex.assert_shape(decoder.embed(pictures.repeat(2, 1).repeat(2, 2)), (2, 4))
    first, second = (decoder(0, 2, image_embedding=e, prompt="") for e in embedding)
    assert np.abs(first - second).max() > 1e-4, "another embedding, another picture"
    assert np.abs(first[0] - first[1]).max() > 1e-3, "another number, another picture"
    without = decoder(0, 2, image_embedding=None, prompt="")
    assert np.isfinite(without).all() and np.abs(without - first).max() > 1e-3
    texts = decoder.embed_text(["a ring", "a cross"])
    np.testing.assert_allclose(decoder.embed_text("a ring"), texts[0], atol=1e-5)
    cosines = guidance.unit(texts) @ guidance.unit(embedding).T
    assert cosines.shape == (2, 2)
    for given, words in (
        ({"prompt": ""}, "image_embedding=sample_fn.embed"),
        ({"prompt": "", "image_embedding": np.zeros(5)}, r"pass \[4\]"),
        ({"prompt": "", "image_embedding": np.full(4, np.nan)}, "not finite"),
        ({"image_embedding": np.zeros(4)}, "prompt="),
    ):
        with pytest.raises(diffax.UserError, match=words):
            decoder(0, **given)
    with pytest.raises(diffax.UserError, match="no condition 'image_embedding'"):
        dalle2(0, prompt="", image_embedding=np.zeros(4))


@pytest.mark.parametrize("lineage", ["DALL-E 2, autoregressive", "karlo"])
def test_parameters_sharded_over_the_devices_make_the_same(lineage):
    """As under fsdp, with what is measured on the data; every array whose sides the devices divide."""
    whole = sample_fn_of(systems.EVERY[lineage]())
    sharded = dataclasses.replace(whole, config={**whole.config, "parallel": "fsdp"})
    made, again = (fn.alone("prior")(0, prompt=PROMPTS) for fn in (whole, sharded))
    chex.assert_trees_all_close(again, made, atol=1e-4)
    there = parallel.settled(whole.params, "fsdp")
    assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(there))
