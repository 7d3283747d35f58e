"""One of everything of one's own, outside diffax: the guide's notebook, and the same by flags of the command line."""

import json
import pathlib

import numpy as np
import pytest

import diffax
from diffax import main
from diffax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOK = json.loads((ROOT / "examples" / "add_your_own.ipynb").read_text(encoding="utf-8"))
MICRO = (
    "config.base.net.width=8",
    "config.base.net.layers=1",
    "config.base.steps=4",
    "config.base.data.count=64",
    "config.base.train.batch_size=16",
    "config.base.train.log_every=2",
    "config.base.train.save_every=4",
    "config.base.train.sample_every=0",
    "config.eval.num=8",
    "config.eval.batch_size=8",
    "config.sample.num=4",
    "config.sample.batch_size=4",
)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = []
    namespace = {"__name__": "notebook", "display": shown.append}
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
        if cell["id"] == "settings":
            namespace.update(WORKDIR=str(tmp_path / "bars"), STEPS=4, MORE_STEPS=6, OVERRIDES=list(MICRO))
    assert [step for step, _ in namespace["losses"]] == [2, 4, 6]  # it went on at 5
    assert namespace["pictures"].shape == (8, 8, 8, 1) and len(shown) == 1


FLAGS = (
    "config.base.data=examples.my_lab:bars",
    "config.base.net=examples.my_lab:Mixer",
    "config.base.loss=examples.my_lab:min_snr",
    "config.base.loss.gamma=4",
    "config.base.sampler=examples.my_lab:churned",
    "config.base.sampler.share=0.2",
    "config.base.guidance=clip_denoised,examples.my_lab:contrast",
    "config.base.guidance.contrast.amount=0.2",
    "config.base.conditions=none",
    "config.base.conditions.angle=examples.my_lab:Angle",
    "config.base.shape=8,8,1",
)


def test_the_same_by_flags(tmp_path, monkeypatch, capsys):
    """Trained, resumed, sampled, scored, compiled ahead and reloaded, by a config that knows none of the parts."""
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "run"
    flags = ["--config=quickstart", f"--workdir={workdir}", *(f"--{flag}" for flag in (*FLAGS, *MICRO))]
    for steps in (4, 6):
        assert main.run([*flags, f"--config.base.train.num_train_steps={steps}"]) == 0
    assert "resuming from step 4" in capsys.readouterr().err
    for mode in ("sample", "evaluate", "compile"):
        assert main.run([*flags, "--config.eval.bpd_num=0", f"--mode={mode}"]) == 0, capsys.readouterr().err
    sample_fn = diffax.load(workdir)
    assert sample_fn(0, angle=[0.5, 1.0]).shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(sample_fn(0, angle=[0.5, 1.0])[:1], sample_fn(0, angle=[0.5]))
    with pytest.raises(UserError, match="angle"):
        sample_fn(0, angle=["north"])
    assert main.run([*flags, "--config.base.net.width=16"]) == 2
    assert "config.base.net.width=8, config says 16" in capsys.readouterr().err
