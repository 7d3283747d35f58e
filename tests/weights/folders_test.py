"""Folders of models: of diffusers and of transformers."""

import functools
import json

import jax
import numpy as np
import pytest

from diffax import weights
from diffax.errors import UserError
from diffax.sampling.load import load
from diffax.training.workdir import load_params, read_config
from diffax.weights import __main__ as command
from diffax.weights import diffusers, files
from diffax.weights.table import torch_shapes
from tests.parity import golden
from tests.weights.small import assert_equal, model_of, parameters
from tests.weights.torch_files import state_dict

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
    model = architecture.model()
    table = diffusers.table(model, flip_sin_to_cos=False)
    return model.net, table, {key: golden.weight(key, shape) for key, shape in torch_shapes(table).items()}


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
    assert (base["schedule"]["num_timesteps"], base["schedule"]["name"]) == (500, "linear")
    network, table, arrays = unet_2d()
    model = model_of(config, "base")
    if suffix == ".bin":
        return
    x, time = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32), np.array([3.0, 400.0], np.float32)
    y = jax.jit(model.net.apply)({"params": params["base"]}, x, time, {})
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
    assert (config["base"]["variance"], config["base"]["schedule"]["num_timesteps"]) == ("fixed_small", 1000)
    loaded = load(tmp_path / "run")
    assert_equal(loaded.params["base"], parameters(found))


def test_settings_that_only_some_have(tmp_path):
    """Attention at other levels on the way up, none in the middle, and another range of clipping."""
    changes = dict(up_block_types=["AttnUpBlock2D", "AttnUpBlock2D"], add_attention=False)
    architecture = diffusers.net_config(UNET_2D | changes)
    table = diffusers.table(architecture.model(), flip_sin_to_cos=False)
    arrays = {key: golden.weight(key, shape) for key, shape in torch_shapes(table).items()}
    scheduler = SCHEDULER | dict(clip_sample_range=2.0)
    config, params, _ = weights.load(diffusers_folder(tmp_path / "a", arrays=arrays, scheduler=scheduler, **changes))
    assert config["base"]["net"]["attention_up"] == [1, 2] and not config["base"]["net"]["mid_attention"]
    assert config["base"]["guidance"]["clip_denoised"]["clip_range"] == 2.0
    assert_equal(params["base"], weights.to_flax(arrays, table))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(_class_name="UNet2DConditionModel"), "this is a UNet2DConditionModel"),
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


# ---- CLIPs of transformers and of OpenAI -----------------------------------------------------------------------------


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
        config = read_config(workdir)
        assert (config["name"], config["stages"], config["clip"]["shape"]) == (name, ["clip"], [16, 16, 3])
        assert_equal(load_params(config, "clip", workdir)[0], params)
        assert not model_of(config, "clip").noised


@pytest.mark.parametrize(
    "text",
    [
        dict(intermediate_size=128),
        dict(hidden_act="gelu"),
        dict(hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=2),
    ],
)
def test_towers_of_a_clip_that_differ(tmp_path, text):
    """In the hidden width, the activation, or in heads that do not make up the width."""
    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)
    settings = {
        "text_config": tower | text,
        "vision_config": tower | dict(image_size=16, patch_size=8),
        "projection_dim": 12,
    }
    network = weights.clip.transformers_config(settings).build()
    shapes = torch_shapes(weights.clip.table(network, "transformers"))
    arrays = {key: golden.weight(key, shape) for key, shape in shapes.items()}
    folder = tmp_path / "my-clip"
    folder.mkdir()
    files.write(folder / "model.safetensors", arrays, {})
    (folder / "config.json").write_text(json.dumps(settings))
    config, params, _ = weights.load(folder)
    its = model_of(config, "clip").net
    assert repr(its.text) == repr(network.text) and repr(its.image) == repr(network.image)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
