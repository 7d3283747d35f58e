"""Configs: each loads, passes the checks and survives JSON; every mistake is one line that names the field."""

import copy
import functools
import json
import math
import pathlib
import textwrap

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffax import components
from diffax import config as configs
from diffax.components import Each, Group, Of, each, spec
from diffax.errors import UserError
from diffax.models.system import System

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
    "karlo up_last": 691_579_523,
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
# CDM's authors published no counts. These were counted on OpenAI's U-Net, to a million. The stage that reads how noisy
# its smaller picture is owns a second timestep embedding besides: 256 -> 1024 -> 1024.
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


def leaves(fields, path: str) -> dict[str, components.Field]:
    """Every plain field of a schema and of the components that are there by default, by its path."""
    found = {}
    for name, field in fields.items():
        here, nested = f"{path}.{name}", field.nested
        if isinstance(nested, Group):
            found |= leaves(components.schema(nested.fields), here)
        elif isinstance(nested, Of):
            found |= leaves(components.schema(components.find(nested.kind, nested.default)), here)
        elif isinstance(nested, Each):
            for each_name in nested.default:
                found |= leaves(components.schema(components.find(nested.kind, each_name)), f"{here}.{each_name}")
        else:
            found[here] = field
    return found


FIELDS = leaves(components.schema(configs.top), "config") | leaves(
    configs.section_fields(configs.new("test"), "base"), "config.base"
)


def one_line(call, *args, **kwargs) -> str:
    """The message of the UserError that the call raises; one line, short enough to read."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600, message
    return message


def put(config: ConfigDict, path: str, value) -> ConfigDict:
    """Sets a field whatever it may hold, as an edited file could."""
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    section[leaf] = value
    return config


def changed(config: ConfigDict, changes) -> ConfigDict:
    """Sets fields given by their paths without `config.`, in this order."""
    for path, value in changes.items():
        put(config, f"config.{path}", copy.deepcopy(value))
    return config


def get(config: ConfigDict, path: str):
    for name in path.split(".")[1:]:
        config = config[name]
    return config


def section_of(key: str) -> tuple[ConfigDict, str]:
    """'SPEC' or 'SPEC SECTION' -> the config and the name of the section."""
    spec_, _, section = key.partition(" ")
    return configs.load(spec_), section or "base"


def defaults() -> ConfigDict:
    return configs.new("test")


def order(section):
    """The names of all fields, in order, of a section and those below it."""
    return [(name, order(its)) for name, its in section.items()] if hasattr(section, "items") else None


# ---- the configs that come with diffax ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_config_is_valid_and_survives_json(name):
    config = configs.load(name)
    configs.check(config)
    configs.check(config, device_count=8, process_count=2)
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    configs.check(again)
    assert again == config and order(again) == order(config)
    assert jax.tree.map(type, again.to_dict()) == jax.tree.map(type, config.to_dict())
    for section in configs.sections(config):
        assert configs.identity(again, section, training=True) == configs.identity(config, section, training=True)


def test_every_config_describes_itself():
    found = configs.available()
    counted = {key.split()[0].split(":")[0] for key in PUBLISHED | COUNTED}
    assert {"quickstart", "glide", "dalle2"} | counted == set(found)
    for name, (summary, variants) in found.items():
        assert summary and "tiny" in variants, name
        assert configs.load(name).name.startswith(name)


@pytest.mark.parametrize("name", [s for s in SPECS if "tiny" in s])
def test_tiny_keeps_the_method(name):
    tiny, full = configs.load(name), configs.load(name.replace("tiny", "").strip(",").rstrip(":,"))
    sections = System(tiny).trained
    left_out = {"up_1024"} if name.startswith("dalle2:") else set()
    assert sections == tuple(section for section in System(full).trained if section not in left_out)
    for section in sections:
        keeps_the_method(tiny[section], full[section])


def keeps_the_method(small: ConfigDict, large: ConfigDict):
    assert small.name == large.name and small.net.name == large.net.name
    conditions = set(large.get("conditions", {}))
    assert set(small.get("conditions", {})) >= conditions
    for path in ("variance", "timesteps", "sampler", "condition_dropout", "guidance", "clip", "noised", "temperature"):
        assert small.get(path) == large.get(path), path
    if "predicts" in large:
        # a small network does not learn to read a smaller picture from eps within minutes, nor a caption
        eager = conditions - {"label"} and large.predicts == "eps"
        assert small.predicts in (large.predicts, "v" if eager else large.predicts)
        assert small.loss.name == large.loss.name
    for path in ("pool", "scale_shift", "resample", "mid_attention"):
        assert small.net.get(path) == large.net.get(path), path
    for condition in conditions:
        mine, its = small.conditions[condition], large.conditions[condition]
        fields = ("name", "dropout", "noise", "level", "truncated", "blur", "blur_sigma", "round", "jpeg", "degrade")
        for field in (*fields, "resize", "enters", "norm", "empty", "final_norm", "padding_embedding", "clip"):
            assert mine.get(field) == its.get(field), (condition, field)
    assert small.train.optimizer == large.train.optimizer
    if "schedule" in large:
        assert small.schedule.name == large.schedule.name
        assert small.schedule.get("continuous") == large.schedule.get("continuous")
    assert small.data.name in ("digits", "photos", "examples.shapes.data:shapes")
    assert small.net.get("channels", 0) <= 32
    if len(small.shape) == 3:
        # What training reads: of a stage that enlarges, perhaps a window.
        crop = small.get("conditions", {}).get("low_res", {}).get("crop", 0)
        side = crop or max(small.shape[:2])
        assert side <= (32 if conditions - {"label"} or "tokenizer" in small else 16) and max(small.shape[:2]) <= 64


@pytest.mark.parametrize("name", [s for s in SPECS if "tiny" in s])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_tiny_runs_on_any_number_of_devices(name, devices):
    for section in (config := configs.load(name))["stages"]:
        assert config[section].train.batch_size % devices == 0


@functools.cache  # several configs have one network, and tracing it takes seconds
def parameters(identity: str, key: str) -> int:
    config, section = section_of(key)
    params = jax.eval_shape(System(config).model(section).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_of(key: str) -> int:
    """Parameters of a section, without any memory for them."""
    config, section = section_of(key)
    identity = {name: configs.identity(config, name) for name in System(config).model(section).frozen}
    own = {path.removeprefix(f"config.{section}."): v for path, v in configs.identity(config, section).items()}
    return parameters(json.dumps([own, identity]), key)


@pytest.mark.parametrize("key, count", PUBLISHED.items())
def test_parameters_are_as_many_as_published(key, count):
    assert count_of(key) == count


@pytest.mark.parametrize("key, about, count", [(key, *counts) for key, counts in COUNTED.items()])
def test_parameters_are_as_many_as_counted(key, about, count):
    assert count_of(key) == count
    assert abs(count / about - 1) < 0.01


@pytest.mark.skipif(not MANIFEST.exists(), reason="no manifest_full_size.json in the golden folder")
@pytest.mark.parametrize("key, model", ON_FILE.items())
def test_networks_have_the_published_options(key, model):
    """Heads and dropout, which no count of parameters shows, and how the model is noised."""
    config, name = section_of(key)
    section = config[name]
    model = model if "/" in model else f"guided-diffusion/{model}"
    entry = json.loads(MANIFEST.read_text())["models"][model]
    args, made = entry["args"], entry["constructor"]
    net, size = section.net, section.shape[0]
    assert (net.channels, net.num_res_blocks, net.dropout) == tuple(
        made.get(option, default)
        for option, default in (("model_channels", None), ("num_res_blocks", None), ("dropout", 0))
    )
    assert net.channel_mult == tuple(made["channel_mult"]) and net.attention == tuple(made["attention_resolutions"])
    assert net.scale_shift == made.get("use_scale_shift_norm", False)
    assert (net.resample == "biggan") == made.get("resblock_updown", False)
    head_channels = made.get("num_head_channels", -1)
    assert net.head_channels == max(head_channels, 0)
    if head_channels <= 0:
        assert net.heads == made.get("num_heads", 1)
    if "pool" in made:
        assert net.pool == made["pool"]
    conditions = set(section.get("conditions", {}))
    assert ("label" in conditions) == bool(made.get("num_classes")) or section.name == "classifier"
    if "noise_schedule" in args:
        assert section.schedule.name == args["noise_schedule"]
        assert section.schedule.num_timesteps == args["diffusion_steps"]
        assert section.schedule.rescale_time == args["rescale_timesteps"]
        assert (section.variance == "learned_range") == args["learn_sigma"]
        assert ("label" in conditions) == args["class_cond"]
        assert not args["class_cond"] or section.conditions.label.num_classes == 1000
    if "large_size" in args:
        assert (size, section.conditions.low_res.factor) == (args["large_size"], 4)
        assert args["large_size"] == 4 * args["small_size"]


def test_hyper_parameters_of_the_papers():
    ddpm = configs.load("ddpm_cifar10").base
    assert ddpm.variance == "fixed_large" and ddpm.loss.name == "simple" and ddpm.net.dropout == 0.1
    assert configs.load("ddpm_lsun_256:church").base.variance == "fixed_small"
    assert [configs.load(f"ddpm_lsun_256:{s}").base.loader.flip for s in ("bedroom", "cat")] == [0, 1]
    hybrid, vlb = (configs.load(f"iddpm_cifar10:{v}").base for v in ("hybrid", "vlb"))
    assert (hybrid.loss.name, hybrid.loss.weight, hybrid.timesteps.name) == ("hybrid", 4, "uniform")
    assert (vlb.loss.name, vlb.loss.weight) == ("vlb", 4000)
    assert vlb.timesteps.name == "loss_second_moment"
    cond = configs.load("iddpm_imagenet_64:cond").base
    assert cond.loss.weight == 1 and not cond.schedule.rescale_time and hybrid.schedule.rescale_time
    for stage in (hybrid, vlb, cond):
        assert stage.train.grad_clip == 0 and stage.train.warmup_steps == 0 and not stage.loader.flip


@pytest.mark.parametrize(
    "name, scale, steps, batch, rate, classifier",
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
def test_recipes_of_adm(name, scale, steps, batch, rate, classifier):
    config = configs.load(name)
    stage, train = config.base, config.base.train
    assert (train.num_train_steps, train.batch_size, train.learning_rate, train.ema) == (steps, batch, rate, (0.9999,))
    assert (train.optimizer.name, train.optimizer.weight_decay, train.grad_clip) == ("adamw", 0, 0)
    assert (train.warmup_steps, train.anneal) == (0, "none")
    assert (stage.loss.name, stage.loss.weight) == ("hybrid", stage.schedule.num_timesteps / 1000)
    assert stage.loader.flip
    if classifier:
        assert [*stage.guidance] == ["clip_denoised", "classifier"] and stage.guidance.classifier.scale == scale
        assert stage.guidance.classifier.section == "classifier"
        assert stage.steps == "250" and config.stages == ("classifier", "base")
        assert config.classifier == configs.load(classifier).classifier
    else:
        assert [*stage.guidance] == ["clip_denoised"] and stage.steps == "" and config.stages == ("base",)


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
    assert (train.num_train_steps, train.batch_size, train.learning_rate) == (steps, batch, rate)
    assert (train.optimizer.name, train.optimizer.weight_decay) == ("adamw", decay)
    assert (train.anneal, train.ema) == ("linear", ())
    assert (train.grad_clip, train.warmup_steps, section.net.num_res_blocks) == (0, 0, depth)
    assert section.loader.flip and section.loader.crop == "random"
    assert section.schedule == configs.load(f"adm_imagenet_{size}").base.schedule


@pytest.mark.parametrize(
    "name, variance, dropout, steps, batch",
    [
        ("cfg_imagenet_64", 0.3, 0.1, 400_000, 2048),
        ("cfg_imagenet_64:p20", 0.3, 0.2, 400_000, 2048),
        ("cfg_imagenet_64:p50", 0.3, 0.5, 400_000, 2048),
        ("cfg_imagenet_128", 0.2, 0.1, 2_700_000, 256),
    ],
)
def test_recipes_of_classifier_free_guidance(name, variance, dropout, steps, batch):
    stage = configs.load(name).base
    adm = configs.load(name.split(":")[0].replace("cfg", "adm")).base
    assert (stage.variance, stage.condition_dropout, stage.steps) == (variance, dropout, "256")
    assert (stage.schedule.logsnr_min, stage.schedule.logsnr_max) == (-20, 20)
    # x is clipped after guidance, which leaves the range of pictures.
    assert [*stage.guidance] == ["classifier_free", "clip_denoised"]
    assert stage.net == adm.net and stage.train.learning_rate == adm.train.learning_rate
    assert (stage.train.num_train_steps, stage.train.batch_size) == (steps, batch)


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
    assert (train.batch_size, train.num_train_steps, train.learning_rate) == (batch, steps, 1e-4)
    assert train.ema == (0.9999,) and train.optimizer.name == "adam" and stage.schedule.num_timesteps == length
    assert int(stage.steps or length) == sampled
    # The label at every stage, guidance at none.
    assert [*stage.conditions] == (["label"] if name == "base" else ["label", "low_res"])
    assert stage.conditions.label.num_classes == 1000
    assert [*stage.guidance] == ["clip_denoised"] and not stage.condition_dropout
    if name in ("base", "up_64"):
        assert (stage.variance, stage.loss.name, stage.schedule.name) == ("learned_range", "hybrid", "cosine")
        assert stage.loss.weight == length / 1000 and not stage.schedule.continuous
    else:
        assert (stage.variance, stage.loss.name, stage.schedule.continuous) == ("fixed_large", "simple", True)
    if name == "base":
        return
    c = stage.conditions.low_res
    if name == "up_64":
        # Any amount of noise in training; in sampling what was best of 4000 steps, between 751 and 1251.
        assert (c.noise, c.blur) == (1, 0) and 751 <= c.level * 4000 <= 1251 and not c.truncated
    else:
        assert (c.noise, c.blur, c.blur_sigma) == (0, 0.5, (0.4, 0.6))
    assert c.factor == (4 if name == "up_256" else 2)


@pytest.mark.parametrize("name", ["cascade_128", "cascade_256"])
def test_cascades_share_their_first_stages(name):
    config, to_64 = configs.load(name), configs.load("cascade_64")
    assert config.stages == ("base", "up_64", name.replace("cascade", "up")) and to_64.stages == ("base", "up")
    assert config.base == to_64.base and config.up_64 == to_64.up
    assert [config[section].shape[0] for section in config.stages] == [32, 64, int(name.split("_")[1])]


@pytest.mark.parametrize("name", ["cascade_128", "cascade_256"])
def test_betas_of_the_continuous_stages(name):
    """From 1e-6 to 1e-2 over 2000 steps (SR3), where the schema's numbers are for 1000."""
    from diffax.diffusion import schedules

    c = configs.load(name)[name.replace("cascade", "up")].schedule
    assert c.name == "linear"
    betas = schedules.linear_betas(c.num_timesteps, c.beta_start, c.beta_end)
    assert betas == pytest.approx(np.linspace(1e-6, 1e-2, 2000), rel=1e-12)


@pytest.mark.parametrize(
    "name, steps, rate, length, schedule, flip",
    [
        ("adm_upsample_64_256", 500_000, 1e-4, 1000, "linear", True),
        ("adm_upsample_128_512", 1_050_000, 1e-4, 1000, "linear", True),
        ("iddpm_upsample_64_256", 500_000, 3e-4, 4000, "linear", False),
    ],
)
def test_recipes_of_upsamplers(name, steps, rate, length, schedule, flip):
    config = configs.load(name)
    stage, train = config.up, config.up.train
    assert config.stages == ("up",) and "base" not in config
    assert (train.num_train_steps, train.batch_size, train.learning_rate, train.ema) == (steps, 256, rate, (0.9999,))
    assert (train.optimizer.name, train.optimizer.weight_decay) == ("adamw", 0)
    assert (train.grad_clip, train.warmup_steps) == (0, 0)
    assert (stage.schedule.name, stage.schedule.num_timesteps, stage.loader.flip) == (schedule, length, flip)
    # Published without rescaling, so the bound has weight 1 whatever T is.
    assert (stage.loss.name, stage.loss.weight, stage.schedule.rescale_time) == ("hybrid", 1, False)
    assert [*stage.guidance] == ["clip_denoised"] and stage.steps == "250"
    c = stage.conditions.low_res
    assert (c.factor, c.noise, c.blur, c.round, c.jpeg, c.crop) == (4, 0, 0, False, (), 0)


def test_recipes_of_text_to_image():
    glide, decoder = configs.load("glide").base, configs.load("dalle2").decoder
    assert [*glide.guidance] == ["classifier_free", "clip_denoised"] and glide.guidance.classifier_free.scale == 3
    assert [*decoder.conditions] == ["text", "image_embedding"] and decoder.conditions.text.dropout == 0.5
    assert [*configs.load("glide_inpaint_256").up.conditions] == ["text", "inpaint", "low_res"]
    karlo = configs.load("karlo")
    assert [*karlo.up.guidance] == [
        "finish_with",
        "clip_denoised",
    ] and karlo.up.guidance.finish_with.section == "up_last"
    assert [*karlo.up_last.guidance] == ["clip_denoised"]
    assert karlo.prior.guidance.clip_denoised.clip_range == 10
    assert configs.load("dalle2_clip").clip.train.sam == 0.1 and configs.load("clip_vit_h16").clip.train.sam == 0


def test_a_clip_may_guide_glide():
    config = configs.load("glide:clip,tiny")
    assert [*config.base.guidance] == ["clip", "clip_denoised"] and config.base.guidance.clip.section == "clip"
    assert System(config).trained == ("base", "up", "clip")


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("cascade_64:tiny", {"base": (8, 8, 3), "up": (16, 16, 3)}),
        ("cascade_128:tiny", {"base": (8, 8, 3), "up_64": (16, 16, 3), "up_128": (32, 32, 3)}),
        ("cascade_256:tiny", {"base": (8, 8, 3), "up_64": (16, 16, 3), "up_256": (32, 32, 3)}),
        ("adm_upsample_64_256:tiny", {"up": (64, 64, 3)}),
        ("adm_upsample_128_512:tiny", {"up": (64, 64, 3)}),
        ("iddpm_upsample_64_256:tiny", {"up": (32, 32, 1)}),
    ],
)
def test_sizes_of_tiny_cascades(name, shapes):
    config = configs.load(name)
    assert {section: config[section].shape for section in config.stages} == shapes
    if name.startswith("cascade"):
        assert config.eval.classifier.name == "network"
        for section in shapes:
            assert config[section].data.single and config[section].data.label == "colour"
            assert config[section].conditions.label.num_classes == 8
    assert bool(config.eval.levels) == (config.stages == ("base", "up")), "where the last stage has a level"


@pytest.mark.parametrize("name", ["adm_imagenet_128:tiny", "adm_classifier_128:tiny", "cfg_imagenet_128:tiny"])
def test_tiny_at_128_has_one_shape_to_a_picture(name):
    config = configs.load(name)
    for section in configs.sections(config):
        assert config[section].data.single and config[section].data.label == "colour"
        label = config[section] if "num_classes" in config[section] else config[section].conditions.label
        assert label.num_classes == 8
    if "base" in config:
        assert config.eval.classifier.name == "network"


# ---- finding a config -----------------------------------------------------------------------------------------------


def test_a_config_is_found_by_name_and_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = configs.load("ddpm_cifar10:tiny")
    assert configs.load("configs/ddpm_cifar10.py:tiny") == wanted
    assert configs.load("ddpm_cifar10.py:tiny") == wanted
    assert configs.load(pathlib.Path("configs/ddpm_cifar10.py")) == configs.load("ddpm_cifar10")
    assert configs.load("iddpm_cifar10:vlb+tiny") == configs.load("iddpm_cifar10:tiny,vlb")


def test_a_file_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "quickstart.py"
    file.write_text(
        "from diffax.config import new\n"
        "VARIANTS = {'b': 'another'}\n"
        "get_config = lambda variant='': new('mine' + variant)\n"
    )
    assert configs.load("configs/quickstart.py").name == "mine"
    assert configs.load(f"{file}:b").name == "mineb"
    assert configs.load("quickstart").name == "quickstart"


def test_parts_of_configs_are_no_configs():
    assert "there is no config '_tiny'" in one_line(configs.load, "_tiny")
    assert not [name for name in configs.available() if name.startswith("_")]


@pytest.mark.parametrize(
    "name, words",
    [
        ("ddpm_cifar", "did you mean ddpm_cifar10"),
        ("configs/quikstart.py", "did you mean quickstart"),
        ("/nowhere/quickstart.py", "/nowhere/quickstart.py"),
        ("~nouser/x.py", "there is no config '~nouser/x.py'"),
        ("x" * 5000, "there is no config 'xxx"),
        ("x" * 5000 + ".py", "there is no config 'xxx"),
        ("a\0b.py", "there is no config"),
        ("", "quickstart"),
        ("configs", "quickstart"),
        ("quickstart:tinny", "did you mean tiny"),
        ("quickstart:" + "y" * 5000, "unknown variant 'yyy"),
        ("iddpm_cifar10:hybrid,vlb", "exclude each other"),
        ("iddpm_cifar10:vlb,vlb", "twice"),
        ("iddpm_cifar10:small", "hybrid"),
        ("quickstart\nquickstart", "no config"),
    ],
)
def test_unknown_config_or_variant(name, words):
    assert words in one_line(configs.load, name)


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
            from diffax.config import new
            def get_config(variant=''):
                config = new('x')
                config.base.trian.learning_rate = 1.0
                return config
            """,
            "trian",
        ),
    ],
)
def test_broken_file(tmp_path, source, words):
    file = tmp_path / "broken.py"
    file.write_text(textwrap.dedent(source))
    message = one_line(configs.load, str(file))
    assert words in message and "broken.py" in message


def test_a_typo_in_a_file_is_found_by_the_check(tmp_path):
    file = tmp_path / "typo.py"
    file.write_text(
        "from diffax.config import new\n"
        "def get_config(variant=''):\n"
        "    config = new('x')\n"
        "    config.base.train.lerning_rate = 1.0\n"
        "    return config\n"
    )
    message = one_line(configs.check, configs.load(str(file)))
    assert message == ("unknown field config.base.train.lerning_rate; did you mean config.base.train.learning_rate?")


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, value",
    [
        ("config.base.train.num_train_steps=1e3", 1000),
        ("--config.base.train.num_train_steps=2_000", 2000),
        ("config.base.train.learning_rate=1", 1.0),
        ("config.base.train.learning_rate=3e-5", 3e-5),
        ("config.base.net.channel_mult=1,2,2", (1.0, 2.0, 2.0)),
        ("config.base.net.channel_mult=(1, 2.5)", (1.0, 2.5)),
        ("config.base.net.channel_mult=[1,2]", (1.0, 2.0)),
        ("config.base.net.channel_mult=3", (3.0,)),
        ("config.base.net.attention=2,", (2,)),
        ("config.base.net.attention=none", ()),
        ("config.base.net.attention=()", ()),
        ("config.base.shape=16,16,1e0", (16, 16, 1)),
        ("config.stages=('base','up')", ("base", "up")),
        ("config.stages=(base,up)", ("base", "up")),
        ("config.eval.steps=('90,60,60','ddim25')", ("90,60,60", "ddim25")),
        ("config.eval.steps=250,50", ("250", "50")),
        ("config.base.steps=250", "250"),
        ("config.base.steps='90,60'", "90,60"),
        ("config.base.steps=", ""),
        ("config.base.workdir=/a b=c/d", "/a b=c/d"),
        ("config.base.loader.flip=True", True),
        ("config.base.loader.flip=false", False),
        ("config.base.train.anneal=none", "none"),
        ("config.base.variance=learned_range", "learned_range"),
        ("config.base.variance=0.3", 0.3),
        ("config.base.train.ema=0.999,0.9999", (0.999, 0.9999)),
        ("config.eval.guidance=0,1.5,8", (0.0, 1.5, 8.0)),
        ("config.eval.guidance=none", ()),
        ("config.eval.samplers=ddpm,ddim", ("ddpm", "ddim")),
        ("config.eval.steps=quad10,logsnr10", ("quad10", "logsnr10")),
        ("config.name=mine", "mine"),
        ("config.base.guidance.clip_denoised.clip_range=2", 2.0),
        ("config.base.train.optimizer.b1=0.5", 0.5),
    ],
)
def test_override(override, value):
    config = configs.load("ddpm_cifar10", [override])
    found = get(config, override.removeprefix("--").split("=")[0])
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    "overrides, path, value",
    [
        (["config.base.loss=vlb"], "loss", {"name": "vlb", "weight": 1.0}),
        (["config.base.loss.weight=5", "config.base.loss=vlb"], "loss", {"name": "vlb", "weight": 5.0}),
        (["config.base.sampler=ddim"], "sampler", {"name": "ddim", "eta": 0.0}),
        (["config.base.sampler.eta=1", "config.base.sampler=ddim"], "sampler", {"name": "ddim", "eta": 1.0}),
        (
            ["config.base.data=examples.shapes.data:shapes", "config.base.data.single=true"],
            "data",
            {
                "name": "examples.shapes.data:shapes",
                "split": "train",
                "holdout": (),
                "single": True,
                "label": "label",
                "data_dir": "",
            },
        ),
        (
            ["config.base.conditions=label", "config.base.conditions.label.num_classes=3"],
            "conditions",
            {"label": {"name": "label", "num_classes": 3, "dropout": 0.0}},
        ),
        (
            ["config.base.guidance=classifier_free,clip_denoised", "config.base.guidance.classifier_free.scale=3"],
            "guidance",
            {
                "classifier_free": {"name": "classifier_free", "scale": 3.0},
                "clip_denoised": {"name": "clip_denoised", "clip_range": 1.0},
            },
        ),
        (["config.base.guidance=none"], "guidance", {}),
    ],
)
def test_another_component_by_flag(overrides, path, value):
    found = configs.load("ddpm_cifar10", overrides).base[path].to_dict()
    assert found == value
    assert [*found] == [*value] or path == "data"


def test_a_component_of_ones_own_by_flag():
    path = f"{__name__}:softer"
    config = configs.load("ddpm_cifar10", [f"--config.base.loss={path}", "--config.base.loss.gamma=3"])
    assert config.base.loss.to_dict() == {"name": path, "gamma": 3.0}
    configs.check(config)
    assert configs.from_dict(configs.to_dict(config)) == config
    message = one_line(configs.load, "ddpm_cifar10", [f"--config.base.loss={path}", "--config.base.loss.gama=3"])
    assert message == "unknown field config.base.loss.gama; did you mean config.base.loss.gamma?"


def softer(*, gamma: float = 5.0):
    """A loss of the user's own."""
    from diffax.diffusion import losses

    def loss(out, batch, **how):
        value, terms = losses.simple()(out, batch, **how)
        return value / gamma, terms

    return loss


@pytest.mark.parametrize(
    "override",
    [
        "config.base.train.num_train_steps=1.5",
        "config.base.train.num_train_steps=abc",
        "config.base.train.num_train_steps=true",
        "config.base.train.num_train_steps=none",
        "config.base.train.num_train_steps=",
        "config.base.train.num_train_steps=1e400",
        "config.base.train.num_train_steps=nan",
        "config.base.train.num_train_steps=1,2",
        "config.base.train.learning_rate=fast",
        "config.base.train.learning_rate=",
        "config.base.loader.flip=1",
        "config.base.loader.flip=",
        "config.base.shape=32,x,3",
        "config.base.shape=32,32.5,3",
        "config.base.shape=32,,3",
        "config.base.variance=huge",
        "config.base.net=3",
        "config.base.train=3",
        "config.base=3",
    ],
)
def test_override_of_the_wrong_type(override):
    path, _, text = override.partition("=")
    message = one_line(configs.load, "ddpm_cifar10", [override])
    assert message.startswith(path) and (text in message or "section" in message)


def test_the_kind_of_model_is_no_flag():
    message = one_line(configs.load, "ddpm_cifar10", ["config.base.name=classifier"])
    assert message.startswith("config.base.name is the kind of model")


@pytest.mark.parametrize("text", ["-" * 3000, "(" * 3000, "[" * 3000 + "1", "1," * 3000, "9" * 5000, "'" * 3000])
@pytest.mark.parametrize("path", ["config.base.shape", "config.base.net.channels", "config.base.train.learning_rate"])
def test_override_by_a_hostile_value(path, text):
    try:
        message = one_line(lambda: configs.check(configs.load("ddpm_cifar10", [f"{path}={text}"])))
    except OverflowError:
        pytest.fail("no UserError")
    assert message.startswith(path)


@pytest.mark.parametrize("override", ["", "--", "config", "config.seed", "base.train.ema=1", "=", "x" * 5000])
def test_override_of_no_form(override):
    assert "--config.section.field=value" in one_line(configs.load, "ddpm_cifar10", [override])


def test_overrides_are_recorded_and_the_last_wins():
    overrides = ["--config.seed=1", "config.base.workdir=a=b", "config.seed=2"]
    assert configs.overridden(overrides) == {"config.seed": "2", "config.base.workdir": "a=b"}
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
                assert "did you mean " in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("config.base.net.widht", "config.base.net.channels"),
        ("config.base.net.width", "config.base.net.channels"),
        ("config.base.net.chanels", "config.base.net.channels"),
        ("config.base.train.lr", "config.base.train.learning_rate"),
        ("config.base.learning_rate", "config.base.train.learning_rate"),
        ("config.base.train.batchsize", "config.base.train.batch_size"),
        ("config.base.train.steps", "config.base.train.num_train_steps"),
        ("config.base.drop", "config.base.condition_dropout"),
        ("config.base.takes", "config.base.conditions"),
        ("config.bsae.net.heads", "base"),
        ("config.base.nett.heads", "config.base.net"),
        ("config.conditions", "config.base.conditions"),
    ],
)
def test_what_is_meant_is_found(typo, meant):
    message = one_line(configs.load, "ddpm_cifar10", [f"{typo}=1"])
    assert message.startswith("unknown field ") and "did you mean" in message and meant in message


def test_a_field_like_nothing_lists_what_is_there():
    message = one_line(configs.load, "ddpm_cifar10", ["config.base.guidance.clip_denoised.zzz=1"])
    where = "config.base.guidance.clip_denoised"
    assert message == f"unknown field {where}.zzz; {where} has clip_range"


# ---- checks: one field at a time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIELDS)
def test_bad_value_is_named(path):
    field, wrong = FIELDS[path], [object(), {}, 1j, ("x", 1, None), -(10**40), math.nan]
    wrong += [None] * (not field.accepts(None))
    for value in wrong:
        if not field.accepts(value):
            message = one_line(configs.check, put(defaults(), path, value))
            assert message.startswith(f"{path} must be"), (value, message)


@pytest.mark.parametrize("path", FIELDS)
def test_missing_field_is_named(path):
    config = defaults()
    *sections, leaf = path.split(".")[1:]
    section = config
    for name in sections:
        section = section[name]
    del section[leaf]
    assert path in one_line(configs.check, config)


@pytest.mark.parametrize("path", FIELDS)
def test_unknown_field_in_a_file_is_named(path):
    typo = f"{path}_"
    message = one_line(configs.check, put(defaults(), typo, 1))
    assert message.startswith(f"unknown field {typo};")


@pytest.mark.parametrize("path", ["config.base.net", "config.sample", "config.base.conditions", "config.base.guidance"])
def test_section_that_is_none(path):
    assert path in one_line(configs.check, put(defaults(), path, 3))


@pytest.mark.parametrize("path", ["config.bose", "config.base.nett"])
def test_unknown_section(path):
    message = one_line(configs.check, put(defaults(), path, ConfigDict({"a": 1})))
    assert path in message


# ---- checks: fields that must go together ---------------------------------------------------------------------------


def label(num_classes: int = 10) -> ConfigDict:
    return each("condition", label=spec("condition", "label", num_classes=num_classes))


LABELLED = {"base.conditions": label()}
LEARNED = {"base.variance": "learned_range"}
HYBRID = {"base.loss": spec("loss", "hybrid")}
VLB = {"base.loss": spec("loss", "vlb")}
MOMENT = {"base.timesteps": spec("timesteps", "loss_second_moment")}
FREE = each("guidance", "classifier_free")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base.shape": (32, 36, 3)}, ["config.base", "shape", "multiples of 8"]),
        ({"base.shape": (32,)}, ["config.base", "shape"]),
        ({"base.net.channels": 100}, ["config.base", "net.groups 32", "level of 100"]),
        ({"base.net.channel_mult": (1, 0.3)}, ["config.base", "net.groups"]),
        ({"base.net.channels": 129, "base.net.groups": 1}, ["config.base", "net.channels must be even"]),
        ({"base.net.groups": 48}, ["config.base", "net.groups 48"]),
        ({"base.net.heads": 3}, ["config.base", "256", "3 heads"]),
        ({"base.net.head_channels": 96}, ["config.base", "net.head_channels 96"]),
        ({"base.net.heads_up": 3}, ["config.base", "heads_up"]),
        ({"base.net.attention": (16,)}, ["config.base", "net.attention 16", "[1, 2, 4, 8]"]),
        ({"base.net.attention": (3,)}, ["config.base", "net.attention 3"]),
        ({"base.conditions": label(0)}, ["config.base.conditions.label.num_classes", "got 0"]),
        ({"base.data": spec("data", "folder")}, ["config.base.data", "path must name the folder"]),
        ({"base.data": spec("data", "captions")}, ["config.base.data", "path must name the folder"]),
        ({"base.data": spec("data", "tfds")}, ["config.base.data", "path must name the folder"]),
        ({"base.data": spec("data", "mix", parts="digits, nothing")}, ["data.parts", "'nothing'"]),
        (
            {"base.data": spec("data", "examples.shapes.data:shapes", holdout=("red cube",))},
            ["config.base.data", "red cube"],
        ),
        ({"base.loader.embeddings": "/x"}, ["config.base.loader.embeddings", "reads no embedding"]),
        ({"base.variance": "learned"}, ["config.base", "variance 'learned'", "'hybrid' or 'vlb'"]),
        (LEARNED, ["config.base", "'hybrid' or 'vlb'"]),
        (HYBRID, ["config.base", "loss", "variance"]),
        (HYBRID | {"base.variance": 0.5}, ["config.base", "variance is 0.5"]),
        ({"base.schedule.beta_start": 0.1}, ["config.base.schedule", "beta_start", "beta_end"]),
        ({"base.schedule.num_timesteps": 5}, ["config.base.schedule", "(0, 1]"]),
        *(
            ({"base.steps": steps}, ["config.base", "steps", repr(steps)])
            for steps in (
                *("1001", "0", "-5", "ddim300", "ddim", "10,,5", "2.5", "fast", "trailing1001", "trailing"),
                *("quad0", "quad1001", "logsnr", "logsnr1001"),
            )
        ),
        ({"eval.steps": ("50", "dim50")}, ["config.eval.steps", "dim50"]),
        ({"eval.steps": ("quad10", "quad-10")}, ["config.eval.steps", "quad-10"]),
        ({"eval.samplers": ("ddpm", "euler")}, ["config.eval.samplers", "dpm_solver_pp_2m", "euler"]),
        ({"eval.samplers": ("ddmp",)}, ["config.eval.samplers", "did you mean ddpm"]),
        ({"eval.guidance": (1.0, math.nan)}, ["config.eval.guidance", "a number", "nan"]),
        ({"eval.guidance": (1.0, 2.0)}, ["config.eval.guidance", "no stage has guidance", "'classifier_free'"]),
        ({"eval.levels": (0.0, 1.5)}, ["config.eval.levels", "[0, 1]", "1.5"]),
        ({"eval.levels": (0.0, 0.5)}, ["config.eval.levels", "no stage has a noised smaller picture"]),
        ({"eval.classifier": {"name": "inception"}}, ["config.eval.classifier", "'svc'"]),
        ({"eval.template": "a photo"}, ["config.eval.template", "one {}"]),
        ({"sample.prompts": ("a",)}, ["config.sample.prompts", "no stage reads a caption"]),
        ({"base.condition_dropout": 0.1}, ["config.base", "condition_dropout is 0.1", "no condition"]),
        ({"base.condition_dropout": 1.0}, ["config.base.condition_dropout", "[0, 1)"]),
        ({"base.guidance": FREE}, ["config.base", "classifier_free", "condition_dropout"]),
        (LABELLED | {"base.guidance": FREE}, ["config.base", "classifier_free", "condition_dropout"]),
        (LABELLED | {"base.conditions.label.dropout": 0.5}, ["config.base", "conditions.label.dropout", "above 0"]),
        ({"base.guidance": each("guidance", "classifier")}, ["guidance.classifier.section", "'classifier'"]),
        ({"base.guidance": each("guidance", "clip")}, ["config.base.guidance.clip.section", "'clip'"]),
        (
            {"base.guidance": each("guidance", "classifier"), "base.guidance.classifier.section": "base"},
            ["config.base.guidance.classifier.section", "need each other"],
        ),
        ({"base.guidance": each("guidance", "insert_known")}, ["config.base", "insert_known", "'inpaint'"]),
        ({"base.candidates": 2}, ["config.base", "candidates must be 1"]),
        ({"base.clip": "clip"}, ["config.base.clip", "'clip'"]),
        ({"base.train.optimizer.weight_decay": 0.1}, ["unknown field config.base.train.optimizer.weight_decay"]),
        ({"base.train.ema": (0.9, 0.9)}, ["config.base.train.ema", "different"]),
        ({"name": ""}, ["config.name"]),
        ({"name": "../x"}, ["config.name"]),
        ({"name": "x" * 5000}, ["config.name"]),
        ({"stages": ()}, ["config.stages"]),
        ({"stages": ("base", "up")}, ["config.stages", "config.up"]),
        ({"stages": ("base", "base")}, ["config.stages", "different"]),
        ({"stages": ("sample",)}, ["config.stages"]),
        ({"stages": ("../base",)}, ["config.stages", "../base"]),
        ({"stages": ("bose",)}, ["config.stages", "config.bose", "did you mean base"]),
    ],
)
def test_fields_that_do_not_go_together(changes, words):
    message = one_line(configs.check, changed(defaults(), changes))
    assert all(word in message for word in words), message


CONTINUOUS = {"base.schedule": spec("schedule", "cosine_logsnr"), "base.steps": "100"}


@pytest.mark.parametrize(
    "changes, field",
    [
        (VLB, "loss"),
        (HYBRID | LEARNED, "loss"),
        (MOMENT, "timesteps"),
        ({"base.predicts": "previous_x"}, "predicts"),
        ({"base.steps": ""}, "steps"),
        ({"base.steps": "0"}, "steps"),
        ({"base.steps": "10,20"}, "steps"),
        ({"base.steps": "ddim50"}, "steps"),
        ({"base.steps": "trailing10"}, "steps"),
        ({"base.steps": "fast27"}, "steps"),
        ({"base.steps": "quad0"}, "steps"),
        ({"base.steps": "logsnr"}, "steps"),
        ({"base.schedule.logsnr_max": -20.0}, "logsnr_min"),
    ],
)
def test_what_needs_a_discrete_schedule(changes, field):
    message = one_line(configs.check, changed(defaults(), CONTINUOUS | changes))
    assert message.startswith("config.base") and field in message


@pytest.mark.parametrize(
    "changes",
    [
        CONTINUOUS,
        CONTINUOUS | {"base.variance": 0.3, "base.predicts": "v", "base.steps": "4096"},
        CONTINUOUS | {"base.steps": "quad10", "eval.steps": ("100", "quad10", "logsnr10")},
        CONTINUOUS | {"base.steps": "logsnr10"},
        CONTINUOUS
        | LABELLED
        | {"base.condition_dropout": 0.1, "base.guidance": each("guidance", "classifier_free", "clip_denoised")},
        LEARNED | HYBRID,
        {"base.variance": "learned"} | VLB,
        {"base.variance": "learned", "base.predicts": "previous_x"} | HYBRID,
        VLB | MOMENT,
        {"base.steps": "90,60,60,20,20"},
        {"base.steps": "ddim50", "base.sampler": spec("sampler", "ddim", eta=1.0)},
        {"base.steps": "fast27"},
        {"base.steps": "trailing10", "eval.steps": ("trailing1000", "quad10", "quad1000", "logsnr10", "logsnr1000")},
        {"base.steps": "quad10"},
        {"base.steps": "logsnr10"},
        {"eval.samplers": tuple(components.names("sampler")), "eval.classifier": spec("evaluation", "network")},
        LABELLED | {"base.condition_dropout": 0.1, "base.guidance": FREE, "eval.guidance": (0, 1.5, -1.0)},
        LABELLED | {"base.condition_dropout": 0.1},
        LABELLED
        | {"base.condition_dropout": 0.5, "base.guidance": each("guidance", "classifier_free", "dynamic_threshold")},
        {"base.data": spec("data", "examples.shapes.data:shapes", single=True, holdout=("red circle",))},
        {"base.net.head_channels": 64, "base.net.attention": (1, 2, 4, 8)},
        {"base.net.attention": ()},
        {"base.conditions": label(1)},
        {"base.shape": (8, 24, 1)},
        {"eval.steps": ("50", "ddim25")},
        {"base.train.optimizer": spec("optimizer", "adamw", weight_decay=0.01)},
        {"base.guidance": each("guidance")},
    ],
)
def test_fields_that_go_together(changes):
    configs.check(changed(defaults(), changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"base.net.pool": "spatial_v2", "base.timesteps": spec("timesteps", "stratified"), "base.train.ema": ()}, []),
        ({"base.net.channel_mult": (0.5, 1, 1, 2), "base.net.channels": 64}, []),
        ({"base.schedule": spec("schedule", "cosine_logsnr")}, []),
        ({"base.net.pool": "max"}, ["config.base.net.pool", "'attention'"]),
        ({"base.num_classes": 0}, ["config.base.num_classes", "got 0"]),
        ({"base.shape": (32, 32)}, ["config.base.shape", "3 items"]),
        ({"base.net.heads": 3}, ["config.base", "3 heads"]),
        ({"base.conditions": label()}, ["unknown field config.base.conditions"]),
    ],
)
def test_a_noised_classifier(changes, words):
    config = changed(configs.new("test", model="classifier"), changes)
    if not words:
        return configs.check(config)
    message = one_line(configs.check, config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"base.noised": False, "base.schedule": spec("schedule", "cosine_logsnr")}, []),
        ({"base.schedule": spec("schedule", "cosine_logsnr")}, ["config.base", "discrete timesteps"]),
        ({"base.timesteps": spec("timesteps", "loss_second_moment")}, ["config.base", "timesteps"]),
        ({"base.net.image.heads": 5}, ["config.base.net", "image.heads 5"]),
        ({"base.net.text.heads": 5}, ["config.base.net", "text.heads 5"]),
        ({"base.net.image.patch": 3}, ["config.base.net", "image.patch 3"]),
        ({"base.net.text.vocab_size": 9}, ["config.base.net", "text.vocab_size", "49408"]),
        ({"base.shape": (64, 64, 1)}, ["config.base.net", "image.mean", "use 1"]),
        ({"base.tokenizer.length": 2}, ["config.base.tokenizer", "at least 3"]),
        ({"base.embedding.mean": (1.0, 2.0)}, ["config.base", "embedding.mean", "512"]),
    ],
)
def test_a_clip(changes, words):
    config = changed(configs.new("test", model="clip"), changes)
    if not words:
        return configs.check(config)
    message = one_line(configs.check, config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("dalle2:tiny", {"clip.noised": True}, ["config.prior", "clean pictures", "config.clip.noised"]),
        ("dalle2:ar,tiny", {"clip.noised": True}, ["config.prior", "clean pictures"]),
        ("dalle2_decoder_64:tiny", {"clip.noised": True}, ["config.decoder", "clean pictures"]),
        ("dalle2:tiny", {"prior.shape": (16,)}, ["config.prior", "(32,)", "features of the CLIP clip"]),
        ("dalle2:tiny", {"prior.net.heads": 3}, ["config.prior", "heads must divide width, 128"]),
        ("dalle2:tiny", {"prior.clip": "decoder"}, ["config.prior.clip", "a CLIP"]),
        ("dalle2:tiny", {"decoder.shape": (16, 32, 3)}, ["config.decoder", "proportions"]),
        (
            "dalle2:tiny",
            {"decoder.conditions.image_embedding.width": 32},
            ["config.decoder", "one width", "image_embedding 32", "text 64"],
        ),
        ("dalle2:tiny", {"decoder.conditions.text.heads": 5}, ["config.decoder.conditions.text", "heads must divide"]),
        (
            "dalle2:tiny",
            {"decoder.conditions.text.vocab_size": 5},
            ["config.decoder.conditions.text", "vocab_size must be 0 or at least"],
        ),
        ("dalle2:tiny", {"eval.bpd_num": 4, "stages": ("clip", "prior", "decoder")}, ["config.eval.bpd_num", "0"]),
        ("dalle2:ar,tiny", {"prior.codes.components": 33}, ["config.prior", "codes.components", "32"]),
        ("dalle2:ar,tiny", {"prior.codes.examples": 3}, ["config.prior", "codes.examples", "codes.buckets"]),
        ("dalle2:ar,tiny", {"prior.guidance": each("guidance", "clip_denoised")}, ["config.prior", "classifier_free"]),
        (
            "dalle2:ar,tiny",
            {"prior.conditions": each("condition", "text_features")},
            ["config.prior", "'text_embedding'"],
        ),
        ("karlo:tiny", {"up_last.shape": (32, 32, 3)}, ["config.up", "shape", "up_last"]),
        ("karlo:tiny", {"up.guidance.finish_with.section": "clip"}, ["guidance.finish_with.section", "'clip'"]),
        ("karlo:tiny", {"up_last.schedule.num_timesteps": 500}, ["config.up", "schedule", "up_last"]),
        ("glide:clip,tiny", {"clip.noised": False}, ["config.base", "noised must be true"]),
        ("glide:clip,tiny", {"clip.schedule.num_timesteps": 500}, ["config.base", "schedule", "clip"]),
        ("glide:tiny", {"base.guidance.classifier_free.section": "x"}, ["unknown field", "classifier_free.section"]),
    ],
)
def test_models_of_a_system_that_do_not_fit(name, changes, words):
    message = one_line(configs.check, changed(configs.load(name), changes))
    assert all(word in message for word in words), message


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
    message = one_line(configs.check, config, device_count=devices, process_count=processes)
    assert words in message and "config.base.train.batch_size" in message


def test_batch_of_a_device_each():
    config = defaults()
    config.base.train.update(batch_size=16, accumulate=2)
    configs.check(config, device_count=8, process_count=2)


# ---- checks: stages that follow on each other -----------------------------------------------------------------------


def cascade() -> ConfigDict:
    config = configs.new("test", stages=("base", "up"))
    config.up.shape = (64, 64, 3)
    config.up.conditions = each("condition", "low_res")
    config.up.conditions.low_res.factor = 2
    return config


def test_every_stage_is_checked():
    configs.check(cascade())
    config = cascade()
    config.up.net.heads = 3
    assert one_line(configs.check, config).startswith("config.up")
    config = put(cascade(), "config.up.net.depht", 3)
    assert "unknown field config.up.net.depht" in one_line(configs.check, config)
    config = cascade()
    configs.override(config, ["config.up.train.num_train_steps=5"])
    assert config.up.train.num_train_steps == 5 and config.base.train.num_train_steps != 5


LOW = "up.conditions.low_res"
UPSAMPLER = {"stages": ("up",)}
NOISED = {f"{LOW}.noise": 1.0, f"{LOW}.level": 0.25}
TRUNCATED = {f"{LOW}.truncated": True}
LOGSNR = {"base.schedule": spec("schedule", "cosine_logsnr"), "up.schedule": spec("schedule", "cosine_logsnr")}


@pytest.mark.parametrize(
    "changes",
    [
        UPSAMPLER,
        UPSAMPLER | {f"{LOW}.factor": 4, "up.shape": (64, 128, 3)},
        UPSAMPLER | {"up.shape": (24, 40, 1), f"{LOW}.factor": 8},
        NOISED,
        NOISED | {f"{LOW}.level": 1.0},
        NOISED | {"eval.levels": (0.0, 0.5)},
        {f"{LOW}.noise": 0.5, f"{LOW}.level": 0.5},
        {f"{LOW}.blur": 0.5},
        {f"{LOW}.blur": 1.0, f"{LOW}.blur_sigma": (0.5, 0.5), f"{LOW}.round": False},
        {f"{LOW}.jpeg": (30, 95)},
        {f"{LOW}.jpeg": (75,)},
        {f"{LOW}.crop": 8},
        {f"{LOW}.crop": 64},
        {f"{LOW}.crop": 12, "up.net.channel_mult": (1, 2), "up.net.attention": (2,)},
        NOISED | TRUNCATED,
        NOISED | TRUNCATED | {"base.steps": "100"},
        {"base.shape": (16, 16, 3), f"{LOW}.factor": 4, "up.conditions.label": spec("condition", "label")},
        NOISED | TRUNCATED | LOGSNR | {"base.steps": "50", "up.steps": "50"},
    ],
)
def test_low_res_that_fits(changes):
    config = changed(cascade(), changes)
    configs.check(config)
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"up.conditions": each("condition")}, ["config.up.conditions", "'low_res'", "config.base"]),
        ({f"{LOW}.factor": 3}, [f"config.{LOW}", "factor", "(64, 64, 3)", "got 3"]),
        ({f"{LOW}.factor": 4}, [f"config.{LOW}.factor", "(16, 16, 3)", "config.base.shape", "(32, 32, 3)"]),
        ({"base.shape": (32, 32, 1)}, [f"config.{LOW}.factor", "(32, 32, 3)", "config.base.shape", "(32, 32, 1)"]),
        ({f"{LOW}.level": 0.1}, [f"config.{LOW}", "level must be at most noise", "0.1"]),
        ({f"{LOW}.noise": 0.2, f"{LOW}.level": 0.3}, [f"config.{LOW}", "at most", "0.2", "got 0.3"]),
        ({f"{LOW}.blur_sigma": (0.6, 0.4)}, [f"config.{LOW}", "blur_sigma", "lowest first"]),
        ({f"{LOW}.jpeg": (95, 30)}, [f"config.{LOW}", "jpeg", "lowest first", "95"]),
        ({f"{LOW}.degrade": "bsr", f"{LOW}.jpeg": (30,)}, [f"config.{LOW}", "degrade", "leave out blur, jpeg"]),
        ({f"{LOW}.crop": 12}, ["config.up", "low_res.crop", "multiple of 8", "got 12"]),
        ({f"{LOW}.crop": 72}, ["config.up", "low_res.crop", "at most 64", "got 72"]),
        (UPSAMPLER | NOISED | TRUNCATED, [f"config.{LOW}.truncated", "stage before"]),
        (TRUNCATED, [f"config.{LOW}", "truncated", "level above 0", "level 0"]),
        (
            NOISED | TRUNCATED | {"up.schedule": spec("schedule", "cosine")},
            [f"config.{LOW}.truncated", "schedule", "config.base"],
        ),
        (NOISED | TRUNCATED | {"sample.save": True}, ["config.sample.save", "truncated"]),
        (NOISED | TRUNCATED | {f"{LOW}.level": 1.0}, [f"config.{LOW}.level 1", "before its first step"]),
        (
            NOISED | TRUNCATED | {f"{LOW}.level": 0.9, "base.steps": "5"},
            [f"config.{LOW}.level 0.9", "before its first step"],
        ),
    ],
)
def test_low_res_that_does_not_fit(changes, words):
    message = one_line(configs.check, changed(cascade(), changes))
    assert all(word in message for word in words), message


CHAIN = {"base.schedule.continuous": True, "base.steps": "100"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base.steps": "quad20", "base.schedule.num_timesteps": 2000},
        {"base.steps": "logsnr20", "base.variance": 0.3, "base.predicts": "x"},
        {"base.schedule": spec("schedule", "cosine", continuous=True)},
        {"base.schedule": spec("schedule", "const", continuous=True), "eval.steps": ("10", "20")},
    ],
)
def test_a_chain_may_be_made_continuous(changes):
    configs.check(changed(defaults(), CHAIN | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base.steps": ""}, ["config.base", "steps ''"]),
        ({"base.steps": "ddim50"}, ["config.base", "ddim50"]),
        ({"base.steps": "10,10"}, ["config.base", "10,10"]),
        ({"eval.steps": ("50", "ddim50")}, ["config.eval.steps", "ddim50"]),
        (VLB, ["config.base", "loss", "continuous"]),
        (HYBRID | LEARNED, ["config.base", "loss", "continuous"]),
        (MOMENT, ["config.base.timesteps", "continuous"]),
        ({"base.predicts": "previous_x"}, ["config.base", "predicts", "continuous"]),
        ({"base.schedule.beta_start": 0.1}, ["config.base.schedule", "beta_start", "beta_end"]),
    ],
)
def test_what_a_continuous_chain_cannot_have(changes, words):
    message = one_line(configs.check, changed(defaults(), CHAIN | changes))
    assert all(word in message for word in words), message


def guided(changes=None) -> ConfigDict:
    """An unconditional stage and the classifier of 10 classes that guides it."""
    config = defaults()
    configs.add_section(config, "guide", "classifier").num_classes = 10
    config.base.guidance = each("guidance", "clip_denoised", "classifier")
    config.base.guidance.classifier.section = "guide"
    return changed(config, changes or {})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stages": ("guide", "base")},
        LABELLED,
        {"guide.net.channels": 32, "guide.train.ema": (), "guide.loader.crop": "random"},
        {
            "base.schedule": spec("schedule", "cosine_logsnr"),
            "guide.schedule": spec("schedule", "cosine_logsnr"),
            "base.steps": "50",
        },
    ],
)
def test_a_classifier_may_guide(changes):
    config = guided(changes)
    configs.check(config)
    assert set(System(config).trained) == {"base", "guide"}
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"guide.shape": (64, 64, 3)}, ["config.base", "shape", "guide", "64"]),
        ({"guide.schedule": spec("schedule", "cosine")}, ["config.base", "schedule", "guide"]),
        ({"guide.schedule.num_timesteps": 4000}, ["config.base", "schedule", "guide"]),
        ({"base.conditions": label(6)}, ["config.base", "num_classes", "guide", "6", "10"]),
        ({"guide.num_classes": 0}, ["config.guide.num_classes"]),
        ({"guide.conditions": label()}, ["unknown field config.guide.conditions"]),
        ({"guide.net.heads": 3}, ["config.guide"]),
        ({"guide.train.optimizer.weight_decay": 0.1}, ["config.guide.train.optimizer.weight_decay"]),
        ({"guide": configs.section("diffusion")}, ["config.base.guidance.classifier.section", "'guide'"]),
        (
            {"base.guidance.classifier.section": "gude"},
            ["config.base.guidance.classifier.section", "'gude'", "did you mean guide"],
        ),
        (
            LABELLED
            | {"base.condition_dropout": 0.1, "base.guidance.classifier_free": spec("guidance", "classifier_free")},
            ["config.base", "classifier and classifier_free", "choose one"],
        ),
    ],
)
def test_a_classifier_must_fit_what_it_guides(changes, words):
    message = one_line(configs.check, guided(changes))
    assert all(word in message for word in words), message


def test_what_guides_is_trained_too_and_once():
    config = guided({"stages": ("base",)})
    assert System(config).trained == ("base", "guide")
    config.stages = ("guide", "base")
    assert System(config).trained == ("guide", "base")


def test_a_stage_can_be_left_out():
    config = cascade()
    config.stages = ("base",)
    configs.check(config)


# ---- as data --------------------------------------------------------------------------------------------------------


def test_from_dict_fills_in_what_an_older_file_lacks():
    data = configs.to_dict(defaults())
    del data["base"]["net"]["remat"], data["eval"]
    assert configs.from_dict(data) == defaults()


def test_from_dict_keeps_all_stages_and_the_order():
    config = cascade()
    config.base.guidance = each("guidance", "dynamic_threshold", "clip_denoised")
    again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert again == config and order(again) == order(config)
    assert [*again.base.guidance] == ["dynamic_threshold", "clip_denoised"]


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("base", "net", "widht"), 3, "did you mean config.base.net.channels"),
        (("base", "net", "channels"), "3", "config.base.net.channels must be a whole number"),
        (("base", "net", "channels"), None, "config.base.net.channels must be a whole number"),
        (("base", "net"), 3, "config.base.net must be a section"),
        (("base", "net", "name"), "unett", "did you mean unet"),
        (("base", "name"), "diffusin", "did you mean diffusion"),
        (("base", "shape"), 3, "config.base.shape must be a tuple"),
        (("base", "shape"), [1, "a"], "config.base.shape must be a tuple"),
        (("extra",), 3, "unknown field config.extra"),
        (("stages",), "base", "config.stages must be a tuple"),
        (("base",), 3, "config.base"),
        (("name",), 3, "config.name must be text"),
    ],
)
def test_from_dict_refuses_what_is_no_config(path, value, words):
    data = configs.to_dict(defaults())
    section = data
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    assert words in one_line(configs.from_dict, data)


def test_identity_is_of_the_parameters():
    config, other = defaults(), defaults()
    configs.override(other, ["config.base.net.dtype=bfloat16", "config.base.steps=50", "config.base.sampler=ddim"])
    assert configs.identity(config, "base", training=True) == configs.identity(other, "base", training=True)
    configs.override(other, ["config.base.net.dropout=0.5", "config.base.train.learning_rate=1"])
    assert configs.identity(config, "base") == configs.identity(other, "base")
    assert configs.identity(config, "base", training=True) != configs.identity(other, "base", training=True)
    configs.override(other, ["config.base.net.channels=64"])
    one, two = configs.identity(config, "base"), configs.identity(other, "base")
    assert [path for path in one if one[path] != two[path]] == ["config.base.net.channels"]
