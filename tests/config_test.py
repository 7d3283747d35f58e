"""Configs: each builds, validates and survives JSON; every mistake is one line naming the field."""

import functools
import json
import math
import pathlib
import textwrap

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffax import config as configs
from diffax.config import STAGE, TOP, Field
from diffax.errors import UserError

# A config, and after a space its section where that is not `base`: the parameters of the published network.
PUBLISHED = {
    "adm_classifier_64 classifier": 65_438_568,
    "adm_classifier_128 classifier": 42_568_040,
    "adm_classifier_256 classifier": 54_096_360,
    "adm_classifier_512 classifier": 54_448_360,
    "adm_imagenet_64": 295_904_454,
    "adm_imagenet_64 classifier": 65_438_568,
    "adm_imagenet_128": 421_529_606,
    "adm_imagenet_256": 553_838_086,
    "adm_imagenet_256_uncond": 552_814_086,
    "adm_imagenet_512": 558_997_638,
    "adm_lsun_bedroom": 552_814_086,
    "adm_lsun_cat": 552_814_086,
    "adm_lsun_horse": 552_814_086,
    "adm_lsun_horse:nodropout": 552_814_086,
    "adm_upsample_64_256 up": 311_795_910,
    "adm_upsample_128_512 up": 308_835_270,
    # The authors published none: ADM's network with 3 channels out and one more row of labels.
    "cfg_imagenet_64": 295_900_035,
    "cfg_imagenet_128": 421_523_715,
    "glide_base_64": 385_030_726,
    "glide_base_64:paper": 3_554_414_086,
    "glide_upsample_256 up": 398_361_286,
    "glide_upsample_256:paper up": 1_540_932_998,
    "glide_inpaint_64": 385_037_638,
    "glide_inpaint_256 up": 398_368_198,
    # 86,443,776 and 71,679,488 published, the scale, and biases of zero that the published keys do without
    "karlo clip": 427_616_513,
    "karlo prior": 1_022_028_544,
    "karlo decoder": 893_318_086,
    "karlo up": 691_579_523,
    "karlo_prior prior": 1_022_028_544,
    "karlo_decoder_64 decoder": 893_318_086,
    "karlo_upsample_256 up": 691_579_523,
    "clip_vit_b16 clip": 149_620_737,
    "clip_vit_l14 clip": 427_616_513,
    "glide_clip clip": 158_123_264 + 1 + 12 * (768 + 512),
    "ddpm_cifar10": 35_746_307,
    "ddpm_lsun_256:bedroom": 113_673_219,
    "ddpm_lsun_256:cat": 113_673_219,
    "ddpm_lsun_256:church": 113_673_219,
    "ddpm_celebahq_256": 113_673_219,
    "iddpm_cifar10:hybrid": 52_546_438,
    "iddpm_lsun_256": 113_676_678,
    "iddpm_lsun_256:bs64": 113_676_678,
    "iddpm_cifar10:vlb": 52_546_438,
    "iddpm_imagenet_64": 121_063_942,
    "iddpm_imagenet_64:vlb": 121_063_942,
    "iddpm_imagenet_64:cond": 273_049_350,
    "iddpm_upsample_64_256 up": 279_792_390,
}
# CDM's authors published no counts. These were counted on OpenAI's U-Net, to a million. The stage that is told how much
# noise its smaller picture has owns a second clock besides: 256 -> 1024 -> 1024.
COUNTED = {
    "cascade_64 base": (826e6, 825_505_542),
    "cascade_64 up": (750e6, 750_377_990 + (256 * 1024 + 1024) + (1024 * 1024 + 1024)),
    "cascade_128 up_128": (575e6, 575_283_203),
    "cascade_256 up_256": (634e6, 634_046_467),
    # The paper says 1B, 3.5B, 700M and 300M; its table leaves parts open.
    "dalle2_clip clip": (986e6, 986_339_841),
    "clip_vit_h16 clip": (986e6, 986_339_841),
    "dalle2_prior prior": (1.33e9, 1_326_752_768),
    "dalle2_prior_ar prior": (2.29e9, 2_285_749_120),
    "dalle2_decoder_64 decoder": (3.565e9, 3_565_435_398),
    "dalle2_upsample_256 up": (730e6, 729_702_083),
    "dalle2_upsample_1024 up": (282e6, 282_059_139),
}
# A config and section as above: the published model whose options are on file.
ON_FILE = {
    **{f"adm_classifier_{size} classifier": f"{size}x{size}_classifier" for size in (64, 128, 256, 512)},
    **{f"adm_imagenet_{size}": f"{size}x{size}_diffusion" for size in (64, 128, 256, 512)},
    **{f"adm_imagenet_{size} classifier": f"{size}x{size}_classifier" for size in (64, 128, 256, 512)},
    "adm_imagenet_256_uncond": "256x256_diffusion_uncond",
    "adm_imagenet_256_uncond classifier": "256x256_classifier",
    "adm_lsun_bedroom": "lsun_bedroom",
    "adm_lsun_cat": "lsun_cat",
    "adm_lsun_horse": "lsun_horse",
    "adm_lsun_horse:nodropout": "lsun_horse_nodropout",
    "adm_upsample_64_256 up": "64_256_upsampler",
    "adm_upsample_128_512 up": "128_512_upsampler",
    "iddpm_imagenet_64:cond": "improved-diffusion/imagenet64_cond_270M_250K",
    "iddpm_upsample_64_256 up": "improved-diffusion/upsample_cond_500K",
    "iddpm_lsun_256": "improved-diffusion/lsun_uncond_100M_1200K_bs128",
    "iddpm_lsun_256:bs64": "improved-diffusion/lsun_uncond_100M_2400K_bs64",
}
MANIFEST = pathlib.Path(__file__).parent / "golden" / "manifest_full_size.json"
SPECS = [
    f"{name}:{variant}" if variant else name
    for name, (_, variants) in configs.available().items()
    for variant in ("", *variants, *(f"{v},tiny" for v in variants if v != "tiny"))
]
FIELDS = {f"config.{p}": f for p, f in TOP.items()} | {f"config.base.{p}": f for p, f in STAGE.items()}


def one_line(call, *args, **kwargs) -> str:
    """The message of the UserError that the call raises; one line, short enough to read."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


def put(config: ConfigDict, path: str, value) -> ConfigDict:
    """Sets a field past the type checks and casts of ConfigDict, as an edited file could."""
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    with config.unlocked():
        if leaf in section:
            del section[leaf]
        section[leaf] = value
    return config


def get(config: ConfigDict, path: str):
    for name in path.split(".")[1:]:
        config = config[name]
    return config


def section_of(key: str) -> tuple[ConfigDict, str]:
    """'SPEC' or 'SPEC SECTION' -> the config and the name of the section."""
    spec, _, section = key.partition(" ")
    return configs.load(spec), section or "base"


def defaults() -> ConfigDict:
    return configs.config_defaults("test")


# ---- the configs that come with diffax -----------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_config_is_valid_and_survives_json(spec):
    config = configs.load(spec)
    assert config.is_locked
    configs.validate(config)
    configs.validate(config, device_count=8, process_count=2)
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    configs.validate(again)
    assert again == config
    assert jax.tree.map(type, again.to_dict()) == jax.tree.map(type, config.to_dict())


def test_every_config_describes_itself():
    found = configs.available()
    counted = {key.split()[0].split(":")[0] for key in PUBLISHED | COUNTED}
    assert {"quickstart", "glide", "dalle2"} | counted == set(found)
    for name, (summary, variants) in found.items():
        assert summary and "tiny" in variants, name
        assert configs.load(name).name.startswith(name)


@pytest.mark.parametrize("spec", [s for s in SPECS if "tiny" in s])
def test_tiny_keeps_the_method(spec):
    tiny, full = configs.load(spec), configs.load(spec.replace("tiny", "").strip(",").rstrip(":,"))
    sections = configs.trained_sections(tiny)
    left_out = {"up_1024"} if spec.startswith("dalle2:") else set()
    assert sections == tuple(name for name in configs.trained_sections(full) if name not in left_out)
    for name in sections:
        small, large = tiny[name], full[name]
        # a small network does not learn to read a smaller picture from eps within minutes, nor, it is feared, a caption
        eager = small.takes not in ((), ("label",)) and large.predicts == "eps"
        assert small.predicts in (large.predicts, "v" if eager else large.predicts)
        for path in ("variance", "timesteps", "sampler", "drop", "guidance", "classifier"):
            assert small[path] == large[path]
        for path in ("loss", "schedule", "net"):
            assert small[path].name == large[path].name
        for path in ("pool", "scale_shift", "resample"):
            assert small.net[path] == large.net[path]
        for path in ("optimizer", "weight_decay"):
            assert small.train[path] == large.train[path]
        assert set(small.takes) >= set(large.takes) and (small.num_classes > 0) >= (large.num_classes > 0)
        for path in ("noise", "level", "truncated", "blur", "blur_sigma", "round", "jpeg", "degrade"):
            assert small.low_res[path] == large.low_res[path]
        assert small.schedule.continuous == large.schedule.continuous
        assert small.data.name in configs.EMBEDDED and small.net.channels <= 32
        # What training looks at: of a stage that enlarges, perhaps a window.
        side = small.low_res.crop or max(small.shape[:2])
        assert side <= (16 if small.takes in ((), ("label",)) else 32) and max(small.shape[:2]) <= 64


@pytest.mark.parametrize("spec", [s for s in SPECS if "tiny" in s])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_tiny_runs_on_any_number_of_devices(spec, devices):
    configs.validate(configs.load(spec), device_count=devices)


@functools.cache  # several configs have one network, and tracing it takes seconds
def parameters(net, shape: tuple[int, int, int]) -> int:
    from diffax import networks

    params = jax.eval_shape(net.init, jax.random.key(0), *networks.example_inputs(net, shape))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("key, count", PUBLISHED.items())
def test_parameters_are_as_many_as_published(key, count):
    from diffax.models import stages

    config, section = section_of(key)
    model = stages.build(configs.to_dict(config), section)
    assert parameters(model.net, model.shape) == count


@pytest.mark.parametrize("key, about, count", [(key, *counts) for key, counts in COUNTED.items()])
def test_parameters_are_as_many_as_counted(key, about, count):
    from diffax.models import stages

    config, section = section_of(key)
    model = stages.build(configs.to_dict(config), section)
    shape = (config[section].codes.components,) if configs.is_code_prior(config[section]) else model.shape
    assert parameters(model.net, shape) == count
    assert abs(count / about - 1) < 0.01


@pytest.mark.skipif(not MANIFEST.exists(), reason="no manifest_full_size.json in the golden folder")
@pytest.mark.parametrize("key, model", ON_FILE.items())
def test_networks_have_the_published_options(key, model):
    """Heads and dropout, which no count of parameters shows, and how the model is noised."""
    from diffax.weights import openai

    config, name = section_of(key)
    section = configs.to_dict(config)[name]
    model = model if "/" in model else f"guided-diffusion/{model}"
    entry = json.loads(MANIFEST.read_text())["models"][model]
    args, size = entry["args"], section["shape"][0]
    published = openai.net_config(entry["constructor"], model=entry["class"], image_size=size)
    assert tuple(section["shape"]) == published.shape and set(section["takes"]) == set(published.takes)
    passed_over = ["remat", *(["heads", "heads_up"] if published.net["head_channels"] else [])]
    for field, value in published.net.items():
        if field not in passed_over:
            found = section["net"][field]
            assert (tuple(found) if isinstance(found, list) else found) == value, field
    if "noise_schedule" in args:
        assert section["schedule"]["name"] == args["noise_schedule"]
        assert section["schedule"]["steps"] == args["diffusion_steps"]
        assert section["schedule"]["rescale_time"] == args["rescale_timesteps"]
        assert (section["variance"] == "learned_range") == args["learn_sigma"]
        assert section["num_classes"] == (1000 if args["class_cond"] else 0)
    if "large_size" in args:
        assert (section["shape"][0], section["low_res"]["factor"]) == (args["large_size"], 4)
        assert args["large_size"] == 4 * args["small_size"]


def test_hyper_parameters_of_the_papers():
    ddpm = configs.load("ddpm_cifar10").base
    assert ddpm.variance == "fixed_large" and ddpm.loss.name == "simple" and ddpm.net.dropout == 0.1
    assert configs.load("ddpm_lsun_256:church").base.variance == "fixed_small"
    assert [configs.load(f"ddpm_lsun_256:{s}").base.data.flip for s in ("bedroom", "cat")] == [0, 1]
    hybrid, vlb = (configs.load(f"iddpm_cifar10:{v}").base for v in ("hybrid", "vlb"))
    assert (hybrid.loss.name, hybrid.loss.weight, hybrid.timesteps.name) == ("hybrid", 4, "uniform")
    assert (vlb.loss.name, vlb.loss.weight) == ("vlb", 4000)
    assert vlb.timesteps.name == "loss_second_moment"
    cond = configs.load("iddpm_imagenet_64:cond").base
    assert cond.loss.weight == 1 and not cond.schedule.rescale_time and hybrid.schedule.rescale_time
    for stage in (hybrid, vlb, cond):
        assert stage.train.clip == 0 and stage.train.warmup_steps == 0 and not stage.data.flip


@pytest.mark.parametrize(
    "spec, scale, steps, batch, rate, classifier",
    [
        ("adm_imagenet_64", 1.0, 540_000, 2048, 3e-4, "adm_classifier_64"),
        ("adm_imagenet_128", 0.5, 4_360_000, 256, 1e-4, "adm_classifier_128"),
        ("adm_imagenet_256", 1.0, 1_980_000, 256, 1e-4, "adm_classifier_256"),
        ("adm_imagenet_256_uncond", 10.0, 2_000_000, 256, 1e-4, "adm_classifier_256"),
        ("adm_imagenet_512", 4.0, 1_940_000, 256, 1e-4, "adm_classifier_512"),
        ("adm_lsun_bedroom", None, 500_000, 256, 1e-4, ""),
        ("adm_lsun_cat", None, 200_000, 256, 1e-4, ""),
        ("adm_lsun_horse", None, 250_000, 256, 1e-4, ""),
        ("adm_lsun_horse:nodropout", None, 250_000, 256, 1e-4, ""),
    ],
)
def test_recipes_of_adm(spec, scale, steps, batch, rate, classifier):
    config = configs.load(spec)
    stage, train = config.base, config.base.train
    assert (train.steps, train.batch_size, train.learning_rate, train.ema) == (steps, batch, rate, (0.9999,))
    assert (train.optimizer, train.weight_decay, train.clip) == ("adamw", 0, 0)
    assert (train.warmup_steps, train.anneal) == (0, "none")
    assert (stage.loss.name, stage.loss.weight, stage.data.flip) == ("hybrid", stage.schedule.steps / 1000, True)
    if classifier:
        assert stage.guidance == ("clip_denoised", "classifier") and stage.guidance_scale == scale
        assert stage.steps == "250" and config.stages == ("classifier", "base")
        assert config.classifier == configs.load(classifier).classifier
    else:
        assert stage.guidance == ("clip_denoised",) and stage.steps == "" and config.stages == ("base",)


@pytest.mark.parametrize(
    "size, depth, steps, batch, rate, decay",
    [
        (64, 4, 300_000, 1024, 6e-4, 0.2),
        (128, 2, 300_000, 256, 3e-4, 0.05),
        (256, 2, 500_000, 256, 3e-4, 0.05),
        (512, 2, 500_000, 256, 3e-4, 0.05),
    ],
)
def test_recipes_of_adms_classifiers(size, depth, steps, batch, rate, decay):
    config = configs.load(f"adm_classifier_{size}")
    section, train = config.classifier, config.classifier.train
    assert config.stages == ("classifier",) and "base" not in config
    assert (train.steps, train.batch_size, train.learning_rate, train.weight_decay) == (steps, batch, rate, decay)
    assert (train.optimizer, train.anneal, train.ema) == ("adamw", "linear", ())
    assert (train.clip, train.warmup_steps, section.net.num_res_blocks) == (0, 0, depth)
    assert section.data.flip and section.data.crop == "random"
    assert section.schedule == configs.load(f"adm_imagenet_{size}").base.schedule


@pytest.mark.parametrize(
    "spec, variance, drop, steps, batch",
    [
        ("cfg_imagenet_64", 0.3, 0.1, 400_000, 2048),
        ("cfg_imagenet_64:p20", 0.3, 0.2, 400_000, 2048),
        ("cfg_imagenet_64:p50", 0.3, 0.5, 400_000, 2048),
        ("cfg_imagenet_128", 0.2, 0.1, 2_700_000, 256),
    ],
)
def test_recipes_of_classifier_free_guidance(spec, variance, drop, steps, batch):
    stage = configs.load(spec).base
    adm = configs.load(spec.split(":")[0].replace("cfg", "adm")).base
    assert (stage.variance, stage.drop, stage.steps) == (variance, drop, "256")
    assert (stage.schedule.logsnr_min, stage.schedule.logsnr_max) == (-20, 20)
    # Limits come after guidance, which leaves the range of pictures.
    assert stage.guidance == ("classifier_free", "clip_denoised")
    assert stage.net == adm.net and stage.train.learning_rate == adm.train.learning_rate
    assert (stage.train.steps, stage.train.batch_size) == (steps, batch)


# CDM's recipe, {section: channel_mult, depth, attention at these pixels, heads, dropout, batch, steps of training, T,
# steps of sampling}.
CDM = {
    "base": ((1, 2, 3, 4), 6, {8, 16}, 4, 0.1, 2048, 700_000, 4000, 4000),
    "up_64": ((1, 2, 3, 4), 5, {8, 16}, 4, 0.1, 2048, 400_000, 4000, 4000),
    "up_128": ((1, 2, 4, 8, 8), 3, {16}, 1, 0.0, 1024, 500_000, 2000, 100),
    "up_256": ((1, 2, 4, 4, 8, 8), 3, {16}, 1, 0.0, 1024, 500_000, 2000, 100),
}


@pytest.mark.parametrize("name", CDM)
def test_recipes_of_cascades(name):
    config = configs.load("cascade_256" if name == "up_256" else "cascade_128")
    stage, net, train = config[name], config[name].net, config[name].train
    mult, depth, attention, heads, dropout, batch, steps, length, sampled = CDM[name]
    assert (net.channel_mult, net.num_res_blocks, net.heads, net.dropout) == (mult, depth, heads, dropout)
    assert {stage.shape[0] // factor for factor in net.attention} == attention
    assert net.channels == (256 if name in ("base", "up_64") else 128)
    assert (train.batch_size, train.steps, train.learning_rate, train.ema) == (batch, steps, 1e-4, (0.9999,))
    assert train.optimizer == "adam" and stage.schedule.steps == length
    assert int(stage.steps or length) == sampled
    # The label at every stage, guidance at none.
    assert stage.takes == (("label",) if name == "base" else ("label", "low_res")) and stage.num_classes == 1000
    assert stage.guidance == ("clip_denoised",) and not stage.drop
    c = stage.low_res
    if name in ("base", "up_64"):
        assert (stage.variance, stage.loss.name, stage.schedule.name) == ("learned_range", "hybrid", "cosine")
        assert stage.loss.weight == length / 1000 and not stage.schedule.continuous
    else:
        assert (stage.variance, stage.loss.name, stage.schedule.continuous) == ("fixed_large", "simple", True)
        assert (c.noise, c.blur, c.blur_sigma) == (0, 0.5, (0.4, 0.6))
    if name == "up_64":
        # Any amount of noise in training; in sampling what was best of 4000 steps, between 751 and 1251.
        assert (c.noise, c.blur) == (1, 0) and 751 <= c.level * 4000 <= 1251 and not c.truncated
    assert c.factor == {"up_256": 4, "base": 4}.get(name, 2)


@pytest.mark.parametrize("spec", ["cascade_128", "cascade_256"])
def test_cascades_share_their_first_stages(spec):
    config, to_64 = configs.load(spec), configs.load("cascade_64")
    assert config.stages == ("base", "up_64", spec.replace("cascade", "up")) and to_64.stages == ("base", "up")
    assert config.base == to_64.base and config.up_64 == to_64.up
    assert [config[name].shape[0] for name in config.stages] == [32, 64, int(spec.split("_")[1])]


@pytest.mark.parametrize("name", ["cascade_128", "cascade_256"])
def test_betas_of_the_continuous_stages(name):
    """From 1e-6 to 1e-2 over 2000 steps (SR3), where the schema's numbers are for 1000."""
    from diffax.diffusion import schedules

    c = configs.load(name)[name.replace("cascade", "up")].schedule
    betas = schedules.BETAS[c.name](c.steps, c.beta_start, c.beta_end)
    assert betas == pytest.approx(np.linspace(1e-6, 1e-2, 2000), rel=1e-12)


@pytest.mark.parametrize(
    "spec, steps, rate, length, schedule, flip",
    [
        ("adm_upsample_64_256", 500_000, 1e-4, 1000, "linear", True),
        ("adm_upsample_128_512", 1_050_000, 1e-4, 1000, "linear", True),
        ("iddpm_upsample_64_256", 500_000, 3e-4, 4000, "linear", False),
    ],
)
def test_recipes_of_upsamplers(spec, steps, rate, length, schedule, flip):
    config = configs.load(spec)
    stage, train = config.up, config.up.train
    assert config.stages == ("up",) and "base" not in config
    assert (train.steps, train.batch_size, train.learning_rate, train.ema) == (steps, 256, rate, (0.9999,))
    assert (train.optimizer, train.weight_decay, train.clip, train.warmup_steps) == ("adamw", 0, 0, 0)
    assert (stage.schedule.name, stage.schedule.steps, stage.data.flip) == (schedule, length, flip)
    # Published without rescaling, so the bound has weight 1 whatever T is.
    assert (stage.loss.name, stage.loss.weight, stage.schedule.rescale_time) == ("hybrid", 1, False)
    assert stage.guidance == ("clip_denoised",) and stage.steps == "250"
    c = stage.low_res
    assert (c.factor, c.noise, c.blur, c.round, c.jpeg, c.crop) == (4, 0, 0, False, (), 0)


@pytest.mark.parametrize(
    "spec, shapes",
    [
        ("cascade_64:tiny", {"base": (8, 8, 3), "up": (16, 16, 3)}),
        ("cascade_128:tiny", {"base": (8, 8, 3), "up_64": (16, 16, 3), "up_128": (32, 32, 3)}),
        ("cascade_256:tiny", {"base": (8, 8, 3), "up_64": (16, 16, 3), "up_256": (32, 32, 3)}),
        ("adm_upsample_64_256:tiny", {"up": (64, 64, 3)}),
        ("adm_upsample_128_512:tiny", {"up": (64, 64, 3)}),
        ("iddpm_upsample_64_256:tiny", {"up": (32, 32, 1)}),
    ],
)
def test_sizes_of_tiny_cascades(spec, shapes):
    config = configs.load(spec)
    assert {name: config[name].shape for name in config.stages} == shapes
    if spec.startswith("cascade"):
        assert config.eval.judge == "network"
        for name in shapes:
            assert config[name].data.single and config[name].data.label == "colour" and config[name].num_classes == 8
    assert bool(config.eval.levels) == (config.stages == ("base", "up")), "where the last stage has a level"


@pytest.mark.parametrize("spec", ["adm_imagenet_128:tiny", "adm_classifier_128:tiny", "cfg_imagenet_128:tiny"])
def test_tiny_at_128_has_one_shape_to_a_picture(spec):
    config = configs.load(spec)
    for name in configs.trained_sections(config):
        assert config[name].data.name == "shapes" and config[name].data.single
        assert config[name].data.label == "colour" and config[name].num_classes == 8
    if "base" in config:
        assert config.eval.judge == "network"


def test_choices_are_those_of_the_modules():
    from diffax import data
    from diffax.diffusion import losses, samplers, schedules, timesteps
    from diffax.evaluation import judges
    from diffax.models import stages
    from diffax.training import parallel

    for path, there in {
        "guidance": stages.GUIDANCE,
        "sampler.name": samplers.SAMPLERS,
        "loss.name": losses.LOSSES,
        "timesteps.name": timesteps.TIMESTEPS,
        "schedule.name": {*schedules.BETAS, *configs.CONTINUOUS},
        "data.name": data.names(),
        "parallel": parallel.MODES,
    }.items():
        assert set((STAGE | TOP)[path].choices) == set(there), path
    assert set(TOP["eval.judge"].choices) == {*judges.JUDGES, "captions"}
    assert set(TOP["eval.samplers"].choices) == set(samplers.SAMPLERS)
    assert set(configs.SCALED) == set(stages.SCALED) < set(stages.GUIDANCE)
    for path, field in STAGE.items():
        if path.startswith("net."):
            for choice in field.choices:
                config = defaults()
                config.base.net.update({path.removeprefix("net."): choice})
                if choice in ("prior", "code_prior"):
                    continue  # make no pictures; built by dalle2_test
                if choice == "clip":
                    config.base.takes = ("text",)
                assert stages.build(configs.to_dict(config), "base")


# ---- finding a config ----------------------------------------------------------------------------


def test_a_config_is_found_by_name_and_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = configs.load("ddpm_cifar10:tiny")
    assert configs.load("configs/ddpm_cifar10.py:tiny") == wanted
    assert configs.load("ddpm_cifar10.py:tiny") == wanted
    assert configs.load("iddpm_cifar10:vlb+tiny") == configs.load("iddpm_cifar10:tiny,vlb")


def test_a_file_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "quickstart.py"
    file.write_text(
        "from diffax.config import config_defaults\n"
        "VARIANTS = {'b': 'another'}\n"
        "get_config = lambda variant='': config_defaults('mine' + variant)\n"
    )
    assert configs.load("configs/quickstart.py").name == "mine"
    assert configs.load(f"{file}:b").name == "mineb"
    assert configs.load("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    "spec, words",
    [
        ("ddpm_cifar", "did you mean ddpm_cifar10"),
        ("configs/quikstart.py", "did you mean quickstart"),
        ("/nowhere/quickstart.py", "/nowhere/quickstart.py"),
        ("", "quickstart"),
        ("configs", "quickstart"),
        ("quickstart:tinny", "did you mean tiny"),
        ("iddpm_cifar10:hybrid,vlb", "exclude each other"),
        ("iddpm_cifar10:vlb,vlb", "twice"),
        ("iddpm_cifar10:small", "hybrid"),
        ("quickstart\nquickstart", "no config"),
    ],
)
def test_unknown_config_or_variant(spec, words):
    assert words in one_line(configs.load, spec)


@pytest.mark.parametrize(
    "source, words",
    [
        ("def get_config(", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("x = 1", "get_config"),
        ("def get_config(variant=''): return {}", "ConfigDict"),
        ("def get_config(variant=''): return 1 / 0", "ZeroDivisionError"),
        (
            """
            from diffax.config import config_defaults
            def get_config(variant=''):
                config = config_defaults('x')
                config.base.train.lerning_rate = 1.0
                return config
            """,
            "lerning_rate",
        ),
    ],
)
def test_broken_file(tmp_path, source, words):
    file = tmp_path / "broken.py"
    file.write_text(textwrap.dedent(source))
    message = one_line(configs.load, str(file))
    assert words in message and "broken.py" in message


# ---- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, value",
    [
        ("config.base.train.steps=1e3", 1000),
        ("--config.base.train.steps=2_000", 2000),
        ("config.base.train.learning_rate=1", 1.0),
        ("config.base.train.learning_rate=3e-5", 3e-5),
        ("config.base.net.channel_mult=1,2,2", (1, 2, 2)),
        ("config.base.net.channel_mult=(1, 2.5)", (1, 2.5)),
        ("config.base.net.channel_mult=[1,2]", (1, 2)),
        ("config.base.net.channel_mult=3", (3,)),
        ("config.base.net.attention=2,", (2,)),
        ("config.base.net.attention=none", ()),
        ("config.base.net.attention=()", ()),
        ("config.base.shape=16,16,1e0", (16, 16, 1)),
        ("config.base.takes=label", ("label",)),
        ("config.base.takes=('label','low_res')", ("label", "low_res")),
        ("config.base.takes=(label,low_res)", ("label", "low_res")),
        ("config.eval.steps=('90,60,60','ddim25')", ("90,60,60", "ddim25")),
        ("config.eval.steps=250,50", ("250", "50")),
        ("config.base.steps=250", "250"),
        ("config.base.steps='90,60'", "90,60"),
        ("config.base.steps=", ""),
        ("config.base.data.path=/a b=c/d", "/a b=c/d"),
        ("config.base.data.flip=True", True),
        ("config.base.data.flip=false", False),
        ("config.base.train.anneal=none", "none"),
        ("config.base.variance=learned_range", "learned_range"),
        ("config.base.variance=0.3", 0.3),
        ("config.base.train.ema=0.999,0.9999", (0.999, 0.9999)),
        ("config.base.guidance=classifier_free,clip_denoised", ("classifier_free", "clip_denoised")),
        ("config.eval.guidance=0,1.5,8", (0, 1.5, 8)),
        ("config.eval.guidance=none", ()),
        ("config.eval.samplers=ddpm,ddim", ("ddpm", "ddim")),
        ("config.eval.steps=quad10,logsnr10", ("quad10", "logsnr10")),
    ],
)
def test_override(override, value):
    config = configs.load("ddpm_cifar10", [override])
    found = get(config, override.removeprefix("--").split("=")[0])
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    "override",
    [
        "config.base.train.steps=1.5",
        "config.base.train.steps=abc",
        "config.base.train.steps=true",
        "config.base.train.steps=none",
        "config.base.train.steps=",
        "config.base.train.steps=1e400",
        "config.base.train.steps=nan",
        "config.base.train.steps=1,2",
        "config.base.train.learning_rate=fast",
        "config.base.train.learning_rate=",
        "config.base.data.flip=1",
        "config.base.data.flip=",
        "config.base.shape=32,x,3",
        "config.base.shape=32,32.5,3",
        "config.base.shape=32,,3",
        "config.base.variance=huge",
        "config.base.net=3",
        "config.base=3",
    ],
)
def test_override_of_the_wrong_type(override):
    path, _, text = override.partition("=")
    message = one_line(configs.load, "ddpm_cifar10", [override])
    assert message.startswith(path) and (text in message or "section" in message)


@pytest.mark.parametrize("override", ["", "--", "config", "config.seed", "base.train.steps=1", "="])
def test_override_of_no_form(override):
    assert "--config.section.field=value" in one_line(configs.load, "ddpm_cifar10", [override])


def test_overrides_are_recorded_and_the_last_wins():
    overrides = ["--config.seed=1", "config.base.data.path=a=b", "config.seed=2"]
    assert configs.overridden(overrides) == {"config.seed": "2", "config.base.data.path": "a=b"}
    assert configs.load("quickstart", overrides).seed == 2


def typos(path: str):
    """A letter lost, doubled, swapped, and one appended, in the last part of a path."""
    head, _, leaf = path.rpartition(".")
    middle = len(leaf) // 2
    yield f"{head}.{leaf[:middle]}{leaf[middle + 1 :]}"
    yield f"{head}.{leaf[:middle]}{leaf[middle]}{leaf[middle:]}"
    yield f"{head}.{leaf[: middle - 1]}{leaf[middle]}{leaf[middle - 1]}{leaf[middle + 1 :]}"
    yield f"{path}x"


@pytest.mark.parametrize("path", FIELDS)
def test_typo_of_a_field_gets_a_hint(path):
    for typo in typos(path):
        if typo not in FIELDS:
            message = one_line(configs.load, "ddpm_cifar10", [f"{typo}=1"])
            assert message.startswith(f"unknown field {typo};")
            # One or two letters leave nothing to go by.
            if len(path.rpartition(".")[2]) > 3:
                assert "did you mean config." in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("config.base.net.widht", "config.base.net.channels"),
        ("config.base.net.width", "config.base.net.channels"),
        ("config.base.net.chanels", "config.base.net.channels"),
        ("config.base.train.lr", "config.base.train.learning_rate"),
        ("config.lr", "config.base.train.learning_rate"),
        ("config.learning_rate", "config.base.train.learning_rate"),
        ("config.base.lerning_rate", "config.base.train.learning_rate"),
        ("config.bsae.net.heads", "config.base.net.heads"),
        ("config.base.nett.heads", "config.base.net.heads"),
        ("config.base.train.batchsize", "config.base.train.batch_size"),
    ],
)
def test_what_is_meant_is_found(typo, meant):
    message = one_line(configs.load, "ddpm_cifar10", [f"{typo}=1"])
    assert message.startswith(f"unknown field {typo}; did you mean") and meant in message


def test_a_field_like_nothing_lists_what_is_there():
    message = one_line(configs.load, "ddpm_cifar10", ["config.base.sampler.zzz=1"])
    assert message == "unknown field config.base.sampler.zzz; config.base.sampler has name, eta, temperature"


# ---- validation: one field at a time -------------------------------------------------------------


def wrong_values(field: Field):
    """Values that no field of this kind holds."""
    yield None
    yield {}
    if field.many:
        yield from (3, "label", [1], 1.5)
        items = [item for item in wrong_values(Field(field.kind(), **kept(field)))]
        length = max(field.lengths[0], 1)
        yield from ((item,) * length for item in items)
        if field.lengths[0]:
            yield ()
        yield (field.default or ("x",)) * (field.lengths[1] + 1)
        return
    if field.kind in (int, float):
        yield from (True, float("nan"), float("inf"), -float("inf"), 2**40, 1e300, "x", "", (1,))
        yield field.low - 1
        if field.above:
            yield field.low
        if field.below:
            yield field.high
        if field.kind is int:
            yield 1.5
    elif field.kind is bool:
        yield from (0, 1, "true", 0.0)
    else:
        yield from (3, 1.5, True, ("a",))
        if field.choices:
            yield from ("", "nothing", field.choices[0] + "x", field.choices[0].upper())


def kept(field: Field) -> dict:
    names = ("kind", "low", "high", "above", "below", "choices")
    return {name: getattr(field, name) for name in names}


@pytest.mark.parametrize("path", FIELDS)
def test_bad_value_is_named(path):
    for value in wrong_values(FIELDS[path]):
        if isinstance(value, dict):
            value = ConfigDict(value)
        message = one_line(configs.validate, put(defaults(), path, value))
        assert path in message, (value, message)
        if not isinstance(value, ConfigDict | tuple | None) and path != "config.stages":
            assert f"{path} must be" in message and repr(value) in message, (value, message)


@pytest.mark.parametrize("path", FIELDS)
def test_missing_field_is_named(path):
    config = defaults()
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    with config.unlocked():
        del section[leaf]
    assert path in one_line(configs.validate, config)


@pytest.mark.parametrize("path", FIELDS)
def test_unknown_field_in_a_file_is_named(path):
    config = defaults()
    typo = f"{path}_"
    message = one_line(configs.validate, put(config, typo, 1))
    assert message.startswith(f"unknown field {typo};")
    if typo.count(".") > 1 or path == "config.parallel":
        assert path in message


@pytest.mark.parametrize("path", ["config.base", "config.base.net", "config.sample"])
def test_section_that_is_none(path):
    assert path in one_line(configs.validate, put(defaults(), path, 3))


@pytest.mark.parametrize("path", ["config.bose", "config.base.nett"])
def test_unknown_section(path):
    config = put(defaults(), path, ConfigDict({"a": 1}))
    assert one_line(configs.validate, config).startswith(f"unknown field {path}.a;")


# ---- validation: fields that must go together ----------------------------------------------------


LABELLED = {"base.takes": ("label",), "base.num_classes": 10}
CLASSIFIER = {"base.net.name": "classifier", "base.num_classes": 10}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base.shape": (32, 36, 3)}, ["config.base.shape", "divisible by 8"]),
        ({"base.shape": (32, 32, 4)}, ["config.base.shape", "(height, width, 3)"]),
        ({"base.net.channels": 100}, ["config.base.net.groups", "100 channels of level 0"]),
        ({"base.net.channel_mult": (1, 0.3)}, ["config.base.net.groups", "38.4"]),
        ({"base.net.channels": 129, "base.net.groups": 1}, ["config.base.net.channels", "even"]),
        ({"base.net.groups": 48}, ["config.base.net.groups", "48"]),
        ({"base.net.heads": 3}, ["config.base.net.heads", "256", "3"]),
        ({"base.net.head_channels": 96}, ["config.base.net.head_channels", "96"]),
        ({"base.net.heads_up": 3}, ["config.base.net.heads_up", "3"]),
        ({"base.net.attention": (16,)}, ["config.base.net.attention", "1, 2, 4, 8", "not resol"]),
        ({"base.net.attention": (3,)}, ["config.base.net.attention"]),
        ({"base.net.attention": (2, 2)}, ["config.base.net.attention", "different"]),
        ({"base.takes": ("label",)}, ["config.base.num_classes", "got 0"]),
        ({"base.num_classes": 10}, ["config.base.num_classes", "config.base.takes"]),
        ({"base.takes": ("low_res", "low_res")}, ["config.base.takes", "different"]),
        ({"base.data.name": "folder"}, ["config.base.data.path", "folder"]),
        ({"base.data.name": "tfds"}, ["config.base.data.path", "tfds"]),
        ({"base.data.split": ""}, ["config.base.data.split"]),
        ({"base.data.holdout": ("red circle",)}, ["config.base.data.holdout", "shapes"]),
        ({"base.variance": "learned"}, ["config.base.variance", "'hybrid' or 'vlb'"]),
        ({"base.variance": "learned_range"}, ["config.base.variance", "'hybrid' or 'vlb'"]),
        ({"base.loss.name": "hybrid"}, ["config.base.loss.name", "config.base.variance"]),
        ({"base.variance": 0.5, "base.loss.name": "hybrid"}, ["config.base.variance"]),
        ({"base.schedule.beta_start": 0.1}, ["config.base.schedule.beta_start", "beta_end"]),
        ({"base.schedule.steps": 5}, ["config.base.schedule.steps", "(0, 1]"]),
        ({"base.steps": "1001"}, ["config.base.steps", "1001"]),
        ({"base.steps": "0"}, ["config.base.steps", "'0'"]),
        ({"base.steps": "-5"}, ["config.base.steps", "-5"]),
        ({"base.steps": "ddim300"}, ["config.base.steps", "ddim300"]),
        ({"base.steps": "ddim"}, ["config.base.steps", "ddim"]),
        ({"base.steps": "10,,5"}, ["config.base.steps"]),
        ({"base.steps": "2.5"}, ["config.base.steps"]),
        ({"base.steps": "fast"}, ["config.base.steps", "'ddimN'"]),
        ({"eval.steps": ("50", "dim50")}, ["config.eval.steps", "dim50"]),
        ({"base.steps": "trailing1001"}, ["config.base.steps", "trailing1001", "1000"]),
        ({"base.steps": "trailing"}, ["config.base.steps", "'trailing'", "'trailingN'"]),
        ({"base.steps": "quad0"}, ["config.base.steps", "quad0", "'quadN'"]),
        ({"base.steps": "quad1001"}, ["config.base.steps", "quad1001", "1000"]),
        ({"base.steps": "logsnr"}, ["config.base.steps", "'logsnr'", "'logsnrN'"]),
        ({"base.steps": "logsnr1001"}, ["config.base.steps", "logsnr1001", "1000"]),
        ({"eval.steps": ("quad10", "quad-10")}, ["config.eval.steps", "quad-10"]),
        ({"eval.samplers": ("ddpm", "euler")}, ["config.eval.samplers", "dpm_solver_pp_2m", "euler"]),
        ({"eval.samplers": ("ddmp",)}, ["config.eval.samplers", "did you mean ddpm"]),
        ({"eval.guidance": (1.0, math.nan)}, ["config.eval.guidance", "a number", "nan"]),
        ({"eval.guidance": (1.0, 2.0)}, ["config.eval.guidance", "no stage is guided", "'classifier_free'"]),
        ({"eval.levels": (0.0, 1.5)}, ["config.eval.levels", "[0, 1]", "1.5"]),
        ({"eval.judge": "inception"}, ["config.eval.judge", "'svc', 'network'"]),
        ({"base.data.name": "digits", "base.data.single": True}, ["config.base.data.single", "shapes", "digits"]),
        ({"base.drop": 0.1}, ["config.base.drop", "config.base.takes", "'label'"]),
        ({"base.drop": 1.0}, ["config.base.drop", "[0, 1)"]),
        ({"base.guidance": ("classifier_free",)}, ["config.base.guidance", "config.base.drop"]),
        (LABELLED | {"base.guidance": ("classifier_free",)}, ["config.base.guidance", "config.base.drop"]),
        (LABELLED | {"base.drop": 0.1, "base.guidance": configs.SCALED}, ["config.base.guidance", "choose one"]),
        ({"base.guidance": ("classifier",)}, ["config.base.classifier", "config.base.guidance"]),
        ({"base.classifier": "classifier"}, ["config.base.classifier", "config.base.guidance"]),
        (
            {"base.guidance": ("classifier",), "base.classifier": "other"},
            ["config.base.classifier", "'other'", "net.name is 'classifier'"],
        ),
        ({"base.guidance": ("classifier",), "base.classifier": "base"}, ["config.base.classifier", "'base'"]),
        ({"base.net.name": "classifier"}, ["config.base.num_classes", "classifier"]),
        (CLASSIFIER | {"base.takes": ("label",)}, ["config.base.takes", "classifier"]),
        (
            CLASSIFIER | {"base.timesteps.name": "loss_second_moment"},
            ["config.base.timesteps.name", "loss_second_moment"],
        ),
        (CLASSIFIER | {"base.net.pool": "max"}, ["config.base.net.pool", "'attention'"]),
        (CLASSIFIER | {"base.shape": (36, 36, 3)}, ["config.base.shape", "divisible by 8"]),
        ({"base.train.weight_decay": 0.1}, ["config.base.train.weight_decay", "adamw"]),
        ({"base.train.ema": (0.9, 0.9)}, ["config.base.train.ema", "different"]),
        ({"name": ""}, ["config.name"]),
        ({"name": "../x"}, ["config.name"]),
        ({"stages": ("base", "up")}, ["config.stages", "config.up"]),
        ({"stages": ("base", "base")}, ["config.stages", "different"]),
        ({"stages": ("sample",)}, ["config.stages"]),
        ({"stages": ("../base",)}, ["config.stages", "../base"]),
        ({"stages": ("bose",)}, ["config.stages", "config.bose"]),
    ],
)
def test_fields_that_do_not_go_together(changes, words):
    config = defaults()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    message = one_line(configs.validate, config)
    assert all(word in message for word in words), message


CONTINUOUS = {"base.schedule.name": "cosine_logsnr", "base.steps": "100"}


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"base.loss.name": "vlb"}, "loss.name"),
        ({"base.loss.name": "hybrid", "base.variance": "learned_range"}, "loss.name"),
        ({"base.timesteps.name": "loss_second_moment"}, "timesteps.name"),
        ({"base.predicts": "previous_x"}, "predicts"),
        ({"base.steps": ""}, "steps"),
        ({"base.steps": "0"}, "steps"),
        ({"base.steps": "10,20"}, "steps"),
        ({"base.steps": "ddim50"}, "steps"),
        ({"base.steps": "trailing10"}, "steps"),
        ({"base.steps": "fast27"}, "steps"),
        ({"base.steps": "quad0"}, "steps"),
        ({"base.steps": "logsnr"}, "steps"),
        ({"base.schedule.logsnr_max": -20.0}, "schedule.logsnr_min"),
    ],
)
def test_what_needs_a_discrete_schedule(changes, field):
    config = defaults()
    for path, value in (CONTINUOUS | changes).items():
        put(config, f"config.{path}", value)
    assert f"config.base.{field}" in one_line(configs.validate, config)


@pytest.mark.parametrize(
    "changes",
    [
        CONTINUOUS,
        CONTINUOUS | {"base.variance": 0.3, "base.predicts": "v", "base.steps": "4096"},
        CONTINUOUS | {"base.steps": "quad10", "eval.steps": ("100", "quad10", "logsnr10")},
        CONTINUOUS | {"base.steps": "logsnr10"},
        CONTINUOUS | LABELLED | {"base.drop": 0.1, "base.guidance": ("classifier_free", "clip_denoised")},
        CONTINUOUS | CLASSIFIER,
        {"base.variance": "learned_range", "base.loss.name": "hybrid"},
        {"base.variance": "learned", "base.loss.name": "vlb"},
        {"base.variance": "learned", "base.loss.name": "hybrid", "base.predicts": "previous_x"},
        {"base.loss.name": "vlb", "base.timesteps.name": "loss_second_moment"},
        {"base.steps": "90,60,60,20,20"},
        {"base.steps": "ddim50", "base.sampler.name": "ddim", "base.sampler.eta": 1.0},
        {"base.steps": "fast27"},
        {"base.steps": "trailing10", "eval.steps": ("trailing1000", "quad10", "quad1000", "logsnr10", "logsnr1000")},
        {"base.steps": "quad10"},
        {"base.steps": "logsnr10"},
        {"eval.samplers": configs.SAMPLERS, "eval.judge": "network"},
        LABELLED | {"base.drop": 0.1, "base.guidance": ("classifier_free",), "eval.guidance": (0, 1.5, -1.0)},
        LABELLED | {"base.drop": 0.1},
        LABELLED | {"base.drop": 0.5, "base.guidance": ("classifier_free", "dynamic_threshold")},
        {"base.data.name": "shapes", "base.data.single": True, "base.data.holdout": ("red circle",)},
        CLASSIFIER,
        CLASSIFIER | {"base.net.pool": "spatial_v2", "base.timesteps.name": "stratified", "base.train.ema": ()},
        {"base.net.channel_mult": (0.5, 1, 1, 2), "base.net.channels": 64},
        {"base.net.head_channels": 64, "base.net.attention": (1, 2, 4, 8)},
        {"base.net.attention": ()},
        {"base.takes": ("label",), "base.num_classes": 1},
        {"base.data.name": "shapes", "base.data.holdout": ("red circle",)},
        {"base.shape": (8, 24, 1)},
        {"eval.steps": ("50", "ddim25")},
        {"base.train.optimizer": "adamw", "base.train.weight_decay": 0.01},
    ],
)
def test_fields_that_go_together(changes):
    config = defaults()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    configs.validate(config)


@pytest.mark.parametrize(
    "batch, accumulate, devices, processes, words",
    [
        (12, 1, 8, 1, "global batch 12 is not divisible by 8 devices (use 8 or 16)"),
        (3, 1, 8, 1, "(use 8)"),
        (24, 2, 8, 1, "8 devices x 2 accumulated parts (use 16 or 32)"),
        (15, 1, 1, 4, "4 processes (use 12 or 16)"),
    ],
)
def test_batch_that_cannot_be_divided(batch, accumulate, devices, processes, words):
    config = defaults()
    config.base.train.update(batch_size=batch, accumulate=accumulate)
    message = one_line(configs.validate, config, device_count=devices, process_count=processes)
    assert words in message and "config.base.train.batch_size" in message


def test_batch_of_a_device_each():
    config = defaults()
    config.base.train.update(batch_size=16, accumulate=2)
    configs.validate(config, device_count=8, process_count=2)


def cascade() -> ConfigDict:
    config = defaults()
    with config.unlocked():
        config.up = configs.stage_defaults()
    config.stages = ("base", "up")
    config.up.update(shape=(64, 64, 3), takes=("low_res",))
    config.up.low_res.factor = 2
    return config


def test_every_stage_is_checked():
    configs.validate(cascade())
    config = cascade()
    config.up.net.heads = 3
    assert "config.up.net.heads" in one_line(configs.validate, config)
    config = put(cascade(), "config.up.net.depht", 3)
    assert "unknown field config.up.net.depht" in one_line(configs.validate, config)
    config = cascade()
    configs.override(config, ["config.up.train.steps=5"])
    assert config.up.train.steps == 5 and config.base.train.steps != 5


UPSAMPLER = {"stages": ("up",)}
NOISED = {"up.low_res.noise": 1.0, "up.low_res.level": 0.25}


@pytest.mark.parametrize(
    "changes",
    [
        UPSAMPLER,
        UPSAMPLER | {"up.low_res.factor": 4, "up.shape": (64, 128, 3)},
        UPSAMPLER | {"up.shape": (24, 40, 1), "up.low_res.factor": 8},
        NOISED,
        NOISED | {"up.low_res.level": 1.0},
        {"up.low_res.noise": 0.5, "up.low_res.level": 0.5},
        {"up.low_res.blur": 0.5},
        {"up.low_res.blur": 1.0, "up.low_res.blur_sigma": (0.5, 0.5), "up.low_res.round": False},
        {"up.low_res.jpeg": (30, 95)},
        {"up.low_res.jpeg": (75,)},
        {"up.low_res.crop": 8},
        {"up.low_res.crop": 64},
        {"up.low_res.crop": 12, "up.net.channel_mult": (1, 2), "up.net.attention": (2,)},
        NOISED | {"up.low_res.truncated": True},
        NOISED | {"up.low_res.truncated": True, "base.steps": "100"},
        {
            "base.shape": (16, 16, 3),
            "up.low_res.factor": 4,
            "up.takes": ("label", "low_res"),
            "up.num_classes": 10,
        },
        {
            **NOISED,
            **{f"{name}.schedule.name": "cosine_logsnr" for name in ("base", "up")},
            **{f"{name}.steps": "50" for name in ("base", "up")},
            "up.low_res.truncated": True,
        },
        {"base.low_res.crop": 0},  # as by default
    ],
)
def test_low_res_that_fits(changes):
    config = cascade()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    configs.validate(config)
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"up.takes": ()}, ["config.up.takes", "'low_res'", "config.base"]),
        ({"base.low_res.noise": 0.5}, ["config.base.low_res", "config.base.takes", "'low_res'"]),
        (UPSAMPLER | {"up.takes": ()}, ["config.up.low_res", "config.up.takes"]),
        ({"up.low_res.factor": 3}, ["config.up.low_res.factor", "(64, 64, 3)", "got 3"]),
        (
            {"up.low_res.factor": 4},
            ["config.up.low_res.factor", "(16, 16, 3)", "config.base.shape", "(32, 32, 3)"],
        ),
        (
            {"base.shape": (32, 32, 1)},
            ["config.up.low_res.factor", "(32, 32, 3)", "config.base.shape", "(32, 32, 1)"],
        ),
        ({"up.low_res.level": 0.1}, ["config.up.low_res.level", "config.up.low_res.noise", "0.1"]),
        (
            {"up.low_res.noise": 0.2, "up.low_res.level": 0.3},
            ["config.up.low_res.level", "at most", "0.2", "got 0.3"],
        ),
        ({"up.low_res.blur_sigma": (0.6, 0.4)}, ["config.up.low_res.blur_sigma", "lowest first"]),
        ({"up.low_res.jpeg": (95, 30)}, ["config.up.low_res", "jpeg", "lowest first", "95"]),
        ({"up.low_res.degrade": "bsr", "up.low_res.jpeg": (30,)}, ["config.up.low_res.degrade", "leave blur and jpeg"]),
        ({"up.low_res.crop": 12}, ["config.up.low_res.crop", "multiple of 8", "got 12"]),
        ({"up.low_res.crop": 72}, ["config.up.low_res.crop", "at most 64", "got 72"]),
        (UPSAMPLER | NOISED | {"up.low_res.truncated": True}, ["config.up.low_res.truncated", "stage before"]),
        ({"up.low_res.truncated": True}, ["config.up.low_res.truncated", "level above 0", "level 0"]),
        (
            NOISED | {"up.low_res.truncated": True, "up.schedule.name": "cosine"},
            ["config.up.low_res.truncated", "schedule", "config.base"],
        ),
        (
            NOISED | {"up.low_res.truncated": True, "up.low_res.level": 1.0},
            ["config.up.low_res.level 1", "before its first step"],
        ),
        (
            NOISED | {"up.low_res.truncated": True, "up.low_res.level": 0.9, "base.steps": "5"},
            ["config.up.low_res.level 0.9", "before its first step"],
        ),
    ],
)
def test_low_res_that_does_not_fit(changes, words):
    config = cascade()
    for path, value in changes.items():
        put(config, f"config.{path}", value)
    message = one_line(configs.validate, config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base.steps": "quad20", "base.schedule.steps": 2000},
        {"base.steps": "logsnr20", "base.variance": 0.3, "base.predicts": "x"},
        {"base.schedule.name": "cosine"},
        {"base.schedule.name": "const", "eval.steps": ("10", "20")},
    ],
)
def test_a_chain_may_be_made_continuous(changes):
    config = defaults()
    for path, value in ({"base.schedule.continuous": True, "base.steps": "100"} | changes).items():
        put(config, f"config.{path}", value)
    configs.validate(config)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base.steps": ""}, ["config.base.steps", "'N', 'quadN' or 'logsnrN'"]),
        ({"base.steps": "ddim50"}, ["config.base.steps", "ddim50"]),
        ({"base.steps": "10,10"}, ["config.base.steps", "continuous"]),
        ({"eval.steps": ("50", "ddim50")}, ["config.eval.steps", "ddim50"]),
        ({"base.loss.name": "vlb"}, ["config.base.loss.name", "continuous"]),
        ({"base.loss.name": "hybrid", "base.variance": "learned_range"}, ["config.base.loss.name", "continuous"]),
        ({"base.timesteps.name": "loss_second_moment"}, ["config.base.timesteps.name", "continuous"]),
        ({"base.predicts": "previous_x"}, ["config.base.predicts", "continuous"]),
        ({"base.schedule.name": "jsd"}, ["config.base.schedule", "(0, 1)"]),  # its last beta is 1
        ({"base.schedule.beta_start": 0.1}, ["config.base.schedule.beta_start", "beta_end"]),
    ],
)
def test_what_a_continuous_chain_cannot_have(changes, words):
    config = defaults()
    for path, value in ({"base.schedule.continuous": True, "base.steps": "100"} | changes).items():
        put(config, f"config.{path}", value)
    message = one_line(configs.validate, config)
    assert all(word in message for word in words), message


def guided(**changes) -> ConfigDict:
    """An unconditional stage and the classifier of 10 classes that guides it."""
    config = defaults()
    classifier = configs.add_section(config, "guide")
    classifier.net.name, classifier.num_classes = "classifier", 10
    config.base.guidance, config.base.classifier = ("clip_denoised", "classifier"), "guide"
    for path, value in changes.items():
        put(config, f"config.{path.replace('__', '.')}", value)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stages": ("guide", "base")},
        {"base__takes": ("label",), "base__num_classes": 10},
        {"guide__net__channels": 32, "guide__train__ema": (), "guide__data__crop": "random"},
        {
            "base__schedule__name": "cosine_logsnr",
            "guide__schedule__name": "cosine_logsnr",
            "base__steps": "50",
        },
    ],
)
def test_a_classifier_may_guide(changes):
    config = guided(**changes)
    configs.validate(config)
    assert set(configs.trained_sections(config)) == {"base", "guide"}
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"guide__shape": (64, 64, 3)}, ["config.base.shape", "config.guide.shape", "64"]),
        (
            {"guide__schedule__name": "cosine"},
            ["config.base.schedule", "config.guide.schedule", "'linear'", "'cosine'"],
        ),
        ({"guide__schedule__steps": 4000}, ["config.base.schedule", "config.guide.schedule"]),
        (
            {"base__takes": ("label",), "base__num_classes": 6},
            ["config.base.num_classes", "config.guide.num_classes", "6", "10"],
        ),
        ({"guide__num_classes": 0}, ["config.guide.num_classes", "classifier"]),
        ({"guide__takes": ("label",)}, ["config.guide.takes", "classifier"]),
        ({"guide__net__heads": 3}, ["config.guide.net.heads"]),
        ({"guide__train__weight_decay": 0.1}, ["config.guide.train.weight_decay", "adamw"]),
        ({"guide__net__name": "unet"}, ["config.base.classifier", "'guide'"]),
        ({"base__classifier": "gude"}, ["config.base.classifier", "'gude'", "there is guide"]),
        ({"base__classifier": ""}, ["config.base.classifier", "config.base.guidance"]),
        ({"base__guidance": ("clip_denoised",)}, ["config.base.classifier", "config.base.guidance"]),
        (
            {
                "base__takes": ("label",),
                "base__num_classes": 10,
                "base__drop": 0.1,
                "base__guidance": ("classifier", "classifier_free"),
            },
            ["config.base.guidance", "choose one"],
        ),
    ],
)
def test_a_classifier_must_fit_what_it_guides(changes, words):
    message = one_line(configs.validate, guided(**changes))
    assert all(word in message for word in words), message


def test_what_guides_is_trained_too_and_once():
    config = guided(stages=("base",))
    assert configs.trained_sections(config) == ("base", "guide")
    assert configs.is_classifier(config.guide) and not configs.is_classifier(config.base)
    config.stages = ("guide", "base")
    assert configs.trained_sections(config) == ("guide", "base")


def test_a_stage_can_be_left_out():
    config = cascade()
    config.stages = ("base",)
    configs.validate(config)


# ---- as data -------------------------------------------------------------------------------------


def test_from_dict_fills_in_what_an_older_file_lacks():
    data = configs.to_dict(defaults())
    del data["base"]["net"]["remat"], data["eval"]
    assert configs.from_dict(data) == defaults()


def test_from_dict_keeps_all_stages():
    assert configs.from_dict(configs.to_dict(cascade())) == cascade()


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("base", "net", "widht"), 3, "did you mean config.base.net.channels"),
        (("base", "net", "channels"), "3", "config.base.net.channels must be a whole number"),
        (("base", "net", "channels"), None, "config.base.net.channels must be a whole number"),
        (("base", "net"), 3, "config.base.net must be a section"),
        (("base", "shape"), 3, "config.base.shape must be a tuple"),
        (("base", "shape"), [1, "a"], "config.base.shape must be a tuple"),
        (("extra",), 3, "unknown field config.extra"),
        (("stages",), "base", "config.stages must be a tuple"),
        (("base",), 3, "config.base"),
    ],
)
def test_from_dict_refuses_what_is_no_config(path, value, words):
    data = configs.to_dict(defaults())
    section = data
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    assert words in one_line(configs.from_dict, data)
