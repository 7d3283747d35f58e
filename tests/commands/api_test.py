"""diffax from Python: nothing heavy until it is used; training with callbacks; errors that are raised."""

import subprocess
import sys

import numpy as np
import pytest

import diffax
from diffax import config as configs
from diffax.training import reporting
from tests import micro

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "torch", "matplotlib")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import diffax; print(time.perf_counter() - t); print(*sys.modules)"
    )
    seconds, modules = python(code).splitlines()
    assert float(seconds) < 0.5
    assert not {name.partition(".")[0] for name in modules.split()} & set(HEAVY)


def test_flags_and_names_of_configs_are_checked_before_anything_heavy_is_imported():
    code = (
        "import sys; from diffax import main\n"
        "for flags in (['--mode=trian', '--config=quickstart'], ['--config=quikstart'], ['--help'], ['--sede=1']):\n"
        "    main.run(flags)\n"
        "print(*sys.modules)"
    )
    modules = python(code).splitlines()[-1]
    assert not {name.partition(".")[0] for name in modules.split()} & set(HEAVY)


def test_config_is_a_module_that_can_be_called():
    config = diffax.config("quickstart:tiny", "base.train.num_train_steps=20", "--config.base.net.channels=8")
    assert (config.base.train.num_train_steps, config.base.net.channels) == (20, 8)
    configs.check(config)
    assert diffax.config is configs and configs.load("quickstart").base.net.channels == 16
    with pytest.raises(diffax.UserError, match="did you mean"):
        diffax.config("quickstart", "base.net.chanels=8")
    assert "train" in dir(diffax) and not hasattr(diffax, "sampels")


def test_modules_find_each_other_whatever_is_used_first():
    for first in ("diffax.load", "diffax.train", "diffax.SampleFn", "diffax.config('quickstart')", "diffax.Preempted"):
        python(f"import diffax; {first}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, what on_step got, what on_sample got) of a run."""
    steps, samples = [], []
    config = diffax.config("quickstart", *micro.OVERRIDES, "base.train.sample_every=3")
    workdir = diffax.train(
        config,
        tmp_path_factory.mktemp("runs") / "api",
        on_step=lambda step, metrics: steps.append((step, metrics["loss"])),
        on_sample=lambda step, sample_fn: samples.append((step, sample_fn(0, label=[3]))),
    )
    return workdir, steps, samples


def test_callbacks(trained):
    workdir, steps, samples = trained
    rows = reporting.read_metrics(workdir / "base" / "metrics.jsonl")
    assert steps == [(row["step"], row["loss"]) for row in rows] and [step for step, _ in steps] == [2, 4, 6]
    assert [step for step, _ in samples] == [3, 6] and not (workdir / "base" / "samples").exists()
    np.testing.assert_allclose(samples[-1][1], diffax.load(workdir)(0, label=[3]), atol=1e-5)


def test_training_again_changes_nothing(trained):
    workdir = trained[0]
    before = (workdir / "base" / "metrics.jsonl").read_bytes()
    assert diffax.train(diffax.config("quickstart", *micro.OVERRIDES), workdir) == workdir
    assert (workdir / "base" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "how", "message"),
    [
        (["base.train.batch_size=10"], {}, "not divisible"),
        (["base.conditions.label.num_classes=3"], {}, "config.base.data: the data have 10 classes"),
        ([], {"stage": "bsae"}, "did you mean base"),
        (["base.workdir=elsewhere"], {"stage": "base"}, "base is trained elsewhere"),
        (["base.train.start_from=/nowhere"], {}, "no checkpoint"),
    ],
)
def test_errors_are_raised_before_anything_is_written(tmp_path, overrides, how, message):
    config = diffax.config("quickstart", *micro.OVERRIDES, *overrides)
    with pytest.raises(diffax.UserError, match=message) as caught:
        diffax.train(config, tmp_path / "run", **how)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_config_by_name_trains_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from diffax.config import load\nVARIANTS = {}\n\n\ndef get_config(variant=''):\n"
        f"    return load('quickstart', {list(micro.OVERRIDES)})\n"
    )
    assert str(diffax.train("mine.py")) == "runs/mine"
    assert diffax.load("runs/mine")(0, label=[1]).shape == (1, 8, 8, 1)
