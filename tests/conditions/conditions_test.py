"""Conditions by themselves: what users may give, what data must hold, and a condition of one's own."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.conditions.base import Condition, Offer, one_each
from diffax.conditions.inpaint import Inpaint
from diffax.conditions.label import Label
from diffax.conditions.low_res import LowRes
from diffax.data.source import Source
from diffax.diffusion import augment, schedules
from diffax.errors import UserError
from diffax.models import cascade
from diffax.networks.context import Context
from tests.models import micro, systems

LABEL = Label(name="label", num_classes=3)
TEXT = micro.model(conditions=micro.conditions(text=micro.text())).conditions["text"]
LOW_RES = LowRes(
    name="low_res", shape=(8, 8, 3), factor=2, noise=0.5, level=0.1, schedule=schedules.cosine(num_timesteps=40)
)
EMBEDDING = systems.dalle2().model("decoder").conditions["image_embedding"]


# ---- what users give ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "value", "words"),
    [
        (LABEL, 3, "label 3 is out of range; sample_fn; labels are 0 to 2"),
        (LABEL, -1, "label -1 is out of range"),
        (LABEL, 1.5, "label is 1.5; sample_fn; pass an integer"),
        (LABEL, [[1], [2, 3]], "pass an integer, or a list"),
        (LABEL, [1, 2, 0], "3 values of label for 2 pictures"),
        (TEXT, [], "there are no prompts"),
        (TEXT, 3, "prompt is 3; sample_fn; pass a text"),
        (TEXT, ["a", 3], "pass a text, or a list of texts"),
        (TEXT, ["a", "b", "c"], "3 values of prompt for 2 pictures"),
        (LOW_RES, np.zeros((4, 4)), "pass one picture .h, w, 3."),
        (LOW_RES, np.zeros((4, 4, 1)), "pass one picture .h, w, 3."),
        (LOW_RES, "photo.png", "pass one picture .h, w, 3."),
        (LOW_RES, np.full((4, 4, 3), 1.5), "outside .-1, 1."),
        (LOW_RES, np.full((4, 4, 3), np.nan), "outside .-1, 1."),
        (LOW_RES, np.zeros((3, 4, 4, 3)), "3 values of image for 2 pictures"),
        (EMBEDDING, np.zeros(5), "pass .4. or .n, 4."),
        (EMBEDDING, np.full(4, np.inf), "image_embedding is not finite"),
        (EMBEDDING, "red", "image_embedding is"),
    ],
)
def test_what_users_may_not_give_gets_one_line(condition, value, words):
    with pytest.raises(UserError, match=words) as caught:
        condition.from_user(value, 2)
    assert "\n" not in str(caught.value)


def test_one_value_serves_all_pictures():
    np.testing.assert_array_equal(LABEL.from_user(np.int64(2), 3), [2, 2, 2])
    np.testing.assert_array_equal(TEXT.from_user("a red circle", 2), TEXT.from_user(["a red circle"] * 2, 2))
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    found = LOW_RES.from_user(image, 2)
    assert found["image"].shape == (2, 4, 4, 3) and np.abs(found["image"]).max() <= 1
    np.testing.assert_allclose(found["level"], 0.1)
    assert one_each("x", np.zeros(3), 2, 1).shape == (2, 3)
    counts = [LABEL.count(1), LABEL.count([1, 2]), TEXT.count("a"), TEXT.count(["a"]), LOW_RES.count(image)]
    assert counts == [None, 2, None, 1, None]


def test_an_image_embedding_may_be_left_out_where_training_did_so():
    found = EMBEDDING.from_user(None, 2)
    assert not found["present"].any() and not found["embedding"].any()
    with pytest.raises(UserError, match="training never dropped 'image_embedding'"):
        dataclasses.replace(EMBEDDING, droppable=False).from_user(None, 2)


def test_a_level_is_one_that_training_had():
    np.testing.assert_allclose(LOW_RES.levels([0.0, 0.5], 2)["level"], [0, 0.5])
    for value, words in ((0.6, "level is 0.6; sample_fn; training had levels from 0 to 0.5"), (-0.1, "level is -0.1")):
        with pytest.raises(UserError, match=words):
            LOW_RES.levels(value, 2)
    assert dataclasses.replace(LOW_RES, noise=0.0, level=0.0).levels(0.3, 2) == {}


def test_values_are_chosen_where_a_user_names_none():
    rows = {"image": np.zeros((2, 8, 8, 3)), "caption": ["a ring", "a cross"], "pose": np.arange(6.0).reshape(2, 3)}
    offer = Offer([], lambda n: rows, lambda image: np.arange(8.0).reshape(2, 4))
    np.testing.assert_array_equal(LABEL.choose(5, offer), [0, 1, 2, 0, 1])
    assert TEXT.choose(3, offer) == ["a ring", "a cross", "a ring"]
    assert TEXT.choose(3, offer._replace(prompts=["a", "b"])) == ["a", "b", "a"]
    np.testing.assert_array_equal(EMBEDDING.choose(3, offer)[2], np.arange(4.0))
    np.testing.assert_array_equal(Pose(name="pose").choose(3, offer)[2], rows["pose"][0])
    assert LABEL.captions([0, 2], ["circle"]) == ["circle", "2"] and TEXT.captions("a", []) == ["a"]


# ---- what data hold -------------------------------------------------------------------------------------------------


def source(keys=(), class_names=()):
    return Source("pictures", 1, lambda i: {}, tuple(keys), tuple(class_names))


def test_data_must_hold_what_conditions_read():
    LABEL.check_data(source(["label"], ["a", "b", "c"]))
    TEXT.check_data(source(["caption"]))
    TEXT.check_data(source(["label"], ["a", "b"]))  # captions are made of the names of classes
    EMBEDDING.check_data(source())
    for condition, data, words in (
        (LABEL, source(), "the condition 'label' needs labels, and the data have none; pictures"),
        (LABEL, source(["label"], "abcd"), "the data have 4 classes, but num_classes=3"),
        (TEXT, source(["label"]), "needs captions, and the data have none"),
        (Pose(name="pose"), source(["label"]), "'pose' needs 'pose' of every picture, but the data have .'label'."),
    ):
        with pytest.raises(UserError, match=words):
            condition.check_data(data)


# ---- smaller pictures -----------------------------------------------------------------------------------------------


def test_a_smaller_picture_in_training_is_that_of_the_window():
    condition = dataclasses.replace(LOW_RES, noise=0.0, level=0.0, crop=4)
    image = jnp.asarray(micro.filled(jax.ShapeDtypeStruct((8, 8, 3), jnp.float32), 16))
    x, found = condition.in_training({"image": image}, image, micro.keys_of(16))
    assert x.shape == (16, 4, 4, 3) and set(found) == {"image"}
    np.testing.assert_allclose(found["image"], augment.round_to_bytes(augment.area_downsample(x, 2)), atol=1e-6)
    assert len({float(row.sum()) for row in x}) == 16


def test_noise_on_a_smaller_picture_is_of_all_levels_up_to_the_strongest():
    n = 2000
    image = jnp.zeros((n, 8, 8, 3))
    _, found = dataclasses.replace(LOW_RES, round=False).in_training({}, image, micro.keys_of(n))
    time = np.asarray(found["time"])
    assert time.min() == -1 and time.max() <= 20 - 1, "u up to 0.5 of 40 steps"
    assert len(np.unique(time)) == 21
    spread = np.std(found["image"], axis=(1, 2, 3))
    assert spread[time == -1].max() == 0 and np.corrcoef(time, spread)[0, 1] > 0.9


def test_degraded_pictures_come_from_the_host():
    """Those are read of the batch; others are made of the picture itself."""
    assert LOW_RES.edit is None and LOW_RES.batch_example() == {}
    jpeg = dataclasses.replace(LOW_RES, jpeg=(60, 95), noise=0.0, level=0.0, round=False)
    assert jpeg.batch_example()["low_res"].shape == (4, 4, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    _, more = jpeg.edit(pixels, np.random.default_rng(0))
    assert more["low_res"].shape == (4, 4, 3) and more["low_res"].dtype == np.uint8
    small = jnp.full((1, 4, 4, 3), 0.25)
    _, found = jpeg.in_training({"low_res": small}, jnp.zeros((1, 8, 8, 3)), micro.keys_of(1))
    np.testing.assert_array_equal(found["image"], small)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(noise=0.2, level=0.3), "level must be at most noise, 0.2, got 0.3"),
        (dict(degrade="bsr", blur=0.5), "degrade is 'bsr', which blurs and writes JPEG itself"),
        (dict(blur_sigma=(0.6, 0.4)), "ranges, lowest first"),
        (dict(jpeg=(95, 60)), "ranges, lowest first"),
        (dict(truncated=True), "truncated needs a level above 0"),
        (dict(shape=(9, 9, 3), factor=2), "factor must divide the sides of .9, 9, 3., got 2"),
    ],
)
def test_smaller_pictures_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        LowRes(name="low_res", **fields)


def test_nothing_is_known_where_a_call_edits_nothing():
    inpaint = Inpaint(name="inpaint", shape=(8, 8, 3), empty=1.0)
    assert not inpaint.absent(2).any() and inpaint.absent(2).shape == (2, 8, 8, 4)
    x = jnp.ones((3, 8, 8, 3))
    np.testing.assert_array_equal(inpaint.in_training({}, x, micro.keys_of(3))[1], 0)
    _, found = dataclasses.replace(inpaint, empty=0.0).in_training({}, x, micro.keys_of(3))
    np.testing.assert_array_equal(found[..., :3], np.broadcast_to(found[..., 3:], x.shape))


# ---- a condition of one's own ---------------------------------------------------------------------------------------


class PoseEncoder(nn.Module):
    """A vector of joint angles, projected."""

    features: int

    @nn.compact
    def __call__(self, pose, z):
        return Context(vector=nn.Dense(self.features, name="dense")(pose))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pose(Condition):
    """A vector of joint angles."""

    size: int = 3

    def example(self):
        return jax.ShapeDtypeStruct((self.size,), jnp.float32)

    def encoder(self, net):
        return PoseEncoder(net.vector_width, name=self.name)


def test_a_condition_of_ones_own_is_trained_and_sampled_with():
    """By its import path; it is never dropped, as it has no null value."""
    conditions = micro.conditions(pose=dict(name=f"{__name__}:Pose", size=5), label=dict(num_classes=3))
    model = micro.model(conditions=conditions, condition_dropout=0.1)
    assert set(model.nulls) == {"label"} and [*model.columns()] == ["pose", "label"]
    params, batch = micro.drawn(model), micro.batch_of(model)
    assert set(params) == {"net", "pose", "label"} and batch["pose"].shape == (4, 5)
    loss = jax.jit(lambda b: micro.loss_of(model, params, b, micro.keys_of())[0])
    assert np.abs(loss(batch) - loss({**batch, "pose": -batch["pose"]})).max() > 1e-4
    given = {"pose": model.conditions["pose"].from_user([1, 2, 3, 4, 5], 2), "label": np.zeros(2, np.int32)}
    out = jax.jit(cascade.cascade([model]))({"base": params}, micro.keys_of(2), {"base": given})
    assert np.isfinite(out).all()
    with pytest.raises(UserError, match="pose is .*; sample_fn; pass float32 of shape"):
        model.conditions["pose"].from_user(np.zeros(4), 2)
    with pytest.raises(UserError, match="pose has values that are not finite"):
        model.conditions["pose"].from_user([1, 2, 3, 4, np.nan], 2)
    assert model.conditions["pose"].count(np.zeros((2, 5))) == 2
    network = types.SimpleNamespace(vector_width=8)
    with pytest.raises(NotImplementedError, match="pose is never dropped"):
        model.conditions["pose"].null({})
    assert model.conditions["pose"].encoder(network).features == 8
