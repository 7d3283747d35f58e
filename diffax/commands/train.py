"""Training the sections of a config, from the command line (--mode=train) and from Python (`diffax.train`)."""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import components
from diffax import config as configs
from diffax.commands import Job, on_the_way
from diffax.commands.embed import embedded_source
from diffax.commands.trained import are_trained, makes_pictures
from diffax.data.pipeline import Column, batches
from diffax.data.source import Source
from diffax.errors import UserError
from diffax.models.system import System
from diffax.sampling.load import default_name, with_embedding_statistics
from diffax.training import cpu_flags, loop, parallel, processes
from diffax.training import workdir as workdirs
from diffax.training.checkpoints import Checkpoints, lock

Batches = Callable[..., Iterator[dict[str, np.ndarray]]]
Path = str | os.PathLike[str]


def run(job: Job) -> None:
    """Trains what the config describes (or --stage) and ends with a grid of samples."""
    train(job.config, job.workdir, stage=job.args.stage, tensorboard=job.args.tensorboard)
    if makes_pictures(job.config) and are_trained(job.config, job.workdir, System(job.config).trained):
        from diffax.commands import sample

        sample.run(job)


def train(
    config: Path | Mapping[str, Any],
    workdir: Path | None = None,
    *,
    stage: str | None = None,
    on_step: loop.OnStep | None = None,
    on_sample: on_the_way.OnSample | None = None,
    tensorboard: bool = False,
) -> pathlib.Path:
    """Trains the models of a config into a workdir; goes on from the newest checkpoints that are there.

    Args:
      config: from `diffax.config`, or its name or path, such as 'quickstart:tiny'.
      workdir: where everything is written; by default runs/NAME.
      stage: train this section alone; by default all that are not trained elsewhere, one after the other.
      on_step: (step, averaged metrics) -> None, after every row of metrics.jsonl.
      on_sample: (step, sample_fn) -> None, every `train.sample_every` steps and at the end, with the averaged
        parameters of that moment; by default a grid of samples is drawn. It is not called for models that are not
        sampled, or whose sampling needs others that are not trained yet.
      tensorboard: also write TensorBoard events.

    Returns:
      The workdir, for `diffax.load`.

    Raises:
      UserError: the config, the data or what is in the workdir cannot be used; nothing was written.
      RunError: the disk is full, or too many steps in a row were not finite.
      Preempted: SIGTERM or SIGINT; the state is saved, and the same call goes on from there.
    """
    cpu_flags.set_cpu_flags()
    config, workdir = _resolved(config, workdir)
    configs.check(config, device_count=parallel.device_count(), process_count=processes.process_count())
    config = with_embedding_statistics(configs.to_dict(config), workdir)
    system = System(config)
    names = _chosen(system, stage)
    sources = {name: open_data(system, name, workdir) for name in names}
    for i, name in enumerate(names):
        _check(system, name, sources[name], workdir, before=names[:i])
    with contextlib.ExitStack() as held:
        for name in names:  # not the whole workdir: its sections may be trained at the same time
            held.enter_context(lock(workdir / name))
        for name in names:
            _train_section(system, name, sources[name], workdir, on_step, on_sample, tensorboard)
    return workdir


def _resolved(config: Path | Mapping[str, Any], workdir: Path | None) -> tuple[Any, pathlib.Path]:
    """(the config, complete; the folder)."""
    if isinstance(config, str | os.PathLike):
        return configs.load(config), pathlib.Path(workdir or pathlib.Path("runs") / default_name(config))
    whole = configs.from_dict(configs.to_dict(config))
    return whole, pathlib.Path(workdir or pathlib.Path("runs") / whole.name)


def _chosen(system: System, stage: str | None) -> list[str]:
    """The sections that are trained here."""
    elsewhere = {name: system.config[name]["workdir"] for name in system.trained if system.config[name]["workdir"]}
    if stage is None:
        return [name for name in system.trained if name not in elsewhere]
    if stage not in system.trained:
        there = ", ".join(system.trained)
        raise UserError(f"unknown stage {stage!r}{components.closest(stage, system.trained)}; stages are {there}")
    if stage in elsewhere:
        raise UserError(
            f"{stage} is trained elsewhere; config.{stage}.workdir={elsewhere[stage]}; leave that empty to train it"
        )
    return [stage]


# ---- data -----------------------------------------------------------------------------------------------------------


def open_data(system: System, name: str, workdir: pathlib.Path) -> Source:
    """The data that a section is trained on; with the image embeddings that lie in files, if it names any."""
    section, model = system.config[name], system.model(name)
    data = components.build(section["data"], "data", path=f"config.{name}.data")
    if not section["loader"]["embeddings"]:
        return data.open(model.data_shape)
    return embedded_source(system.config, model, workdir, lambda: data.open(model.data_shape))


def _check(system: System, name: str, source: Source, workdir: pathlib.Path, before: Sequence[str]) -> None:
    """Raises UserError if the data cannot feed a section, or what it is to start from or needs frozen is not there."""
    config, model = system.config, system.model(name)
    for condition in model.conditions.values():
        try:
            condition.check_data(source)
        except UserError as error:
            raise UserError(f"config.{name}.data: {error}") from error
    for column in model.columns().values():
        _ = getattr(column.convert, "loaded", None)  # a vocabulary that is missing is an error now, not at step 1
    for other in model.frozen:
        if other not in before:
            with Checkpoints(workdirs.folder_of(config, other, workdir) / "checkpoints", read_only=True) as found:
                found.read_meta()
    if config[name]["train"]["start_from"]:
        workdirs.starting_params(config, name, model)


def _batches(system: System, model: Any, source: Source, prepare: Callable) -> Batches:
    """(first step, shared=False) -> this process's batches from there on, as the model's loss reads them.

    With `shared` they are as small, but the same in every process.
    """
    section, columns = system.config[model.name], dict(model.columns())
    if "image_embedding" in source.keys:
        columns["image_embedding"] = Column("image_embedding")
    # Of embeddings that lie in files no picture is larger than the model needs.
    there = section["loader"]["embeddings"]
    shape = (1, 1, 3) if there and "image" not in model.batch_example() else model.shape if there else model.data_shape

    def read(first_step: int, *, shared: bool = False) -> Iterator[dict[str, np.ndarray]]:
        count = processes.process_count()
        found = batches(
            source,
            section["loader"],
            shape=shape,
            batch_size=section["train"]["batch_size"] // (count if shared else 1),
            seed=system.config["seed"],
            start_step=first_step,
            process_index=0 if shared else processes.process_index(),
            process_count=1 if shared else count,
            columns=columns,
            edit=model.edit,
        )
        return map(prepare, found)

    return read


def preparation(model: Any, frozen: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A batch of the data -> what the model's loss reads, and 'index', the numbers of the records.

    What frozen models make of a batch is computed over all devices of this process.
    """
    params, run = parallel.settled(dict(frozen)), parallel.map_batch(model.prepare) if frozen else None

    def prepare(batch: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: values for name, values in batch.items() if name != "index"}
        made = jax.tree.map(np.asarray, run(params, given)) if run else model.prepare({}, given)
        return {**made, "index": batch["index"]}

    return prepare


# ---- one section ----------------------------------------------------------------------------------------------------


def _train_section(system, name, source, workdir, on_step, on_sample, tensorboard) -> None:
    """Trains one section into its own folder of the workdir."""
    config, section, folder = system.config, system.config[name], workdir / name
    model = system.model(name)
    frozen = {other: workdirs.load_params(config, other, workdir)[0] for other in model.frozen}
    model = model.with_frozen(frozen)
    read = _batches(system, model, source, preparation(model, frozen))
    run_of = functools.partial(_run_of, config, name)
    training = run_of(model)
    with Checkpoints(folder / "checkpoints", read_only=True) as found:
        training.check(found)
        is_new = found.latest() is None
    if processes.is_primary():
        workdirs.write_config(config, name, workdir, source.class_names)
    if is_new and hasattr(model, "measure_before"):
        model = _measured_before(model, folder, read)
        training = run_of(model)
    start = functools.partial(workdirs.starting_params, config, name, model)
    loop.fit(
        training,
        folder,
        batches=read,
        on_step=on_step,
        on_sample=on_the_way.on_sample(config, model, workdir, source.class_names, on_sample),
        start_from=start if section["train"]["start_from"] else None,
        tensorboard=tensorboard,
        curve=model.curve,
    )
    _measure_after(config, model, workdir, read)


def _run_of(config: Mapping[str, Any], name: str, model: Any) -> loop.Run:
    section = config[name]
    return loop.Run(
        model,
        section["train"],
        seed=config["seed"],
        mode=config["parallel"],
        identity=components.identity(configs.section_fields(config, name), section, training=True),
        name=f"config.{name}",
        section=section,
    )


def _measured_before(model: Any, folder: pathlib.Path, read: Batches) -> Any:
    """The model with what it measures on the data before its training."""
    try:
        statistics = model.measure_before(read(0, shared=True))
    except ValueError as error:
        raise UserError(f"config.{model.name}: {error}") from error
    workdirs.write_statistics(folder, statistics)
    if processes.is_primary():
        print(f"{model.name}: {model.describe_statistics(statistics, read(0, shared=True))}", file=sys.stderr)
    return model.with_statistics(statistics)


def _measure_after(config: Mapping[str, Any], model: Any, workdir: pathlib.Path, read: Batches) -> None:
    """Measures on the data what a trained model needs, and keeps it; not again for the same checkpoint."""
    folder = workdir / model.name
    if not hasattr(model, "measure_after") or model.statistics_example() is None:
        return
    params, step = workdirs.load_params(config, model.name, workdir)
    if workdirs.statistics_step(folder) == step:
        return

    def over_devices(compute: Callable) -> Callable:
        return functools.partial(parallel.map_batch(compute), parallel.settled(params))

    found = model.measure_after(over_devices, read(0, shared=True))
    workdirs.write_statistics(folder, found, step)
