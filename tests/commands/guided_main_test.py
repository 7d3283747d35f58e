"""Guided models from the command line to `sample_fn`, on micro configs: classifier, classifier-free, sweeps, errors."""

import json
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffax
from diffax import main
from diffax.models import cascade
from diffax.sampling import sample_fn as sampling
from diffax.training import reporting
from tests import micro

CLASSIFIER = tuple(
    o.replace("config.base", "config.classifier")
    for o in micro.OVERRIDES
    if o.startswith("config.base") and not o.startswith(("config.base.steps", "config.base.train.ema"))
)
STEERED = (
    *CLASSIFIER,
    "config.base.conditions=none",
    "config.base.net.head_channels=0",
    "config.classifier.net.head_channels=0",
    "config.eval.guidance=0,2",
)
FREE = ("config.base.net.head_channels=0", "config.eval.guidance=1,3", "config.eval.samplers=ddim,dpm_solver_pp_2m")


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """An unconditional model and its classifier."""
    workdir = tmp_path_factory.mktemp("runs") / "steered"
    assert main.run(micro.flags(workdir, *STEERED, config="adm_imagenet_64:tiny")) == 0
    return workdir


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A model for classifier-free guidance."""
    workdir = tmp_path_factory.mktemp("runs") / "free"
    flags = [f for f in micro.flags(workdir, *FREE, config="cfg_imagenet_64:tiny") if "base.schedule" not in f]
    assert main.run(flags) == 0
    return workdir


def test_a_classifier_is_trained_beside_its_model(steered):
    rows = reporting.read_metrics(steered / "classifier" / "metrics.jsonl")
    assert {"loss", "top1", "top5", "top1_q0", "top1_q3"} <= set().union(*rows)
    assert all(row["top1"] <= row["top5"] for row in rows)
    (row,) = reporting.read_metrics(steered / "classifier" / "held_out.jsonl")
    assert row["step"] == 6 and 0 <= row["top1"] <= row["top5"] <= 1
    for picture in ("classifier/accuracy.png", "classifier/loss.png", "base/samples/00000006.png", "samples.png"):
        assert Image.open(steered / picture).size[0] > 100
    assert not (steered / "classifier" / "samples").exists()


@pytest.mark.parametrize("which", ["steered", pytest.param("free", marks=pytest.mark.slow)])
def test_evaluate_sweeps_guidance_samplers_and_steps(which, request, capsys):
    workdir = request.getfixturevalue(which)
    assert main.run([f"--workdir={workdir}", "--mode=evaluate", "--config.eval.steps=5,3"]) == 0
    rows = json.loads((workdir / "evaluation.json").read_text())["rows"]
    scales, samplers = ((0, 2), ("ddpm",)) if which == "steered" else ((1, 3), ("ddim", "dpm_solver_pp_2m"))
    seen = [(row["guidance"], row["sampler"], row["steps"]) for row in rows]
    assert seen == [(g, s, n) for g in scales for s in samplers for n in (5, 3)]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and row["diversity"] > 0
        assert ("bits_per_dim" in row) == (which == "steered"), "a continuous schedule has no bound"
    assert Image.open(workdir / "trade_off.png").size[0] > 1000
    out = capsys.readouterr()
    assert "| steps | sampler | guidance |" in out.out and (workdir / "evaluation.md").read_text() in out.out
    assert ("classifier on" in out.err) == (which == "steered")


@pytest.mark.parametrize("which", ["steered", "free"])
def test_labels_guidance_and_seeds_share_one_program(which, request, monkeypatch):
    sample_fn = diffax.load(request.getfixturevalue(which))
    assert [*sample_fn.arguments] == ["label"] and sample_fn.num_classes == 10
    made, pure_of = [], cascade.cascade

    def counted(*args, **kwargs):
        made.append(chex.assert_max_traces(pure_of(*args, **kwargs), n=1))
        return made[-1]

    monkeypatch.setattr(cascade, "cascade", counted)
    sampling._compiled.cache_clear()
    chex.clear_trace_counter()
    plain = sample_fn(0, label=[3, 7, 1])
    chex.assert_trees_all_close(sample_fn(0, label=[3, 7, 1], guidance=sample_fn.models[0].scale), plain, atol=1e-5)
    more = sample_fn(0, label=[3, 7, 1], guidance=[0.0, 20.0, -1.0])
    assert np.isfinite(more).all()
    chex.assert_trees_all_close(sample_fn(0, label=[3, 7, 1], guidance={"base": [0.0, 20.0, -1.0]}), more)
    # the first picture does not see the other scales and labels
    chex.assert_trees_all_close(sample_fn(0, label=[3, 5, 5], guidance=[0.0, 1.0, 1.0])[0], more[0], atol=1e-4)
    sample_fn(1, label=[0, 0, 0], guidance=2)
    assert len(made) == 1
    sampling._compiled.cache_clear()


@pytest.mark.parametrize("which", ["steered", "free"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label": 10}, "label 10 is out of range"),
        ({}, "condition 'label' is missing"),
        ({"label": 1, "guidance": float("nan")}, "guidance is nan"),
        ({"label": 1, "guidance": float("inf")}, "guidance is inf"),
        ({"label": 1, "guidance": "strong"}, "guidance is 'strong'"),
        ({"label": 1, "guidance": [[1, 2], [3]]}, "guidance is"),
        ({"label": [1, 2], "guidance": [1, 2, 3]}, "values of"),
        ({"label": 1, "guidance": {"up": 1.0}}, "no stage 'up' has guidance"),
        ({"label": 1, "n": 0}, "nothing to sample"),
        ({"label": 1, "steps": 0}, "steps"),
        ({"label": 1, "sampler": "dpm_solver"}, "did you mean dpm_solver_2m"),
    ],
)
def test_bad_arguments_get_one_line(which, request, kwargs, message):
    sample_fn = diffax.load(request.getfixturevalue(which))
    with pytest.raises(diffax.UserError, match=message) as caught:
        sample_fn(0, **kwargs)
    assert "\n" not in str(caught.value)


def test_the_pure_sampler_is_exported(free):
    sample_fn = diffax.load(free)
    pure = cascade.cascade(sample_fn.models)

    def sample(params, seeds, label, scale):
        return pure(params, jax.vmap(jax.random.key)(seeds), {"base": {"label": label}}, {"base": scale})

    given = (sample_fn.params, jnp.arange(3), jnp.array([1, 2, 3]), jnp.array([0.0, 1.0, 2.0]))
    exported = jax.export.export(jax.jit(sample))(*jax.tree.map(jnp.asarray, given))
    chex.assert_trees_all_close(exported.call(*given), jax.jit(sample)(*given), atol=1e-5)


def test_a_model_can_be_guided_by_a_classifier_of_another_workdir(steered, tmp_path, capsys):
    flags = [f for f in micro.flags(tmp_path / "other", *STEERED, config="adm_imagenet_64:tiny")]
    assert main.run([*flags, f"--config.classifier.workdir={steered}"]) == 0
    assert not (tmp_path / "other" / "classifier").exists() and (tmp_path / "other" / "samples.png").exists()
    chex.assert_trees_all_close(
        diffax.load(tmp_path / "other")(0, label=[1, 2]), diffax.load(steered)(0, label=[1, 2]), atol=1e-5
    )
    assert main.run([*flags, f"--config.classifier.workdir={steered}", "--stage=classifier"]) == 2
    assert "classifier is trained elsewhere" in capsys.readouterr().err


def test_stages_are_jobs_of_their_own(steered, tmp_path, capsys):
    """The classifier alone, then the model alone: the same as both in a row."""
    flags = micro.flags(tmp_path, *STEERED, config="adm_imagenet_64:tiny")
    assert main.run([*flags, "--stage=base"]) == 0
    assert not (tmp_path / "samples.png").exists()
    assert main.run([*flags, "--mode=sample"]) == 2
    assert "classifier" in capsys.readouterr().err
    assert main.run([*flags, "--stage=classifier"]) == 0
    assert (tmp_path / "samples.png").read_bytes() == (steered / "samples.png").read_bytes()


def test_loading_by_a_config_and_a_checkpoint(free, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = json.loads((free / "base" / "config.json").read_text())
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(f"""
        import json
        from diffax.config import from_dict
        VARIANTS = {{}}
        def get_config(variant=""):
            return from_dict(json.loads({json.dumps(json.dumps(saved))}))
        """)
    )
    want = diffax.load(free)(0, label=[1])
    chex.assert_trees_all_close(diffax.load("mine.py", checkpoint=free)(0, label=[1]), want)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(free)
    chex.assert_trees_all_close(diffax.load("mine.py")(0, label=[1]), want)
    for source, checkpoint, message in (
        ("cfg_imagenet_64:tiny", None, "no weights of cfg_imagenet_64:tiny"),
        ("cfg_imagenet_64:tiny", free, "checkpoint was trained with"),
        ("cfg_imagnet_64", None, "no trained model"),
        ("cfg_imagenet_64:tinny", None, "did you mean tiny"),
        ("mine.py", tmp_path, "mine|checkpoint"),
        ("adm_classifier_64:tiny", free, "no stage makes pictures"),
    ):
        with pytest.raises(diffax.UserError, match=message) as caught:
            diffax.load(source, checkpoint=checkpoint)
        assert "\n" not in str(caught.value)


def test_an_older_config_without_new_fields_still_loads():
    from diffax import config as configs

    whole = configs.to_dict(configs.load("quickstart"))
    old = {**whole, "base": {k: v for k, v in whole["base"].items() if k not in ("guidance", "workdir", "temperature")}}
    old["base"]["net"] = {k: v for k, v in whole["base"]["net"].items() if k != "dropout"}
    assert configs.to_dict(configs.from_dict(old)) == whole
