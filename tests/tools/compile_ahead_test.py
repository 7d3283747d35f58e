"""What compiled programs are said to need: the arithmetic by hand, and the command on the devices of the tests."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from diffax import config as configs
from diffax import errors, main
from diffax.config import spec
from diffax.tools import compile_ahead
from diffax.tools.compile_ahead import lowering, reports, roofline
from diffax.training import parallel, slices
from tests.micro import flags
from tests.models import micro, systems

OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used {} of {} hbm. "
    "Exceeded hbm capacity by 1.00M."
)


def small_config(**net):
    """Pictures of 8 x 8 pixels, as plain data."""
    wide = dict(channel_mult=(1, 2), attention=(2,), groups=4)
    label = micro.conditions(label=dict(num_classes=3))
    config = micro.config(base=micro.section(net=micro.unet(**wide | net), conditions=label, steps="5"))
    config.sample.batch_size = 8
    configs.check(config)
    return configs.to_dict(config)


def test_roofline_is_the_slower_of_the_two():
    """5.13 TFLOP and 74.5 GB on a v5e: 26 ms of arithmetic, 91 ms of traffic."""
    v5e = roofline.CHIPS["TPU v5 lite"]
    seconds, bound = roofline.roofline(5.13e12, 74.5e9, v5e)
    assert bound == "memory traffic" and seconds == pytest.approx(0.090965, rel=1e-4)
    seconds, bound = roofline.roofline(5.13e12, 7.45e9, v5e)
    assert bound == "arithmetic" and seconds == pytest.approx(0.026041, rel=1e-4)


@pytest.mark.parametrize(
    "name, kind, dims",
    [
        ("v5e:4x4", "v5e", (4, 4)),
        ("v6e:16x16", "v6e", (16, 16)),
        ("v5p:2x2x4", "v5p", (2, 2, 4)),
        ("v4:2x2x1", "v4", (2, 2, 1)),
    ],
)
def test_topologies_are_read(name, kind, dims):
    assert slices.parse_topology(name) == (kind, dims)


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:4x-4", "v9:4x4", "4x4", "v5e:4x4 "]
)
def test_other_topologies_are_refused(name):
    with pytest.raises(errors.UserError, match="--topology; kinds are v4, v5e, v5p, v6e, and it is written as"):
        slices.parse_topology(name)


GIB = 2**30
# 5 GiB of state and 1 of gradients on 4 devices of 16, in one microbatch of 8
NEED = roofline.Need(5 * GIB, GIB, GIB / 2, 20 * GIB, 16 * GIB, examples=8, accumulate=1, devices=4)


def test_remedies_are_those_that_suffice_alone():
    """With gradients of two microbatches kept: 5 + 2 + 20 / 4 = 12 fits, 5 + 2 + 20 / 2 = 17 does not."""
    found = roofline.remedies(NEED, {"remat": 0.25, "bfloat16": 0.5, "fsdp": 1.0})
    # remat 5 + 1 + 5; bfloat16 5 + 1 + 10 just fits; fsdp 6 / 4 + 2 + 20 does not
    assert found == [{"remat": True}, {"bfloat16": True}, {"accumulate": 4}]


def test_remedies_are_combined_where_none_suffices():
    need = NEED._replace(state=20 * GIB, activations=24 * GIB)
    # the state alone is too large, so all have fsdp: (20 + 1) / 4 = 5.25, or 5.5 with gradients kept, and while it
    # computes 2 more, or 1 where blocks gather theirs again; with remat 6, with four microbatches 6
    found = roofline.remedies(need, {"remat": 0.25, "bfloat16": 0.5, "fsdp": 1.0})
    assert found == [{"remat": True, "fsdp": True}, {"fsdp": True, "accumulate": 4}]
    assert roofline.remedies(need._replace(limit=5 * GIB), {"remat": 0.25, "fsdp": 1.0}) == []
    # 5.25 + 1 + 6: with the whole parameters and their gradient, 2, it would not fit
    need = need._replace(limit=12.5 * GIB, examples=1)
    assert roofline.remedies(need, {"remat": 0.25, "fsdp": 1.0}) == [{"remat": True, "fsdp": True}]
    # the same where it has remat already
    assert roofline.remedies(need._replace(activations=6 * GIB), {"fsdp": 1.0}) == [{"fsdp": True}]


def test_remedies_of_a_sampler():
    """12 GiB of parameters and 8 of the rest, 4 samples on each of 8 devices: 14 with one each, 9.5 sharded, or 3.5."""
    need = {"held": 12 * GIB, "rest": 8 * GIB, "samples": 4, "devices": 8, "hosts": 1, "sharded": False}
    fewer, sharded = "--config.sample.batch_size=8", "--config.parallel=fsdp"
    for limit, found in [(16, [fewer, sharded]), (10, [sharded]), (4, [f"{sharded} {fewer}"]), (3, [])]:
        assert roofline.sample_remedies(**need, limit=limit * GIB) == found
    need |= {"held": 1.5 * GIB, "sharded": True}
    assert roofline.sample_remedies(**need, limit=4 * GIB) == [fewer]
    assert roofline.sample_remedies(**{**need, "samples": 1}, limit=9 * GIB) == []
    one = {"held": 2.0, "rest": 2.0, "samples": 1, "limit": 3.0, "sharded": False}
    assert roofline.sample_remedies(**one, devices=1, hosts=1) == []
    assert roofline.sample_remedies(**one, devices=8, hosts=4) == [sharded], "the two of a host have a half each"
    assert roofline.sample_remedies(**one, devices=8, hosts=8) == []


def test_the_largest_block():
    params = {
        "unet": {"a": {"w": jnp.zeros((2, 3))}, "b": {"w": jnp.zeros(5), "b": jnp.zeros(2)}},
        "text": {"c": jnp.zeros(6)},
    }
    assert roofline.largest_block(params) == 4 * 7
    params = {"block_0": {"conv": {"w": jnp.zeros(3)}, "norm": {"w": jnp.zeros(1)}}, "out": {"w": jnp.zeros(3)}}
    assert roofline.largest_block(params) == 4 * 4, "of a network that is no part of another"


def test_remedies_go_on_from_the_microbatches_that_there_are():
    need = NEED._replace(accumulate=2, activations=18 * GIB)
    assert roofline.remedies(need, {}) == [{"accumulate": 4}]
    assert roofline.as_flags("base", {"fsdp": True, "accumulate": 4}) == (
        "--config.parallel=fsdp --config.base.train.accumulate=4"
    )


def test_what_the_compiler_says_is_read():
    """Both of libtpu's messages; anything else is no matter of memory."""
    assert reports.needed_bytes(OUT_OF_MEMORY.format("23.50G", "15.75G")) == {
        "total": 23.5 * GIB,
        "limit": 15.75 * GIB,
    }
    other = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (44.73G) exceeds "
        "available HBM (15.75G)."
    )
    assert reports.needed_bytes(other) == {"temporary": 44.73 * GIB, "limit": 15.75 * GIB}
    assert reports.needed_bytes("INVALID_ARGUMENT: no") is None


def test_bytes_of_a_device():
    where = parallel.layout("fsdp")
    tree = {"a": jax.ShapeDtypeStruct((8, 3), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    assert roofline.tree_bytes(tree) == 8 * 3 * 4 + 6
    assert (
        roofline.device_bytes(
            parallel.abstract(where, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree))
        )
        == 30
    )
    assert roofline.tree_bytes(jax.eval_shape(lambda: jax.random.key(0))) == 8


def test_changes_that_are_made_already_are_not_proposed():
    config = small_config(remat="blocks", dtype="bfloat16")
    assert reports.open_savings(config, "base") == {"fsdp": 1.0}


@pytest.mark.parametrize("lineage", systems.EVERY)
def test_losses_take_the_example_batches(lineage):
    """Of every kind of model; traced only."""
    system = systems.EVERY[lineage]()
    for name in system.trained:
        model = system.model(name)
        params = jax.eval_shape(lambda model=model: model.init(jax.random.key(0)))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

        def loss(params, batch, keys, model=model):
            return model.loss(params, model.init_extra(), batch, keys, jnp.arange(2), 2)[0]

        assert jax.eval_shape(loss, params, lowering.training_batch(model, 2), keys).shape == (2,)
        assert lowering.saved_bytes(configs.to_dict(system.config), name) > 0


@pytest.mark.parametrize("lineage", systems.EVERY)
def test_samplers_take_the_example_conditions(lineage):
    """Each model alone, with its conditions, what is measured on the data, and the parameters of what guides it."""
    system = systems.EVERY[lineage]()
    config = configs.to_dict(system.config)
    config["sample"]["batch_size"] = 6
    for model in system.generators:
        lowered, n, _ = lowering.lower_sample(config, model.name, None)
        assert n == 8, "filled up to two on each device"
        (out,) = jax.tree.leaves(lowered.out_info)
        assert out.shape == (4, 2, *model.shape)


def test_fsdp_moves_parameters_and_gradients_and_no_part_of_a_picture():
    lowered, _ = lowered_small()
    text = lowered.compile().as_text()
    assert "all-gather" in text and "collective-permute" not in text and "all-to-all" not in text


def lowered_small(**net):
    return lowering.lower_train({**small_config(**net), "parallel": "fsdp"}, "base", None)


def test_a_block_that_is_computed_again_gathers_its_parameters_again():
    """So that they need not be kept. A last bias alone is not gathered twice."""
    lowered, run = lowered_small()
    every = jax.tree.leaves_with_path(run.abstract.params)
    sharded = [p for p, leaf in every if not leaf.sharding.is_fully_replicated]
    inside = [path[-1].key for path in sharded if re.search("block|attention", path[1].key)]
    assert lowered.as_text().count("stablehlo.all_gather") == len(sharded)
    lowered, _ = lowered_small(remat="blocks")
    again = lowered.as_text().count("stablehlo.all_gather") - len(sharded)
    assert len(inside) > again >= sum("bias" not in name for name in inside) > 20


def in_and_out_of_loops(program: str) -> tuple[int, int]:
    """How often parameters are gathered in a compiled program, in its loops and before or after them."""
    counts = [part.count(" all-gather(") for part in program.split("\nENTRY")]
    return counts[0], counts[1]


def test_parameters_are_gathered_within_loops_and_not_before():
    """XLA:CPU would gather all that a loop does not change ahead of it, and a device would have them all at once."""
    config = {**small_config(), "parallel": "fsdp"}
    lowered, n, params = lowering.lower_sample(config, "base", None)
    assert n == 8 and not params["base"]["net"]["conv_in"]["kernel"].sharding.is_fully_replicated
    within, outside = in_and_out_of_loops(lowered.compile().as_text())
    assert within > 100 and outside == 0
    config["base"]["train"]["accumulate"] = 2
    lowered, _ = lowering.lower_train(config, "base", None)
    within, outside = in_and_out_of_loops(lowered.compile().as_text())
    assert within > 100 and outside < 10, "what belongs to each example is gathered in the end"


def test_flash_attention_is_divided_over_the_devices_of_fsdp():
    """A kernel of Pallas is none that XLA's partitioner can divide."""
    config = small_config(flash=True, attention=(1,))
    config = {**config, "parallel": "fsdp", "base": {**config["base"], "shape": (32, 32, 1)}}
    run = lowering.run_of(config, "base")
    batch = lowering.training_batch(lowering.System(config).model("base"), 8)
    traced = run.step.trace(run.abstract, parallel.abstract_batch(run.where, batch))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


# ---- the command ----------------------------------------------------------------------------------------------------


def compile_micro(workdir, *more):
    return main.run(flags(workdir, "--mode=compile", *more))


def written(workdir):
    return [json.loads(path.read_text()) for path in sorted((workdir / "ahead").glob("*.json"))]


def test_train_step_and_sampler_are_compiled_and_remembered(tmp_path, capsys, monkeypatch):
    assert compile_micro(tmp_path) == 0
    said = capsys.readouterr().out
    assert (
        "the train step of quickstart.base for 4 x cpu, pmap, batch 8" in said
        and "the sampler of quickstart.base" in said
    )
    sample, train_ = written(tmp_path)
    assert (train_["program"], sample["program"]) == ("train", "sample")
    for found in (train_, sample):
        assert found["fits"] is None and "seconds" not in found, "nobody says what a CPU can do"
        assert found["total"] == sum(found[k] for k in ("arguments", "outputs", "temporary", "code")) - found["aliased"]
        assert found["flops"] > 0 and found["accessed"] > 0
    batch = 2 * (8 * 8 + 1) * 4  # two pictures and labels on each device
    assert train_["arguments"] == pytest.approx(train_["state"] + batch, abs=64)
    assert train_["aliased"] == pytest.approx(train_["state"], rel=0.01), "the state is not updated in place"
    assert sample["loops"] == sample["steps"] == 5 and sample["batch_size"] == 8

    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
    assert compile_micro(tmp_path) == 0
    assert capsys.readouterr().out.count("delete it to compile again") == 2
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: (_ for _ in ()).throw(errors.RunError("asked again")))
    assert compile_micro(tmp_path, "--effort=0") == 1 and "asked again" in capsys.readouterr().err
    lines = (tmp_path / "ahead" / "report.md").read_text().splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_a_program_that_does_not_fit_gets_what_would_make_it_fit(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY.format("2.00M", "1.50M"))

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert compile_micro(tmp_path, "--program=train") == 0
    said = capsys.readouterr().out
    assert "does not fit: 2.0 MiB of 1.5 MiB on each device" in said
    assert "--config.base.net.remat=blocks" in said
    (found,) = written(tmp_path)
    # of what the gradient keeps, by tracing it: inputs of blocks alone, and the same in half as many bytes
    shares = found["savings"]
    assert 0.05 < shares["remat"] < 0.5 and 0.4 < shares["bfloat16"] < 1 and shares["fsdp"] == 1
    assert found["fits"] is False and "**does not fit**" in (tmp_path / "ahead" / "report.md").read_text()


ABOUT = {"program": "train", "config": "c", "section": "base", "kind": "toy", "count": 2, "platform": "gpu"}
ABOUT |= {"effort": -1.0}


def test_what_else_the_compiler_says_ends_the_run():
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(
        errors.RunError, match="XLA cannot compile the train step of c.base for 2 x toy: INTERNAL: no; "
    ):
        reports._compiled(Lowered(), ABOUT, held=0, loops=1)


def test_a_cost_is_given_with_a_known_chip(monkeypatch):
    """10 GFLOP and 1 GB in each of 3 microbatches, 100 steps of 30 pictures, on a chip of 10 TFLOP/s and 1 TB/s."""
    monkeypatch.setitem(roofline.CHIPS, "toy", roofline.Chip(GIB, 1e13, 1e12))

    class Compiled:
        def memory_analysis(self):
            names = ("argument", "output", "alias", "temp", "generated_code")
            sizes = dict(zip(names, (400, 300, 200, 50, 5), strict=True))
            return type("Stats", (), {f"{name}_size_in_bytes": size for name, size in sizes.items()})

        def cost_analysis(self):
            return {"flops": 1e10, "bytes accessed": 1e9, "optimal_seconds": -754.0}

    class Lowered:
        def compile(self, options):
            assert options == {"exec_time_optimization_effort": -1.0}
            return Compiled()

    found = reports._compiled(Lowered(), ABOUT, held=0, loops=3, outside=0.2e9)
    assert found["total"] == 555 and found["fits"] is True
    assert found["accessed"] == pytest.approx(0.2e9 + 3 * 0.8e9), "what is outside of the loop is not multiplied"
    assert found["seconds"] == pytest.approx(3e-3) and found["bound"] == "arithmetic"
    more = {"parallel": "pmap", "dtype": "bfloat16", "remat": "none", "flash": True, "topology": "", "batch_size": 30}
    more |= {"steps": 100}
    row = ABOUT | found | more | {"accumulate": 3, "images_per_second": 1e4, "days": 3e-3 * 100 / 86400}
    said = compile_ahead.describe(row)
    assert (
        "batch 30 in 3 microbatches, bfloat16, remat none, flash attention" in said
        and "30.0 GFLOP and 2.60 GB accessed" in said
    )
    assert "fewer than 8 pictures" not in said
    assert "fewer than 8 pictures, here 5 in a device's microbatch" in compile_ahead.describe(row | {"few": 5})
    assert "3.0 ms, bound by arithmetic, 100 % of the peak; 10,000.0 images/s" in said and "-754" not in said
    assert "| pmap, bfloat16, flash, batch 30 / 3 |" in compile_ahead.table([row])
    assert "| 3 ms, arithmetic | 100% |  | 10,000 | 0.0 |" in compile_ahead.table([row])
    # 1,000 parameters, of 4 bytes, of which each device of 2 sends the other half, twice
    monkeypatch.setitem(roofline.CHIPS, "toy", roofline.Chip(GIB, 1e13, 1e12, 1e6))
    row |= {"parameters": 1000}
    assert "| 3 ms, arithmetic | 100% | 4 ms | 10,000 | 0.0 |" in compile_ahead.table([row])
    assert "communication between devices, at least, by the vendor's figure: 4.0 ms" in compile_ahead.describe(row)


def test_bytes_that_a_device_sends():
    """Of 3 of 4 parts of 40 bytes: a sum is brought together and sent, 2; under fsdp 2 or 3 for each microbatch."""
    of = functools.partial(roofline.communication, 10, devices=4, dtype="float32")
    assert of(mode="pmap", remat=True, accumulate=8) == of(mode="jit", remat=False, accumulate=1) == 30 * 2
    assert of(mode="fsdp", remat=False, accumulate=1) == 30 * 2
    assert of(mode="fsdp", remat=True, accumulate=4) == 30 * 3 * 4
    assert of(mode="fsdp", remat=True, accumulate=4, dtype="bfloat16") == (30 + 15 * 2) * 4, "gathered are halves"
    assert of(mode="pmap", remat=True, accumulate=4, dtype="bfloat16") == 30 * 2, "gradients are not"
    assert roofline.communication(10, devices=1, mode="pmap", dtype="float32", remat=False, accumulate=1) == 0


@pytest.mark.parametrize(
    "net, pictures, platform, few",
    [
        ("unet", 7, "tpu", 7),
        ("classifier", 1, "tpu", 1),
        ("unet", 8, "tpu", 0),
        ("unet", 7, "gpu", 0),
        ("clip", 7, "tpu", 0),
        ("prior", 7, "tpu", 0),
    ],
)
def test_few_pictures_matter_to_a_tpu_that_convolves_them(net, pictures, platform, few):
    assert reports.few_pictures(spec("network", net), pictures, platform) == few


def test_what_a_loop_holds_is_counted_once():
    """The reason for multiplying by its turns."""
    flops = []
    for turns in (2, 16):

        def repeat(x, turns=turns):
            return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=turns)[0]

        compiled = jax.jit(repeat).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
        flops.append(reports.measure(compiled)["flops"])
    assert flops == pytest.approx([2 * 64**3] * 2, rel=0.01)


@pytest.mark.parametrize(
    "error, answer",
    [
        ("JAX TPU support not installed; cannot generate TPU topology.", "pip install 'diffax[tpu]'"),
        (
            "ABORTED: error accessing libtpu multi-process lockfile. Run rm /tmp/lock",
            "another program uses libtpu",
        ),
    ],
)
def test_without_libtpu_one_line_says_so(tmp_path, capsys, monkeypatch, error, answer):
    def missing(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(slices.topologies, "get_topology_desc", missing)
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "1")
    assert compile_micro(tmp_path, "--topology=v5e:4x4") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "libtpu" in said and answer in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--topology=v5e:4x4x4"], "there is no TPU slice 'v5e:4x4x4'"),
        (["--program=steps"], "unknown --program=steps"),
        (["--effort=2"], "--effort=2.0 is not from -1 to 1"),
        (["--topology=v5e:4x4", "--mode=train"], "pass --mode=compile with it"),
    ],
)
def test_bad_flags(tmp_path, capsys, monkeypatch, wrong, message):
    for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "1")
    assert compile_micro(tmp_path, *wrong) == 2
    assert message in capsys.readouterr().err
