"""A stage: a config made real (floor 3). Here alone networks and diffusion meet.

A system is a list of stages. Each is trained alone by `objective`, and they are sampled in one call by `sample_fn`:
the picture that one stage makes is the `low_res` condition of the next.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffax import guidance, losses, models, samplers, schedules, timesteps
from diffax.process import predict
from diffax.schedules import Schedule, Transition

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One diffusion model, every choice made.

    Attributes:
      name: the config's section.
      shape: (H, W, C) of what it makes.
      takes: conditions that its network reads, such as ('label',).
      num_classes: number of labels, if it takes 'label'.
      net: the network.
      schedule: noise level as a function of u.
      train_steps: T of a discrete schedule; 0 for a continuous one.
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      variance: see `process.predict`.
      timesteps: how training draws u.
      loss: what training minimises.
      guidance: wraps the denoiser when sampling and when evaluating the bound.
      sampler: the sampler.
      sampling: table of the transitions that sampling walks.
    """

    name: str
    shape: tuple[int, int, int]
    takes: tuple[str, ...]
    num_classes: int
    net: models.Network
    schedule: Schedule
    train_steps: int
    predicts: str
    variance: str | float
    timesteps: timesteps.TimestepSampler
    loss: losses.Loss
    guidance: tuple[guidance.Guidance, ...]
    sampler: samplers.Sampler
    sampling: Transition


GUIDANCE: dict[str, Callable[[], guidance.Guidance]] = {
    "clip_denoised": guidance.clip_denoised,
    "dynamic_threshold": guidance.dynamic_threshold,
}


def _choose(table: Mapping[str, Any], name: str, field: str):
    if name not in table:
        raise ValueError(f"unknown {field} {name!r}; use one of {', '.join(sorted(table))}")
    return table[name]


def build_schedule(config: Mapping) -> tuple[Schedule, int]:
    """The schedule that a config's `schedule` section describes, and its T (0 if continuous)."""
    if config["name"] == "cosine_logsnr":
        return schedules.cosine_logsnr(config["logsnr_min"], config["logsnr_max"]), 0
    betas = _choose(schedules.BETAS, config["name"], "schedule.name")
    table = betas(config["steps"], config["beta_start"], config["beta_end"])
    return schedules.discrete(table, rescale_time=config["rescale_time"]), config["steps"]


def build_steps(schedule: Schedule, train_steps: int, steps: str | int) -> Transition:
    """The transitions that sampling walks: `steps` as in `schedules.space_timesteps`, or a count if continuous."""
    if train_steps:
        return schedules.respaced(schedule, train_steps, steps)
    return schedules.even_steps(schedule, int(steps))


def build_stage(config: Mapping, name: str) -> Stage:
    """Builds the stage that section `name` of a config describes.

    Args:
      config: a whole config (see `diffax.config`), any nested mapping.
      name: the section.

    Returns:
      The stage.

    Raises:
      ValueError: an option is unknown or does not fit another.
    """
    c = config[name]
    schedule, train_steps = build_schedule(c["schedule"])
    learned = c["variance"] in ("learned", "learned_range")
    shape = tuple(c["shape"])
    net = models.build(
        c["net"],
        shape=shape,
        takes=tuple(c["takes"]),
        num_classes=c["num_classes"],
        out_channels=shape[-1] * (1 + learned),
    )
    sampler = _choose(samplers.SAMPLERS, c["sampler"]["name"], "sampler.name")
    return Stage(
        name=name,
        shape=shape,
        takes=tuple(c["takes"]),
        num_classes=c["num_classes"],
        net=net,
        schedule=schedule,
        train_steps=train_steps,
        predicts=c["predicts"],
        variance=c["variance"],
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
        loss=_choose(losses.LOSSES, c["loss"]["name"], "loss.name")(c["loss"]["weight"]),
        guidance=tuple(_choose(GUIDANCE, g, "guidance")() for g in c["guidance"]),
        sampler=sampler(c["sampler"]["eta"]),
        sampling=build_steps(schedule, train_steps, c["steps"]),
    )


def build_stages(config: Mapping) -> list[Stage]:
    """All stages of a config, in the order in which they are sampled."""
    return [build_stage(config, name) for name in config["stages"]]


def init_params(stage: Stage, key: Array) -> Params:
    """Initial parameters of the stage's network, float32."""
    return stage.net.init(key, *models.example_inputs(stage.net, stage.shape))["params"]


def denoiser(stage: Stage, params: Params) -> guidance.Denoiser:
    """The stage's denoiser without guidance; it opens only the conditions that its network takes."""

    def denoise(z: Array, step: Transition, **cond: Array):
        out = stage.net.apply({"params": params}, z, step.t.time, {k: cond[k] for k in stage.takes})
        return predict(out, z, step, predicts=stage.predicts, variance=stage.variance)

    return denoise


# ---- training ------------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What `train` needs to know of a model, and all it knows.

    Attributes:
      init: key -> params.
      init_extra: () -> whatever else belongs to the training state (a history of losses, or nothing).
      loss: (params, extra, batch, keys [n], position [n], total) -> (loss [n], metrics, feedback): the loss of each of
        n examples, which stand at `position` among the `total` of the global batch; metrics {name: (sum, count)};
        feedback, a tree of arrays [n].
      update_extra: (extra, feedback of the whole global batch) -> extra.
    """

    init: Callable[[Array], Params]
    init_extra: Callable[[], Any]
    loss: Callable[..., tuple[Array, dict[str, tuple[Array, Array]], Any]]
    update_extra: Callable[[Any, Any], Any]


def objective(stage: Stage) -> Objective:
    """The training objective of a diffusion stage (DDPM algorithm 1; Improved DDPM section 3).

    Batches hold 'image' [n, H, W, C] in [-1, 1] and the conditions that the stage takes. Noise, noise level and dropout
    of an example depend on its own key.
    """
    # One reverse step for every training step, so that the bound knows where each would go.
    steps = schedules.respaced(stage.schedule, stage.train_steps)[::-1] if stage.train_steps else None

    def steps_at(u: Array) -> Transition:
        if steps is None:
            return schedules.to_clean(stage.schedule(u))
        index = jnp.rint(u * stage.train_steps).astype(jnp.int32) - 1
        return jax.tree.map(lambda a: jnp.asarray(a)[index], steps)

    def loss(params, extra, batch, keys, position, total):
        keys = dict(
            zip(("noise", "timestep", "dropout"), jax.vmap(lambda k: jax.random.split(k, 3))(keys).T, strict=True)
        )
        x = batch["image"].astype(jnp.float32)
        u, weight = stage.timesteps.draw(extra, keys["timestep"], position, total)
        eps = jax.vmap(lambda k: jax.random.normal(k, stage.shape))(keys["noise"])
        noised = losses.noised(x, eps, steps_at(u))
        out = stage.net.apply(
            {"params": params},
            noised.z,
            noised.step.t.time,
            {k: batch[k] for k in stage.takes},
            dropout_keys=keys["dropout"],
        )
        value, terms = stage.loss(out, noised, predicts=stage.predicts, variance=stage.variance)
        metrics = {}
        for name, term in {"loss": value, **terms}.items():
            metrics[name] = (jnp.sum(term), jnp.asarray(term.size, jnp.float32))
            for q in range(4):  # by quarter of the noise range, quietest first
                inside = jnp.minimum(jnp.ceil(4 * u) - 1, 3) == q
                metrics[f"{name}_q{q}"] = (jnp.sum(jnp.where(inside, term, 0)), jnp.sum(inside, dtype=jnp.float32))
        return value * weight, metrics, (u, value)

    return Objective(
        init=lambda key: init_params(stage, key),
        init_extra=stage.timesteps.init,
        loss=loss,
        update_extra=lambda extra, feedback: stage.timesteps.update(extra, *feedback),
    )


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample_fn(stages: Sequence[Stage], *, keep: int = 0) -> Callable[..., Array]:
    """The pure sampler of a list of stages, ready for `jax.jit` and `jax.export`.

    Args:
      stages: in order; each one's picture is the next one's `low_res`.
      keep: also return this many estimates of x on the way of the last stage (see `samplers.sample`).

    Returns:
      (params {stage name: params}, keys [B], **cond) -> [B, H, W, C] float32, in [-1, 1] if guidance clips. Picture i
      depends on keys[i] and the i-th conditions only.
    """

    def sample(params: Mapping[str, Params], keys: Array, **cond: Array) -> Array:
        for number, stage in enumerate(stages):
            stage_keys = jax.vmap(lambda k, n=number: jax.random.fold_in(k, n))(keys)
            noise = samplers.picture_noise(stage_keys, stage.shape)
            denoise = guidance.guided(denoiser(stage, params[stage.name]), stage.guidance)
            last = stage is stages[-1]
            out = samplers.sample(
                denoise,
                noise(jnp.int32(-1)),  # number -1, which no step has
                noise,
                stage.sampling,
                stage.sampler,
                keep=keep if last else 0,
                **{k: cond[k] for k in stage.takes},
            )
            cond["low_res"] = out[0] if keep and last else out
        return out

    return sample


def bits_per_dim_fn(stage: Stage) -> Callable[..., losses.BitsPerDim]:
    """(params, image [B, H, W, C], keys [B], **cond) -> the variational bound along the stage's sampling steps."""

    def evaluate(params: Params, image: Array, keys: Array, **cond: Array) -> losses.BitsPerDim:
        denoise = guidance.guided(denoiser(stage, params), stage.guidance)
        noise = samplers.picture_noise(keys, stage.shape)
        return losses.bits_per_dim(denoise, image, noise, stage.sampling, **cond)

    return evaluate
