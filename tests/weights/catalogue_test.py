"""Published files are recognised: every name and shape has its place in a config's network."""

import json
import pathlib

import numpy as np
import pytest

from diffax import config as configs
from diffax import weights
from diffax.errors import UserError
from diffax.weights import catalogue, diffusers, families, files, glide, matching, openai
from diffax.weights.table import torch_shapes
from tests.weights.small import blanks

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
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


def neutral(model):
    """The fields of a network, without what may differ for the same parameters and outputs."""
    encoders = [(name, part.clone(remat="none") if hasattr(part, "remat") else part) for name, part in getattr(
        model.net, "encoders", ())]  # fmt: skip
    net = openai.core(model)
    net = net.clone(dropout=0.0, remat="none", heads=0 if net.head_channels else net.heads, kernel_init="torch")
    if hasattr(net, "attention_up"):
        net = net.clone(attention_up=net.attention_up or net.attention)
    return repr(net), repr(encoders)


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
    model = families.system_of(row.its_config()).model(row.section)
    assert model.shape == want.shape
    assert neutral(model) == neutral(want.model())
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
KARLO_DIFFUSERS = json.loads((pathlib.Path(__file__).parent / "karlo_diffusers.json").read_text())


@needs_manifest
def test_every_entry_of_the_manifest_is_covered_and_what_it_lacks_is_known():
    """By the tests above and by the one below; `convert_test.py` compares all names and shapes of the former."""
    assert {*MODELS, *OTHERS} == {*EVERY}
    covered = [*map(row_of, MODELS), *(row for row in weights.PUBLISHED if {row.file, row.place} & {*OTHERS.values()})]
    assert {(row.file, row.place) for row in weights.PUBLISHED if row not in covered} == {
        ("ViT-B-32.pt", catalogue.CLIPS), ("ViT-B-16.pt", catalogue.CLIPS), ("ViT-L-14.pt", catalogue.CLIPS),
        ("model.safetensors", "openai/clip-vit-base-patch32"), ("model.safetensors", "openai/clip-vit-base-patch16"),
        ("ViT-L-14_stats.th", catalogue.KARLO),
        *((catalogue.UNET, f"kakaobrain/karlo-v1-alpha/{folder}") for folder in KARLO_FOLDERS),
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
    sections, settings = matching._parts(
        blanks(shapes) | {"clip_std": np.ones((1, 768), np.float32)},
        row.family,
        row.its_config(),
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
    made, make = {}, catalogue.Published.table

    def once(row):
        """The two of an upsampler are alike."""
        key = (row.family, *row.options.values())
        if key not in made:
            made[key] = make(row)
        return made[key]

    monkeypatch.setattr(catalogue.Published, "table", once)
    own = {row.section: row.parameters for row in weights.PUBLISHED if row.place == catalogue.KARLO}
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
    whole = next(row for row in weights.PUBLISHED if row.folder == "clip-vit-large-patch14").table()
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
        table = row.table()
        shapes = torch_shapes(table)
        assert files.count(list(shapes.values())) == row.parameters
        assert sum(int(np.prod(entry.shape)) for entry in table) == row.parameters
        assert weights.recognise(blanks(shapes), "renamed")[0] == row
    buffers = {"input_resolution": (), "text_model.embeddings.position_ids": (1, 77)}
    assert set(families.FAMILIES["transformers"].rename(blanks(shapes | buffers))) == set(shapes)


@needs_manifest
def test_arrays_that_are_ambiguous_or_unknown():
    shapes = MODELS["improved-diffusion/cifar10_uncond_50M_500K"]["state_dict"]
    with pytest.raises(UserError, match="any of iddpm_cifar10, iddpm_cifar10:vlb; pass --model=NAME of one"):
        weights.recognise(blanks(shapes), "renamed")
    first = next(iter(shapes))
    with pytest.raises(UserError, match="446 arrays of 52,546,438 numbers are of no model"):
        weights.recognise(blanks({**shapes, first: shapes[first][::-1]}), "cifar10_uncond_50M_500K")
    with pytest.raises(UserError, match="445 arrays of .* numbers are of no model that was published; pass --model"):
        weights.recognise(blanks({key: shape for key, shape in shapes.items() if key != first}))


def test_published_files_differ_in_their_names():
    """Files of one number of parameters differ in name; every config and section is there."""
    keys = [(row.parameters, row.place, row.name) for row in weights.PUBLISHED]
    assert len(set(keys)) == len(keys)
    for row in weights.PUBLISHED:
        assert row.family in families.FAMILIES and bool(row.config) != bool(row.architecture)
        if row.config:
            config = configs.load(row.config)
            assert row.section in families.system_of(configs.to_dict(config)).trained
            assert config.name.startswith(row.config.replace(":", "_"))
