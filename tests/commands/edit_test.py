"""Edits by latents from the command line."""

import numpy as np
import pytest
from PIL import Image

from diffax import config as configs
from diffax import main
from diffax.commands import edit
from diffax.config import spec
from examples.shapes import data as shapes
from tests.models import systems
from tests.sampling import untrained


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags of a workdir without checkpoints: the system in it is one that is at hand."""
    monkeypatch.setattr(shapes, "RANGES", {"train": range(60), "test": range(10**6, 10**6 + 20)})
    monkeypatch.setattr(edit, "load_trained", lambda job: untrained.unclip())
    config = systems.dalle2().config.copy_and_resolve_references()
    config.stages = ("prior", "decoder")
    for name in ("prior", "decoder"):
        config[name].data = spec("data", "examples.shapes.data:shapes", data_dir=str(tmp_path / "tfds"))
    config.sample.batch_size, config.eval.bpd_num = 4, 0
    monkeypatch.setattr(configs, "load", lambda name, overrides: config)
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (12, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return ["--config=dalle2:tiny", f"--workdir={tmp_path}", "--mode=edit", "--count=3"]


EDITS = {
    "reconstruct": (["two"], (3, 2)),
    "variations": (["one", "--prompt=a red ring", "--strength=1"], (4, 1)),
    "interpolate": (["two"], (5, 1)),
    "diff": (["two", "--to=a red ring", "--prompt=a blue ring", "--strength=0.4"], (4, 2)),
    "pca": (["one"], (4, 1)),
    "prior": (["--prompt=a red ring"], (3, 3)),
}


def with_inputs(more, folder):
    one, two = f"--input={folder / 'a.png'}", f"--input={folder / 'a.png'},{folder / 'b.png'}"
    return [{"one": one, "two": two}.get(flag, flag) for flag in more]


def test_every_edit_has_its_rows(flags, tmp_path, capsys):
    assert set(EDITS) == set(edit.EDITS)
    for name, (more, grid) in EDITS.items():
        assert main.run([*flags, f"--edit={name}", *with_inputs(more, tmp_path)]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == f"{name}: {tmp_path / name}.png\n"
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert width == 2 + 50 * grid[0] and height >= 2 + grid[1] * 62, name


def test_bad_flags_get_one_line(flags, tmp_path, capsys):
    (tmp_path / "there.png").touch()
    for more, words in (
        ([], "unknown --edit=None"),
        (["--mode=sample", "--edit=pca"], "pass --mode=edit"),
        (["--edit=interpolat"], "did you mean interpolate"),
        (["--edit=interpolate", "one"], "takes two pictures, got 1"),
        (["--edit=prior", "one", "--prompt=a"], "takes no picture, got 1"),
        (["--edit=prior"], "pass --prompt"),
        (["--edit=variations"], "one or more pictures, got 0"),
        (["--edit=variations", "one", "--strength=2"], "strength is 2"),
        (["--edit=reconstruct", "one", "--strength=1"], "takes no --strength"),
        (["--edit=reconstruct", "one", f"--mask={tmp_path / 'a.png'}"], "takes no --mask"),
        (["--edit=diff", "one"], "takes --to"),
        (["--edit=pca", "one", "--count=1"], "two pictures in a row"),
        (["--edit=pca", "--input=/no/such.png"], "there is no image"),
        (["--edit=pca", "one", f"--output={tmp_path / 'there.png'}"], "the output exists"),
    ):
        assert main.run([*flags, *with_inputs(more, tmp_path)]) == 2, more
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line, line


def test_a_prompt_needs_a_decoder_that_reads_text(flags, tmp_path, capsys, monkeypatch):
    sample_fn = untrained.unclip()
    monkeypatch.setattr(type(sample_fn), "reads_text", False)
    assert main.run([*flags, "--edit=pca", "--prompt=a", *with_inputs(["one"], tmp_path)]) == 2
    assert "this decoder reads no text" in capsys.readouterr().err
