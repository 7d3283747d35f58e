"""Scores of untrained micro systems: what every row has, and that the numbers are those of their definitions."""

import dataclasses

import jax
import numpy as np
import pytest

from diffax import config as configs
from diffax.components import spec
from diffax.data import images
from diffax.data.pipeline import Column
from diffax.evaluation import metrics, scores
from diffax.models.base import Sampling
from diffax.sampling import grids
from tests.evaluation import digits
from tests.models import micro, systems
from tests.sampling import untrained

NAMES = [str(i) for i in range(10)]
SETTINGS = dict(num=12, batch_size=8, bpd_num=0)


def settings(**fields):
    return {**configs.to_dict(configs.new("eval"))["eval"], **SETTINGS, **fields}


@pytest.fixture(scope="module")
def classes():
    return untrained.sample_fn(digits.of(systems.classes()))


@pytest.fixture(scope="module")
def cascade():
    return untrained.sample_fn(digits.of(systems.cascade()))


@dataclasses.dataclass(frozen=True)
class Known:
    """An evaluation classifier, fitted already: the share of values that begin with a letter."""

    letter: str

    argument, accuracy, shares = "prompt", 1.0, ("accuracy",)
    columns = {"caption": Column("caption")}

    def fit(self, section, shape):
        assert section["train"] and shape == (8, 8, 3)
        return self

    def score(self, made, wanted, real):
        assert len(made) == len(wanted) and {"image", "caption"} <= {*real}
        return {"accuracy": float(np.mean([text.startswith(self.letter) for text in wanted]))}

    def others(self, num):
        return {"unseen": ["zz"] * (num // 4)}


def known(*, letter: str = "z") -> Known:
    """See `Known`."""
    return Known(letter)


# ---- bits per dimension ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8])
def test_bits_per_dim_are_those_of_all_pictures_at_once(classes, size):
    (model,) = classes.models
    batch = scores.guide_examples({**classes.config, "eval": {"num": 5}}, model)
    found = scores.bits_per_dim(model, classes.params["base"], batch, batch_size=size)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.arange(5))
    want = jax.jit(model.bits_per_dim)(classes.params["base"], batch["image"], keys, {"label": batch["label"]})
    np.testing.assert_allclose(found.total, want.total, rtol=1e-4)
    assert found.terms.shape == (5, 4) and np.isfinite(found.total).all()


def test_rows_have_the_bound_of_their_steps(classes, cascade):
    rows = list(scores.scores(classes, settings(num=0, bpd_num=3, steps=["2", "4"], guidance=[1.0, 2.0])))
    assert [(row["steps"], row["guidance"]) for row in rows] == [(2, 1.0), (4, 1.0), (2, 2.0), (4, 2.0)]
    first, second = rows[0]["bits_per_dim"], rows[1]["bits_per_dim"]
    assert first != second and [row["bits_per_dim"] for row in rows[2:]] == [first, second]
    assert all("samples" not in row and len(row["_curve"].rate) == row["steps"] for row in rows)
    (row,) = scores.scores(cascade, settings(num=0, bpd_num=3))
    assert row["bits_per_dim"] > 0 and row["level"] == 0.5 and "guidance" not in row


# ---- samples --------------------------------------------------------------------------------------------------------


def test_samples_of_labels_are_scored_by_a_classifier_of_real_pictures(classes):
    rows = list(scores.scores(classes, settings(guidance=[0.0, 2.0], samplers=["ddim"]), NAMES))
    assert [(row["sampler"], row["guidance"], row["steps"]) for row in rows] == [("ddim", 0.0, 4), ("ddim", 2.0, 4)]
    for row in rows:
        assert row["samples"] == 12 and 0 <= row["accuracy"] <= 1 and row["diversity"] > 0
        assert row["_labels"] == [*NAMES, "0", "1"] and "bits_per_dim" not in row
    label = np.arange(12) % 10
    made = classes(1, 12, label=label, guidance=2.0, sampler="ddim", batch_size=8)
    np.testing.assert_allclose(rows[1]["_samples"], made, atol=1e-5)
    real = grids.held_out_examples(classes.config["base"], (8, 8, 3), 12)["image"]
    want = metrics.frechet_distance(metrics.patches(made), metrics.patches(real))
    assert rows[1]["frechet_patches"] == pytest.approx(want, rel=1e-3)


def test_levels_are_those_of_the_last_stage(cascade):
    rows = list(scores.scores(cascade, settings(levels=[0.0, 0.25])))
    assert [row["level"] for row in rows] == [0.0, 0.25] and "guidance" not in rows[0]
    assert rows[0]["frechet_patches"] != rows[1]["frechet_patches"]
    assert rows[0]["_samples"].shape == (12, 16, 16, 3)


def test_captions_are_scored_where_a_classifier_reads_them_and_a_prior_keeps_its_scale():
    sample_fn = untrained.unclip()
    name = "tests.evaluation.scores_test:known"
    classifier = configs.to_dict(spec("evaluation", name))
    (row,) = scores.scores(sample_fn, settings(guidance=[3.0], classifier=classifier))
    real = grids.held_out_examples(sample_fn.config["decoder"], (8, 8, 3), 12, {"caption": Column("caption")})
    captions = [str(text) for text in real["caption"]]
    assert row["accuracy"] == np.mean([text.startswith("z") for text in captions])
    assert (row["unseen_samples"], row["unseen_accuracy"], row["guidance"]) == (3, 1.0, 3.0)
    assert row["_labels"] == captions[: len(row["_samples"])]
    made = sample_fn(1, prompt=captions, guidance={"decoder": 3.0}, batch_size=8)
    np.testing.assert_allclose(row["_samples"], made[: len(row["_samples"])], atol=1e-4)
    # one of labels scores nothing that is made from captions
    (plain,) = scores.scores(sample_fn, settings())
    assert set(row) - set(plain) == {"accuracy", "unseen_samples", "unseen_accuracy"}
    assert "bits_per_dim" not in plain


def test_enlargements_stand_beside_bicubic_ones(cascade):
    alone = cascade.alone("up")
    rows = list(scores.enlargements(alone, settings(num=6, levels=[0.25, 0.5])))
    assert [(row["method"], row.get("level")) for row in rows] == [("bicubic", None), ("up", 0.25), ("up", 0.5)]
    real = grids.held_out_examples(cascade.config["up"], (16, 16, 3), 6)["image"]
    small = images.as_floats(images.to_uint8(grids.smaller(real, 2), nearest=True))
    assert rows[0]["psnr"] == pytest.approx(metrics.psnr(images.bicubic(small, 2), real))
    np.testing.assert_array_equal(rows[1]["_small"], small)
    assert rows[1]["_made"].shape == rows[1]["_real"].shape == (6, 16, 16, 3) and rows[0]["pictures"] == 6


# ---- classifiers and CLIPs ------------------------------------------------------------------------------------------


def test_the_accuracy_of_a_noised_classifier_by_noise_level():
    system = systems.guided()
    model, params = system.model("classifier"), micro.params_of(system)["classifier"]
    batch = {**micro.batch_of(model, 10)}
    found = scores.guide_accuracy(model, params, batch, batch_size=4, levels=5)
    assert {*found} == {"u", "loss", "top1", "top5"} and np.ptp(found["loss"]) > 0
    np.testing.assert_allclose(found["u"], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert (found["top5"] == 1).all(), "of three classes"
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.arange(10))
    eps = jax.vmap(lambda key: jax.random.normal(key, model.shape))(keys)
    want = model.terms(params, batch, model.schedule(np.full(10, 0.4, np.float32)), eps)
    assert found["loss"][1] == pytest.approx(float(want["loss"].mean()), rel=1e-4)


def test_a_clip_of_clean_pictures_has_one_accuracy_and_one_of_classes():
    system = micro.system(("base", "clip"), base=micro.section(), clip=micro.clip())
    model, params = system.model("clip"), micro.params_of(system)["clip"]
    config = {**configs.to_dict(system.config), "eval": settings(num=20, batch_size=4)}
    batch, names = scores.guide_examples(config, model), NAMES
    assert {"image", "label", "text"} <= {*batch}
    found = scores.guide_scores(config, model, params, batch, names)
    assert np.ptp(found["image_top1"]) == 0 and len(found["u"]) == 20
    texts = np.asarray(model.embed_text(params, model.tokenizer([f"a photo of a {name}." for name in names])).embedding)
    image = np.asarray(model.embed_image(params, batch["image"]))
    cosines = image @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    assert found["zero_shot"][0] == np.mean(cosines.argmax(1) == batch["label"])
    assert "zero_shot" not in scores.guide_scores(config, model, params, batch, [])


def test_steps_of_a_row_are_those_taken(classes):
    assert classes.models[0].resampled(Sampling(steps="3")).num_steps == 3
    (row,) = scores.scores(classes, settings(num=0, steps=["ddim3"]))
    assert row["steps"] == 3
