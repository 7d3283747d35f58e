"""A small karlo: from its files, in either program's form, to pictures and back."""

import pathlib

import numpy as np
import pytest
from flax import traverse_util

from diffax import config as configs
from diffax import weights
from diffax.errors import UserError
from diffax.sampling.load import load
from diffax.training.workdir import read_config, write_config
from diffax.weights import __main__ as command
from diffax.weights import catalogue, diffusers, files, folders
from diffax.weights.catalogue import Published
from diffax.weights.families import named_config
from diffax.weights.systems import with_settings
from diffax.weights.table import torch_shapes
from tests.weights.small import assert_equal, model_of
from tests.weights.torch_files import state_dict

MICRO = """
from diffax.config import load

VARIANTS = {}


def get_config(variant=""):
    config = load("KARLO:tiny")
    config.name = "small_karlo"
    config.clip.shape, config.prior.shape, config.decoder.shape = (8, 8, 3), (8,), (8, 8, 3)
    config.clip.net.features = 8
    config.clip.net.image.update(width=16, layers=1, heads=2)
    config.clip.net.text.update(width=16, layers=1, heads=2)
    config.prior.net.update(width=16, layers=1, heads=2)
    config.decoder.net.update(channels=8, channel_mult=(1, 2), groups=4, attention=(2,), head_channels=8)
    config.decoder.conditions.image_embedding.width = config.decoder.conditions.text_features.width = 16
    for section in (config.up, config.up_last):
        section.shape = (16, 16, 3)
        section.conditions.low_res.crop = 0
        section.net.update(channels=8, channel_mult=(1, 2), groups=4)
    for section in (config.prior, config.decoder, config.up, config.up_last):
        section.steps = "2"
    config.sample.update(num=2, batch_size=2)
    return config
"""


@pytest.fixture(scope="module")
def karlo_files(tmp_path_factory):
    """(a config of a small karlo, its five files, the parameters in them)."""
    folder = tmp_path_factory.mktemp("karlo")
    path = folder / "small_karlo.py"
    path.write_text(MICRO.replace("KARLO", str(pathlib.Path(configs._folder()) / "karlo.py")))
    config, files, params = named_config(str(path)), [], {}
    families = {"clip": "openai-clip", "prior": "karlo", "decoder": "karlo", "up": "karlo-upsampler"}
    for section, family in families.items():
        table = Published("", "", family, 0, str(path), section).table()
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
    path, config, sources, params = karlo_files
    workdir = tmp_path / "run"
    assert command.run([*map(str, sources), str(workdir), f"--model={path}"]) == 0
    assert f"up_last of small_karlo: {workdir / 'up_last'}" in capsys.readouterr().out.splitlines()
    want = with_settings(
        config,
        {
            ("clip", "embedding", "mean"): [*map(float, range(8))],
            ("clip", "embedding", "std"): [*map(float, range(1, 9))],
        },
    )
    assert read_config(workdir) == want
    for given in (None, config):
        loaded = load(workdir, config=given)
        assert_equal(loaded.params, params)
        clip = loaded.models[0].target.clip
        np.testing.assert_array_equal(clip.scale.mean, np.arange(8))
        np.testing.assert_array_equal(clip.scale.std, 1 + np.arange(8))
    assert loaded(0, prompt="a red circle").shape == (1, 16, 16, 3)

    # into memory: the same; and a part that reads by a CLIP is no system without it
    found = weights.load(sources, str(path))
    assert found[0] == want
    assert_equal(found[1], params)
    with pytest.raises(UserError, match="prior reads captions or pictures by a CLIP, clip; .*; pass its file too"):
        weights.load(sources[1:], str(path))

    # and back
    for file, section in zip(sources[1:4], ("prior", "decoder", "up"), strict=True):
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
    root, models = tmp_path_factory.mktemp("karlo-diffusers"), {name: model_of(config, name) for name in params}
    stats = {"mean": np.arange(8, dtype=np.float32), "std": 1 + np.arange(8, dtype=np.float32)}

    def written(folder, table, tree, file=catalogue.UNET):
        flat = traverse_util.flatten_dict(tree)
        there = traverse_util.unflatten_dict({entry.path: flat[entry.path] for entry in table})
        files.write(root / folder / file, weights.to_torch(there, table), {})

    def made(make, section, **options):
        return make(models[section], **options)

    written("prior", made(weights.karlo.diffusers_table, "prior"), {"net": params["prior"], "stats": stats})
    for part in ("decoder", "text_proj"):
        written(part, made(weights.karlo.diffusers_decoder_table, "decoder", part=part), params["decoder"])
    for folder, section in (("super_res_first", "up"), ("super_res_last", "up_last")):
        written(folder, made(diffusers.table, section), params[section])
    for tower in ("text", "image"):
        table = made(weights.clip.file_table, "clip", names="transformers", tower=tower)
        written(f"{tower}_encoder", table, params["clip"], folders.MODEL)
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
        assert whole == with_settings(config, settings)
        assert_equal(found, params)
    # the published folder has no image_encoder: there the whole CLIP is a file of its own
    for folder in ("decoder", "text_encoder"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / catalogue.UNET).touch()
    assert folders.parts_in(tmp_path) == [tmp_path / "decoder"]


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
    with pytest.raises(UserError, match="up leaves its last step to a network, up_last; .*; pass its file too"):
        weights.load(root / "super_res_first", str(karlo_files[0]))
    assert not out.exists()
    assert command.run([str(root / "super_res_last"), str(workdir), model]) == 0, capsys.readouterr().err
    assert command.run([str(workdir), str(out), "--to=safetensors", "--stage=up"]) == 0, capsys.readouterr().err
    before, after = files.read(karlo_files[2][3]), files.read(out)
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(np.asarray(after[key]), np.asarray(before[key]), strict=True)
    alone = read_config(workdir)
    del alone["up"]["guidance"]["finish_with"]
    write_config(alone, "up", workdir)
    with pytest.raises(UserError, match="holds a network for the last step too, and up has none; .*; load it in diff"):
        weights.export(workdir, out, stage="up")
