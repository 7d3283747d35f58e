"""The command end to end on micro configs: train, resume, sample, evaluate; and what bad input gets."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import diffax
from diffax import main
from diffax.training import checkpoints, reporting
from tests import micro


def ema(workdir, name="base"):
    with checkpoints.Checkpoints(workdir / name / "checkpoints", read_only=True) as store:
        return store.restore_ema()[:2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    assert main.run(micro.flags(workdir)) == 0
    return workdir


def test_training_leaves_checkpoints_metrics_and_pictures(trained):
    assert ema(trained)[0] == 6
    rows = reporting.read_metrics(trained / "base" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"loss", "mse", "loss_q0", "grad_norm", "learning_rate"} <= set().union(*rows)
    for picture in ("samples.png", "base/loss.png", "base/samples/00000006.png"):
        assert Image.open(trained / picture).size[0] > 100
    saved = json.loads((trained / "base" / "config.json").read_text())
    assert saved["base"]["net"]["channels"] == 8 and not (trained / "config.json").exists()


def test_a_rerun_changes_nothing(trained, capsys):
    before = (trained / "base" / "metrics.jsonl").read_bytes()
    assert main.run(micro.flags(trained)) == 0
    assert (trained / "base" / "metrics.jsonl").read_bytes() == before
    assert "samples:" in capsys.readouterr().out


def test_sample_mode(trained, tmp_path, capsys):
    out = tmp_path / "some" / "grid.png"
    flags = [f"--workdir={trained}", "--mode=sample", f"--output={out}", "--config.sample.num=3"]
    assert main.run(flags) == 0, capsys.readouterr().err
    first = out.read_bytes()
    assert main.run(flags) == 2 and "--overwrite" in capsys.readouterr().err
    assert main.run([*flags, "--overwrite"]) == 0 and out.read_bytes() == first


def test_evaluate_mode(trained, capsys):
    assert main.run([f"--workdir={trained}", "--mode=evaluate", "--config.eval.steps=5,2"]) == 0
    report = json.loads((trained / "evaluation.json").read_text())
    assert [row["steps"] for row in report["rows"]] == [5, 2]
    for row in report["rows"]:
        assert row["bits_per_dim"] > 0 and 0 <= row["accuracy"] <= 1
        assert row["accuracy_of_classifier_on_real"] > 0.9
    assert "| steps | sampler | bits_per_dim |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sample_fn(trained):
    return diffax.load(trained)


class TestSampleFn:
    def test_shapes_and_range(self, sample_fn):
        assert [*sample_fn.arguments] == ["label"] and sample_fn.step == {"base": 6}
        out = sample_fn(0, label=[3, 7, 1])
        chex.assert_shape(out, (3, 8, 8, 1))
        assert np.abs(out).max() <= 1 + 1e-5
        out, kept = sample_fn(0, label=3, n=2, keep=2)
        chex.assert_shape((out, kept), [(2, 8, 8, 1), (2, 2, 8, 8, 1)])
        np.testing.assert_allclose(kept[:, -1], out, atol=1e-6)

    def test_a_picture_depends_on_its_key_and_label_only(self, sample_fn):
        many = sample_fn(0, label=[3, 7, 1, 1, 2], batch_size=4)
        few = sample_fn(0, label=[3, 7])
        np.testing.assert_allclose(many[:2], few, atol=1e-4)
        np.testing.assert_allclose(sample_fn(jax.random.key(0), label=[3, 7]), few, atol=1e-4)
        assert not np.allclose(sample_fn(1, label=[3, 7]), few, atol=1e-2)

    def test_other_steps_and_samplers(self, sample_fn):
        for kwargs in ({"steps": 3}, {"steps": "ddim4", "sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}):
            assert np.isfinite(sample_fn(0, label=[1], **kwargs)).all()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({}, "condition 'label' is missing"),
            ({"label": [10]}, "label 10 is out of range"),
            ({"label": -1}, "label -1 is out of range"),
            ({"label": [0.5]}, "label is"),
            ({"label": "three"}, "label is"),
            ({"label": []}, "label is"),
            ({"label": 1, "n": 0}, "nothing to sample"),
            ({"label": [1, 2], "n": 3}, "2 values of label for 3 pictures"),
            ({"label": 1, "prompt": "a"}, "no condition 'prompt'"),
            ({"label": 1, "steps": 0}, "cannot keep 0"),
            ({"label": 1, "steps": 41}, "cannot keep 41"),
            ({"label": 1, "steps": "many"}, "steps must be"),
            ({"label": 1, "sampler": "euler"}, "sampler.*got 'euler'"),
            ({"label": 1, "batch_size": 0}, "batch_size is 0"),
        ],
    )
    def test_bad_arguments_get_one_line(self, sample_fn, kwargs, message):
        with pytest.raises(diffax.UserError, match=message) as caught:
            sample_fn(0, **kwargs)
        assert "\n" not in str(caught.value)


def test_a_cut_run_of_the_command_ends_bit_equal(trained, tmp_path):
    """The same command, ended by SIGTERM in another process and run again."""
    slow = "config.base.train.save_every=1"  # time for the signal, and a checkpoint at every step
    command = [sys.executable, "-m", "diffax.main", *micro.flags(tmp_path / "cut", slow)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if "step 1/6" in line:
            job.send_signal(signal.SIGTERM)
            break
    rest, status = job.stderr.read(), job.wait(timeout=300)
    assert status in (0, 75), rest
    if status == 75:
        assert "saved; rerun the same command to continue" in rest
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "resuming from step" in done.stderr, done.stderr
    chex.assert_trees_all_equal(ema(trained), ema(tmp_path / "cut"))


def test_a_damaged_checkpoint_falls_back_and_is_named(trained, tmp_path, capfd):
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    for file in (tmp_path / "copy" / "base" / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert main.run(micro.flags(tmp_path / "copy")) == 0
    err = capfd.readouterr().err
    assert "step 6 is damaged" in err and "resuming from step 3" in err
    chex.assert_trees_all_equal(ema(trained), ema(tmp_path / "copy"))


@pytest.mark.parametrize("loss", [pytest.param("hybrid", marks=pytest.mark.slow), "vlb"])
def test_improved_ddpm_trains(tmp_path, loss):
    flags = micro.flags(
        tmp_path, f"config.base.loss.weight={40 if loss == 'vlb' else 0.04}", config=f"iddpm_cifar10:{loss},tiny"
    )
    assert main.run(flags) == 0
    rows = reporting.read_metrics(tmp_path / "base" / "metrics.jsonl")
    assert all(np.isfinite(row["vb"]) for row in rows)


def test_accumulation_and_fsdp_from_the_command_line(trained, tmp_path):
    assert main.run(micro.flags(tmp_path, "config.base.train.accumulate=2", "--config.parallel=fsdp")) == 0
    # another order of summation, and Adam's first steps only look at signs: close, not equal
    chex.assert_trees_all_close(ema(trained)[1], ema(tmp_path)[1], atol=1e-4)


BAD = [
    (["--config.base.net.widht=64"], "unknown field config.base.net.widht; did you mean"),
    (["--config.base.train.batch_size=10"], "global batch 10 is not divisible by 4 devices"),
    (["--config.base.train.learning_rate=nan"], "config.base.train.learning_rate must be"),
    (["--config.base.train.num_train_steps=-3"], "config.base.train.num_train_steps must be"),
    (["--config.base.steps=ddim39"], "ddim39"),
    (["--config.base.data=digts"], "did you mean digits"),
    (["--config.base.data=folder", "--config.base.data.path=/nowhere"], "/nowhere"),
    (["--config.base.conditions.label.num_classes=3"], "config.base.data: the data have 10 classes"),
    (["--mode=trian"], "did you mean train"),
    (["--stage=up"], "unknown --stage=up"),
    (["--coordinator=localhost:1", "--processes=2"], "cannot join the other processes"),
    (["--sede=3"], "unknown argument --sede=3"),
    (["--config=quikstart"], "quickstart"),
    (["--config=quickstart:hug"], "tiny"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, capfd, flags, message):
    assert main.run([*micro.flags(tmp_path / "run"), *flags]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("diffax: error: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists() and not out


def test_without_a_config(tmp_path, capfd):
    assert main.run([]) == 2
    assert main.run(["--mode=sample", f"--workdir={tmp_path}"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "no config" in lines[0] and "no trained model" in lines[1]


def test_a_workdir_of_another_config_is_refused_and_kept(trained, capfd):
    before = (trained / "base" / "config.json").read_bytes(), ema(trained)[0]
    assert main.run(micro.flags(trained, "config.base.net.heads=1")) == 2
    err = capfd.readouterr().err
    assert "checkpoint was trained with" in err and "net.heads=2, config says 1" in err
    assert ((trained / "base" / "config.json").read_bytes(), ema(trained)[0]) == before


def test_sampling_with_another_network_is_refused(trained, capfd):
    assert main.run([*micro.flags(trained, "config.base.net.channels=16"), "--mode=sample"]) == 2
    assert "net.channels=8, config says 16" in capfd.readouterr().err


def test_a_stage_in_use_is_refused_and_another_is_not(trained, capfd):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from diffax.training import checkpoints\n"
            f"with checkpoints.lock({str(trained / 'base')!r}): print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert main.run(micro.flags(trained)) == 2
        assert f"pid {holder.pid}" in capfd.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    with checkpoints.lock(trained / "up"):
        assert main.run(micro.flags(trained)) == 0


def test_help_lists_modes_configs_and_variants(capsys):
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("evaluate", "configs/ddpm_cifar10.py", "configs/iddpm_imagenet_64.py", ":tiny", "--config.base.train"):
        assert word in out


def test_help_describes_components(capsys):
    assert main.run(["--help=loss"]) == 0 and "loss hybrid: L_hybrid" in capsys.readouterr().out
    assert main.run(["--help=network.unet"]) == 0 and "  channels = 128" in capsys.readouterr().out
    for flag, message in (("--help=los", "did you mean loss"), ("--help=loss.hybird", "did you mean hybrid")):
        assert main.run([flag]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("python", [["-m"], ["-P", "-m"]])
def test_import_paths_begin_in_the_current_folder(tmp_path, python):
    (tmp_path / "my_lab.py").write_text('def mine(*, gamma: float = 5.0):\n    """My loss."""\n')
    command = [sys.executable, *python, "diffax.main", "--help=loss.my_lab:mine"]
    path = os.pathsep.join([str(pathlib.Path(diffax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.startswith("loss my_lab:mine: My loss.") and "gamma = 5.0" in done.stdout, done.stderr


def test_debug_shows_the_traceback(tmp_path, capfd):
    assert main.run(["--debug", "--config=nothing"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_no_tensorflow_or_torch_at_run_time():
    code = (
        "import sys, diffax.main; bad = {'tensorflow', 'torch'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
