"""DALL-E 2 on micro models, from the command line to `sample_fn`: CLIP, prior, decoder, upsampler; laws; bad input."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffax
from diffax import codes, conditioning, guidance, main, pipeline, stages
from diffax import config as configs
from diffax.errors import UserError
from diffax.process import Prediction
from diffax.schedules import NoiseLevel, Transition

TEXT = ("text.length=8", "net.text.width=8", "net.text.layers=1", "net.text.heads=2")
UNET = ("net.channels=8", "net.channel_mult=1,", "net.groups=4", "net.attention=none", "net.head_channels=4", "steps=3")
SECTIONS = {
    "clip": (
        *("shape=8,8,3", "net.features=4", "net.image.patch=4", "net.image.width=8", "net.image.layers=1"),
        *("net.image.heads=2", *TEXT),
    ),
    "prior": (
        *("shape=4,", "text.length=8", "net.prior.width=8", "net.prior.layers=1", "net.prior.heads=2"),
        *("steps=3", "guidance_scale=2"),
    ),
    "decoder": ("shape=8,8,3", *TEXT, *UNET),
    "up": ("shape=16,16,3", "low_res.crop=8", *(o for o in UNET if "head" not in o)),
}
TRAIN = (
    *("schedule.steps=40", "train.steps=4", "train.batch_size=8", "train.log_every=2", "train.save_every=4"),
    *("train.sample_every=0", "train.warmup_steps=0"),
)
OVERRIDES = (
    *(f"config.{name}.{o}" for name, own in SECTIONS.items() for o in (*own, *TRAIN)),
    *("config.sample.num=4", "config.sample.batch_size=4", "config.eval.num=0", "config.eval.guidance=none"),
)
PROMPTS = ["a red circle", "a large blue ring at the top left", "a green cross", ""]


def flags(workdir, *more: str) -> list[str]:
    return ["--config=dalle2:tiny", f"--workdir={workdir}", *(f"--{o}" for o in OVERRIDES), *more]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """CLIP and prior trained by one command, the decoder by another; the upsampler, an ordinary one, is left out."""
    folder = tmp_path_factory.mktemp("dalle2")
    assert main.run(flags(folder, "--config.stages=clip,prior")) == 0
    assert main.run(flags(folder, "--stage=decoder")) == 0
    return folder


@pytest.fixture(scope="module")
def dalle2(workdir):
    """With an untrained upsampler, all moved off their start, where the last layers are zero and nothing is read."""
    config = configs.to_dict(configs.load("dalle2:tiny", OVERRIDES))
    trained = diffax.load(workdir, config={**config, "stages": ["clip", "prior", "decoder"]})
    assert [s.name for s in trained.stages] == ["prior", "decoder"] and set(trained.params) == {"clip", *trained.step}
    up = stages.build_stage(config, "up")
    shapes = jax.eval_shape(functools.partial(stages.init_params, up), jax.random.key(1))
    params = {**trained.params, "up": jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)}
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda a: np.float32(a + 0.2 * rng.standard_normal(a.shape)), params)
    return dataclasses.replace(trained, stages=(*trained.stages, up), params=moved, config=config)


@pytest.fixture(scope="module")
def made(dalle2):
    return dalle2(0, prompt=PROMPTS, every_stage=True)


def test_training_reports(workdir):
    rows = {
        name: [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("clip", "prior", "decoder")
    }
    assert all(np.isfinite(row["loss"]) and row["finite"] == 1 for of in rows.values() for row in of if "loss" in row)
    assert all(-1 <= row["cosine"] <= 1 for row in rows["prior"] if "loss" in row)
    assert "text_top1" in rows["clip"][0] and "vb" in rows["decoder"][0]


def test_one_call_goes_from_prompt_to_the_largest_picture(dalle2, made):
    assert dalle2.takes == ("text", "clip_text")
    chex.assert_shape([made[n] for n in ("prior", "decoder", "up")], [(4, 4), (4, 8, 8, 3), (4, 16, 16, 3)])
    chex.assert_tree_all_finite(made)


def test_a_prior_alone(dalle2, made):
    """Guidance 0 forgets the caption, and a network that answers zero makes the mean of what is scaled."""
    mean, std = np.arange(4, dtype=np.float32), np.full(4, 2, np.float32)
    first = dalle2.stages[0]
    scaled = dataclasses.replace(first.clip, scale=codes.Scale(mean, std))
    prior = dataclasses.replace(dalle2, stages=(dataclasses.replace(first, candidates=1, clip=scaled),))
    others = ["a blue square"] * 4
    free, told = ([prior(0, prompt=p, guidance=scale) for p in (PROMPTS, others)] for scale in (0.0, 2.0))
    chex.assert_trees_all_close(free[0], free[1], atol=1e-5)
    assert np.abs(told[0] - told[1]).max() > 1e-3
    assert np.abs(free[0][0] - free[0][1]).max() > 1e-3, "another number, another embedding"
    zero = {**dalle2.params, "prior": jax.tree.map(np.zeros_like, dalle2.params["prior"])}
    np.testing.assert_allclose(dataclasses.replace(prior, params=zero)(0, prompt=others), [mean] * 4, atol=1e-5)
    again = dalle2(0, prompt=others, every_stage=True)
    assert np.abs(again["decoder"] - made["decoder"]).max() > 1e-3


def test_variations_of_a_picture(dalle2):
    decoder = dataclasses.replace(dalle2.starting_at("decoder"), stages=dalle2.stages[1:2])
    assert decoder.takes == ("text", "image_embedding")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    embedding = decoder.embed(pictures)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 3.0, rtol=1e-5)
    chex.assert_trees_all_close(decoder.embed(pictures[0]), embedding[0], atol=1e-5)
    chex.assert_shape(decoder.embed(pictures.repeat(2, 1).repeat(2, 2)), (2, 4))
    first, second = (decoder(0, 2, image_embedding=e, prompt="") for e in embedding)
    assert np.abs(first - second).max() > 1e-4, "another embedding, another picture"
    assert np.abs(first[0] - first[1]).max() > 1e-3, "another number, another picture"
    cond = pipeline.sample_conditions(decoder, 3)
    assert cond["image_embedding"].shape == (3, 4) and len(set(cond["prompt"])) == 3
    for given, words in (
        ({"prompt": ""}, "image_embedding=sample_fn.embed"),
        ({"prompt": "", "image_embedding": np.zeros(5)}, r"pass \[4\]"),
        ({"prompt": "", "image_embedding": np.full(4, np.nan)}, "not finite"),
        ({"image_embedding": np.zeros(4)}, "prompt="),
    ):
        with pytest.raises(UserError, match=words):
            decoder(0, **given)
    with pytest.raises(UserError, match="is not taken"):
        dalle2(0, prompt="", image_embedding=np.zeros(4))


def test_an_embedding_alone_is_no_picture(workdir, tmp_path, capsys):
    for command, words in (
        (flags(workdir, "--mode=sample", "--config.stages=prior"), "prior makes embeddings"),
        (flags(tmp_path / "new", "--stage=prior", "--config.stages=clip,prior,decoder"), "there is no checkpoint"),
    ):
        assert main.run(command) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_the_nearest_candidate_is_kept():
    rng = np.random.default_rng(0)
    candidates, wanted = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 4))
    best = [max(some, key=lambda e, w=w: e @ w) for some, w in zip(candidates, wanted, strict=True)]
    got = stages._nearest(jnp.asarray(candidates.reshape(15, 4)), jnp.asarray(wanted))
    np.testing.assert_allclose(got, np.stack(best), rtol=1e-5)


def test_a_withheld_caption_is_the_empty_one(dalle2):
    prior, params = dalle2.stages[0], dalle2.params["clip"]
    ids = dalle2.tokenizers["clip_text"](["", "a red circle"])
    told = jax.jit(functools.partial(stages.embed_text, prior.clip))(params, ids)
    null = stages.withholding_captions(prior, params).null
    chex.assert_trees_all_close(null["text_embedding"], told["text_embedding"][0], atol=1e-6)
    assert np.isnan(told["text_features"][0]).all() and null["text"] == -1
    padded = np.asarray(ids[1]) < 0
    np.testing.assert_array_equal(np.isnan(told["text_features"][1]).all(-1), padded)
    config = configs.to_dict(configs.load("karlo:tiny", ["config.clip.text.tokenizer=clip"]))
    assert list(stages.build_clip(config, "clip").empty[:3]) == [49406, 49407, -1]


def test_batches_become_what_training_reads(dalle2):
    prior, decoder = dalle2.stages[:2]
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    batch = {"image": pictures, "clip_text": dalle2.tokenizers["clip_text"](PROMPTS[:2])}
    params = dalle2.params["clip"]
    made = jax.jit(stages.embed_batch(prior))(params, batch)
    assert set(made) == {"image_embedding", "text_embedding"}
    chex.assert_trees_all_close(made["image_embedding"], dalle2.embed(pictures), atol=1e-5)
    made = jax.jit(stages.embed_batch(decoder))(params, batch)
    assert set(made) == {"image_embedding", "image"}
    np.testing.assert_allclose(made["image"], pictures.reshape(2, 8, 2, 8, 2, 3).mean((2, 4)), atol=1e-6)


def test_conditions_are_withheld_in_groups():
    cond = {name: jnp.ones((4000,)) for name in ("image_embedding", "text", "text_embedding", "low_res")}
    null = dict.fromkeys(("image_embedding", "text", "text_embedding"), 0.0)
    keys, rates = (
        jax.random.split(jax.random.key(0), 4000),
        {("image_embedding",): 0.1, ("text", "text_embedding"): 0.5},
    )
    got = {k: np.asarray(v) == 0 for k, v in conditioning.drop(cond, keys, rate=rates, null=null).items()}
    np.testing.assert_array_equal(got["text"], got["text_embedding"])
    both = got["text"] & got["image_embedding"]
    shares = [of.mean() for of in (got["image_embedding"], got["text"], both, got["low_res"])]
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.05, 0], atol=0.03)
    decoder = stages.build_stage(configs.to_dict(configs.load("dalle2:tiny", OVERRIDES)), "decoder")
    assert stages._drop_rates(decoder) == {("image_embedding",): 0.1, ("text",): 0.5}


def test_another_network_finishes():
    def denoiser(value):
        return lambda z, step, **cond: Prediction(value * z, z, jnp.ones(()), jnp.zeros(()))

    z, level = jnp.ones((2, 3)), NoiseLevel(jnp.ones(2), jnp.zeros(2))
    for logsnr, want in ((jnp.inf, 5.0), (1.0, 2.0)):
        step = Transition(level, NoiseLevel(jnp.zeros(2), jnp.full(2, logsnr)), jnp.zeros(2), jnp.zeros(2))
        got = jax.jit(guidance.finish_with(denoiser(5.0))(denoiser(2.0)))(z, step)
        np.testing.assert_array_equal(got.x, want * z)


def test_the_last_step_of_karlo_is_anothers():
    config = configs.load("karlo:tiny")
    assert configs.trained_sections(config) == ("clip", "prior", "decoder", "up", "up_last")
    up = stages.build_stages(configs.to_dict(config))[-1]
    assert up.sections == ("up", "up_last") and up.reads == ("low_res",)
    assert up.sampling.t.time.shape == (7,)


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_what_sections_read_and_when_they_are_trained():
    for spec, want in (
        ("dalle2", {"clip": (256, 256, 3), "prior": (256, 256, 3), "decoder": (256, 256, 3), "up": (256, 256, 3)}),
        ("karlo", {"clip": (224, 224, 3), "prior": (224, 224, 3), "decoder": (256, 256, 3), "up_last": (256, 256, 3)}),
    ):
        config = configs.load(spec)
        assert {name: configs.picture_shape(config, name) for name in want} == want
    alone = configs.load("dalle2_prior")
    assert configs.trained_sections(alone) == ("clip", "prior")
    assert not configs.makes_pictures(alone.prior) and configs.is_sampled(alone.prior)


@pytest.mark.parametrize("spec", ["dalle2", "karlo"])
def test_whole_systems_have_the_stages_of_their_parts(spec):
    config = configs.load(spec)
    configs.validate(config, device_count=8)
    found = [s.name for s in stages.build_stages(configs.to_dict(config))]
    assert found == [name for name in config.stages if name != "clip"]


@pytest.mark.parametrize(
    "override, words",
    [
        ("prior.shape=8,8,3", ["config.prior.shape", "one number"]),
        ("prior.shape=64,", ["config.prior.shape", "(32,)", "config.clip.net.features"]),
        ("decoder.shape=32,", ["config.decoder.shape", "(height, width, 3)"]),
        ("decoder.shape=32,16,3", ["config.decoder.shape", "proportions"]),
        ("prior.takes=text,low_res", ["config.prior.takes", "'low_res'"]),
        ("prior.clip=", ["config.prior.clip", "there is clip"]),
        ("decoder.clip=up", ["config.prior.clip", "'up'", "one CLIP"]),
        ("up.clip=clip", ["config.up.clip", "'image_embedding'"]),
        ("clip.net.image.noised=true", ["config.clip.net.image.noised", "false"]),
        ("clip.embedding.std=1,1,1", ["config.clip.embedding.std", "32"]),
        ("decoder.embedding.norm=1", ["config.decoder.embedding", "'clip'"]),
        ("decoder.net.prior.width=8", ["config.decoder.net.prior", "'prior'"]),
        ("prior.net.prior.heads=3", ["config.prior.net.prior.heads", "128"]),
        ("prior.loss.name=vlb", ["config.prior.loss.name", "'simple'"]),
        ("prior.timesteps.name=loss_second_moment", ["config.prior.timesteps.name", "'uniform'"]),
        ("prior.predicts=previous_x", ["config.prior.predicts", "'x'"]),
        ("prior.guidance=dynamic_threshold", ["config.prior.guidance", "'classifier_free'"]),
        ("prior.limit=10", ["config.prior.limit", "'clip_denoised'"]),
        ("decoder.candidates=2", ["config.decoder.candidates", "no prior"]),
        ("up.drop_text=0.5", ["config.up.drop_text", "config.up.drop"]),
        ("decoder.text.length=12", ["config.decoder.text", "config.prior.text"]),
        ("up.last=nothing", ["config.up.last", "another section"]),
        ("up.last=decoder", ["config.up.shape", "config.decoder"]),
    ],
)
def test_bad_configs_get_one_line(override, words):
    config = configs.load("dalle2:tiny", [f"config.{override}"])
    with pytest.raises(UserError) as caught:
        configs.validate(config)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_bits_per_dimension_are_not_of_a_decoder():
    config = configs.load("dalle2_decoder_64:tiny", ["config.eval.bpd_num=4"])
    with pytest.raises(UserError, match="config.eval.bpd_num must be 0"):
        configs.validate(config)
