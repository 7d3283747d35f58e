"""From a trained workdir to pictures, in one call (floor 4)."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import checkpoint, images, parallel, reporting, samplers, stages
from diffax.errors import UserError

Params = Any

# What may be chosen anew for parameters that are there.
NOT_IN_THE_NETWORK = (
    "data",
    "train",
    "loss",
    "timesteps",
    "guidance",
    "sampler",
    "steps",
    "net.dropout",
    "net.dtype",
    "net.remat",
)


@dataclasses.dataclass(frozen=True, eq=False)
class SampleFn:
    """`sample_fn(key, label=[3, 7])` -> pictures; the pure function underneath is `stages.sample_fn`.

    Attributes:
      stages: the stages, in order.
      params: {stage name: parameters}.
      config: the config they were trained with, as a plain dict.
      step: {stage name: training step of the parameters}.
    """

    stages: tuple[stages.Stage, ...]
    params: Mapping[str, Params]
    config: Mapping[str, Any]
    step: Mapping[str, int]

    @property
    def takes(self) -> tuple[str, ...]:
        """The conditions that a call must give."""
        made = {"low_res"} if len(self.stages) > 1 else set()
        return tuple(dict.fromkeys(c for s in self.stages for c in s.takes if c not in made))

    def __call__(
        self,
        key: int | jax.Array,
        n: int | None = None,
        *,
        steps: str | int | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        keep: int = 0,
        batch_size: int = 64,
        **cond: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Samples pictures.

        Picture i depends on the key, i and the i-th conditions only, not on how many are made or on how many devices.
        New labels or keys never compile again; a new `steps`, `sampler` or `keep` does.

        Args:
          key: a seed or a typed PRNG key.
          n: how many; by default as many as there are conditions, else 1.
          steps: another respacing than the config's, such as 50 or 'ddim25'.
          sampler: another sampler than the config's: 'ddpm' or 'ddim'.
          eta: of DDIM, if it is named here.
          keep: also return this many estimates of each picture on the way (DDPM's progressive generation).
          batch_size: pictures made at once.
          **cond: a value for every picture, or one for all: label, an integer or a list of them.

        Returns:
          [n, H, W, C] float32 in [-1, 1]; with `keep`, also [n, keep, H, W, C].

        Raises:
          UserError: a condition is missing, unknown or out of range; n, steps or sampler cannot be.
        """
        cond, n = self._conditions(cond, n)
        if sampler is not None and sampler not in samplers.SAMPLERS:
            raise UserError(f"unknown sampler {sampler!r}; sample_fn; use one of {', '.join(samplers.SAMPLERS)}")
        if batch_size < 1 or keep < 0:
            raise UserError(f"batch_size is {batch_size} and keep {keep}; sample_fn; use at least 1 and 0")
        try:
            run = _compiled(self.stages, None if steps is None else str(steps), sampler, float(eta), keep)
        except ValueError as error:
            raise UserError(f"{error}; sample_fn(steps={steps!r})") from error
        key = jax.random.key(key) if isinstance(key, int | np.integer) else key
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(n))
        size = min(batch_size, 2 ** math.ceil(math.log2(n)))
        done = []
        for start in reporting.progress_bar(range(0, n, size), "sampling"):
            # The last batch is filled up: one program serves all.
            index = np.minimum(np.arange(start, start + size), n - 1)
            out = run(self.params, keys[index], {k: v[index] for k, v in cond.items()})
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    def _conditions(self, cond: Mapping[str, Any], n: int | None) -> tuple[dict[str, np.ndarray], int]:
        for name in cond:
            if name not in self.takes:
                raise UserError(f"condition {name!r} is not taken; sample_fn; it takes {list(self.takes) or 'none'}")
        for name in self.takes:
            if name not in cond:
                raise UserError(f"condition {name!r} is missing; sample_fn; pass {name}=[...]")
        arrays = {}
        for name, value in cond.items():
            kind = np.int32 if name == "label" else np.float32
            try:
                arrays[name] = np.asarray(value)
                wrong = name == "label" and arrays[name].size and not np.issubdtype(arrays[name].dtype, np.integer)
            except ValueError:
                wrong = True
            if wrong or arrays[name].ndim < (0 if name == "label" else 3):
                raise UserError(f"condition {name} is {value!r}; sample_fn; pass one or a list of integers")
            arrays[name] = arrays[name].astype(kind)
        single = {name: 0 if name == "label" else 3 for name in arrays}
        lengths = {name: len(a) for name, a in arrays.items() if a.ndim > single[name]}
        n = max(lengths.values(), default=1) if n is None else n
        if n < 1:
            raise UserError(f"there is nothing to sample (n = {n}); sample_fn; ask for at least one picture")
        for name, length in lengths.items():
            if length != n:
                raise UserError(f"{length} values of {name} for {n} pictures; sample_fn; pass one each, or one for all")
        if "label" in arrays:
            classes = max(s.num_classes for s in self.stages)
            outside = [int(v) for v in np.ravel(arrays["label"]) if not 0 <= v < classes]
            if outside:
                raise UserError(f"label {outside[0]} is out of range; sample_fn; labels are 0 to {classes - 1}")
        full = {
            k: np.broadcast_to(a, (n, *a.shape[-single[k] or a.ndim :])) if k not in lengths else a
            for k, a in arrays.items()
        }
        return full, n


@functools.lru_cache(maxsize=32)
def _compiled(built: tuple[stages.Stage, ...], steps: str | None, sampler: str | None, eta: float, keep: int):
    """The sampler over all devices, one for all parameters: (params, keys, cond) -> pictures."""
    if steps is not None:
        built = tuple(
            dataclasses.replace(s, sampling=stages.build_steps(s.schedule, s.train_steps, steps)) for s in built
        )
    if sampler is not None:
        built = tuple(dataclasses.replace(s, sampler=samplers.SAMPLERS[sampler](eta)) for s in built)
    pure = stages.sample_fn(built, keep=keep)

    def run(params, keys, cond):
        out = pure(params, keys, **cond)
        return (out[0], out[1].swapaxes(0, 1)) if keep else out

    return parallel.map_batch(run)


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of a workdir, from its config.json.

    Raises:
      UserError: there is none, or it is no JSON.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no trained model; {workdir} has no config.json; train first, or pass another workdir"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config ({error}); {path}; restore it or train again") from error


def load(
    workdir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> SampleFn:
    """Loads a trained workdir: `sample_fn = diffax.load('runs/quickstart')`.

    Args:
      workdir: what training wrote to.
      config: use this config in place of the workdir's (a plain dict of the same networks).
      step: a training step, by default the newest intact one.
      decay: which average of the parameters, by default the first configured one.
      raw: the parameters in training instead of an average.

    Returns:
      A `SampleFn`.

    Raises:
      UserError: there is no such workdir, checkpoint, step or average.
    """
    config = read_config(workdir) if config is None else config
    built, params, steps = [], {}, {}
    for name in config["stages"]:
        stage = stages.build_stage(config, name)
        average = decay or next((str(d) for d in config[name]["train"]["ema"]), None)
        folder = pathlib.Path(workdir) / name / "checkpoints"
        with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
            found = checkpoints.restore_ema(step=step, decay=average, raw=raw or average is None)
            steps[name], params[name], meta = found
            lines = checkpoint.config_difference(meta["stage"], config[name], ignore=NOT_IN_THE_NETWORK)
            if lines:
                raise UserError(f"{lines[0]}; {checkpoints.directory}; use the config it was trained with")
        built.append(stage)
    return SampleFn(tuple(built), params, config, steps)


# ---- pictures -------------------------------------------------------------------------------------------------------


def spread_labels(n: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ... : [n] int32."""
    return np.arange(n, dtype=np.int32) % num_classes


def sample_conditions(built: Sequence[stages.Stage], n: int) -> dict[str, np.ndarray]:
    """Conditions for n pictures without a wish of their own: labels in turn."""
    labelled = [s for s in built if "label" in s.takes]
    return {"label": spread_labels(n, labelled[0].num_classes)} if labelled else {}


def draw_grid(
    path: str | os.PathLike[str], pictures: np.ndarray, *, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Writes pictures [n, H, W, C] in [-1, 1] as one PNG.

    Raises:
      RunError: a picture is not finite; nothing is written.
    """
    images.check_finite(pictures)
    images.save_png(path, images.grid(images.to_uint8(pictures), columns, labels))
