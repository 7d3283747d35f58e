"""The benchmark by hand numbers, and the command end to end on a micro config beside a peer of known speed."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import config as configs
from diffax.errors import RunError
from diffax.models.system import System
from diffax.tools import benchmark
from diffax.tools.benchmark import children, programs, rows, timing
from diffax.training import loop
from tests import micro

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers():
    return load("peers")


@pytest.fixture(scope="module")
def scaling(peers):
    return load("scaling")


# ---- counting and timing ----


def test_flops_of_products_convolutions_and_loops():
    def fn(x, kernel, picture, square):
        return x @ kernel, jax.lax.scan(lambda c, _: (c @ square, None), x, length=5), picture

    x, kernel, square = jnp.ones((3, 7)), jnp.ones((7, 11)), jnp.ones((7, 7))
    assert timing.count_flops(fn, x, kernel, x, square) == 2 * 3 * 7 * 11 + 5 * 2 * 3 * 7 * 7

    def conv(picture, kernel):
        return jax.lax.conv_general_dilated(picture, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    out = 2 * 4 * 4 * 5  # [2, 4, 4, 5] of [2, 8, 8, 3]
    found = timing.count_flops(jax.jit(jax.checkpoint(conv)), jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)))
    assert found == 2 * out * 3 * 3 * 3


def test_flops_of_a_published_network():
    """As many as were counted on the published PyTorch code."""
    config = configs.to_dict(configs.load("adm_imagenet_64"))
    assert benchmark.forward_flops(config, "base") / 1e9 == pytest.approx(219.4, rel=0.01)


def test_programs_take_turns():
    calls = []

    def runner(name, seconds):
        def run(times):
            calls.append((name, times))
            return seconds * times

        return run

    found = benchmark.take_turns({"a": runner("a", 0.5), "b": runner("b", 30.0)}, rounds=3, least=1.2)
    assert found == {"a": [0.5] * 3, "b": [30.0] * 3}
    assert calls[:3] == [("a", 1), ("a", 1), ("b", 1)], "the first run of each is not counted"
    assert calls[3:] == [("a", 3), ("b", 1), ("b", 1), ("a", 3), ("a", 3), ("b", 1)]


def test_ratio_is_that_of_each_round():
    # while the machine was ten times slower, both were
    assert benchmark.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2
    row = rows.as_row("x", {"diffax": [1.0, 2.0, 4.0], "peer": [3.0, 6.0, 12.0]}, {"pictures": 8, "flops": 10}, 20)
    assert row["diffax"] == 2 and row["pictures/s"] == 4 and row["of peak"] == "25%"
    assert row["peer"] == 6 and row["peer / diffax"] == 3


def test_peak_memory_forgets():
    if not pathlib.Path("/proc/self/status").exists():
        assert timing.peak_memory() is None
        return
    timing.reset_peak()
    before, size = timing.peak_memory(), 200 * 2**20
    held = np.ones(size, np.uint8)
    grown = timing.peak_memory()
    assert grown > before + 0.9 * size
    del held
    assert timing.peak_memory() == pytest.approx(grown, rel=0.01), "the kernel counts in batches of pages"
    timing.reset_peak()
    assert timing.peak_memory() < grown - 0.5 * size


# ---- the command ----

PEER = """
import json, sys
sys.path.insert(0, {folder!r})
import peers
def prepare(program):
    print("noise on stdout")
    if program == "forward":
        return float, {{"missing": True}}
    return lambda times: 2.0 * times, {{"parameters": 7, "versions": {{"torch": "0"}}}}
peers.gpu_bytes = lambda: 2**30
peers.serve(prepare, sys.stdin, peers.own_stdout())
"""


def flags(tmp_path, *more):
    return [f"--output={tmp_path}", "--config=quickstart", *(f"--{o}" for o in micro.OVERRIDES), *more]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The train step of the micro config."""
    _, config, name = benchmark.read_flags(flags(tmp_path_factory.mktemp("unused")))
    return programs.prepare_train(config, name)


@pytest.fixture(scope="module")
def report(prepared, tmp_path_factory):
    """One run of the command beside a peer that takes two seconds for everything."""
    folder, out = tmp_path_factory.mktemp("benchmark"), io.StringIO()
    command = [sys.executable, "-c", PEER.format(folder=str(FOLDER))]
    chosen = "--programs=train,forward,ddim3,data,checkpoint,startup"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(children, "peer_command", lambda args, peer, section: command)
        patch.setattr(programs, "prepare_train", lambda config, name: prepared)
        patch.setattr(timing, "peak_flops", lambda: (1e12, "by hand"))
        patch.setattr(children, "start_once", lambda argv, cache: {"total": 8.0, "compile": 3.0})
        assert benchmark.run(flags(folder, chosen, "--rounds=2", "--seconds=0", "--peer=diffusers")) == 0
    return json.loads((folder / "benchmark.json").read_text()), out.getvalue(), folder


def test_report_holds_every_program(report):
    found, text, folder = report
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == [
        "train step, s",
        "peak memory of training, MiB",
        "compile of the train step, s",
        "forward, s",
        "DDIM, 3 steps, s",
        "data: a batch of JPEGs, s",
        "data, times what the train step takes in",
        "checkpoint: training stops for, s",
        "checkpoint: until on disk, s",
        "checkpoint: stops for, train steps",
        "start to the end of the first step, cold cache, s",
        "of which compiling the train step, cold cache, s",
        "start to the end of the first step, warm cache, s",
        "of which compiling the train step, warm cache, s",
    ]
    assert all(row["diffax"] > 0 for row in rows.values())
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines() if line.startswith("|"))
    assert (folder / "benchmark.md").read_text().strip() in text and "jaxlib" in text and "torch 0" in text
    assert found["seconds"]["train step, s"]["diffusers"] == [2.0, 2.0]
    assert found["peers"]["diffusers"]["parameters"] == 7


def test_report_compares_with_the_peer(report):
    rows = {row["what"]: row for row in report[0]["rows"]}
    step, sample = rows["train step, s"], rows["DDIM, 3 steps, s"]
    for row in (step, sample):
        ours = report[0]["seconds"][row["what"]]["diffax"]
        assert row["diffusers"] == 2 and row["diffusers / diffax"] == pytest.approx(np.median([2 / s for s in ours]))
        assert row["diffax"] == pytest.approx(np.median(ours)) and row["pictures/s"] == pytest.approx(8 / row["diffax"])
    for alone in ("forward, s", "data: a batch of JPEGs, s"):
        assert "diffusers" not in rows[alone]
    memory = rows["peak memory of training, MiB"]
    assert memory["diffusers"] == 1024 and memory["diffusers / diffax"] == pytest.approx(1024 / memory["diffax"])
    stops, wrote = (rows[f"checkpoint: {what}, s"]["diffax"] for what in ("training stops for", "until on disk"))
    assert 0 < stops and 0 < wrote
    assert rows["checkpoint: stops for, train steps"]["diffax"] == pytest.approx(stops / step["diffax"])
    taken = rows["data: a batch of JPEGs, s"]["pictures/s"] * step["diffax"] / 8
    assert rows["data, times what the train step takes in"]["diffax"] == pytest.approx(taken)


def test_first_step_says_how_long_it_took(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "prepare_train", lambda config, name: prepared)
    assert benchmark.run(flags(tmp_path, f"--first-step={time.time() - 100}")) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["total"] > 100 and found["compile"] == prepared.facts["compile"] > 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--programs=trian"], "unknown program 'trian'; did you mean train?"),
        (["--programs=ddim0"], "unknown program 'ddim0'"),
        (["--peer=difusers"], "unknown peer 'difusers'; did you mean diffusers?"),
        (["--rounds=0"], "--rounds=0"),
        (["--stage=up"], "no stage 'up' makes pictures; --stage; use base"),
        (["--round=3"], "unknown argument --round=3"),
        (["--peer=guided-diffusion", "--peer-path=/nowhere"], "no guided_diffusion/unet.py in it"),
        (["--peer=diffusers", "--peer-python=/nowhere/python"], "there is no such python; --peer-python=/nowhere"),
        (["--peer=diffusers"], "No module named 'torch'; --peer-python"),  # this python has none
    ],
)
def test_bad_input_gets_one_line(tmp_path, capsys, more, message):
    assert benchmark.run(flags(tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_default_configs_are_valid():
    config = programs.benchmark_config(["config.base.train.batch_size=16"])
    configs.check(config)
    model = System(config).model("base")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert loop.count_parameters(params) / 1e6 == pytest.approx(7.7, abs=0.05)
    assert benchmark.forward_flops(configs.to_dict(config), "base") / 1e9 == pytest.approx(3.6, abs=0.05)


def test_default_config_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = programs.benchmark_config()
    configs.check(config, device_count=4)
    assert config.base.net.dtype == "bfloat16" and config.base.train.batch_size == 4 * 8


# ---- processes ----


def test_a_process_that_ends_is_an_error():
    code = "import sys; input(); sys.exit('first\\nno such network')"
    with contextlib.closing(benchmark.Process([sys.executable, "-c", code])) as process:
        with pytest.raises(RunError, match="^no such network$"):
            process.ask(prepare="train")


def test_peer_is_given_the_network(tmp_path):
    args, config, name = benchmark.read_flags(flags(tmp_path, "--peer-python=python3", "--channels-last"))
    python, script, peer, network = children.peer_command(args, "diffusers", config[name])
    assert python == "python3" and pathlib.Path(script) == FOLDER / "peers.py" and peer == "--peer=diffusers"
    net = json.loads(network.removeprefix("--network="))
    assert net["channels"] == 8 and net["shape"] == [8, 8, 1] and net["num_classes"] == 10 and net["channels_last"]


# ---- scaling ----


def test_bytes_of_collectives(scaling):
    text = """
      %all-reduce.7 = (f32[8,4]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1}}
      %all-gather.1 = bf16[16,3]{1,0} all-gather(%c), dimensions={0}
      %all-reduce-start.2 = f32[5]{0} all-reduce-start(%d), to_apply=%add
      %all-reduce-done.2 = f32[5]{0} all-reduce-done(%all-reduce-start.2)
      %add.3 = f32[100]{0} add(%all-reduce.7, %e)
    """
    assert scaling.collective_bytes(text) == {"all-reduce": 4 * (32 + 1 + 5), "all-gather": 2 * 48}


def test_a_slice_by_hand(scaling):
    one = scaling.slice_row(1, compute=0.1, sent=1e9, bandwidth=1e11, pictures=8, overhead=0.05)
    assert one["step, ms"] == pytest.approx(100) and one["efficiency"] == "100%"
    many = scaling.slice_row(4, compute=0.1, sent=1e9, bandwidth=1e11, pictures=8, overhead=0.05)
    # a ring: each chip sends 2 (N - 1) / N of the bytes
    assert many["all-reduce, ms"] == pytest.approx(15) and many["step, ms"] == pytest.approx(120)
    assert many["pictures/s"] == pytest.approx(4 * 8 / 0.12)


def test_overheads_by_hand(scaling):
    found = {(1, 1, 2): [1.0, 1.0], (1, 1, 4): [1.6, 1.6], (2, 1, 4): [2.2, 2.2], (2, 2, 4): [2.42, 2.42]}
    rows = {(row["kind"], row["devices"], row["processes"]): row for row in scaling.overheads(found, batch=2, most=2)}
    assert rows["weak", 2, 1]["beyond the cores"] == "10.0%" and rows["weak", 2, 1]["equal work"] == "37.5%"
    assert rows["strong", 2, 1]["equal work"] == "37.5%"
    assert rows["weak", 2, 2]["than one process"] == "10.0%"


@pytest.mark.slow
def test_two_processes_share_a_step(scaling, tmp_path):
    """Real ones: each makes its own part of the batch, and they wait for each other."""
    with contextlib.ExitStack() as stack:
        core = min(os.sched_getaffinity(0))
        commands = scaling.commands((2, 2, 2), core, flags(tmp_path))
        both = [stack.enter_context(contextlib.closing(benchmark.Process(command))) for command in commands]

        def ask(**request):
            for process in both:
                process.send(**request)
            return [process.answer() for process in both]

        first, second = ask(prepare="train")
        assert first["sent"] == second["sent"] == {"all-reduce": pytest.approx(4 * first["parameters"], rel=0.01)}
        assert all(answer["seconds"] > 0 for answer in ask(times=2))


def test_every_gradient_is_sent_once(scaling, prepared):
    """Under pmap devices exchange the gradients, of which a few are equal, and a few numbers more."""
    sent = scaling.collective_bytes(prepared.facts["step"].as_text())["all-reduce"]
    assert sent == pytest.approx(4 * prepared.facts["parameters"], rel=0.01)


def test_names_of_samplers():
    assert rows.label("dpm10") == "DPM-Solver++, 10 steps, s"
