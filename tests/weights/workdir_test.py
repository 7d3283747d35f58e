"""Files of weights to a workdir and back, and straight into memory."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from diffax import config as configs
from diffax import weights
from diffax.errors import UserError
from diffax.sampling.load import load
from diffax.training import checkpoints
from diffax.training.workdir import read_config
from diffax.weights import __main__ as command
from diffax.weights import catalogue, files, openai
from diffax.weights.catalogue import Published
from diffax.weights.exporting import family_of
from diffax.weights.families import named_config, system_of
from diffax.weights.saving import training_step
from diffax.weights.table import torch_shapes
from tests.weights.small import assert_equal, model_of, parameters
from tests.weights.torch_files import state_dict


def test_a_model_and_then_its_classifier(small, tmp_path, capsys):
    """A file makes a workdir that samples; the file of the classifier makes it a guided one."""
    workdir = tmp_path / "run"
    (base, base_params), (classifier, classifier_params) = small["base"], small["classifier"]
    assert command.run([str(base), str(workdir)]) == 0
    assert "base of small_guided" in capsys.readouterr().out
    alone = load(workdir)
    assert ([*alone.arguments], alone.step) == (["label"], {"base": 800})
    assert alone.models[0].scale is None
    assert_equal(alone.params["base"], base_params)
    assert np.isfinite(alone(0, label=[1, 2])).all()

    assert command.run([str(classifier), str(workdir)]) == 0
    both = load(workdir)
    assert both.models[0].scale == 1.0 and both.config == named_config("small_guided")
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
    assert config == named_config("small_guided") == read_config(workdir)
    for section in ("classifier", "base"):
        assert json.loads((workdir / section / "config.json").read_text()) == config
    assert not (workdir / "config.json").exists()


def test_a_workdir_that_is_not_ours_is_left_alone(small, tmp_path):
    workdir = tmp_path / "run"
    weights.save(weights.match(small["base"][0]), workdir)
    config = json.loads((workdir / "base" / "config.json").read_text())
    config["base"]["temperature"] = 0.5
    (workdir / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="or was edited; .*; choose another workdir"):
        weights.save(weights.match(small["classifier"][0]), workdir)
    assert json.loads((workdir / "base" / "config.json").read_text()) == config
    assert not (workdir / "classifier").exists()


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """GLIDE's two files of a small CLIP, the rows that know them, and its parameters."""
    folder, rows, arrays = tmp_path_factory.mktemp("clip"), [], {}
    network = model_of(named_config("glide_clip:tiny"), "clip").net
    for tower, file in weights.clip.GLIDE_FILES.items():
        row = Published(file, "here", "glide-clip", 0, "glide_clip:tiny", "clip", {"tower": tower})
        shapes, rng = torch_shapes(row.table()), np.random.default_rng(len(rows))
        arrays[tower] = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
        (folder / file).write_bytes(state_dict(arrays[tower]))
        rows.append(row._replace(parameters=files.count(list(shapes.values()))))
    return folder, tuple(rows), weights.clip.from_glide(arrays["image"], arrays["text"], network)


@pytest.mark.parametrize("file", weights.clip.GLIDE_FILES.values())
def test_the_two_files_of_a_clip(clip_files, file, tmp_path, monkeypatch, capsys):
    """Either one stands for both, which are one section; each is written as it was read, with the scale beside them."""
    folder, rows, params = clip_files
    monkeypatch.setattr(catalogue, "PUBLISHED", rows)
    workdir = tmp_path / "run"
    assert command.run([str(folder / file), str(workdir)]) == 0
    with checkpoints.Checkpoints(workdir / "clip" / "checkpoints", read_only=True) as store:
        assert_equal(store.restore_ema()[1], params)
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


# ---- other files -----------------------------------------------------------------------------------------------------


def test_weights_of_another_kind_of_network(clip_files, small, tmp_path, monkeypatch):
    folder, _, _ = clip_files
    monkeypatch.setattr(catalogue, "PUBLISHED", ())  # so that the config alone says what it is
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
        with checkpoints.Checkpoints(workdir / "base" / "checkpoints", read_only=True) as store:
            found = store.restore_ema()[1]
        assert_equal(found, jax.tree.map(lambda a, more=more: a + np.float32(more), small["base"][1]))
    capsys.readouterr()
    assert command.run([str(file), str(tmp_path / "no"), "--model=small_guided", "--ema=x"]) == 2
    assert "it holds no state dict 'x'; " in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_files_straight_into_memory(small):
    base, params = small["base"]
    config, found, step = weights.load(base, "small_guided")
    assert (config["stages"], [*config["base"]["guidance"]], step) == (["base"], ["clip_denoised"], {"base": 800})
    assert_equal(found, {"base": params})
    configs.check(configs.from_dict(config))
    with pytest.raises(UserError, match="is one more base"):
        weights.load([base, base])
    config, _, _ = weights.load(small["classifier"][0])
    assert system_of(config).generators == []
    configs.check(configs.from_dict(config))


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
    assert training_step(match._replace(path=pathlib.Path(f"{name}.pt")), "base") == step


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
    place = ("net", "mid_attention", "attention", "qkv_bias")
    old, new = (functools.reduce(dict.__getitem__, place, tree) for tree in (params, new))
    heads, width = old.shape[1:]
    assert heads > 1
    np.testing.assert_array_equal(new.reshape(-1), old.transpose(1, 0, 2).reshape(-1))
    monkeypatch.setattr(catalogue, "PUBLISHED", ())  # so that the config alone says what it is
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
    """What --ema names is written, else the first that the config has; and the step is returned."""
    workdir, out = tmp_path / "run", tmp_path / "out.safetensors"
    path, params = small["base"]
    weights.save(weights.match(path), workdir)
    ema = {decay: jax.tree.map(lambda a, i=i: a + np.float32(i), params) for i, decay in enumerate(("0.9", "0.995"))}
    with checkpoints.Checkpoints(workdir / "base" / "checkpoints") as store:
        store.save(900, {"params": params}, ema=ema, meta=store.read_meta())
    for decay, want in ((None, "0.995"), ("0.9", "0.9"), ("0.995", "0.995")):
        assert weights.export(workdir, out, decay=decay) == 900
        found = weights.match(out, model="small_base")
        assert_equal(parameters(found), ema[want])


def test_families_of_exported_networks():
    for config, family in (("ddpm_cifar10", "diffusers"), ("adm_imagenet_64", "openai"), ("cfg_imagenet_64", "openai")):
        assert family_of(configs.load(config).base)[0] == family
    assert family_of(configs.load("glide_clip").clip)[0] == "noised-clip"
    karlo = configs.load("karlo")
    families = [family_of(karlo[name])[0] for name in ("clip", "prior", "decoder", "up")]
    assert families == ["openai-clip", "karlo", "karlo", "karlo-upsampler"]


def test_a_condition_that_openai_has_not():
    config = configs.to_dict(configs.load("cascade_64:tiny"))
    model = model_of(config, config["stages"][-1])
    with pytest.raises(ValueError, match="no names for the noise level of 'low_res'"):
        openai.table(model)


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
