"""Loading a trained model: `sample_fn = diffax.load('runs/quickstart')`."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from diffax import config as configs
from diffax import weights
from diffax.errors import UserError
from diffax.models.system import System
from diffax.sampling.sample_fn import SampleFn
from diffax.training import cpu_flags
from diffax.training import workdir as workdirs

Path = str | os.PathLike[str]


def load(
    source: Path,
    *,
    checkpoint: Path | None = None,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> SampleFn:
    """Loads a trained model.

    Args:
      source: the workdir that training wrote to; or a config, `configs/NAME.py[:variant]` or `NAME[:variant]`, whose
        weights are in `checkpoint`; or a published file, such as '64x64_diffusion.pt' (see `diffax.weights`).
      checkpoint: the workdir that holds the weights, or a published file or a list of them; by default `source`, or
        runs/NAME of a config.
      config: use this config in place of the workdir's (of the same networks).
      step: a training step, by default the newest intact one.
      decay: which average of the parameters, by default the first configured one.
      raw: the parameters in training instead of an average.

    Returns:
      A `SampleFn`.

    Raises:
      UserError: there is no such workdir, config, checkpoint, step or average; or no stage that makes pictures.
    """
    cpu_flags.set_cpu_flags()
    files = next((f for f in (checkpoint, source) if f is not None and weights.is_weights(f)), None)
    if files is not None:
        found, params, steps = weights.load(files, source if files is checkpoint else None)
        return sample_fn_of(found, params, steps, str(files))
    config, workdir = _config_and_workdir(source, checkpoint, config)
    return load_workdir(config, workdir, step=step, decay=decay, raw=raw)


def load_workdir(
    config: Mapping[str, Any],
    workdir: Path,
    *,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> SampleFn:
    """The model of a config whose parameters are in a workdir; arguments as of `load`."""
    config = with_embedding_statistics(configs.to_dict(config), workdir)
    system, params, steps = System(configs.from_dict(config)), {}, {}
    _need_generators(system, workdir)
    for name in dict.fromkeys(name for model in system.generators for name in model.sections):
        how = {"step": step, "decay": decay, "raw": raw}
        params[name], steps[name] = workdirs.load_params(system.config, name, workdir, **how)
    return SampleFn(tuple(system.generators), params, config, steps)


def sample_fn_of(
    config: Mapping[str, Any], params: Mapping[str, Any], steps: Mapping[str, int], where: str
) -> SampleFn:
    """The model of a config and parameters that are at hand."""
    system = System(configs.from_dict(configs.to_dict(config)))
    _need_generators(system, where)
    return SampleFn(tuple(system.generators), params, configs.to_dict(config), steps)


def _need_generators(system: System, where: Path) -> None:
    if not system.generators:
        raise UserError(f"no stage makes pictures in {where}: it holds a classifier; load the model that it guides")


def _config_and_workdir(source: Path, checkpoint: Path | None, config: Any) -> tuple[Any, Path]:
    if config is not None:
        return config, checkpoint or source
    if pathlib.Path(source).is_dir() and workdirs.has_config(source):
        return workdirs.read_config(source), checkpoint or source
    workdir = pathlib.Path(checkpoint or pathlib.Path("runs") / default_name(source))
    found = _named_config(source)
    if checkpoint is None and not workdir.exists():
        raise UserError(
            f"there are no weights of {source} in {workdir}; diffax.load; pass checkpoint=WORKDIR, or train with "
            f"python -m diffax.main --config={source}"
        )
    return found, workdir


def _named_config(source: Path) -> Any:
    """The checked config of that name or path."""
    try:
        config = configs.load(os.fspath(source))
    except UserError as error:
        if pathlib.Path(source).is_dir() or "there is no config" in str(error):
            raise UserError(
                f"there is no trained model; {source} is no config and holds none; train first, or pass another workdir"
            ) from None
        raise
    configs.check(config)
    return config


def default_name(config: Path) -> str:
    """The folder below runs/ for a config given as on the command line: 'configs/a.py:tiny' -> 'a_tiny'."""
    return pathlib.Path(config).name.replace(".py", "").replace(":", "_")


def with_embedding_statistics(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The config with the statistics of a CLIP's embeddings that its workdir keeps, where it gives none itself.

    Those of published priors are a file, which `diffax.weights` puts into the workdir's config.
    """
    config = dict(config)
    for name in configs.sections(config):
        own = config[name].get("embedding")
        path = workdirs.folder_of(config, name, workdir) / workdirs.CONFIG
        if own is None or not path.exists():
            continue
        kept = workdirs.read_config(path.parent.parent).get(name, {}).get("embedding", {})
        merged = {**own, **{key: own[key] or kept.get(key, []) for key in ("mean", "std")}}
        config[name] = {**config[name], "embedding": merged}
    return config
