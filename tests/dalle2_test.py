"""DALL-E 2 on micro models, from the command line to `sample_fn`: CLIP, prior, decoder, upsampler; laws; bad input."""

import dataclasses
import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffax
from diffax import config as configs
from diffax import main, networks
from diffax.diffusion import augment, guidance, schedules
from diffax.diffusion.process import Prediction
from diffax.diffusion.schedules import NoiseLevel, Transition
from diffax.errors import UserError
from diffax.models import codes, stages
from diffax.sampling import pipeline
from diffax.tools import compile_ahead
from diffax.training import loop, parallel

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
    return dataclasses.replace(trained, stages=(*trained.stages, up), params=moved(params, 0.2), config=config)


def moved(params, by):
    """Parameters off their start; what is fitted to the data stays."""
    rng = np.random.default_rng(5)

    def move(path, a):
        fitted = any(getattr(key, "key", "") == "fitted" for key in path)
        return a if fitted else np.float32(a + by * rng.standard_normal(a.shape))

    return jax.tree_util.tree_map_with_path(move, params)


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


def test_zero_shot_accuracy_is_the_nearest_captions(workdir):
    config = configs.to_dict(configs.load("dalle2:tiny", OVERRIDES))
    model, (params, _) = stages.build_clip(config, "clip"), pipeline.load_params(config, "clip", workdir)
    rng, names = np.random.default_rng(0), ["circle", "square", "left_ring"]
    batch = {"image": np.float32(rng.uniform(-1, 1, (10, 8, 8, 3))), "label": rng.integers(0, 3, 10)}
    got = pipeline.zero_shot_accuracy(model, params, config["clip"], batch, names, template="a {}", batch_size=4)
    ids = pipeline.text_tokenizer(config["clip"])(["a circle", "a square", "a left ring"])
    texts = np.asarray(stages.embed_text(model, params, ids)["text_embedding"], float)
    pictures = np.asarray(stages.embed_image(model, params, batch["image"]), float)
    cosines = pictures @ texts.T / np.linalg.norm(texts, axis=1)
    assert got == np.mean(np.argmax(cosines, axis=1) == batch["label"])
    # Every label moved to what was found: all are right.
    found = {**batch, "label": np.argmax(cosines, axis=1)}
    assert pipeline.zero_shot_accuracy(model, params, config["clip"], found, names, template="a {}", batch_size=10) == 1


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


# ---- the autoregressive prior ----------------------------------------------------------------------------------------

AR = ("net.text.width=8", "net.text.layers=1", "net.text.heads=2", "codes.components=3", "codes.buckets=5",
      "codes.examples=16")  # fmt: skip


@pytest.fixture(scope="module")
def ar(workdir, tmp_path_factory):
    """Trained for 4 steps beside the CLIP of the other fixture, moved off its start; the trained one, its folder."""
    folder = tmp_path_factory.mktemp("ar")
    own = [f"config.{o}" for o in (f"clip.workdir={workdir}", "stages=clip,prior", *(f"prior.{o}" for o in AR))]
    flags = ["--config=dalle2:ar,tiny", f"--workdir={folder}", *(f"--{o}" for o in (*OVERRIDES, *own))]
    assert main.run([*flags, "--stage=prior", "--config.prior.train.steps=2"]) == 0
    fitted = (folder / "prior" / "fitted.npz").read_bytes()
    assert main.run([*flags, "--stage=prior"]) == 0
    assert (folder / "prior" / "fitted.npz").read_bytes() == fitted, "resuming fits nothing anew"
    trained = diffax.load(folder)
    return dataclasses.replace(trained, params=moved(trained.params, 0.3)), trained, folder


def test_the_code_prior_makes_embeddings(ar):
    sample_fn, trained, folder = ar
    stage = sample_fn.stages[0]
    assert sample_fn.takes == ("text", "clip_text") and stage.is_guided and stage.num_steps == 3
    rows = [json.loads(line) for line in (folder / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert all(0 <= row["top1"] <= 1 and abs(row["loss"] - np.log(5)) < 1 and row["finite"] == 1 for row in rows)
    made = sample_fn(0, prompt=PROMPTS)
    chex.assert_shape(made, (4, 4))
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 3.0, rtol=1e-5)
    # each is the codec's reading of one of the 5^3 rows of codes
    codec = codes.Codec(**trained.params["prior"]["fitted"])
    every = np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)
    there = guidance.unit(codes.read(every, codec))
    assert (np.max(made / 3 @ np.asarray(there).T, axis=1) > 1 - 1e-5).all()
    chex.assert_trees_all_close(sample_fn(0, 1, prompt=PROMPTS[0]), made[:1], atol=1e-5)
    free = [sample_fn(0, 24, prompt=p, guidance=0.0) for p in ("a red circle", "a blue square")]
    chex.assert_trees_all_close(*free, atol=1e-5)
    told = [sample_fn(0, 24, prompt=p, guidance=4.0) for p in ("a red circle", "a blue square")]
    assert np.abs(told[0] - told[1]).max() > 1e-2


@pytest.mark.slow
def test_parameters_cut_over_the_devices_make_the_same(dalle2, made, ar, monkeypatch):
    """As under fsdp, with what is fitted to the data; every array of them whose sides 4 devices divide."""
    prior, _, _ = ar
    gathered, unbox = set(), parallel.Shard.unbox
    monkeypatch.setattr(parallel.Shard, "unbox", lambda shard: (gathered.add(shard.part.shape), unbox(shard))[1])
    cut, cut_prior = (dataclasses.replace(s, config={**s.config, "parallel": "fsdp"}) for s in (dalle2, prior))
    chex.assert_trees_all_close(cut(0, prompt=PROMPTS, every_stage=True), made, atol=1e-4)
    chex.assert_trees_all_close(cut_prior(0, prompt=PROMPTS), prior(0, prompt=PROMPTS), atol=1e-5)
    assert len(gathered) > 20
    there = parallel.settled(dalle2.params, "fsdp")
    assert compile_ahead.device_bytes(there) < 0.4 * compile_ahead.tree_bytes(there)


def test_the_loss_of_codes_is_their_cross_entropy(ar):
    sample_fn, _, _ = ar
    stage, params = sample_fn.stages[0], sample_fn.params["prior"]
    codec = codes.Codec(**params["fitted"])
    rng = np.random.default_rng(2)
    x, text = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    ids = np.asarray(sample_fn.tokenizers["text"](["a red circle"] * 6))
    batch = {"image_embedding": x, "text_embedding": text, "text": ids}
    objective = stages.objective(dataclasses.replace(stage, null={}))

    @jax.jit
    def both(keys):
        got = objective.loss(params, codec, batch, keys, jnp.arange(6), 6)
        similarity = jnp.searchsorted(codec.similarity_edges, jnp.sum(x * text, 1), side="right")
        cond = {"text": ids, "text_embedding": text, "similarity": similarity}
        wanted = codes.write(x, codec)
        return got, wanted, stage.net.apply({"params": params}, wanted, None, cond)

    (loss, metrics, feedback), wanted, logits = both(jax.random.split(jax.random.key(0), 6))
    coordinates = (x - codec.mean).astype(np.float64) @ codec.directions
    by_hand = (coordinates[..., None] >= codec.edges[None]).sum(-1)
    np.testing.assert_array_equal(wanted, by_hand)
    p = np.exp(np.asarray(logits, np.float64))
    each = -np.log(np.take_along_axis(p, by_hand[..., None], -1)[..., 0] / p.sum(-1))
    np.testing.assert_allclose(loss, each.mean(1), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_q1"][0] / metrics["loss_q1"][1], each[:, 1].mean(), rtol=1e-4)
    assert feedback == ()


def test_pictures_that_fit_are_asked_for(ar, monkeypatch):
    """The buckets of the upper half of the products in training, 5 at quantiles: from the third on."""
    sample_fn, _, _ = ar
    asked, params = [], sample_fn.params["prior"]
    monkeypatch.setattr(
        networks, "sample_codes", lambda net, params, context, keys, **_: jnp.zeros((len(keys), 3), int)
    )
    monkeypatch.setattr(networks, "merge", lambda contexts: asked.append(contexts[-1].sequence[:, 0]))
    cond = {"text": jnp.zeros((60, 8), int), "text_embedding": jnp.zeros((60, 4))}
    keys = jax.random.split(jax.random.key(0), 60)
    stages.write_embeddings(sample_fn.stages[0], params, keys, cond, jnp.float32(1))
    table = params["similarity"]["embed"]["embedding"]
    found = [{int(np.abs(table - row).sum(1).argmin()) for row in np.asarray(rows)} for rows in asked]
    assert found == [{5}, {2, 3, 4}], "withheld first, then given"


def test_the_codec_is_needed_and_must_fit_the_data(ar, workdir, tmp_path, capsys):
    _, _, folder = ar
    (folder / "prior" / "fitted.npz").rename(tmp_path / "kept.npz")
    with pytest.raises(UserError, match="cannot read what was fitted to the data"):
        diffax.load(folder)
    (tmp_path / "kept.npz").rename(folder / "prior" / "fitted.npz")
    stage = stages.build_stage(configs.to_dict(configs.load("dalle2_prior_ar:tiny")), "prior")
    section = {"codes": dict(components=3, buckets=9, examples=8), "train": {"start_from": ""}}
    rows = {"image_embedding": np.eye(4, dtype=np.float32), "text_embedding": np.eye(4, dtype=np.float32)}
    with pytest.raises(UserError, match="8 values are too few for 9 buckets.*prior.codes"):
        pipeline.with_codec(stage, section, tmp_path, itertools.repeat(rows))


# ---- the variance of the diffusion prior -----------------------------------------------------------------------------


def test_what_the_prior_leaves_open_is_measured(workdir, dalle2):
    stage, params = dalle2.stages[0], dalle2.params["prior"]
    fitted = params["fitted"]
    assert fitted["step"] == 4 and stage.analytic and stage.variance == "fixed_small"
    assert (np.diff(fitted["logsnr"]) > 0).all() and (fitted["residual"] >= 0).all() and len(fitted["residual"]) == 25
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    ids, text = np.asarray(dalle2.tokenizers["text"](["a red circle"] * 8)), jnp.asarray(x[::-1])
    batch, keys = {"image_embedding": x, "text": ids, "text_embedding": text}, jax.random.split(jax.random.key(0), 8)
    got = jax.jit(stages.residual_fn(stage, np.array([1.0, 0.5])))(params, batch, keys)[:, 1]
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (4,)))(keys)
    level = stage.schedule(np.array([0.5]))
    z = np.sqrt(jax.nn.sigmoid(level.logsnr)) * x + np.sqrt(jax.nn.sigmoid(-level.logsnr)) * eps
    f = jax.jit(stage.net.apply)(
        {"params": params}, z, jnp.full(8, level.time[0]), {"text": ids, "text_embedding": text}
    )
    np.testing.assert_allclose(got, np.mean(x**2, 1) - np.mean(np.asarray(f, np.float64) ** 2, 1), rtol=1e-3, atol=1e-4)


def test_the_analytic_variance_is_that_of_a_gaussian():
    """Of x ~ N(0, s^2) the reverse step is a normal, whose variance follows from the joint of z_s and z_t."""
    s2 = 0.3
    steps = schedules.respaced(schedules.discrete(schedules.cosine_betas(1000)), 1000, "10")
    a_t, a_s = (np.asarray(jax.nn.sigmoid(jnp.asarray(level.logsnr)), np.float64) for level in (steps.t, steps.s))
    var_t, var_s = (a * s2 + 1 - a for a in (a_t, a_s))
    want = var_s - (np.sqrt(a_t / a_s) * var_s) ** 2 / var_t
    want[-1] = 0
    residual = s2 * (1 - a_t) / var_t
    got = stages.analytic_variance(jnp.zeros((10, 3)), jax.tree.map(jnp.asarray, steps), jnp.asarray(residual))
    np.testing.assert_allclose(got[:, 0], want, rtol=2e-3, atol=1e-6)
    assert (want[:-1] > 1.05 * np.exp(steps.min_logvar[:-1])).sum() >= 5, "more than the small fixed variance"


# ---- sharpness-aware minimisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices, accumulate", [(1, 1), (1, 2), (2, 1)])
def test_sharpness_aware_minimisation_on_a_quadratic(devices, accumulate):
    """Every device, or microbatch, climbs by its own gradient; the gradients found there are averaged."""
    curvature, rho, rate = np.array([1.0, 10.0, 0.1]), 0.5, 0.1

    def loss(params, extra, batch, keys, position, total, gather=None):
        value = 0.5 * jnp.sum(curvature * (params["w"] - batch["x"]) ** 2, 1)
        return value, {}, ()

    objective = stages.Objective(lambda key: {"w": jnp.array([1.0, -2.0, 3.0])}, lambda: (), loss, lambda e, f: e)
    tx = optax.sgd(rate)
    state = loop.init_state(jax.random.key(0), objective=objective, tx=tx, ema=())
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    step = functools.partial(
        loop.train_step, objective=objective, tx=tx, schedule=lambda count: rate, accumulate=accumulate, sam=rho
    )
    if devices > 1:
        step = functools.partial(step, axis_name="data")
        after, _ = jax.jit(jax.vmap(step, (None, 0), axis_name="data"))(state, {"x": x.reshape(devices, -1, 3)})
        chex.assert_trees_all_close(after.params["w"][0], after.params["w"][1])
        got, parts = after.params["w"][0], x.reshape(devices, -1, 3)
    else:
        got = jax.jit(step)(state, {"x": x})[0].params["w"]
        parts = [x[i::accumulate] for i in range(accumulate)]
    w, slopes = np.array([1.0, -2.0, 3.0]), []
    for part in parts:
        g = curvature * (w - part.mean(0, dtype=np.float64))
        slopes.append(curvature * (w + rho * g / np.linalg.norm(g) - part.mean(0, dtype=np.float64)))
    np.testing.assert_allclose(got, w - rate * np.mean(slopes, 0), rtol=1e-5)


# ---- laws ------------------------------------------------------------------------------------------------------------


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
    got = {k: np.asarray(v) == 0 for k, v in augment.drop(cond, keys, rate=rates, null=null).items()}
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


@pytest.mark.parametrize("spec", ["dalle2", "dalle2:ar", "karlo"])
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
        ("up.variance=analytic", ["config.up.variance", "'unet'"]),
        ("up.data.embeddings=x", ["config.up.data.embeddings", "no image embedding"]),
        ("eval.template=a picture", ["config.eval.template", "one {}"]),
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


@pytest.mark.parametrize(
    "override, words",
    [
        ("codes.components=33", ["config.prior.codes.components", "32"]),
        ("codes.examples=10", ["config.prior.codes.examples", "64"]),
        ("takes=text", ["config.prior.takes", "'text_embedding'"]),
        ("guidance=clip_denoised", ["config.prior.guidance", "'classifier_free'"]),
        ("net.name=prior", ["config.prior.codes", "'code_prior'"]),
    ],
)
def test_bad_configs_of_the_code_prior_get_one_line(override, words):
    with pytest.raises(UserError) as caught:
        configs.validate(configs.load("dalle2_prior_ar:tiny", [f"config.prior.{override}"]))
    assert all(word in str(caught.value) for word in words), caught.value


def test_bits_per_dimension_are_not_of_a_decoder():
    config = configs.load("dalle2_decoder_64:tiny", ["config.eval.bpd_num=4"])
    with pytest.raises(UserError, match="config.eval.bpd_num must be 0"):
        configs.validate(config)
