"""GLIDE on micro models, from the command line to `sample_fn`: prompts, CLIP, inpainting, image-to-image; and laws."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffax
from diffax import main, networks
from diffax.diffusion import augment, guidance, samplers, schedules
from diffax.diffusion.process import Prediction, diffuse
from diffax.diffusion.schedules import NoiseLevel
from diffax.errors import UserError
from diffax.evaluation import judges
from diffax.models import stages
from diffax.sampling import pipeline
from tests import micro

UP = tuple(o.replace("config.base", "config.up") for o in micro.OVERRIDES if o.startswith("config.base"))
CLIP = (
    *("config.clip.shape=8,8,3", "config.clip.net.image.patch=4", "config.clip.net.image.width=8"),
    *("config.clip.net.image.layers=1", "config.clip.net.image.heads=2", "config.clip.net.text.width=8"),
    *("config.clip.net.text.layers=1", "config.clip.net.text.heads=2", "config.clip.net.features=4"),
    *("config.clip.schedule.steps=40", "config.clip.train.steps=4", "config.clip.train.batch_size=8"),
    *("config.clip.train.log_every=2", "config.clip.train.sample_every=0", "config.clip.train.save_every=4"),
)
TEXT = ("net.text.width=8", "net.text.layers=1", "net.text.heads=2", "text.length=8", "net.head_channels=0")
BASE = (
    *("config.base.shape=8,8,3", "config.base.net.channel_mult=1", "config.base.net.attention=1"),
    "config.eval.guidance=1,3",
    "config.eval.num=10",
    *(f"config.base.{o}" for o in TEXT),
)
ENLARGES = (
    *("config.up.shape=16,16,3", "config.up.low_res.crop=8", "config.up.steps=4", *UP[1:5]),
    *(o for o in UP if "shape" not in o and "up.steps" not in o),
    *("config.up.net.channel_mult=1", "config.up.net.attention=1"),
    *(f"config.up.{o}" for o in TEXT),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model and an upsampler, a CLIP for that base, and an inpainting model that started from it."""
    root = tmp_path_factory.mktemp("runs")
    assert main.run(micro.flags(root / "glide", *BASE, *ENLARGES, config="glide:tiny")) == 0
    guided = (*BASE, *CLIP, f"config.clip.{TEXT[3]}", f"config.base.workdir={root / 'glide'}")
    assert main.run(micro.flags(root / "clip", *guided, "--stage=clip", config="glide_base_64:clip,tiny")) == 0
    start = f"config.base.train.start_from={root / 'glide'}"
    assert main.run(micro.flags(root / "inpaint", *BASE, start, config="glide_inpaint_64:tiny")) == 0
    return root


@pytest.fixture(scope="module")
def glide(trained):
    """Moved off its start, where the last layers are zero and a caption changes nothing."""
    found = diffax.load(trained / "glide")
    leaves, tree = jax.tree.flatten(found.params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [np.asarray(a + 0.1 * jax.random.normal(key, a.shape)) for a, key in zip(leaves, keys, strict=True)]
    return dataclasses.replace(found, params=jax.tree.unflatten(tree, moved))


def test_training_ends_with_captioned_pictures(trained):
    for name in ("clip", "glide", "inpaint"):
        height = Image.open(trained / name / "samples.png").size[1]
        assert height > 3 * (48 + 3 * 10), "captions of several lines stand below three rows of pictures"
    rows = [json.loads(line) for line in (trained / "clip" / "clip" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "image_top1", "text_top1", "image_top1_q0"} <= set().union(*rows)
    assert all(row["loss"] > 0 and 0 <= row["image_top1"] <= 1 for row in rows)


def test_prompts_from_the_command_line(trained, tmp_path, capsys):
    flags = [f"--workdir={trained / 'glide'}", "--mode=sample", "--config.sample.num=2"]
    assert main.run([*flags, "--prompt=a red circle", f"--output={tmp_path / 'one.png'}"]) == 0
    file = tmp_path / "prompts.txt"
    file.write_text("a blue ring\n\n  a large green cross at the top left \na red square\n")
    assert main.run([*flags, f"--prompts={file}", f"--output={tmp_path / 'three.png'}"]) == 0
    one, three = (Image.open(tmp_path / f"{name}.png").size for name in ("one", "three"))
    assert three[0] > one[0]
    file.write_text("\n \n")
    capsys.readouterr()
    for more, words in (
        ([f"--prompts={file}"], ["no prompts", "one a line"]),
        (["--prompts=/no/such/file"], ["cannot read the prompts"]),
        (["--strength=0.5"], ["no picture to edit", "--input"]),
        ([f"--input={tmp_path / 'one.png'}", "--strength=2"], ["strength is 2"]),
    ):
        assert main.run([*flags, *more, f"--output={tmp_path / 'none.png'}"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert all(word in line for word in words), line
    assert not (tmp_path / "none.png").exists()


def test_editing_from_the_command_line(trained, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    mask = np.zeros((24, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(picture).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:9]).save(tmp_path / "small.png")
    flags = [f"--workdir={trained / 'glide'}", "--mode=sample", "--config.sample.num=3", "--prompt=a red circle"]
    flags += [f"--input={tmp_path / 'photo.png'}", f"--output={tmp_path / 'edited.png'}"]
    assert main.run([*flags, f"--mask={tmp_path / 'small.png'}"]) == 2
    assert "the mask is 32 x 9 and the picture 32 x 24" in capsys.readouterr().err
    assert main.run([*flags, f"--mask={tmp_path / 'mask.png'}", "--strength=0.6"]) == 0
    assert Image.open(tmp_path / "edited.png").size[0] > 100


def test_pictures_depend_on_prompt_key_and_number(glide):
    prompts = ["a red circle", "a blue ring at the top left", "a red circle"]
    made = glide(0, prompt=prompts)
    chex.assert_shape(made, (3, 16, 16, 3))
    chex.assert_trees_all_close(glide(0, 2, prompt=prompts[:2]), made[:2], atol=1e-5)
    assert np.abs(glide(0, 1, prompt="a blue ring") - made[:1]).max() > 1e-3
    assert np.abs(made[0] - made[2]).max() > 1e-3, "the same prompt, another number"
    chex.assert_trees_all_close(glide(0, 1, prompt=prompts[0], guidance=3.0), made[:1], atol=1e-5)


def test_text_is_encoded_once(glide, monkeypatch):
    """The same pictures as when each step reads the caption, scale by scale."""
    ids = glide.tokenizers["text"](["a red circle", "a green cross"])
    keys = jax.random.split(jax.random.key(0), 2)
    run = {}
    for once in (True, False):
        if not once:
            monkeypatch.setattr(stages, "_encode_text", lambda stage, params, cond: (stage, cond))
        pure = stages.sample_fn(glide.stages[:1])
        jitted = jax.jit(lambda params, scale, pure=pure: pure(params, keys, guidance={"base": scale}, text=ids))
        run[once] = [jitted(glide.params, scale) for scale in (0.0, 1.0, 4.0)]
    chex.assert_trees_all_close(run[True], run[False], atol=2e-5)
    assert np.abs(run[True][0] - run[True][2]).max() > 1e-3


def test_known_pixels_are_returned_bit_by_bit(glide, trained):
    rng = np.random.default_rng(0)
    for sample_fn, kind in ((glide, "replacement"), (diffax.load(trained / "inpaint"), "inpainting channels")):
        shape = sample_fn.stages[-1].shape
        picture = rng.uniform(-1, 1, shape).astype(np.float32)
        mask = rng.random(shape[:2]) < 0.5
        made = sample_fn(0, 2, prompt="a red circle", image=picture, mask=mask)
        assert (made[:, mask] == picture[mask]).all(), kind
        assert (np.abs(made - picture)[:, ~mask] > 0).mean() > 0.9, kind
        full = sample_fn(0, 1, prompt="a red circle", image=picture, mask=np.ones(shape[:2]))
        np.testing.assert_array_equal(full[0], picture)


def test_strength_says_how_far_one_goes(glide):
    base = dataclasses.replace(glide, stages=glide.stages[:1])
    picture = np.full(base.stages[0].shape, -0.8, np.float32)
    picture[:4] = 0.8
    far = [np.abs(base(0, 4, prompt="a red circle", image=picture, strength=s) - picture).mean() for s in (0.2, 1.0)]
    assert far[0] < 0.5 * far[1], far


def test_bad_edits_get_one_line(glide):
    picture = np.zeros(glide.stages[-1].shape, np.float32)
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
        ({"prompt": ["a", "b"], "n": 3}, "2 values of text for 3"),
        ({"prompt": ["a", 3]}, "caption"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            glide(0, **kwargs)
        assert "\n" not in str(caught.value)


def test_clip_guides(trained):
    sample_fn = diffax.load(trained / "clip")
    assert sample_fn.takes == ("text", "clip_text")
    plain = sample_fn(0, 2, prompt="a red circle", guidance=0.0)
    guided = sample_fn(0, 2, prompt="a red circle", guidance=50.0)
    chex.assert_tree_all_finite(guided)
    assert np.abs(guided - plain).max() > 1e-3
    own = jax.tree.map(jnp.asarray, sample_fn.params)
    clip, stage = sample_fn.stages[0].guide, sample_fn.stages[0]
    ids = sample_fn.tokenizers["clip_text"](["a red circle"] * 2)
    words, _ = clip.net.apply({"params": own["clip"]}, ids, method="encode_text")
    step = jax.tree.map(lambda a: jnp.broadcast_to(a[2], 2), stage.sampling)
    z = jax.random.normal(jax.random.key(1), (2, *stage.shape))
    text = sample_fn.tokenizers["text"](["a red circle"] * 2)

    def similarity(z):
        image = clip.net.apply({"params": own["clip"]}, z, step.t.time, method="encode_image")
        cos = jnp.sum(image * words, -1) / jnp.linalg.norm(image, axis=-1) / jnp.linalg.norm(words, axis=-1)
        return jnp.sum(jnp.exp(own["clip"]["logit_scale"]) * cos)

    denoise = stages.guided_denoiser(stage, own, jnp.float32(3.0))
    got = jax.jit(lambda z: denoise(z, step, text=text, clip_text=words).score)(z)
    chex.assert_trees_all_close(got, 3 * jax.grad(similarity)(z), atol=1e-4)


def test_evaluation_scores_captions(trained, monkeypatch):
    judge = judges.CaptionJudge(
        read=lambda pictures: {"shape": np.full(len(pictures), "circle"), "colour": np.full(len(pictures), "red")},
        features=lambda pictures: pictures.reshape(len(pictures), -1)[:, :4],
        accuracy={"shape": 0.5, "colour": 1.0},
    )
    monkeypatch.setattr(judges, "captions", lambda section: judge)
    workdir = trained / "inpaint"
    assert main.run([f"--workdir={workdir}", "--mode=evaluate"]) == 0
    rows = json.loads((workdir / "evaluation.json").read_text())["rows"]
    assert [row["guidance"] for row in rows] == [1, 3]
    for row in rows:
        assert row["samples"] == 10 and row["held_out_samples"] == 2
        assert 0 <= row["accuracy"] <= 1 and row["judge_on_real_shape"] == 0.5
    assert Image.open(workdir / "caption_accuracy.png").size[0] > 500


def test_captions_are_scored_by_what_they_say():
    seen = {
        "shape": ["circle", "ring", "ring"],
        "colour": ["red", "red", "blue"],
        "place": ["none", "none", "top left"],
    }
    judge = judges.CaptionJudge(lambda pictures: {k: np.array(v) for k, v in seen.items()}, None, {})
    prompts = ["a red circle at the top left", "a blue ring", "a small blue ring at the top left"]
    got = judges.caption_scores(judge, np.zeros((3, 1)), prompts)
    assert got == pytest.approx({"accuracy": 2 / 3, "whole": 1 / 3, "shape": 1, "colour": 2 / 3, "place": 1 / 2})


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_a_widened_network_is_the_same_function(glide, trained):
    params, untouched = glide.params["base"], diffax.load(trained / "glide").params["base"]
    section = diffax.load(trained / "inpaint").config["base"]
    wide = pipeline.starting_params({**section, "train": {**section["train"], "start_from": trained / "glide"}}, "base")
    chex.assert_trees_all_equal(wide, networks.widen_input(untouched, at=3, by=4))
    wide = networks.widen_input(params, at=3, by=4)
    stage = stages.build_stage({**glide.config, "stages": ["base"], "base": section}, "base")
    z = jax.random.normal(jax.random.key(0), (2, *stage.shape))
    text = glide.tokenizers["text"](["a red circle", ""])
    inpaint = jax.random.uniform(jax.random.key(1), (2, *stage.shape[:2], 4))
    plain = glide.stages[0].net.apply({"params": params}, z, jnp.array([3.0, 30.0]), {"text": text})
    widened = stage.net.apply({"params": wide}, z, jnp.array([3.0, 30.0]), {"text": text, "inpaint": inpaint})
    chex.assert_trees_all_close(plain, widened, atol=1e-5)
    with pytest.raises(UserError, match="may differ by 'inpaint' alone"):
        pipeline.starting_params({**section, "takes": ["inpaint"], "train": {"start_from": trained / "glide"}}, "base")


def test_new_channels_stand_where_the_condition_does():
    kernel = np.arange(2 * 2 * 6 * 3, dtype=np.float32).reshape(2, 2, 6, 3)
    params = {"unet": {"conv_in": {"kernel": kernel, "bias": np.ones(3)}, "other": {}}, "text": {}}
    wide = networks.widen_input(params, at=3, by=4)["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(np.delete(wide, np.s_[3:7], axis=2), kernel)
    assert not np.asarray(wide)[:, :, 3:7].any()


def test_masks_are_boxes_or_their_surroundings():
    keys = jax.random.split(jax.random.key(0), 2000)
    known = np.asarray(augment.random_known(keys, (8, 8, 3), empty=0.25))
    assert known.shape == (2000, 8, 8, 1) and set(np.unique(known)) == {0.0, 1.0}
    nothing = ~known.any((1, 2, 3))
    assert 0.21 < nothing.mean() < 0.33, "a quarter, and a few boxes that fill the picture"
    for mask in known[~nothing][:50, :, :, 0]:
        inside = mask if mask.all((0, 1)) or mask.sum() == mask[mask.any(1)][:, mask.any(0)].sum() else 1 - mask
        box = inside[inside.any(1)][:, inside.any(0)]
        other = (1 - mask)[(1 - mask).any(1)][:, (1 - mask).any(0)]
        assert box.all() or other.all()


def test_small_masks_know_what_is_known_below():
    known = np.ones((1, 4, 4, 1), np.float32)
    known[0, 0, 1] = 0
    x, small = augment.shrink_known(jnp.arange(16.0).reshape(1, 4, 4, 1), jnp.asarray(known), 2)
    np.testing.assert_array_equal(np.asarray(small)[0, :, :, 0], [[0, 1], [1, 1]])
    np.testing.assert_allclose(x[0, 1, 1, 0], np.mean([10, 11, 14, 15]))
    for factor in (1, 3, 4):
        ones = augment.shrink_known(jnp.zeros((1, 12, 12, 1)), jnp.ones((1, 12, 12, 1)), factor)[1]
        assert (np.asarray(ones) == 1).all()


def test_keep_known_puts_the_picture_into_x():
    t = NoiseLevel(time=jnp.ones(1), logsnr=jnp.zeros(1))
    step = schedules.to_clean(t)
    z, picture = jnp.full((1, 2, 2, 1), 0.3), jnp.full((1, 2, 2, 1), -0.5)
    known = jnp.zeros((1, 2, 2, 1)).at[0, 0].set(1)

    def denoise(z, step, **cond):
        return Prediction(x=jnp.full_like(z, 0.9), eps=z, variance=z, logvar=z)

    p = guidance.keep_known()(denoise)(z, step, inpaint=augment.masked(picture, known))
    np.testing.assert_allclose(p.x[0, :, :, 0], [[-0.5, -0.5], [0.9, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(diffuse(p.x, t, p.eps), z, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp_2m"])
def test_replacement_leaves_the_rest_to_the_sampler(name):
    """On independent pixels the unknown ones come out as without a mask, and the known ones as they are."""
    schedule, count = schedules.build({"name": "linear", "steps": 50, "beta_start": 1e-4, "beta_end": 0.02,
                                       "rescale_time": False, "continuous": False})  # fmt: skip
    steps = schedules.build_steps(schedule, count, "20")

    def denoise(z, step, **cond):
        # of data N(0, 1/4), pixel by pixel
        x = z * (step.t.alpha / (step.t.alpha**2 + 4 * step.t.sigma**2))[:, None]
        eps = (z - step.t.alpha[:, None] * x) / step.t.sigma[:, None]
        logvar = step.min_logvar[:, None]
        return Prediction(x=x, eps=eps, variance=jnp.exp(logvar), logvar=logvar)

    keys = jax.random.split(jax.random.key(0), 4)
    noise = samplers.picture_noise(keys, (6,))
    known, x = jnp.array([1.0, 0, 1, 0, 0, 1]), jnp.full((4, 6), 0.25)
    sampler = samplers.SAMPLERS[name](0.0)
    plain = samplers.sample(denoise, noise(jnp.int32(-1)), noise, steps, sampler)
    made = samplers.sample(denoise, noise(jnp.int32(-1)), noise, steps, samplers.keep_known(sampler, x, known))
    np.testing.assert_array_equal(made[:, known > 0], 0.25)
    chex.assert_trees_all_close(made[:, known == 0], plain[:, known == 0], atol=1e-6)
