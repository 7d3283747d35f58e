"""A stage: a config made real (floor 3). Here alone networks and diffusion meet.

A system is a list of stages. Each is trained alone by `objective`, and they are sampled in one call by `sample_fn`:
the picture that one stage makes is the `low_res` condition of the next. A noised classifier is trained like a stage,
and guides one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax import conditioning, guidance, losses, models, samplers, schedules, timesteps
from diffax import config as configs
from diffax.process import diffuse, predict
from diffax.schedules import NoiseLevel, Schedule, Transition

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedClassifier:
    """p(y | z_t), a classifier that works at every noise level (ADM, section 4), every choice made.

    Attributes:
      name: the config's section.
      shape: (H, W, C) of the pictures it reads.
      num_classes: number of labels.
      net: a `models.Classifier`.
      schedule: noise level as a function of u.
      train_steps: T of a discrete schedule; 0 for a continuous one.
      timesteps: how training draws u.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    net: models.Classifier
    schedule: Schedule
    train_steps: int
    timesteps: timesteps.TimestepSampler

    @property
    def reads(self) -> tuple[str, ...]:
        """What a training batch must hold besides its pictures."""
        return ("label",)


class LowRes(NamedTuple):
    """How a stage meets the smaller picture that it enlarges (CDM, section 3).

    Attributes:
      factor: how much smaller it is.
      noise: strongest Gaussian noise on it in training, as u of the stage's schedule; 0: none.
      level: the noise on it in sampling, as u.
      truncated: whether the stage before stops at that level in place of being noised to it.
      blur: share of the training examples in which it is blurred; blur_sigma: range of the standard deviation, pixels.
      round: whether it is rounded to bytes, as files hold it.
      crop: side of the random window that training cuts from picture and smaller picture; 0: the whole.
    """

    factor: int
    noise: float
    level: float
    truncated: bool
    blur: float
    blur_sigma: tuple[float, float]
    round: bool
    crop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One diffusion model, every choice made.

    Attributes:
      name: the config's section.
      number: its place among the stages, which its noise depends on: the same when those before were sampled earlier.
      shape: (H, W, C) of what it makes.
      takes: conditions that its network reads, such as ('label', 'low_res').
      low_res: how it meets 'low_res', if it takes that.
      num_classes: number of labels that it, or the classifier that guides it, knows.
      net: the network.
      schedule: noise level as a function of u.
      train_steps: T of a discrete schedule; 0 for a continuous one.
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      variance: see `process.predict`.
      timesteps: how training draws u.
      loss: what training minimises.
      drop: share of the training examples whose conditions are withheld.
      null: {condition: what stands for it where it is withheld}; empty if none ever is.
      guidance: names of `GUIDANCE` that wrap the denoiser in sampling, innermost first.
      scale: of the guidance that has one, where a call gives none.
      classifier: what the guidance 'classifier' asks.
      sampler: the sampler.
      sampling: table of the transitions that sampling walks.
    """

    name: str
    number: int
    shape: tuple[int, int, int]
    takes: tuple[str, ...]
    low_res: LowRes | None
    num_classes: int
    net: models.Network
    schedule: Schedule
    train_steps: int
    predicts: str
    variance: str | float
    timesteps: timesteps.TimestepSampler
    loss: losses.Loss
    drop: float
    null: Mapping[str, Any]
    guidance: tuple[str, ...]
    scale: float
    classifier: NoisedClassifier | None
    sampler: samplers.Sampler
    sampling: Transition

    @property
    def reads(self) -> tuple[str, ...]:
        """Conditions that sampling needs: the network's and those of the guidance."""
        return tuple(dict.fromkeys((*self.takes, *(self.classifier.reads if self.classifier else ()))))

    @property
    def is_guided(self) -> bool:
        """Whether a guidance with a scale wraps it."""
        return any(name in SCALED for name in self.guidance)


def _classifier_guidance(stage: Stage, params: Mapping[str, Params], scale: Array) -> guidance.Guidance:
    classifier = stage.classifier

    def log_prob(z: Array, t: NoiseLevel, *, label: Array, **_: Array) -> Array:
        logits = classifier.net.apply({"params": params[classifier.name]}, z, t.time)
        return -losses.cross_entropy(logits, label)

    return guidance.classifier(log_prob, scale)


# (stage, {section: params}, scale) -> guidance
GUIDANCE: dict[str, Callable[[Stage, Mapping[str, Params], Array], guidance.Guidance]] = {
    "clip_denoised": lambda stage, params, scale: guidance.clip_denoised(),
    "dynamic_threshold": lambda stage, params, scale: guidance.dynamic_threshold(),
    "classifier": _classifier_guidance,
    "classifier_free": lambda stage, params, scale: guidance.classifier_free(scale, stage.null),
}
SCALED = configs.SCALED  # a stage has one of these at most


def _choose(table: Mapping[str, Any], name: str, field: str):
    if name not in table:
        raise ValueError(f"unknown {field} {name!r}; use one of {', '.join(sorted(table))}")
    return table[name]


def build_classifier(config: Mapping, name: str) -> NoisedClassifier:
    """Builds the noised classifier that section `name` of a config describes.

    Raises:
      ValueError: an option is unknown or does not fit another.
    """
    c = config[name]
    schedule, train_steps = schedules.build(c["schedule"])
    return NoisedClassifier(
        name=name,
        shape=tuple(c["shape"]),
        num_classes=c["num_classes"],
        net=models.build(c["net"], shape=tuple(c["shape"]), out_channels=c["num_classes"]),
        schedule=schedule,
        train_steps=train_steps,
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
    )


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
    schedule, train_steps = schedules.build(c["schedule"])
    learned = c["variance"] in ("learned", "learned_range")
    shape = tuple(c["shape"])
    settings = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(c["low_res"]).items()}
    low_res = LowRes(**{k: settings[k] for k in LowRes._fields}) if "low_res" in c["takes"] else None
    net = models.build(
        c["net"],
        shape=shape,
        takes=(*c["takes"], *(["low_res_time"] if low_res and low_res.noise else [])),
        num_classes=c["num_classes"],
        out_channels=shape[-1] * (1 + learned),
        null_label=c["drop"] > 0,
    )
    names = tuple(c["guidance"])
    for guide in names:
        _choose(GUIDANCE, guide, "guidance")
    classifier = build_classifier(config, c["classifier"]) if "classifier" in names else None
    sampler = _choose(samplers.SAMPLERS, c["sampler"]["name"], "sampler.name")
    makers = [n for n in config["stages"] if not configs.is_classifier(config[n])]
    return Stage(
        name=name,
        number=makers.index(name) if name in makers else 0,
        shape=shape,
        takes=tuple(c["takes"]),
        low_res=low_res,
        num_classes=c["num_classes"] or (classifier.num_classes if classifier else 0),
        net=net,
        schedule=schedule,
        train_steps=train_steps,
        predicts=c["predicts"],
        variance=c["variance"],
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
        loss=_choose(losses.LOSSES, c["loss"]["name"], "loss.name")(c["loss"]["weight"]),
        drop=c["drop"],
        null=models.null_conditions(net) if c["drop"] else {},
        guidance=names,
        scale=c["guidance_scale"],
        classifier=classifier,
        sampler=sampler(c["sampler"]["eta"]),
        sampling=schedules.build_steps(schedule, train_steps, c["steps"]),
    )


def build(config: Mapping, name: str) -> Stage | NoisedClassifier:
    """Builds whichever of the two section `name` describes."""
    return (build_classifier if configs.is_classifier(config[name]) else build_stage)(config, name)


def build_stages(config: Mapping) -> list[Stage]:
    """The diffusion stages of a config, in the order in which they are sampled."""
    return [build_stage(config, name) for name in config["stages"] if not configs.is_classifier(config[name])]


def init_params(model: Stage | NoisedClassifier, key: Array) -> Params:
    """Initial parameters of the network, float32."""
    return model.net.init(key, *models.example_inputs(model.net, model.shape))["params"]


def denoiser(stage: Stage, params: Params) -> guidance.Denoiser:
    """The stage's denoiser without guidance; it opens only the conditions that its network takes."""

    def denoise(z: Array, step: Transition, **cond: Array):
        out = stage.net.apply({"params": params}, z, step.t.time, {k: cond[k] for k, _ in stage.net.conditioners})
        return predict(out, z, step, predicts=stage.predicts, variance=stage.variance)

    return denoise


def guided_denoiser(stage: Stage, params: Mapping[str, Params], scale: Array | None = None) -> guidance.Denoiser:
    """The stage's denoiser under its guidance.

    Args:
      stage: the stage.
      params: {section: parameters} of the stage and of its classifier.
      scale: of the guidance that has one, scalar or [B]; None leaves that guidance out.

    Returns:
      The denoiser; with a classifier it also reads 'label'.
    """
    names = [name for name in stage.guidance if scale is not None or name not in SCALED]
    return guidance.guided(denoiser(stage, params[stage.name]), [GUIDANCE[n](stage, params, scale) for n in names])


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


def objective(model: Stage | NoisedClassifier) -> Objective:
    """The training objective of a stage or a noised classifier."""
    return classifier_objective(model) if isinstance(model, NoisedClassifier) else diffusion_objective(model)


def _split(keys: Array, names: Sequence[str]) -> dict[str, Array]:
    """[n] keys -> {name: [n] keys}."""
    return dict(zip(names, jax.vmap(lambda k: jax.random.split(k, len(names)))(keys).T, strict=True))


def _normal(keys: Array, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def _by_quarter(terms: Mapping[str, Array], u: Array) -> dict[str, tuple[Array, Array]]:
    """Sums and counts of [n] terms: of all, and of each quarter of the noise range, quietest first."""
    metrics = {}
    for name, term in terms.items():
        metrics[name] = (jnp.sum(term), jnp.asarray(term.size, jnp.float32))
        for q in range(4):
            inside = jnp.clip(jnp.ceil(4 * u) - 1, 0, 3) == q
            metrics[f"{name}_q{q}"] = (jnp.sum(jnp.where(inside, term, 0)), jnp.sum(inside, dtype=jnp.float32))
    return metrics


def _worsened(low_res: Array, keys: Array, stage: Stage) -> dict[str, Array]:
    """The conditions that training makes of a smaller picture: conditioning augmentation (CDM, section 3)."""
    c, keys = stage.low_res, _split(keys, ("blur", "level", "noise"))
    if c.round:
        low_res = conditioning.round_to_bytes(low_res)
    if c.blur:
        low, high = c.blur_sigma
        low_res = conditioning.random_blur(low_res, keys["blur"], share=c.blur, low=low, high=high)
    if not c.noise:
        return {"low_res": low_res}
    # From 0, no noise, to the strongest, both included, in steps of the chain if it has any.
    level = stage.schedule(c.noise * jax.vmap(jax.random.uniform)(keys["level"]))
    return {"low_res": conditioning.noise_to(low_res, level, keys["noise"]), "low_res_time": level.time}


def _as_sampled(low_res: Array, stage: Stage, level: NoiseLevel, keys: Array | None) -> dict[str, Array]:
    """The conditions that sampling makes of a smaller picture at a level [B]; without keys it is noised already."""
    noised = keys is None
    if stage.low_res.round and not noised:
        low_res = conditioning.round_to_bytes(low_res)
    if not stage.low_res.noise:
        return {"low_res": low_res}
    return {"low_res": low_res if noised else conditioning.noise_to(low_res, level, keys), "low_res_time": level.time}


def diffusion_objective(stage: Stage) -> Objective:
    """The training objective of a diffusion stage (DDPM algorithm 1; Improved DDPM section 3).

    Batches hold 'image' [n, H, W, C] in [-1, 1] and the conditions that the stage takes. Noise, noise level, dropout
    and which conditions are withheld depend on an example's own key.
    """
    # One reverse step for every training step, so that the bound knows where each would go.
    steps = schedules.respaced(stage.schedule, stage.train_steps)[::-1] if stage.train_steps else None

    def steps_at(u: Array) -> Transition:
        if steps is None:
            return schedules.to_clean(stage.schedule(u))
        index = jnp.rint(u * stage.train_steps).astype(jnp.int32) - 1
        return jax.tree.map(lambda a: jnp.asarray(a)[index], steps)

    def loss(params, extra, batch, keys, position, total):
        keys = _split(keys, ("noise", "timestep", "dropout", "drop", "crop", "low_res"))
        u, weight = stage.timesteps.draw(extra, keys["timestep"], position, total)
        x, cond = batch["image"].astype(jnp.float32), {k: batch[k] for k in stage.takes if k != "low_res"}
        if c := stage.low_res:
            low_res = batch["low_res"] if "low_res" in batch else conditioning.area_downsample(x, c.factor)
            if c.crop:
                x, low_res = conditioning.crop_together(x, low_res, keys["crop"], side=c.crop)
            cond |= _worsened(low_res, keys["low_res"], stage)
        noised = losses.noised(x, _normal(keys["noise"], x.shape[1:]), steps_at(u))
        if stage.null:
            cond = conditioning.drop(cond, keys["drop"], rate=stage.drop, null=stage.null)
        out = stage.net.apply({"params": params}, noised.z, noised.step.t.time, cond, dropout_keys=keys["dropout"])
        value, terms = stage.loss(out, noised, predicts=stage.predicts, variance=stage.variance)
        return value * weight, _by_quarter({"loss": value, **terms}, u), (u, value)

    return Objective(
        init=lambda key: init_params(stage, key),
        init_extra=stage.timesteps.init,
        loss=loss,
        update_extra=lambda extra, feedback: stage.timesteps.update(extra, *feedback),
    )


def classifier_terms(
    classifier: NoisedClassifier, params: Params, x: Array, label: Array, t: NoiseLevel, eps: Array, **apply: Any
) -> dict[str, Array]:
    """How well a noised classifier tells pictures at given noise levels.

    Args:
      classifier: the classifier.
      params: its parameters.
      x: [n, H, W, C] clean pictures; label: [n] what they show; eps: [n, H, W, C] noise.
      t: levels [n].
      **apply: passed to the network, such as dropout_keys.

    Returns:
      'loss' (cross entropy, nats), 'top1' and 'top5' (1 where the label is the best, among the best five), [n] each.
    """
    logits = classifier.net.apply({"params": params}, diffuse(x, t, eps), t.time, **apply)
    better = jnp.sum(logits > jnp.take_along_axis(logits, label[:, None], axis=1), axis=1)
    ranks = {"top1": 1, "top5": 5}
    hits = {name: (better < rank).astype(jnp.float32) for name, rank in ranks.items()}
    return {"loss": losses.cross_entropy(logits, label), **hits}


def classifier_objective(classifier: NoisedClassifier) -> Objective:
    """Cross entropy on noised pictures (ADM, section 4).

    Batches hold 'image' and 'label'. Metrics are the loss, top-1 and top-5 accuracy, by quarter of the noise range.
    """

    def loss(params, extra, batch, keys, position, total):
        keys = _split(keys, ("noise", "timestep", "dropout"))
        u, weight = classifier.timesteps.draw(extra, keys["timestep"], position, total)
        x, t = batch["image"].astype(jnp.float32), classifier.schedule(u)
        eps = _normal(keys["noise"], classifier.shape)
        terms = classifier_terms(classifier, params, x, batch["label"], t, eps, dropout_keys=keys["dropout"])
        return terms["loss"] * weight, _by_quarter(terms, u), (u, terms["loss"])

    return Objective(
        init=lambda key: init_params(classifier, key),
        init_extra=classifier.timesteps.init,
        loss=loss,
        update_extra=lambda extra, feedback: classifier.timesteps.update(extra, *feedback),
    )


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample_fn(stages: Sequence[Stage], *, keep: int = 0, every_stage: bool = False) -> Callable[..., Array]:
    """The pure sampler of a list of stages, ready for `jax.jit` and `jax.export`.

    Args:
      stages: in order; each one's picture is the next one's `low_res`.
      keep: also return this many estimates of x on the way of the last stage (see `samplers.sample`).
      every_stage: return what every stage made, {stage: pictures}, in place of the last one's.

    Returns:
      (params {section: params}, keys [B], *, guidance=None, level=None, **cond) -> [B, H, W, C] float32, in [-1, 1] if
      guidance clips. `guidance` is {stage: scale} and `level` {stage: noise level u of its smaller picture}, scalars
      or [B]; stages that they do not name take their own. A first stage that takes `low_res` [B, h, w, C] makes
      pictures of `factor` times its size. Picture i depends on keys[i] and the i-th conditions, scale and level only.
    """

    def sample(
        params: Mapping[str, Params],
        keys: Array,
        *,
        guidance: Mapping[str, Array] | None = None,
        level: Mapping[str, Array] | None = None,
        **cond: Array,
    ) -> Array:
        made, reached = {}, None
        for number, stage in enumerate(stages):
            stage_keys = _fold_in(keys, stage.number)
            given, shape, steps = {k: cond[k] for k in stage.reads}, stage.shape, stage.sampling
            if c := stage.low_res:
                u = jnp.broadcast_to(jnp.asarray((level or {}).get(stage.name, c.level), jnp.float32), keys.shape)
                at, noise_keys = stage.schedule(u), _fold_in(stage_keys, -2)  # a number that no step has
                if reached is not None:
                    at, noise_keys = jax.tree.map(lambda a: jnp.broadcast_to(a, keys.shape), reached), None
                given |= _as_sampled(given["low_res"], stage, at, noise_keys)
                shape = (*(c.factor * side for side in given["low_res"].shape[1:3]), stage.shape[-1])
            reached = None
            if stop := _truncated_at(stages[number + 1 : number + 2]):
                steps = schedules.until(steps, stop)
                reached = jax.tree.map(lambda a: a[-1], steps.s)
            noise = samplers.picture_noise(stage_keys, shape)
            last = stage is stages[-1]
            out = samplers.sample(
                guided_denoiser(stage, params, (guidance or {}).get(stage.name, stage.scale)),
                noise(jnp.int32(-1)),  # nor has this
                noise,
                steps,
                stage.sampler,
                keep=keep if last else 0,
                **given,
            )
            made[stage.name] = cond["low_res"] = out[0] if keep and last else out
        return made if every_stage else out

    return sample


def _fold_in(keys: Array, number: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, jnp.int32(number)))(keys)


def chooses_level(stage: Stage, *, first: bool) -> bool:
    """Whether sampling may choose the noise on the stage's smaller picture: not where the stage before stops at it."""
    return bool(stage.low_res and stage.low_res.noise and (first or not stage.low_res.truncated))


def _truncated_at(after: Sequence[Stage]) -> float | None:
    """The log-SNR at which sampling stops because the stage after it wants noise; None: at clean data."""
    for stage in after:
        if stage.low_res and stage.low_res.truncated and stage.low_res.level:
            return float(stage.schedule(np.array([stage.low_res.level])).logsnr[0])
    return None


def bits_per_dim_fn(stage: Stage) -> Callable[..., losses.BitsPerDim]:
    """(params, image [B, H, W, C], keys [B], **cond) -> the variational bound along the stage's sampling steps.

    The bound is the model's own: guidance that has a scale is left out. A stage that enlarges sees the image's own
    smaller version, at its level.
    """

    def evaluate(params: Params, image: Array, keys: Array, **cond: Array) -> losses.BitsPerDim:
        denoise = guided_denoiser(stage, {stage.name: params})
        noise = samplers.picture_noise(keys, stage.shape)
        if c := stage.low_res:
            low_res, level = (
                conditioning.area_downsample(image, c.factor),
                stage.schedule(jnp.full(keys.shape, c.level)),
            )
            cond |= _as_sampled(low_res, stage, level, _fold_in(keys, -2))
        return losses.bits_per_dim(denoise, image, noise, stage.sampling, **cond)

    return evaluate
