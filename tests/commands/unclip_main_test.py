"""A system of a CLIP, a prior, a decoder and an upsampler from the command line: train, embed, sample, edit; errors."""

import chex
import numpy as np
import pytest
from PIL import Image

import diffax
from diffax import main
from diffax.training import reporting
from diffax.training import workdir as workdirs

UNET = ("net.channels=8", "net.channel_mult=1,", "net.groups=4", "net.attention=none", "net.heads=2", "steps=3")
SECTIONS = {
    "clip": (
        *("shape=8,8,3", "tokenizer.length=8", "net.features=4", "net.image.patch=4", "net.image.width=8"),
        *("net.image.layers=1", "net.image.heads=2", "net.text.width=8", "net.text.layers=1", "net.text.heads=2"),
    ),
    "prior": (
        *("shape=4", "net.width=8", "net.layers=1", "net.heads=2", "conditions.text.tokenizer.length=8", "steps=3"),
        *("guidance.classifier_free.scale=2",),
    ),
    "decoder": (
        *("shape=8,8,3", "net.head_channels=4", "conditions.text.tokenizer.length=8", "conditions.text.width=8"),
        *("conditions.text.layers=1", "conditions.text.heads=2", "conditions.image_embedding.width=8", *UNET),
    ),
    "up": ("shape=16,16,3", "conditions.low_res.crop=8", *UNET),
}
TRAIN = (
    *("schedule.num_timesteps=40", "train.num_train_steps=4", "train.batch_size=8", "train.log_every=2"),
    *("train.save_every=4", "train.sample_every=0", "train.warmup_steps=0"),
)
OVERRIDES = (
    *(f"config.{name}.{o}" for name, own in SECTIONS.items() for o in (*own, *TRAIN)),
    *("config.sample.num=4", "config.sample.batch_size=4", "config.eval.num=0", "config.eval.guidance=none"),
)


def flags(workdir, *more):
    return ["--config=dalle2:tiny", f"--workdir={workdir}", *(f"--{o}" for o in OVERRIDES), *more]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """CLIP and prior trained by one command, the decoder and the upsampler by others."""
    folder = tmp_path_factory.mktemp("dalle2")
    assert main.run(flags(folder, "--config.stages=clip,prior")) == 0
    for stage in ("decoder", "up"):
        assert main.run(flags(folder, f"--stage={stage}")) == 0
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    return path


def test_every_section_has_what_it_needs(workdir):
    for name in SECTIONS:
        rows = reporting.read_metrics(workdir / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(row["loss"]) for row in rows)
        assert (workdir / name / "config.json").exists()
    statistics = workdirs.read_statistics(workdir / "prior")
    assert set(statistics) == {"logsnr", "residual"} and workdirs.statistics_step(workdir / "prior") == 4
    assert (workdir / "samples.png").exists() and (workdir / "up" / "samples" / "00000004.png").exists()


def test_sampling_by_prompts(workdir, tmp_path, capsys):
    out = tmp_path / "prompted.png"
    mode = (f"--workdir={workdir}", "--mode=sample", "--prompt=a red ring", f"--output={out}")
    assert main.run([*mode, "--config.sample.save=true"]) == 0, capsys.readouterr().err
    names = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [np.load(name)["arr_0"].shape for name in names[1:]] == [(4, 8, 8, 3), (4, 16, 16, 3)]
    sample_fn = diffax.load(workdir)
    assert [*sample_fn.arguments] == ["prompt"] and set(sample_fn.step) == {"clip", "prior", "decoder", "up"}
    chex.assert_shape(sample_fn(0, prompt=["a red ring", "a blue cross"]), (2, 16, 16, 3))


def test_decoder_is_trained_on_embeddings_in_files(workdir, tmp_path, capsys):
    folder = f"--config.decoder.loader.embeddings={tmp_path / 'embeddings'}"
    small = "--config.decoder.data=digits"
    mode = ("--mode=embed", "--stage=decoder", folder, small)
    assert main.run(flags(workdir, *mode)) == 0, capsys.readouterr().err
    assert "embedded: 1 of 1 files" in capsys.readouterr().err
    other = flags(tmp_path / "run", f"--config.clip.workdir={workdir}", "--stage=decoder", small)
    assert main.run([*other, folder]) == 0, capsys.readouterr().err
    assert main.run([*flags(tmp_path / "plain", f"--config.clip.workdir={workdir}", "--stage=decoder", small)]) == 0
    losses = [
        [row["loss"] for row in reporting.read_metrics(tmp_path / run / "decoder" / "metrics.jsonl")]
        for run in ("run", "plain")
    ]
    np.testing.assert_allclose(*losses, rtol=0.05)


@pytest.mark.parametrize("edit", ["reconstruct", "variations", "interpolate", "diff", "pca", "prior"])
def test_edits(workdir, picture, tmp_path, capsys, edit):
    inputs = {"interpolate": [picture, picture], "prior": []}.get(edit, [picture])
    more = {"diff": ["--prompt=a red ring", "--to=a blue ring"], "prior": ["--prompt=a red ring"]}.get(edit, [])
    given = [f"--input={','.join(map(str, inputs))}"] if inputs else []
    out = tmp_path / "edit.png"
    mode = ["--mode=edit", f"--edit={edit}", f"--workdir={workdir}", "--count=2", f"--output={out}"]
    assert main.run([*mode, *given, *more]) == 0, capsys.readouterr().err
    assert Image.open(out).size[0] > 30 and f"{edit}: {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags_of", "message"),
    [
        (["--mode=edit", "--edit=variation"], "did you mean variations"),
        (["--mode=edit", "--edit=variations"], "one or more pictures, got 0"),
        (["--mode=edit", "--edit=diff", "--input=a.png"], "takes --to"),
        (["--mode=edit", "--edit=variations", "--input=a.png", "--to=b"], "takes no --to"),
        (["--mode=edit", "--edit=prior"], "takes a caption"),
        (["--mode=edit", "--edit=variations", "--input=a.png", "--strength=2"], "strength is 2"),
        (["--mode=edit", "--edit=variations", "--input=/nowhere/a.png"], "/nowhere/a.png"),
        (["--edit=variations"], "pass --mode=edit"),
        (["--mode=sample", "--prompts=/nowhere"], "cannot read the prompts"),
        (["--mode=sample", "--mask=a.png"], "no picture to edit"),
        (["--mode=embed"], "no folder is named"),
    ],
)
def test_bad_flags_get_one_line(workdir, capfd, flags_of, message):
    assert main.run([f"--workdir={workdir}", "--config=dalle2:tiny", *flags_of]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_what_is_missing_is_an_error_before_training(workdir, tmp_path, capfd):
    assert main.run(flags(tmp_path / "new", "--stage=prior", "--config.stages=clip,prior")) == 2
    assert "there is no checkpoint" in capfd.readouterr().err and not (tmp_path / "new").exists()
    mode = flags(workdir, "--mode=sample", "--config.stages=clip,prior")
    assert main.run(mode) == 2 and "makes embeddings" in capfd.readouterr().err
