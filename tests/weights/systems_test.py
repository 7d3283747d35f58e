"""Which files make one system, and the config of a workdir as they come."""

import pytest

from diffax import config as configs
from diffax import weights
from diffax.errors import UserError
from diffax.training.workdir import write_config
from diffax.weights.families import named_config
from diffax.weights.matching import Match
from diffax.weights.saving import present_sections, system_with
from diffax.weights.systems import only


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
        found.append(Match(folder / row.file, {}, row.its_config(), sections, settings))
    return found


def put(found, workdir):
    """Leaves what `save` would leave, but for the numbers; returns the config."""
    config = system_with(found, workdir)
    configs.check(configs.from_dict(config))
    for name in (name for m in found for name in m.sections):
        (workdir / name / "checkpoints").mkdir(parents=True)
    for name in present_sections(config, workdir):
        write_config(configs.from_dict(config), name, workdir)
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
            assert config == only(named_config(want), there)
    assert config == named_config("glide:clip")
    (classifier,) = of_files(["64x64_classifier.pt"], tmp_path)
    with pytest.raises(UserError, match="holds glide, which has no classifier like this one"):
        system_with([classifier], tmp_path)


KARLO = ("ViT-L-14.pt", "prior-ckpt-step=01000000-of-01000000.ckpt", "decoder-ckpt-step=01000000-of-01000000.ckpt",
         "improved-sr-ckpt-step=1.2M.ckpt", "ViT-L-14_stats.th")  # fmt: skip


@pytest.mark.parametrize("parts", [[(0, 1, 2, 3, 4)], [(1,), (0,), (4,), (3,), (2,)], [(2, 4), (3,), (1, 0)]])
def test_the_files_of_karlo_are_one_system(parts, tmp_path):
    """All at once or one after the other; the statistics are in the config whenever they came."""
    for part in parts:
        config = put(of_files([KARLO[i] for i in part], tmp_path), tmp_path)
    want = named_config("karlo")
    want["clip"]["embedding"].update(mean=[0.5] * 768, std=[0.5] * 768)
    assert config == want
    with pytest.raises(UserError, match="there are parameters of prior already"):
        system_with(of_files(KARLO[1:2], tmp_path), tmp_path)


def test_statistics_alone_are_no_model(tmp_path):
    found = of_files(KARLO[4:], tmp_path)
    with pytest.raises(UserError, match="statistics of embeddings alone; .*stats.th; give the files of the models"):
        system_with(found, tmp_path)
