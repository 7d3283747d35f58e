"""A config made real: what is trained and when, how models are numbered, and how they follow on each other."""

import pytest

from diffax import config as configs
from diffax.errors import UserError
from diffax.models.system import System
from tests.models import micro, systems


def test_what_is_trained_and_in_which_order():
    """First what stages need frozen, then they, then what helps them to sample."""
    found = {name: make().trained for name, make in systems.EVERY.items()}
    assert found == {
        "classes": ("base",),
        "classifier-guided": ("base", "classifier"),
        "cascade": ("base", "up"),
        "GLIDE": ("base", "up"),
        "CLIP-guided": ("base", "clip"),
        "DALL-E 2": ("clip", "prior", "decoder", "up"),
        "DALL-E 2, autoregressive": ("clip", "prior", "decoder", "up"),
        "karlo": ("clip", "prior", "decoder", "up", "up_last"),
    }
    alone = micro.config(**{name: systems.karlo().config[name] for name in ("prior", "clip", "up", "up_last")})
    alone.stages = ("prior", "up")
    assert System(alone).trained == ("clip", "prior", "up", "up_last")


def test_models_are_numbered_among_those_that_are_sampled():
    numbers = {model.name: model.number for model in systems.dalle2().generators}
    assert numbers == {"prior": 0, "decoder": 1, "up": 2}
    config = systems.dalle2().config.copy_and_resolve_references()
    config.stages = ("prior", "decoder", "up")
    assert [model.number for model in System(config).generators] == [0, 1, 2]


def test_what_training_reads():
    found = {name: systems.dalle2().model(name).data_shape for name in ("clip", "prior", "decoder", "up")}
    assert found == {"clip": (8, 8, 3), "prior": (8, 8, 3), "decoder": (8, 8, 3), "up": (16, 16, 3)}
    small = micro.conditions(image_embedding={})
    system = System(micro.config(clip=micro.clip(shape=(12, 12, 3)), decoder=micro.section(conditions=small)))
    assert system.model("decoder").data_shape == (16, 16, 3), "a whole multiple, no smaller than the CLIP's"


def test_a_model_is_built_once_and_shared():
    system = systems.karlo()
    clip = system.model("clip")
    assert system.model("decoder").conditions["image_embedding"].clip is clip
    assert system.model("prior").target.clip is clip


@pytest.mark.parametrize(
    ("lineage", "overrides", "words"),
    [
        ("cascade", ["up.shape=24,24,3"], "config.up.conditions.low_res.factor 2 takes pictures of .12, 12, 3. to"),
        ("cascade", ["up.conditions.low_res.factor=4"], "config.base.shape is .8, 8, 3."),
        ("cascade", ["up.conditions=label"], "config.up.conditions must have 'low_res', as config.up comes after"),
        ("cascade", ["up.conditions.low_res.noise=0.2"], "config.up.conditions.low_res: level must be at most noise"),
        ("cascade", ["up.conditions.low_res.truncated=true", "up.conditions.low_res.level=0"], "a level above 0"),
        (
            "cascade",
            ["up.conditions.low_res.truncated=true", "up.schedule.num_timesteps=80"],
            "truncated needs the sch",
        ),
        ("cascade", ["stages=base,down"], "config.stages names 'down'"),
        ("classifier-guided", ["base.guidance.classifier.section=clasifier"], "did you mean classifier"),
        ("classifier-guided", ["base.guidance.classifier.section=base"], "need each other"),
        ("CLIP-guided", ["base.guidance=classifier", "base.guidance.classifier.section=clip"], "of a classifier, got"),
        ("classifier-guided", ["classifier.shape=16,16,3"], "config.base: shape must equal that of classifier"),
        ("classifier-guided", ["classifier.schedule.num_timesteps=50"], "schedule must equal that of classifier"),
        ("CLIP-guided", ["clip.noised=false"], "clip.noised must be true"),
        ("CLIP-guided", ["clip.timesteps=loss_second_moment"], "config.clip: timesteps must be without a history"),
        ("CLIP-guided", ["clip.schedule=cosine_logsnr"], "config.clip: schedule must have discrete timesteps"),
        ("DALL-E 2", ["prior.shape=8,8,3"], "config.prior: shape must be .4,., the features of the CLIP clip"),
        ("DALL-E 2", ["prior.shape=64,"], "config.prior: shape must be .4,., the features of the CLIP clip"),
        ("DALL-E 2", ["decoder.shape=32,"], "config.decoder: shape must be .height, width, channels."),
        ("DALL-E 2", ["decoder.shape=16,8,3"], "config.decoder: shape must have the proportions"),
        ("DALL-E 2", ["prior.clip="], "config.prior: shape must be"),
        ("DALL-E 2", ["prior.clip=up"], "config.prior.clip must name the section of a CLIP, got 'up'"),
        ("DALL-E 2", ["clip.embedding.std=1,1,1"], "config.clip: embedding.mean and std must be 0, 1 or 4 numbers"),
        ("DALL-E 2", ["prior.net.heads=3"], "config.prior: heads must divide width, 8"),
        ("DALL-E 2", ["decoder.candidates=2"], "config.decoder: candidates must be 1"),
        ("DALL-E 2", ["decoder.condition_dropout=0"], "conditions.text.dropout needs condition_dropout"),
        ("DALL-E 2, autoregressive", ["prior.codes.components=33"], "codes.components must be at most the 4 dim"),
        ("DALL-E 2, autoregressive", ["prior.codes.examples=4"], "codes.examples must be at least"),
        ("DALL-E 2, autoregressive", ["prior.conditions=text"], "must have 'text_embedding' for a code prior"),
        ("DALL-E 2, autoregressive", ["prior.guidance=clip_denoised"], "can be 'classifier_free' alone"),
        ("DALL-E 2, autoregressive", ["prior.clip="], "config.prior: shape must be the features of its CLIP"),
        ("karlo", ["up_last.predicts=x"], "config.up: predicts must equal that of up_last"),
        ("karlo", ["up.guidance.last_step.section=decoder"], "config.up: shape must equal that of decoder"),
        ("karlo", ["up.guidance.last_step.section=up"], "need each other"),
    ],
)
def test_what_does_not_fit_gets_one_line(lineage, overrides, words):
    config = configs.from_dict(configs.to_dict(systems.EVERY[lineage]().config))
    with pytest.raises(UserError, match=words) as caught:
        configs.override(config, [f"config.{override}" for override in overrides])
        configs.check(config)
    assert "\n" not in str(caught.value)
