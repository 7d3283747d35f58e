"""Published files: recognised, converted to a workdir, and written back."""

import functools
import json
import pathlib
import textwrap

import jax
import numpy as np
import pytest
from flax import traverse_util

from diffax import config as configs
from diffax import main, networks, weights
from diffax.errors import UserError
from diffax.models import stages
from diffax.sampling import pipeline
from diffax.training import checkpoint
from diffax.weights import __main__ as command
from diffax.weights import diffusers, files, glide, openai, published
from diffax.weights.table import torch_shapes
from tests.parity import golden
from tests.weights.torch_files import state_dict

FOLDER = pathlib.Path(__file__).parent / "golden"
MANIFEST = FOLDER / "manifest_full_size.json"
CLASSES = ("UNetModel", "SuperResModel", "EncoderUNetModel", "UNet2DModel", *glide.MODELS)
MODELS = {
    name: entry
    for name, entry in (json.loads(MANIFEST.read_text())["models"] if MANIFEST.exists() else {}).items()
    if entry["class"] in CLASSES
}
EVERY = json.loads(MANIFEST.read_text())["models"] if MANIFEST.exists() else {}
needs_manifest = pytest.mark.skipif(not MODELS, reason="no manifest_full_size.json in the golden folder")


def row_of(name):
    """The published file of an entry of the manifest."""
    repository, _, model = name.partition("/")
    for row in weights.PUBLISHED:
        if row.place == name or (repository != "google" and row.name == model.replace("-", "_")):
            return row
    raise KeyError(name)


def blanks(shapes):
    """{name: array} of given shapes that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def neutral(network):
    """The fields of a network, without what may differ for the same parameters and outputs."""
    inner = network if isinstance(network, networks.Classifier) else network.unet
    inner = inner.clone(dropout=0.0, remat="none", heads=0 if inner.head_channels else inner.heads)
    if isinstance(inner, networks.UNet):
        inner = inner.clone(attention_up=inner.attention_up or inner.attention)
    conditioners = [
        (name, part.clone(remat="none") if hasattr(part, "remat") else part)
        for name, part in getattr(network, "conditioners", ())
    ]
    return repr(inner), repr(conditioners)


# ---- recognised ------------------------------------------------------------------------------------------------------


@needs_manifest
@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_a_published_file_builds_the_network_of_its_program(name):
    """With `test_keys_shapes_and_count_of_a_published_model` this says that each file is recognised."""
    entry, row = MODELS[name], row_of(name)
    size = entry["args"].get("large_size") or entry["args"].get("image_size")
    if entry["class"] == "UNet2DModel":
        want = diffusers.net_config(entry["constructor"])
        assert row.options == {"flip_sin_to_cos": entry["constructor"]["flip_sin_to_cos"]}
    elif entry["class"] in glide.MODELS:
        want = glide.net_config(entry["constructor"], model=entry["class"], image_size=size)
    else:
        want = openai.net_config(entry["constructor"], model=entry["class"], image_size=size)
        assert row.options.get("attention_order", "legacy") == want.attention_order
    network, shape = published.network(row)
    assert shape == want.shape
    assert neutral(network) == neutral(want.build())
    assert row.parameters == entry["num_parameters"]


@needs_manifest
@pytest.mark.parametrize(
    "name",
    [
        "guided-diffusion/64x64_diffusion",
        "guided-diffusion/128x128_classifier",
        "improved-diffusion/cifar10_uncond_vlb_50M_500K",
        "glide/base",
        "google/ddpm-cifar10-32",
    ],
)
def test_a_published_file_is_recognised_from_names_and_shapes(name):
    entry, row = MODELS[name], row_of(name)
    shapes = entry.get("state_dict") or MODELS[entry["same_state_dict_as"]]["state_dict"]
    found, table = weights.recognise(blanks(shapes), row.name)
    assert found == row
    assert torch_shapes(table) == {key: tuple(shape) for key, shape in shapes.items()}  # none missing and none left


# CLIPs, and the parts of karlo: entries of the manifest, and the file or the place of each
OTHERS = {
    "glide/clip-image-enc": "clip_image_enc.pt",
    "glide/clip-text-enc": "clip_text_enc.pt",
    "openai/clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "karlo/prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "karlo/decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "karlo/sr_64_256": "improved-sr-ckpt-step=1.2M.ckpt",
    "karlo-diffusers/prior (PriorTransformer defaults, 32 heads)": "kakaobrain/karlo-v1-alpha/prior",
}
# {module of diffusers, with karlo's options: {key: shape}}
KARLO_DIFFUSERS = json.loads((pathlib.Path(__file__).parent / "weights" / "karlo_diffusers.json").read_text())


@needs_manifest
def test_every_entry_of_the_manifest_is_covered_and_what_it_lacks_is_known():
    """By the tests above and by the one below; `tests/convert_test.py` compares all names and shapes of the former."""
    assert {*MODELS, *OTHERS} == {*EVERY}
    covered = [*map(row_of, MODELS), *(row for row in weights.PUBLISHED if {row.file, row.place} & {*OTHERS.values()})]
    assert {(row.file, row.place) for row in weights.PUBLISHED if row not in covered} == {
        ("ViT-B-32.pt", published.CLIPS), ("ViT-B-16.pt", published.CLIPS), ("ViT-L-14.pt", published.CLIPS),
        ("model.safetensors", "openai/clip-vit-base-patch32"), ("model.safetensors", "openai/clip-vit-base-patch16"),
        ("ViT-L-14_stats.th", published.KARLO),
        *((published.UNET, f"kakaobrain/karlo-v1-alpha/{folder}") for folder in KARLO_FOLDERS),
        ("model.safetensors", "kakaobrain/karlo-v1-alpha/text_encoder"),
        ("model.safetensors", "kakaobrain/karlo-v1-alpha-image-variations/image_encoder"),
    }  # fmt: skip


@needs_manifest
@pytest.mark.parametrize("name", OTHERS)
def test_clips_and_karlo_are_recognised(name):
    """Each array has its place, and parameters come out, of the right number, all of them in sections of a config."""
    shapes = EVERY[name]["state_dict"]
    (row,) = (row for row in weights.PUBLISHED if OTHERS[name] in (row.file, row.place))
    found, table = weights.recognise(blanks(shapes), row.name)
    assert (found, found.parameters) == (row, EVERY[name]["num_parameters"])
    assert torch_shapes(table) == {key: tuple(shape) for key, shape in shapes.items()}
    without_key_bias = 12 * (768 if "image" in name else 512) if row.family == "glide-clip" else 0
    assert sum(int(np.prod(entry.shape)) for entry in table) == row.parameters + without_key_bias
    sections, settings = published._parts(
        blanks(shapes) | {"clip_std": np.ones((1, 768), np.float32)},
        row.family,
        published._config(row.config),
        row.section,
        table,
    )
    count = sum(len(part) for part in sections.values()) + len(settings)
    assert count == len(table)
    assert [*sections] == (["up", "up_last"] if "sr" in name else [row.section])
    assert [*settings] == ([("clip", "embedding", k) for k in ("mean", "std")] if "diffusers" in name else [])


KARLO_FOLDERS = {"decoder": "decoder", "text_proj": "text_proj", "super_res_first": "super_res",
                 "super_res_last": "super_res"}  # fmt: skip


def test_karlo_in_diffusers_is_recognised(monkeypatch):
    """Every array of each of its modules has its place, and two of them make up the decoder of karlo's own file."""
    made, make = {}, published.table

    def once(row):
        """The two of an upsampler are alike."""
        key = (row.family, *row.options.values())
        if key not in made:
            made[key] = make(row)
        return made[key]

    monkeypatch.setattr(published, "table", once)
    own = {row.section: row.parameters for row in weights.PUBLISHED if row.place == published.KARLO}
    paths, counts = {}, {}
    for folder, module in KARLO_FOLDERS.items():
        shapes = KARLO_DIFFUSERS[module]
        row, table = weights.recognise(blanks(shapes), folder)
        assert (row.folder, row.config) == (folder, "karlo")
        assert torch_shapes(table) == {key: tuple(shape) for key, shape in shapes.items()}
        assert files.count(list(shapes.values())) == row.parameters == sum(int(np.prod(e.shape)) for e in table)
        paths.setdefault(row.section, []).extend(entry.path for entry in table)
        counts[row.section] = counts.get(row.section, 0) + row.parameters
    assert counts["decoder"] == own["decoder"] and counts["up"] + counts["up_last"] == own["up"]
    assert paths["up"] == paths["up_last"] and len({*paths["decoder"]}) == len(paths["decoder"])
    with pytest.raises(UserError, match="could be of super_res_first or super_res_last; call the file, or its folder"):
        weights.recognise(blanks(KARLO_DIFFUSERS["super_res"]), "renamed")


def test_the_encoders_of_a_clip_in_two_files():
    """Together they have all that the whole file has, but for the scale."""
    whole = published.table(next(row for row in weights.PUBLISHED if row.folder == "clip-vit-large-patch14"))
    shapes, paths = torch_shapes(whole), []
    for tower, model in (("text", "text_"), ("image", "vis")):
        row, table = weights.recognise(blanks({k: s for k, s in shapes.items() if k.startswith(model)}), "renamed")
        assert row.folder == f"{tower}_encoder"
        paths += [entry.path for entry in table]
    assert sorted(paths) == sorted(entry.path for entry in whole)


def test_openai_and_transformers_agree_on_the_size_of_a_clip():
    """One network, under the names of either; the old files' buffers are no parameters."""
    rows = [row for row in weights.PUBLISHED if row.parameters == 151_277_313]
    assert [row.family for row in rows] == ["openai-clip", "transformers"]
    for row in rows:
        table = published.table(row)
        shapes = torch_shapes(table)
        assert files.count(list(shapes.values())) == row.parameters
        assert sum(int(np.prod(entry.shape)) for entry in table) == row.parameters
        assert weights.recognise(blanks(shapes), "renamed")[0] == row
    buffers = {"input_resolution": (), "text_model.embeddings.position_ids": (1, 77)}
    assert set(published.FAMILIES["transformers"].rename(blanks(shapes | buffers))) == set(shapes)


@needs_manifest
def test_arrays_that_are_not_told_apart_or_not_known():
    shapes = MODELS["improved-diffusion/cifar10_uncond_50M_500K"]["state_dict"]
    with pytest.raises(UserError, match="any of iddpm_cifar10, iddpm_cifar10:vlb; pass --model=NAME of one"):
        weights.recognise(blanks(shapes), "renamed")
    first = next(iter(shapes))
    with pytest.raises(UserError, match="446 arrays of 52,546,438 numbers are of no model"):
        weights.recognise(blanks({**shapes, first: shapes[first][::-1]}), "cifar10_uncond_50M_500K")
    with pytest.raises(UserError, match="445 arrays of .* numbers are of no model that was published; pass --model"):
        weights.recognise(blanks({key: shape for key, shape in shapes.items() if key != first}))


def test_published_files_are_told_by_their_names():
    """Files of one number of parameters differ in name; every config and section is there."""
    keys = [(row.parameters, row.place, row.name) for row in weights.PUBLISHED]
    assert len(set(keys)) == len(keys)
    for row in weights.PUBLISHED:
        assert row.family in published.FAMILIES and bool(row.config) != bool(row.architecture)
        if row.config:
            config = configs.load(row.config)
            assert row.section in configs.trained_sections(config)
            assert config.name.startswith(row.config.replace(":", "_"))


# ---- to a workdir ----------------------------------------------------------------------------------------------------


CONFIGS = {
    "small_guided": """
        from diffax.config import add_section, config_defaults, load

        def get_config(variant=""):
            config = config_defaults("small_guided")
            stage = config.base
            stage.shape, stage.takes, stage.num_classes = (8, 8, 1), ("label",), 5
            stage.data.name = "digits"
            stage.net.update(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), heads=2, groups=4)
            stage.variance, stage.loss.name, stage.steps = "learned_range", "hybrid", "2"
            stage.train.update(steps=800, ema=(0.995,))
            stage.guidance, stage.classifier = ("clip_denoised", "classifier"), "classifier"
            add_section(config, "classifier", load("small_classifier").classifier)
            config.stages = ("classifier", "base")
            config.eval.guidance = (1.0, 2.0)
            return config
        """,
    "small_classifier": """
        from diffax.config import config_defaults

        def get_config(variant=""):
            config = config_defaults("small_classifier", stages=("classifier",))
            section = config.classifier
            section.shape, section.num_classes, section.data.name = (8, 8, 1), 5, "digits"
            section.net.update(name="classifier", channels=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
            section.net.update(groups=4)
            section.train.update(steps=600, ema=())
            return config
        """,
}


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A folder of configs, and the rows and tables of what they describe, as if it had been published."""
    folder = tmp_path_factory.mktemp("configs")
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text("VARIANTS = {}\n" + textwrap.dedent(text))
    rows, made = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "_folder", lambda: folder)
        for config, section in (("small_guided", "base"), ("small_classifier", "classifier")):
            row = published.Published(f"small_{section}.pt", "here", "openai", 0, config, section)
            table = published.table(row)
            shapes = torch_shapes(table)
            rows.append(row._replace(parameters=files.count(list(shapes.values()))))
            rng = np.random.default_rng(0)
            arrays = {key: np.float32(0.1) * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
            (folder / row.file).write_bytes(state_dict(arrays))
            made[section] = folder / row.file, weights.to_flax(arrays, table)
    return folder, tuple(rows), made


@pytest.fixture
def small(small_files, monkeypatch):
    """{section: (path of a .pt file, the parameters in it)}, and both are known."""
    folder, rows, made = small_files
    monkeypatch.setattr(configs, "_folder", lambda: folder)
    monkeypatch.setattr(published, "PUBLISHED", rows)
    return made


def parameters(found):
    """Those of a file that holds one section."""
    (table,) = found.sections.values()
    return weights.to_flax(found.tensors, table)


def assert_equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def test_a_model_and_then_its_classifier(small, tmp_path, capsys):
    """A file makes a workdir that samples; the file of the classifier makes it a guided one."""
    workdir = tmp_path / "run"
    (base, base_params), (classifier, classifier_params) = small["base"], small["classifier"]
    assert command.run([str(base), str(workdir)]) == 0
    assert "base of small_guided" in capsys.readouterr().out
    alone = pipeline.load(workdir)
    assert (alone.takes, alone.step) == (("label",), {"base": 800})
    assert not alone.stages[0].is_guided
    assert_equal(alone.params["base"], base_params)
    assert main.run([f"--workdir={workdir}", "--mode=sample", "--config.sample.num=2"]) == 0
    assert (workdir / "samples.png").exists()

    assert command.run([str(classifier), str(workdir)]) == 0
    both = pipeline.load(workdir)
    assert both.stages[0].is_guided and both.config == published._config("small_guided")
    assert_equal(both.params, {"base": base_params, "classifier": classifier_params})

    config, params, step = weights.load([base, classifier])
    assert (config, step) == (both.config, both.step)
    assert_equal(params, both.params)

    capsys.readouterr()
    assert command.run([str(base), str(workdir)]) == 2
    assert "there are parameters of base already" in capsys.readouterr().err


def test_the_classifier_first(small, tmp_path):
    workdir = tmp_path / "run"
    for section in ("classifier", "base"):
        config = weights.save(weights.match(small[section][0]), workdir)
    assert config == published._config("small_guided") == json.loads((workdir / "config.json").read_text())


def test_a_workdir_that_is_not_ours_is_left_alone(small, tmp_path):
    workdir = tmp_path / "run"
    weights.save(weights.match(small["base"][0]), workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["base"]["guidance_scale"] = 7.0
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="or was edited; .*; choose another workdir"):
        weights.save(weights.match(small["classifier"][0]), workdir)
    assert json.loads((workdir / "config.json").read_text()) == config
    assert not (workdir / "classifier").exists()


def of_files(names, folder):
    """What `match` finds in published files of these names; no numbers are needed to see what goes with what."""
    rows = [next(row for row in weights.PUBLISHED if row.file == name) for name in names]
    found = []
    for row in rows:
        sections, settings = {row.section: []}, {}
        if row.family == "karlo-upsampler":
            sections["up_last"] = []
        if row.family == "karlo-stats":
            sections, settings = {}, {("clip", "embedding", name): [0.5] * 768 for name in ("mean", "std")}
        found.append(published.Match(folder / row.file, {}, published._config(row.config), sections, settings))
    return found


def put(found, workdir):
    """Leaves what `save` would leave, but for the numbers; returns the config."""
    config = published._system(found, workdir)
    configs.validate(configs.from_dict(config))
    for name in (name for m in found for name in m.sections):
        (workdir / name / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    return config


GLIDE = ("base.pt", "clip_text_enc.pt", "upsample.pt")
GLIDES = {"base": "glide_base_64", "clip": "glide_clip", "up": "glide_upsample_256", "base clip": "glide_base_64:clip",
          "base up": "glide", "base clip up": "glide:clip"}  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_the_files_of_glide_are_one_system(order, tmp_path):
    """Whatever comes first: a workdir has the config of the sections that are in it."""
    there = []
    for m in of_files([GLIDE[i] for i in order], tmp_path):
        config = put([m], tmp_path)
        there = sorted([*there, *m.sections])
        if want := GLIDES.get(" ".join(there)):
            assert config == published.only(published._config(want), there)
    assert config == published._config("glide:clip")
    (classifier,) = of_files(["64x64_classifier.pt"], tmp_path)
    with pytest.raises(UserError, match="holds glide, which has no classifier like this one"):
        published._system([classifier], tmp_path)


KARLO = ("ViT-L-14.pt", "prior-ckpt-step=01000000-of-01000000.ckpt", "decoder-ckpt-step=01000000-of-01000000.ckpt",
         "improved-sr-ckpt-step=1.2M.ckpt", "ViT-L-14_stats.th")  # fmt: skip


@pytest.mark.parametrize("parts", [[(0, 1, 2, 3, 4)], [(1,), (0,), (4,), (3,), (2,)], [(2, 4), (3,), (1, 0)]])
def test_the_files_of_karlo_are_one_system(parts, tmp_path):
    """All at once or one after the other; the statistics are in the config whenever they came."""
    for part in parts:
        config = put(of_files([KARLO[i] for i in part], tmp_path), tmp_path)
    want = published._config("karlo")
    want["clip"]["embedding"].update(mean=[0.5] * 768, std=[0.5] * 768)
    assert config == want
    with pytest.raises(UserError, match="there are parameters of prior already"):
        published._system(of_files(KARLO[1:2], tmp_path), tmp_path)


def test_statistics_alone_are_no_model(tmp_path):
    found = of_files(KARLO[4:], tmp_path)
    with pytest.raises(UserError, match="statistics of embeddings alone; .*stats.th; give the files of the models"):
        published._system(found, tmp_path)


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """GLIDE's two files of a small CLIP, the rows that know them, and its parameters."""
    folder, rows, arrays = tmp_path_factory.mktemp("clip"), [], {}
    network = stages.build(published._config("glide_clip:tiny"), "clip").net
    for tower, file in weights.clip.GLIDE_FILES.items():
        row = published.Published(file, "here", "glide-clip", 0, "glide_clip:tiny", "clip", {"tower": tower})
        shapes, rng = torch_shapes(published.table(row)), np.random.default_rng(len(rows))
        arrays[tower] = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
        (folder / file).write_bytes(state_dict(arrays[tower]))
        rows.append(row._replace(parameters=files.count(list(shapes.values()))))
    return folder, tuple(rows), weights.clip.from_glide(arrays["image"], arrays["text"], network)


@pytest.mark.parametrize("file", weights.clip.GLIDE_FILES.values())
def test_the_two_files_of_a_clip(clip_files, file, tmp_path, monkeypatch, capsys):
    """Either one stands for both, which are one section; each is written as it was read, with the scale beside them."""
    folder, rows, params = clip_files
    monkeypatch.setattr(published, "PUBLISHED", rows)
    workdir = tmp_path / "run"
    assert command.run([str(folder / file), str(workdir)]) == 0
    with checkpoint.Checkpoints(workdir / "clip" / "checkpoints", read_only=True) as checkpoints:
        assert_equal(checkpoints.restore_ema()[1], params)
    assert float(params["logit_scale"]) == np.float32(np.log(100))
    other = next(name for name in weights.clip.GLIDE_FILES.values() if name != file)
    for sources in (folder / file, [folder / file, folder / other]):
        config, found, _ = weights.load(sources, "glide_clip:tiny")
        assert_equal(found, {"clip": params})
        assert config["stages"] == ["clip"]
    # and back, as one file with the scale
    out = tmp_path / "out.safetensors"
    assert command.run([str(workdir), str(out), "--to=safetensors"]) == 0
    exported = files.read(out)
    assert float(np.asarray(exported.pop("logit_scale"))) == params["logit_scale"]
    for tower, name in weights.clip.GLIDE_FILES.items():
        for key, array in files.read(folder / name).items():
            np.testing.assert_array_equal(np.asarray(exported.pop(f"{tower}.{key}")), np.asarray(array), strict=True)
    assert not exported
    assert_equal(weights.load(out, "glide_clip:tiny")[1], {"clip": params})
    alone = tmp_path / file
    alone.write_bytes((folder / file).read_bytes())
    with pytest.raises(UserError, match=f"one encoder of a CLIP, and {other} is not beside it; .*{file}; put both"):
        weights.match(alone)
    alone.with_name(other).write_bytes((folder / file).read_bytes())
    with pytest.raises(UserError, match=f"encoder that goes with {file}: .*missing.*; .*{other}; download it again"):
        weights.match(alone)


# ---- karlo, in small -------------------------------------------------------------------------------------------------

MICRO = """
from diffax.config import load

VARIANTS = {}


def get_config(variant=""):
    config = load("KARLO:tiny")
    config.name = "small_karlo"
    config.clip.shape, config.prior.shape, config.decoder.shape = (8, 8, 3), (8,), (8, 8, 3)
    config.up.shape = (16, 16, 3)
    config.clip.net.features = 8
    config.clip.net.image.update(width=16, layers=1, heads=2)
    config.clip.net.text.update(width=16, layers=1, heads=2)
    config.prior.net.prior.update(width=16, layers=1, heads=2)
    config.decoder.net.update(channels=8, channel_mult=(1, 2), groups=4, attention=(2,), head_channels=8)
    config.decoder.net.clip.sequence_width = 16
    config.up.low_res.crop = 0
    config.up.net.update(channels=8, channel_mult=(1, 2), groups=4)
    config.prior.steps = config.decoder.steps = config.up.steps = "2"
    for name in ("net", "shape", "low_res", "steps"):
        config.up_last[name] = config.up[name]
    config.sample.update(num=2, batch_size=2)
    return config
"""


@pytest.fixture(scope="module")
def karlo_files(tmp_path_factory):
    """(a config of a small karlo, its five files, the parameters in them)."""
    folder = tmp_path_factory.mktemp("karlo")
    path = folder / "small_karlo.py"
    path.write_text(MICRO.replace("KARLO", str(pathlib.Path(configs._folder()) / "karlo.py")))
    config, files, params = published._config(str(path)), [], {}
    families = {"clip": "openai-clip", "prior": "karlo", "decoder": "karlo", "up": "karlo-upsampler"}
    for section, family in families.items():
        table = published.table(published.Published("", "", family, 0, str(path), section))
        rng = np.random.default_rng(len(files))
        arrays = {k: np.float32(0.1) * rng.standard_normal(s, np.float32) for k, s in torch_shapes(table).items()}
        files.append(folder / f"{section}.ckpt")
        nested = {"state_dict": lambda t: {"state_dict": t, "step": 7}, "": lambda t: t}
        files[-1].write_bytes(state_dict(arrays, wrap=nested["state_dict" if family.startswith("karlo") else ""]))
        found = weights.to_flax(arrays, table)
        params |= {"up": found["first"], "up_last": found["last"]} if section == "up" else {section: found}
    files.append(folder / "stats.th")
    stats = np.float32([np.arange(8), 1 + np.arange(8)])
    files[-1].write_bytes(state_dict(dict(zip("01", stats, strict=True)), wrap=lambda t: tuple(t.values())))
    return path, config, files, params


def test_karlo_from_its_files_to_a_picture(karlo_files, tmp_path, capsys):
    """One command makes a workdir that the config samples from, by its statistics, though the config has none."""
    path, config, files, params = karlo_files
    workdir = tmp_path / "run"
    assert command.run([*map(str, files), str(workdir), f"--model={path}"]) == 0
    assert f"up_last of small_karlo: {workdir / 'up_last'}" in capsys.readouterr().out.splitlines()
    want = published._with_settings(
        config,
        {
            ("clip", "embedding", "mean"): [*map(float, range(8))],
            ("clip", "embedding", "std"): [*map(float, range(1, 9))],
        },
    )
    assert json.loads((workdir / "config.json").read_text()) == want
    for given in (None, config):
        loaded = pipeline.load(workdir, config=given)
        assert_equal(loaded.params, params)
        prior = loaded.stages[0]
        np.testing.assert_array_equal(prior.clip.scale.mean, np.arange(8))
        np.testing.assert_array_equal(prior.clip.scale.std, 1 + np.arange(8))
    flags = [f"--config={path}", "--mode=sample", f"--workdir={workdir}", "--prompt=a red circle"]
    assert main.run(flags) == 0, capsys.readouterr().err
    assert (workdir / "samples.png").exists()

    # into memory: the same; and a part that reads by a CLIP is no system without it
    found = weights.load(files, str(path))
    assert found[0] == want
    assert_equal(found[1], params)
    with pytest.raises(UserError, match="prior reads captions or pictures by a CLIP, clip; .*; pass its file too"):
        weights.load(files[1:], str(path))

    # and back
    for file, section in zip(files[1:4], ("prior", "decoder", "up"), strict=True):
        out = tmp_path / f"{section}.safetensors"
        assert command.run([str(workdir), str(out), "--to=safetensors", f"--stage={section}"]) == 0
        before, after = files.read(file), files.read(out)
        assert set(before) == set(after)
        for key in before:
            np.testing.assert_array_equal(np.asarray(after[key]), np.asarray(before[key]), strict=True)
    capsys.readouterr()
    assert command.run([str(workdir), str(out), "--to=safetensors", "--stage=up_last"]) == 2
    assert f"up_last is in one file with up, whose last step it takes; {workdir}; " in capsys.readouterr().err


@pytest.fixture(scope="module")
def karlo_folder(karlo_files, tmp_path_factory):
    """(the folder of a small karlo in diffusers' form, the parameters in it)."""
    path, config, _, params = karlo_files
    params = {**params, "clip": {**params["clip"], "logit_scale": np.float32(np.log(100))}}
    root, nets = tmp_path_factory.mktemp("karlo-diffusers"), {name: stages.build(config, name) for name in params}
    stats = {"mean": np.arange(8, dtype=np.float32), "std": 1 + np.arange(8, dtype=np.float32)}

    def written(folder, table, tree, file=published.UNET):
        flat = traverse_util.flatten_dict(tree)
        there = traverse_util.unflatten_dict({entry.path: flat[entry.path] for entry in table})
        files.write(root / folder / file, weights.to_torch(there, table), {})

    def made(make, section, **options):
        return make(nets[section].net, nets[section].shape, **options)

    written("prior", made(weights.karlo.diffusers_table, "prior"), {"net": params["prior"], "stats": stats})
    for part in ("decoder", "text_proj"):
        written(part, made(weights.karlo.diffusers_decoder_table, "decoder", part=part), params["decoder"])
    for folder, section in (("super_res_first", "up"), ("super_res_last", "up_last")):
        written(folder, made(diffusers.table, section), params[section])
    for tower in ("text", "image"):
        table = made(weights.clip.file_table, "clip", names="transformers", tower=tower)
        written(f"{tower}_encoder", table, params["clip"], published.MODEL)
    return root, params


def test_karlo_from_the_folder_of_diffusers(karlo_files, karlo_folder, tmp_path):
    """One source, of which each sub-folder has its place; or its files in any order."""
    path, config, _, _ = karlo_files
    root, params = karlo_folder
    assert weights.is_weights(root) and not weights.is_weights(tmp_path)
    mean = [*map(float, range(8))]
    settings = {("clip", "embedding", "mean"): mean, ("clip", "embedding", "std"): [value + 1 for value in mean]}
    for sources in (root, sorted(root.glob("*/*"), reverse=True)):
        whole, found, _ = weights.load(sources, str(path))
        assert whole == published._with_settings(config, settings)
        assert_equal(found, params)
    # the published folder has no image_encoder: there the whole CLIP is a file of its own
    for folder in ("decoder", "text_encoder"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / published.UNET).touch()
    assert published._parts_in(tmp_path) == [tmp_path / "decoder"]


@pytest.mark.parametrize("given, missing", [("decoder", "text_proj"), ("text_encoder", "image_encoder")])
def test_half_a_network_is_refused(karlo_files, karlo_folder, given, missing):
    source, section = karlo_folder[0] / given, "clip" if "encoder" in given else "decoder"
    with pytest.raises(UserError, match=f"a part of the {section} of small_karlo, and {missing} is missing; ") as error:
        weights.match(source, model=str(karlo_files[0]))
    assert str(source) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"and {missing} is missing"):
        weights.match_all([source], model=str(karlo_files[0]))
    with pytest.raises(UserError, match=f"is one more {section}; "):
        weights.match_all([source, source], model=str(karlo_files[0]))


def test_an_upsampler_whose_networks_come_one_by_one(karlo_files, karlo_folder, tmp_path, capsys):
    """It is written to karlo's file as soon as both are there."""
    model, workdir, out = f"--model={karlo_files[0]}", tmp_path / "run", tmp_path / "up.safetensors"
    root, _ = karlo_folder
    assert command.run([str(root / "super_res_first"), str(workdir), model]) == 0, capsys.readouterr().err
    assert command.run([str(workdir), str(out), "--to=safetensors", "--stage=up"]) == 2
    assert f"and there are no parameters of up_last; {workdir}; train it, or conv" in capsys.readouterr().err
    with pytest.raises(UserError, match="the last step of up is that of up_last; .*; pass its file too"):
        weights.load(root / "super_res_first", str(karlo_files[0]))
    assert not out.exists()
    assert command.run([str(root / "super_res_last"), str(workdir), model]) == 0, capsys.readouterr().err
    assert command.run([str(workdir), str(out), "--to=safetensors", "--stage=up"]) == 0, capsys.readouterr().err
    before, after = files.read(karlo_files[2][3]), files.read(out)
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(np.asarray(after[key]), np.asarray(before[key]), strict=True)
    alone = json.loads((workdir / "config.json").read_text())
    alone["up"]["last"] = ""
    (workdir / "config.json").write_text(json.dumps(alone))
    with pytest.raises(UserError, match="holds a network for the last step too, and up has none; .*; load it in diff"):
        weights.export(workdir, out)


def test_clips_of_other_sizes_and_programs(tmp_path, capsys):
    """What the arrays of openai/CLIP or the config.json of transformers describe becomes a config of its own."""
    settings = {
        "text_config": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1),
        "vision_config": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1,
                              image_size=16, patch_size=8),
        "projection_dim": 12,
    }  # fmt: skip
    architecture = weights.clip.transformers_config(settings)
    tables = {names: weights.clip.table(architecture.build(), names) for names in ("transformers", "openai")}
    rng = np.random.default_rng(0)
    shapes = torch_shapes(tables["transformers"])
    arrays = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    params = weights.to_flax(arrays, tables["transformers"])
    folder = tmp_path / "my-clip"
    folder.mkdir()
    files.write(folder / "model.safetensors", arrays, {})
    (tmp_path / "other.pt").write_bytes(state_dict(weights.to_torch(params, tables["openai"])))
    (folder / "config.json").write_text(json.dumps(settings))
    for source, name in ((folder, "my-clip"), (tmp_path / "other.pt", "other")):
        workdir = tmp_path / f"run-{name}"
        assert command.run([str(source), str(workdir)]) == 0, capsys.readouterr().err
        config = json.loads((workdir / "config.json").read_text())
        assert (config["name"], config["stages"], config["clip"]["shape"]) == (name, ["clip"], [16, 16, 3])
        assert_equal(pipeline.load_params(config, "clip", workdir)[0], params)
        built = stages.build(config, "clip")
        assert not built.noised and repr(built.net) == repr(architecture.build().clone(
            image=architecture.build().image.clone(hidden=0), text=architecture.build().text.clone(hidden=0)
        ))  # fmt: skip
    settings["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match="intermediate_size=128 cannot be converted; supported: 256; .*; convert another"
    ):
        weights.match(folder)
    settings["text_config"].update(intermediate_size=256, hidden_size=128)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="intermediate_size=256 cannot be converted"):
        weights.match(folder)


def test_weights_of_another_kind_of_network(clip_files, small, tmp_path, monkeypatch):
    folder, _, _ = clip_files
    monkeypatch.setattr(published, "PUBLISHED", ())  # so that it is told from the config alone
    for path, model, what in (
        (folder / "clip_text_enc.pt", "small_guided", "glide-clip has no such network"),
        (small["base"][0], "small_classifier", "unexpected"),
    ):
        with pytest.raises(UserError, match=f"the weights do not fit {model}: .*{what}.*; pass the --model"):
            weights.match(path, model=model)
    file = tmp_path / "RN50.pt"
    file.write_bytes(state_dict({"visual.attnpool.k_proj.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(UserError, match="weights of no known program"):
        weights.match(file)


def test_one_of_several_state_dicts(small, tmp_path, capsys):
    """--ema says which; the average is taken unless it does."""
    arrays = {key: np.asarray(array) for key, array in files.read(small["base"][0]).items()}
    both = {f"{part} {key}": array + i for i, part in enumerate(("ema", "model")) for key, array in arrays.items()}

    def nested(tensors):
        parts = {part: {k.removeprefix(f"{part} "): t for k, t in tensors.items() if k.startswith(part)} for part in
                 ("ema", "model")}  # fmt: skip
        return parts | {"step": 7}

    file = tmp_path / "training.pt"
    file.write_bytes(state_dict(both, wrap=nested))
    for argument, more in ((), 0), (("--ema=ema",), 0), (("--ema=model",), 1):
        workdir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert command.run([str(file), str(workdir), "--model=small_guided", *argument]) == 0
        with checkpoint.Checkpoints(workdir / "base" / "checkpoints", read_only=True) as checkpoints:
            found = checkpoints.restore_ema()[1]
        assert_equal(found, jax.tree.map(lambda a, more=more: a + np.float32(more), small["base"][1]))
    capsys.readouterr()
    assert command.run([str(file), str(tmp_path / "no"), "--model=small_guided", "--ema=x"]) == 2
    assert "it holds no state dict 'x'; " in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_files_straight_into_memory(small):
    base, params = small["base"]
    config, found, step = weights.load(base, "small_guided")
    assert (config["stages"], config["base"]["guidance"], step) == (["base"], ["clip_denoised"], {"base": 800})
    assert_equal(found, {"base": params})
    configs.validate(configs.from_dict(config))
    with pytest.raises(UserError, match="is one more base"):
        weights.load([base, base])
    config, _, _ = weights.load(small["classifier"][0])
    assert stages.build_stages(config) == []
    configs.validate(configs.from_dict(config))


def test_what_counts_as_weights(small, tmp_path):
    base = small["base"][0]
    assert weights.is_weights(base) and weights.is_weights([base, base]) and weights.is_weights("64x64_diffusion.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diffusion_pytorch_model.bin").touch()
    assert weights.is_weights(tmp_path / "model")
    (tmp_path / "my.py").touch()
    for other in ("adm_imagenet_64", "adm_lsun_horse:nodropout", tmp_path, tmp_path / "my.py", "configs/quickstart.py"):
        assert not weights.is_weights(other)


@pytest.mark.parametrize("name, step", [("ema_0.9999_540000", 540000), ("model000500", 500), ("x", 800), ("x_1", 800)])
def test_training_step(name, step, small):
    match = weights.match(small["base"][0], model="small_base")
    assert published.training_step(match._replace(path=pathlib.Path(f"{name}.pt")), "base") == step


def test_a_file_that_is_not_the_model_that_it_is_said_to_be(small, tmp_path, capsys):
    base, classifier = small["base"][0], small["classifier"][0]
    assert command.run([str(classifier), str(tmp_path / "run"), "--model=small_base"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffax: error: the weights do not fit small_base: ") and error.count("\n") == 1
    assert "missing: " in error and "unexpected: " in error and "of another shape: " in error
    assert f"; {classifier}; pass the --model" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="there is no config 'small_guide'; .*did you mean small_guided"):
        weights.match(base, model="small_guide")
    (tmp_path / "other.pt").write_bytes(state_dict({"fc.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(UserError, match="weights of no known program; .*other.pt"):
        weights.match(tmp_path / "other.pt")


def test_a_model_of_ones_own(small, monkeypatch):
    """--model names a config; the section is found, and the order of attention is what the user says."""
    base, params = small["base"]
    found = weights.match(base, model="small_guided", attention_order="new")
    assert ([*found.sections], found.config["name"]) == (["base"], "small_guided")
    new = parameters(found)
    place = ("unet", "mid_attention", "attention", "qkv_bias")
    old, new = (functools.reduce(dict.__getitem__, place, tree) for tree in (params, new))
    heads, width = old.shape[1:]
    assert heads > 1
    np.testing.assert_array_equal(new.reshape(-1), old.transpose(1, 0, 2).reshape(-1))
    monkeypatch.setattr(published, "PUBLISHED", ())  # so that it is told from the config alone
    assert [*weights.match(small["classifier"][0], model="small_guided").sections] == ["classifier"]


# ---- back out --------------------------------------------------------------------------------------------------------


def test_there_and_back_is_exact(small, tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out.safetensors"
    for section in ("base", "classifier"):
        weights.save(weights.match(small[section][0]), workdir)
    assert command.run([str(workdir), str(out), "--to=safetensors"]) == 2
    assert "there is more than one stage" in capsys.readouterr().err
    for section, (path, params) in small.items():
        assert command.run([str(workdir), str(out), "--to=safetensors", f"--stage={section}"]) == 0
        before, after = files.read(path), files.read(out)
        assert set(before) == set(after)
        for key in before:
            np.testing.assert_array_equal(np.asarray(after[key]), np.asarray(before[key]), strict=True)
        found = weights.match(out, model=f"small_{section}")
        assert_equal(parameters(found), params)
    with pytest.raises(UserError, match="checkpoint has no EMA 0.5; it has 0.995"):
        weights.export(workdir, out, stage="base", decay="0.5")


def test_one_of_several_averages(small, tmp_path):
    """What --ema names is written, else the first that the config has; and the step is told."""
    workdir, out = tmp_path / "run", tmp_path / "out.safetensors"
    path, params = small["base"]
    weights.save(weights.match(path), workdir)
    ema = {decay: jax.tree.map(lambda a, i=i: a + np.float32(i), params) for i, decay in enumerate(("0.9", "0.995"))}
    with checkpoint.Checkpoints(workdir / "base" / "checkpoints") as checkpoints:
        checkpoints.save(900, {"params": params}, ema=ema, meta={})
    for decay, want in ((None, "0.995"), ("0.9", "0.9"), ("0.995", "0.995")):
        assert weights.export(workdir, out, decay=decay) == 900
        found = weights.match(out, model="small_base")
        assert_equal(parameters(found), ema[want])


def test_families_of_exported_networks():
    for config, family in (("ddpm_cifar10", "diffusers"), ("adm_imagenet_64", "openai"), ("cfg_imagenet_64", "openai")):
        assert published._family(configs.load(config).base)[0] == family
    assert published._family(configs.load("glide_clip").clip)[0] == "noised-clip"
    karlo = configs.load("karlo")
    families = [published._family(karlo[name])[0] for name in ("clip", "prior", "decoder", "up")]
    assert families == ["openai-clip", "karlo", "karlo", "karlo-upsampler"]


def test_a_condition_that_openai_has_not():
    config = configs.to_dict(configs.load("cascade_64:tiny"))
    up = config["stages"][-1]
    model = stages.build(config, up)
    with pytest.raises(ValueError, match="no names for the condition 'low_res_time'"):
        openai.table(model.net, model.shape)


# ---- folders of diffusers --------------------------------------------------------------------------------------------

SCHEDULER = dict(
    _class_name="DDPMScheduler", beta_schedule="linear", num_train_timesteps=500, variance_type="fixed_large"
)


UNET_2D = dict(
    sample_size=16, in_channels=3, out_channels=3, center_input_sample=False, time_embedding_type="positional",
    freq_shift=1, flip_sin_to_cos=False, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"], block_out_channels=[32, 64], layers_per_block=1,
    mid_block_scale_factor=1, downsample_padding=0, act_fn="silu", attention_head_dim=None, norm_num_groups=32,
    norm_eps=1e-6, resnet_time_scale_shift="default", add_attention=True,
)  # fmt: skip


def unet_2d():
    """(network, its table, arrays under diffusers' names) of a small `UNet2DModel`."""
    architecture = diffusers.net_config(UNET_2D)
    network = architecture.build()
    table = diffusers.table(network, architecture.shape, flip_sin_to_cos=False)
    return network, table, {key: golden.weight(key, shape) for key, shape in torch_shapes(table).items()}


def diffusers_folder(folder, *, scheduler=SCHEDULER, arrays=None, suffix=".safetensors", **changes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **UNET_2D, **changes}))
    if scheduler:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    arrays = unet_2d()[2] if arrays is None else arrays
    path = folder / f"diffusion_pytorch_model{suffix}"
    path.write_bytes(state_dict(arrays)) if suffix == ".bin" else files.write(path, arrays, {})
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_diffusers(tmp_path, suffix):
    folder = diffusers_folder(tmp_path / "ddpm-small", suffix=suffix)
    config, params, _ = weights.load(folder)
    base = config["base"]
    assert (config["name"], base["shape"], base["variance"]) == ("ddpm-small", [16, 16, 3], "fixed_large")
    assert (base["schedule"]["steps"], base["schedule"]["name"]) == (500, "linear")
    network, table, arrays = unet_2d()
    stage = stages.build_stage(config, "base")
    if suffix == ".bin":
        return
    x, time = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32), np.array([3.0, 400.0], np.float32)
    y = jax.jit(stage.net.apply)({"params": params["base"]}, x, time, {})
    want = jax.jit(network.apply)({"params": weights.to_flax(arrays, table)}, x, time, {})
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_a_folder_becomes_a_workdir(tmp_path):
    """Old names of its arrays are known, and a scheduler of no file is the default one."""
    arrays = unet_2d()[2]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {functools.reduce(lambda k, new: k.replace(new, old[new]), old, key): a for key, a in arrays.items()}
    assert set(renamed) != set(arrays)
    folder = diffusers_folder(tmp_path / "x" / "unet", scheduler=None, arrays=renamed)
    found = weights.match(folder.parent)
    config = weights.save(found, tmp_path / "run")
    assert (config["base"]["variance"], config["base"]["schedule"]["steps"]) == ("fixed_small", 1000)
    loaded = pipeline.load(tmp_path / "run")
    assert_equal(loaded.params["base"], parameters(found))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(_class_name="UNet2DConditionModel"), "this is a UNet2DConditionModel"),
        (dict(up_block_types=["AttnUpBlock2D", "AttnUpBlock2D"]), "attention must be at the same levels"),
        (dict(act_fn="gelu"), "act_fn='gelu' cannot be converted"),
        (dict(block_out_channels=[32, 96]), "do not fit the config.json beside them: .*of another shape"),
        (dict(scheduler=SCHEDULER | dict(beta_schedule="sigmoid")), "beta_schedule='sigmoid', supported are linear"),
        (dict(scheduler=SCHEDULER | dict(trained_betas=[0.1])), "trained_betas=.0.1., which is not supported"),
    ],
)
def test_folders_that_are_refused(tmp_path, changes, match):
    with pytest.raises(UserError, match=match) as error:
        weights.match(diffusers_folder(tmp_path / "a", **changes))
    assert "\n" not in str(error.value)


def test_folders_that_are_not_complete(tmp_path):
    folder = diffusers_folder(tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read config.json"):
        weights.match(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no settings"):
        weights.match(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="there is no diffusion_pytorch_model.safetensors or .bin, and no model.safet"):
        weights.match(folder)
    files.write(folder / "model.safetensors", {"visual_projection.weight": np.ones((2, 2), np.float32)}, {})
    assert weights.is_weights(folder)
    with pytest.raises(UserError, match="config.json holds no settings"):
        weights.match(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="of no model that was published; .*model.safetensors; pass --model"):
        weights.match(folder)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_list(capsys):
    assert command.run(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(weights.PUBLISHED)
    row = next(line.split() for line in lines if line.startswith("64x64_diffusion.pt"))
    assert row[1:4] == ["295,904,454", "adm_imagenet_64", "base"] and row[4].endswith("/diffusion/jul-2021")


@pytest.mark.parametrize(
    "argv", [[], ["a.pt"], ["a.pt", "b", "--to=pickle"], ["a.pt", "b", "--nonsense"], ["a.pt", "b"]]
)
def test_bad_command_lines(argv, capsys):
    assert command.run(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("diffax: error: ") and err.count("\n") == 1 and not out
