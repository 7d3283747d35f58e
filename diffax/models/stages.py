"""A stage: a config made real (floor 3). Here alone networks and diffusion meet.

A system is a list of stages. Each is trained alone by `objective`, and they are sampled in one call by `sample_fn`:
the picture that one stage makes is the `low_res` condition of the next. A noised classifier is trained like a stage,
and guides one. A prior is a stage whose sample is no picture but an image embedding of a CLIP, which is trained before
it and then frozen, the `image_embedding` condition of the next (DALL-E 2). One kind of it is no diffusion model: it
writes the embedding as a row of codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax import config as configs
from diffax import networks
from diffax.conditions import tokenizer
from diffax.diffusion import augment, guidance, losses, samplers, schedules, timesteps
from diffax.diffusion.process import diffuse, expand, posterior, predict
from diffax.diffusion.schedules import NoiseLevel, Schedule, Transition
from diffax.models import codes
from diffax.networks import clip
from diffax.training import parallel

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class NoisedClassifier:
    """p(y | z_t), a classifier that works at every noise level (ADM, section 4), every choice made.

    Attributes:
      name: the config's section.
      shape: (H, W, C) of the pictures it reads.
      num_classes: number of labels.
      net: a `networks.Classifier`.
      schedule: noise level as a function of u.
      train_steps: T of a discrete schedule; 0 for a continuous one.
      timesteps: how training draws u.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    net: networks.Classifier
    schedule: Schedule
    train_steps: int
    timesteps: timesteps.TimestepSampler

    @property
    def reads(self) -> tuple[str, ...]:
        """What a training batch must hold besides its pictures."""
        return ("label",)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP: which caption goes with which picture (Radford et al. 2021), at every noise level if noised (GLIDE).

    Attributes:
      name: the config's section.
      shape: (H, W, C) of the pictures it reads.
      net: a `networks.clip.CLIP`.
      noised: whether its pictures are noisy, and it is told how much.
      schedule: noise level as a function of u.
      train_steps: T of the schedule.
      timesteps: how training draws u.
      norm: the length that stages are given its embeddings in; 0: their own.
      scale: mean and deviation of its image embeddings, which a prior works without.
      empty: [L] ids of the empty caption.
    """

    name: str
    shape: tuple[int, int, int]
    net: clip.CLIP
    noised: bool
    schedule: Schedule
    train_steps: int
    timesteps: timesteps.TimestepSampler
    norm: float
    scale: codes.Scale
    empty: np.ndarray

    @property
    def takes(self) -> tuple[str, ...]:
        """What a training batch must hold besides its pictures: ids of its own tokenizer."""
        return ("text",)

    @property
    def reads(self) -> tuple[str, ...]:
        """The condition of a stage that it guides: a caption in its own ids."""
        return ("clip_text",)


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
    """One diffusion model, or an autoregressive prior in the place of one, every choice made.

    Attributes:
      name: the config's section.
      number: its place among the stages, which its noise depends on: the same when those before were sampled earlier.
      shape: (H, W, C) of what it makes; (D,) of a prior.
      takes: conditions that its network reads, such as ('label', 'low_res').
      clip: whose embeddings it takes or makes, frozen; None if there are none.
      low_res: how it meets 'low_res', if it takes that.
      empty: share of the training examples of which it knows no pixel, if it takes 'inpaint'.
      num_classes: number of labels that it, or the classifier that guides it, knows.
      net: the network.
      schedule: noise level as a function of u.
      train_steps: T of a discrete schedule; 0 for a continuous one.
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      variance: see `process.predict`.
      analytic: whether sampling adds to that what the data leave open, see `analytic_variance`.
      timesteps: how training draws u.
      loss: what training minimises.
      drop: share of the training examples whose conditions are withheld.
      drop_text: share of those whose caption is, on its own; 0: with the rest.
      null: {condition: what stands for it where it is withheld}; empty if none ever is.
      guidance: names of `GUIDANCE` that wrap the denoiser in sampling, innermost first.
      scale: of the guidance that has one, where a call gives none.
      limit: of the guidance 'clip_denoised'.
      guide: what the guidance 'classifier' or 'clip' asks.
      candidates: how many samples a prior makes, to keep the one nearest to the caption.
      codec: of an autoregressive prior, for training: how it writes embeddings, blank until that is fitted; else None.
      percentile: of the products of embeddings and captions in training: sampling asks it for one from there up.
      last: section of the network that takes the last step; '': its own.
      sampler: the sampler.
      temperature: of the noise that sampling starts from; of an autoregressive prior, of its logits.
      sampling: table of the transitions that sampling walks.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    takes: tuple[str, ...]
    clip: Clip | None
    low_res: LowRes | None
    empty: float
    num_classes: int
    net: networks.Network
    schedule: Schedule
    train_steps: int
    predicts: str
    variance: str | float
    analytic: bool
    timesteps: timesteps.TimestepSampler
    loss: losses.Loss
    drop: float
    drop_text: float
    null: Mapping[str, Any]
    guidance: tuple[str, ...]
    scale: float
    limit: float
    guide: NoisedClassifier | Clip | None
    candidates: int
    codec: codes.Codec | None
    percentile: float
    last: str
    sampler: samplers.Sampler
    temperature: float
    sampling: Transition

    @property
    def emits(self) -> str:
        """The condition that its sample is to the stages after it."""
        return "image_embedding" if len(self.shape) == 1 else "low_res"

    @property
    def reads(self) -> tuple[str, ...]:
        """Conditions that sampling needs: the network's and the guidance's; not 'inpaint', which may be empty.

        What a CLIP makes of a caption is not given, but the caption, as 'clip_text'.
        """
        takes = ["clip_text" if name in BY_TEXT_ENCODER else name for name in self.takes if name != "inpaint"]
        return tuple(dict.fromkeys((*takes, *(self.guide.reads if self.guide else ()))))

    @property
    def sections(self) -> tuple[str, ...]:
        """Whose parameters sampling needs: its own, and those of its guide, its CLIP and its last step."""
        others = [model.name for model in (self.guide, self.clip) if model]
        return tuple(dict.fromkeys((self.name, *others, *([self.last] if self.last else []))))

    @property
    def num_steps(self) -> int:
        """How often sampling calls the network for one sample."""
        return len(self.sampling.t.time) if self.codec is None else self.codec.directions.shape[1]

    @property
    def is_guided(self) -> bool:
        """Whether a guidance with a scale wraps it."""
        return any(name in SCALED for name in self.guidance)


def _classifier_guidance(stage: Stage, params: Mapping[str, Params], scale: Array) -> guidance.Guidance:
    classifier = stage.guide

    def log_prob(z: Array, t: NoiseLevel, *, label: Array, **_: Array) -> Array:
        logits = classifier.net.apply({"params": params[classifier.name]}, z, t.time)
        return -losses.cross_entropy(logits, label)

    return guidance.classifier(log_prob, scale)


def _clip_guidance(stage: Stage, params: Mapping[str, Params], scale: Array) -> guidance.Guidance:
    own = params[stage.guide.name]

    def similarity(z: Array, t: NoiseLevel, *, clip_text: Array, **_: Array) -> Array:
        """clip_text: [B, E], encoded already."""
        image = stage.guide.net.apply({"params": own}, z, t.time, method="encode_image")
        return guidance.clip_similarity(image, clip_text, jnp.minimum(own["logit_scale"], LARGEST_LOGIT_SCALE))

    return guidance.clip_guided(similarity, scale)


LARGEST_LOGIT_SCALE = float(np.log(100.0))  # Radford et al. 2021
BY_TEXT_ENCODER = ("text_embedding", "text_features")  # conditions that a CLIP makes of a caption
# what no step of sampling changes, read once
READ_ONCE = ("text", "image_embedding", *BY_TEXT_ENCODER)

# (stage, {section: params}, scale) -> guidance
GUIDANCE: dict[str, Callable[[Stage, Mapping[str, Params], Array], guidance.Guidance]] = {
    "clip_denoised": lambda stage, params, scale: guidance.clip_denoised(stage.limit),
    "dynamic_threshold": lambda stage, params, scale: guidance.dynamic_threshold(),
    "keep_known": lambda stage, params, scale: guidance.keep_known(),
    "classifier": _classifier_guidance,
    "clip": _clip_guidance,
    "classifier_free": lambda stage, params, scale: guidance.classifier_free(scale, stage.null),
}
SCALED = configs.SCALED  # a stage has one of these at most


def _choose(table: Mapping[str, Any], name: str, field: str):
    if name not in table:
        raise ValueError(f"unknown {field} {name!r}; use one of {', '.join(sorted(table))}")
    return table[name]


def _vocab_size(section: Mapping) -> int:
    """Rows of the table of tokens: as many as the tokenizer has ids, unless the section wants more."""
    return section["net"]["text"]["vocab_size"] or tokenizer.VOCAB_SIZES[section["text"]["tokenizer"]]


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
        net=networks.build(
            {k: v for k, v in c["net"].items() if k not in NOT_OF_A_NETWORK},
            shape=tuple(c["shape"]),
            out_channels=c["num_classes"],
        ),
        schedule=schedule,
        train_steps=train_steps,
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
    )


def build_clip(config: Mapping, name: str) -> Clip:
    """Builds the CLIP that section `name` of a config describes.

    Raises:
      ValueError: an option is unknown or does not fit another.
    """
    c = config[name]
    net, shape = c["net"], tuple(c["shape"])
    schedule, train_steps = schedules.build(c["schedule"])
    image = {key: net["image"][key] for key in ("width", "layers", "heads", "patch")}
    text = {key: net["text"][key] for key in ("width", "layers", "heads")}
    text |= {"vocab_size": _vocab_size(c), "length": c["text"]["length"]}
    options = {key: net[key] for key in ("features", "activation", "dtype", "remat")}
    noised, embedding = net["image"]["noised"], c["embedding"]
    mean, std = (
        np.array(v or (default,), np.float32) for v, default in ((embedding["mean"], 0), (embedding["std"], 1))
    )
    empty = np.full(c["text"]["length"], tokenizer.PADDING, np.int32)
    if c["text"]["tokenizer"] == "clip":
        empty[:2] = [tokenizer.VOCAB_SIZES["clip"] - 2, tokenizer.VOCAB_SIZES["clip"] - 1]  # start and end
    return Clip(
        name=name,
        shape=shape,
        net=clip.build({**options, "image": {**image, "times": train_steps * noised}, "text": text}, shape),
        noised=noised,
        schedule=schedule,
        train_steps=train_steps,
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
        norm=embedding["norm"],
        scale=codes.Scale(mean, std),
        empty=empty,
    )


NOT_OF_A_NETWORK = ("image", "features", "activation", "prior", "clip")  # options of `net`, of others than a U-Net


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
    text = {"vocab_size": _vocab_size(c), "length": c["text"]["length"]}
    own = {k: v for k, v in c["net"].items() if k not in NOT_OF_A_NETWORK}
    own |= {"text": {**c["net"]["text"], **text}, **(c["net"]["prior"] if configs.is_prior(c) else {})}
    if c["clip"]:
        its = config[c["clip"]]
        sizes = {"size": its["net"]["features"], "width": its["net"]["text"]["width"], "length": its["text"]["length"]}
        own["clip"] = {**c["net"]["clip"], **sizes}
    codec, sizes = None, {"shape": shape, "num_classes": c["num_classes"], "out_channels": shape[-1] * (1 + learned)}
    more = ["low_res_time"] if low_res and low_res.noise else []
    if configs.is_code_prior(c):
        codec = codes.blank_codec(*shape, c["codes"]["components"], c["codes"]["buckets"])
        count, buckets = codec.centres.shape
        sizes, more = {"shape": (count,), "num_classes": buckets, "out_channels": buckets}, ["similarity"]
    net = networks.build(own, takes=(*c["takes"], *more), null_label=c["drop"] > 0, **sizes)
    names = tuple(c["guidance"])
    for guide in names:
        _choose(GUIDANCE, guide, "guidance")
    guide = build(config, c["classifier"]) if {"classifier", "clip"} & {*names} else None
    sampler = _choose(samplers.SAMPLERS, c["sampler"]["name"], "sampler.name")
    makers = [n for n in config["stages"] if configs.is_sampled(config[n])]
    return Stage(
        name=name,
        number=makers.index(name) if name in makers else 0,
        shape=shape,
        takes=tuple(c["takes"]),
        clip=build_clip(config, c["clip"]) if c["clip"] else None,
        low_res=low_res,
        empty=c["inpaint"]["empty"],
        num_classes=c["num_classes"] or getattr(guide, "num_classes", 0),
        net=net,
        schedule=schedule,
        train_steps=train_steps,
        predicts=c["predicts"],
        variance="fixed_small" if c["variance"] == "analytic" else c["variance"],
        analytic=c["variance"] == "analytic",
        timesteps=_choose(timesteps.TIMESTEPS, c["timesteps"]["name"], "timesteps.name")(train_steps),
        loss=_choose(losses.LOSSES, c["loss"]["name"], "loss.name")(c["loss"]["weight"]),
        drop=c["drop"],
        drop_text=c["drop_text"],
        null=networks.null_conditions(net) if c["drop"] else {},
        guidance=names,
        scale=c["guidance_scale"],
        limit=c["limit"],
        guide=guide,
        candidates=c["candidates"],
        codec=codec,
        percentile=c["codes"]["percentile"],
        last=c["last"],
        sampler=sampler(c["sampler"]["eta"]),
        temperature=c["sampler"]["temperature"],
        sampling=schedules.build_steps(schedule, train_steps, c["steps"]),
    )


def build(config: Mapping, name: str) -> "Stage | NoisedClassifier | Clip":
    """Builds whatever section `name` describes."""
    builders = {"classifier": build_classifier, "clip": build_clip}
    return builders.get(config[name]["net"]["name"], build_stage)(config, name)


def build_stages(config: Mapping) -> list[Stage]:
    """The diffusion stages of a config, in the order in which they are sampled."""
    return [build_stage(config, name) for name in config["stages"] if configs.is_sampled(config[name])]


def init_params(model: Stage | NoisedClassifier | Clip, key: Array) -> Params:
    """Initial parameters of the network, float32."""
    writes = isinstance(model, Stage) and model.codec is not None
    shape = model.codec.directions.shape[1:] if writes else model.shape
    return model.net.init(key, *networks.example_inputs(model.net, shape))["params"]


def denoiser(stage: Stage, params: Params) -> guidance.Denoiser:
    """The stage's denoiser without guidance; it opens only the conditions that its network takes.

    Of a stage with an analytic variance `params['fitted']` is what `fit_residual` found, by log-SNR.
    """

    def denoise(z: Array, step: Transition, **cond: Array):
        out = stage.net.apply({"params": params}, z, step.t.time, {k: cond[k] for k, _ in stage.net.conditioners})
        p = predict(out, z, step, predicts=stage.predicts, variance=stage.variance)
        if not stage.analytic:
            return p
        table = nn.meta.unbox(params["fitted"])
        variance = analytic_variance(z, step, jnp.interp(step.t.logsnr, table["logsnr"], table["residual"]))
        return p._replace(variance=variance, logvar=jnp.log(jnp.maximum(variance, jnp.exp(p.logvar))))

    return denoise


def analytic_variance(z: Array, step: Transition, residual: Array) -> Array:
    """The best constant variance of a reverse step: the posterior's + c_x^2 Var[x | z_t] (Bao et al. 2022, theorem 1).

    Args:
      z: [B, ...], whose shape alone matters.
      step: [B]; c_x is the weight of x in the posterior's mean.
      residual: [B] Var[x | z_t], the mean over dimensions and data.

    Returns:
      [B, 1, ...]; 0 at the last step.
    """
    one = jnp.ones((len(z),) + (1,) * (z.ndim - 1))
    on_x = posterior(one, 0 * one, step).mean
    variance = jnp.exp(expand(step.min_logvar, one)) + on_x**2 * expand(residual, one)
    return jnp.where(expand(step.s.is_clean, one), 0.0, variance)


def residual_fn(stage: Stage, u: np.ndarray) -> Callable[..., Array]:
    """(params, {'image_embedding', conditions}, keys [B]) -> [B, G], whose mean over B is Var[x | z_t] at levels u.

    E[x^2] - E[f^2] where f is the best estimate, E[x | z_t]: means over dimensions (Analytic-DPM, in terms of x).
    """

    def residual(params: Params, batch: Mapping[str, Array], keys: Array) -> Array:
        x, cond = codes.scaled(batch["image_embedding"], stage.clip.scale), {k: batch[k] for k in stage.takes}

        def at(numbered: tuple[Array, Array]) -> Array:
            number, u = numbered
            level = stage.schedule(jnp.full(keys.shape, u))
            z = diffuse(x, level, _normal(_fold_in(keys, number), x.shape[1:]))
            out = stage.net.apply({"params": params}, z, level.time, cond)
            p = predict(out, z, schedules.to_clean(level), predicts=stage.predicts, variance=stage.variance)
            return losses.mean_flat(x**2) - losses.mean_flat(p.x**2)

        return jax.lax.map(at, (jnp.arange(len(u)), jnp.asarray(u, jnp.float32))).T

    return residual


def guided_denoiser(stage: Stage, params: Mapping[str, Params], scale: Array | None = None) -> guidance.Denoiser:
    """The stage's denoiser under its guidance.

    Args:
      stage: the stage.
      params: {section: parameters} of the stage and of its guide.
      scale: of the guidance that has one, scalar or [B]; None leaves that guidance out.

    Returns:
      The denoiser; with a classifier it also reads 'label', with a CLIP 'clip_text', an embedding [B, E].
    """
    names = [name for name in stage.guidance if scale is not None or name not in SCALED]

    def guided(z: Array, step: Transition, **cond: Array):
        there = parallel.tied(params, z)  # it is called in a loop
        denoise = denoiser(stage, there[stage.name])
        if stage.last:
            denoise = guidance.finish_with(denoiser(stage, there[stage.last]))(denoise)
        return guidance.guided(denoise, [GUIDANCE[n](stage, there, scale) for n in names])(z, step, **cond)

    return guided


# ---- embeddings -----------------------------------------------------------------------------------------------------


def _of_norm(model: Clip, embedding: Array) -> Array:
    return model.norm * guidance.unit(embedding) if model.norm else embedding


def embed_image(model: Clip, params: Params, image: Array) -> Array:
    """The condition 'image_embedding' [B, E] of pictures [B, H, W, C] in [-1, 1], of the CLIP's size or another."""
    if image.shape[1:] != model.shape:
        image = jax.image.resize(image, (len(image), *model.shape), "cubic", antialias=True)
    return _of_norm(model, model.net.apply({"params": params}, image, method="encode_image"))


def embed_text(model: Clip, params: Params, text: Array) -> dict[str, Array]:
    """The conditions 'text_embedding' [B, E] and 'text_features' [B, L, W], NaN at padding, of captions' ids [B, L]."""
    embedding, features = model.net.apply({"params": params}, text, method="encode_text")
    features = jnp.where((text < 0)[..., None], jnp.nan, features)
    return {"text_embedding": _of_norm(model, embedding), "text_features": features}


def embed_batch(stage: Stage) -> Callable[..., dict[str, Array]]:
    """(frozen CLIP's parameters, {'image', 'clip_text'}) -> what `objective` reads in their place.

    That is 'image', of the stage's size, where it makes pictures, and the embeddings that it takes or makes. Pictures
    may be a whole number of times larger than the stage's (`config.picture_shape`); an 'image_embedding' that is there
    already is taken as it is. 'clip_text' are ids of the CLIP's tokenizer, [B, L], wanted only by a stage that reads
    captions by it.
    """

    def embed(params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
        image, made = batch["image"], {}
        if "image_embedding" in (*stage.takes, stage.emits):
            known = batch.get("image_embedding")
            made["image_embedding"] = embed_image(stage.clip, params, image) if known is None else known
        if names := [name for name in BY_TEXT_ENCODER if name in stage.takes]:
            text = embed_text(stage.clip, params, batch["clip_text"])
            made |= {name: text[name] for name in names}
        if stage.emits == "image_embedding":
            return made
        return made | {"image": augment.area_downsample(image, image.shape[1] // stage.shape[0])}

    return embed


def withholding_captions(stage: Stage, params: Params) -> Stage:
    """The stage with the empty caption's embeddings, by its CLIP's `params`, in place of a withheld caption's."""
    if not {*BY_TEXT_ENCODER} & {*stage.null}:
        return stage
    nothing = embed_text(stage.clip, params, jnp.asarray(stage.clip.empty)[None])
    return dataclasses.replace(stage, null=stage.null | {k: nothing[k][0] for k in nothing if k in stage.null})


# ---- training ------------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """What `train` needs to know of a model, and all it knows.

    Attributes:
      init: key -> params.
      init_extra: () -> whatever else belongs to the training state (a history of losses, or nothing).
      loss: (params, extra, batch, keys [n], position [n], total, gather) -> (loss [n], metrics, feedback): the loss of
        each of n examples, which stand at `position` among the `total` of the global batch; metrics {name: (sum,
        count)}; feedback, a tree of arrays [n]. Parameters are read through Flax, which makes whole those that are cut
        over the devices. `gather` brings the examples of all devices together, [n, ...] -> [N, ...]; without it those
        at hand are all.
      update_extra: (extra, feedback of the whole global batch) -> extra.
    """

    init: Callable[[Array], Params]
    init_extra: Callable[[], Any]
    loss: Callable[..., tuple[Array, dict[str, tuple[Array, Array]], Any]]
    update_extra: Callable[[Any, Any], Any]


def objective(model: Stage | NoisedClassifier | Clip) -> Objective:
    """The training objective of a stage, a noised classifier or a CLIP."""
    if isinstance(model, Stage) and model.codec is not None:
        return code_objective(model)
    makers = {NoisedClassifier: classifier_objective, Clip: clip_objective, Stage: diffusion_objective}
    return makers[type(model)](model)


def _objective(model: Stage | NoisedClassifier | Clip, loss: Callable) -> Objective:
    """A loss with what all objectives share: the network's start, and the history that draws noise levels."""
    return Objective(
        init=lambda key: init_params(model, key),
        init_extra=model.timesteps.init,
        loss=loss,
        update_extra=lambda extra, feedback: model.timesteps.update(extra, *feedback),
    )


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
        low_res = augment.round_to_bytes(low_res)
    if c.blur:
        low, high = c.blur_sigma
        low_res = augment.random_blur(low_res, keys["blur"], share=c.blur, low=low, high=high)
    if not c.noise:
        return {"low_res": low_res}
    # From 0, no noise, to the strongest, both included, in steps of the chain if it has any.
    level = stage.schedule(c.noise * jax.vmap(jax.random.uniform)(keys["level"]))
    return {"low_res": augment.noise_to(low_res, level, keys["noise"]), "low_res_time": level.time}


def _as_sampled(low_res: Array, stage: Stage, level: NoiseLevel, keys: Array | None) -> dict[str, Array]:
    """The conditions that sampling makes of a smaller picture at a level [B]; without keys it is noised already."""
    noised = keys is None
    if stage.low_res.round and not noised:
        low_res = augment.round_to_bytes(low_res)
    if not stage.low_res.noise:
        return {"low_res": low_res}
    return {"low_res": low_res if noised else augment.noise_to(low_res, level, keys), "low_res_time": level.time}


MADE = ("low_res", "inpaint")  # conditions that training makes of the picture


def _drop_rates(stage: Stage) -> float | dict[tuple[str, ...], float]:
    """The share of the examples of which each group of conditions is withheld, see `augment.drop`."""
    if not stage.drop_text:
        return stage.drop
    text = tuple(name for name in stage.null if name in ("text", *BY_TEXT_ENCODER))
    return {tuple(name for name in stage.null if name not in text): stage.drop, text: stage.drop_text}


def diffusion_objective(stage: Stage) -> Objective:
    """The training objective of a diffusion stage (DDPM algorithm 1; Improved DDPM section 3).

    Batches hold 'image' [n, H, W, C] in [-1, 1] and the conditions that the stage takes; of a prior 'image_embedding'
    [n, D] in place of the picture. Noise, noise level, dropout and which conditions are withheld depend on an example's
    own key. Metrics are the loss and its terms, of a prior also the cosine of the embedding and its estimate.
    """
    # One reverse step for every training step, so that the bound knows where each would go.
    steps = schedules.respaced(stage.schedule, stage.train_steps)[::-1] if stage.train_steps else None

    def steps_at(u: Array) -> Transition:
        if steps is None:
            return schedules.to_clean(stage.schedule(u))
        index = jnp.rint(u * stage.train_steps).astype(jnp.int32) - 1
        return jax.tree.map(lambda a: jnp.asarray(a)[index], steps)

    def loss(params, extra, batch, keys, position, total, gather=None):
        names = ("noise", "timestep", "dropout", "drop", "crop", "low_res")
        keys = _split(keys, (*names, "inpaint") if "inpaint" in stage.takes else names)
        u, weight = stage.timesteps.draw(extra, keys["timestep"], position, total)
        x = batch["image_embedding" if stage.emits == "image_embedding" else "image"].astype(jnp.float32)
        cond = {k: batch[k] for k in stage.takes if k not in MADE}
        if stage.emits == "image_embedding":
            x = codes.scaled(x, stage.clip.scale)
        if c := stage.low_res:
            low_res = batch["low_res"] if "low_res" in batch else augment.area_downsample(x, c.factor)
            if c.crop:
                x, low_res = augment.crop_together(x, low_res, keys["crop"], side=c.crop)
            cond |= _worsened(low_res, keys["low_res"], stage)
        if "inpaint" in stage.takes:
            known = augment.random_known(keys["inpaint"], x.shape[1:], empty=stage.empty)
            cond["inpaint"] = augment.masked(x, known)
        noised = losses.noised(x, _normal(keys["noise"], x.shape[1:]), steps_at(u))
        if stage.null:
            cond = augment.drop(cond, keys["drop"], rate=_drop_rates(stage), null=stage.null)
        out = stage.net.apply({"params": params}, noised.z, noised.step.t.time, cond, dropout_keys=keys["dropout"])
        value, terms = stage.loss(out, noised, predicts=stage.predicts, variance=stage.variance)
        if stage.emits == "image_embedding":
            p = predict(out, noised.z, noised.step, predicts=stage.predicts, variance=stage.variance)
            found, wanted = (guidance.unit(codes.unscaled(v, stage.clip.scale)) for v in (p.x, x))
            terms = terms | {"cosine": jnp.sum(found * wanted, axis=-1)}
        return value * weight, _by_quarter({"loss": value, **terms}, u), (u, value)

    return _objective(stage, loss)


def code_objective(stage: Stage) -> Objective:
    """Cross entropy of the codes of an embedding, each given those before it (DALL-E 2, section 2.2).

    Batches hold 'image_embedding' [n, D] and the conditions that the stage takes, 'text_embedding' among them: the
    bucket of the product of the two is one more condition, which is withheld with the caption. The stage's codec is
    what else belongs to the training state. Metrics are the loss, the mean over codes in nats, and the share of codes
    that are the most probable; also of each quarter of the row, whose first components tell the most.
    """

    def loss(params, extra, batch, keys, position, total, gather=None):
        keys = _split(keys, ("drop", "dropout"))
        x = batch["image_embedding"].astype(jnp.float32)
        wanted = codes.write(x, extra)
        cond = {k: batch[k] for k in stage.takes}
        cond["similarity"] = codes.similarity_bucket(x, batch["text_embedding"], extra)
        if stage.null:
            cond = augment.drop(cond, keys["drop"], rate=_drop_rates(stage), null=stage.null)
        logits = stage.net.apply({"params": params}, wanted, None, cond, dropout_keys=keys["dropout"])
        each = losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.ravel()).reshape(wanted.shape)
        hits = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
        metrics = {}
        for name, term in {"loss": each, "top1": hits}.items():
            parts = {"": term} | {f"_q{q}": part for q, part in enumerate(jnp.array_split(term, 4, axis=1))}
            metrics |= {name + q: (jnp.sum(a), jnp.asarray(a.size, jnp.float32)) for q, a in parts.items() if a.size}
        return jnp.mean(each, axis=1), metrics, ()

    return Objective(
        init=functools.partial(init_params, stage),
        init_extra=lambda: jax.tree.map(jnp.asarray, stage.codec),
        loss=loss,
        update_extra=lambda codec, feedback: codec,
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

    def loss(params, extra, batch, keys, position, total, gather=None):
        keys = _split(keys, ("noise", "timestep", "dropout"))
        u, weight = classifier.timesteps.draw(extra, keys["timestep"], position, total)
        x, t = batch["image"].astype(jnp.float32), classifier.schedule(u)
        eps = _normal(keys["noise"], classifier.shape)
        terms = classifier_terms(classifier, params, x, batch["label"], t, eps, dropout_keys=keys["dropout"])
        return terms["loss"] * weight, _by_quarter(terms, u), (u, terms["loss"])

    return _objective(classifier, loss)


def clip_terms(
    model: Clip,
    params: Params,
    x: Array,
    text: Array,
    t: NoiseLevel,
    eps: Array,
    *,
    position: Array | None = None,
    gather: Callable[[Array], Array] | None = None,
) -> dict[str, Array]:
    """How well a CLIP matches pictures at given noise levels with their captions.

    Args:
      model: the CLIP.
      params: its parameters.
      x: [n, H, W, C] clean pictures; text: [n, L] ids of their captions; eps: [n, H, W, C] noise.
      t: levels [n]; not used by a CLIP of clean pictures.
      position, gather: see `losses.contrastive`; without them the n pairs are all there are.

    Returns:
      'loss' (nats), 'image_top1' and 'text_top1', [n] each.
    """
    z, time = (diffuse(x, t, eps), t.time) if model.noised else (x, None)
    image, words, scale = model.net.apply({"params": params}, z, text, time)
    position = jnp.arange(len(x)) if position is None else position
    more = {"gather": gather} if gather else {}
    scale = jnp.minimum(scale, LARGEST_LOGIT_SCALE)
    loss, hits = losses.contrastive(image, words, scale, position, **more)
    return {"loss": loss, **hits}


def clip_objective(model: Clip) -> Objective:
    """The contrastive loss over the global batch (GLIDE, section 2.4: on noised pictures).

    Batches hold 'image' and 'text'. Metrics are the loss and the accuracy of both directions, by quarter of the noise
    range. Of an accumulated batch each part is contrasted alone.
    """

    def loss(params, extra, batch, keys, position, total, gather=None):
        keys = _split(keys, ("noise", "timestep"))
        u, weight = model.timesteps.draw(extra, keys["timestep"], position, total)
        x, eps = batch["image"].astype(jnp.float32), _normal(keys["noise"], model.shape)
        terms = clip_terms(model, params, x, batch["text"], model.schedule(u), eps, position=position, gather=gather)
        return terms["loss"] * weight, _by_quarter(terms, u), (u, terms["loss"])

    return _objective(model, loss)


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample_fn(
    stages: Sequence[Stage], *, keep: int = 0, every_stage: bool = False, strength: float = 1.0
) -> Callable[..., Array]:
    """The pure sampler of a list of stages, ready for `jax.jit` and `jax.export`.

    Args:
      stages: in order; each one's picture is the next one's `low_res`, a prior's embedding the later ones'
        `image_embedding`.
      keep: also return this many estimates of x on the way of the last stage (see `samplers.sample`).
      every_stage: return what every stage made, {stage: pictures or embeddings}, in place of the last one's.
      strength: how much of the chain of the first stage that makes pictures is walked, in (0, 1]; below 1 from a noised
        `picture` and not from noise alone (SDEdit, Meng et al. 2022; GLIDE, section 5).

    Returns:
      (params {section: params}, keys [B], *, guidance=None, level=None, picture=None, known=None, **cond) ->
      [B, H, W, C] float32, in [-1, 1] if guidance clips. `guidance` is {stage: scale} and `level` {stage: noise level u
      of its smaller picture}, scalars or [B]; stages that they do not name take their own. A first stage that takes
      `low_res` [B, h, w, C] makes pictures of `factor` times its size. `picture` [B, H, W, C], of the last stage's
      size, is what is edited: with `known` [B, H, W, 1] its pixels stay where that is 1, by the inpainting channels of
      stages that have them and by replacement in the others. Picture i depends on keys[i] and the i-th conditions,
      scale and level only.
    """
    painters = [stage for stage in stages if stage.emits == "low_res"]

    def sample(
        params: Mapping[str, Params],
        keys: Array,
        *,
        guidance: Mapping[str, Array] | None = None,
        level: Mapping[str, Array] | None = None,
        picture: Array | None = None,
        known: Array | None = None,
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
            scale = jnp.asarray((guidance or {}).get(stage.name, stage.scale), jnp.float32)
            repeat = functools.partial(jnp.repeat, repeats=stage.candidates, axis=0) if stage.candidates > 1 else _same
            if stage.candidates > 1:
                stage_keys = jax.vmap(lambda key, n=stage.candidates: jax.random.split(key, n))(stage_keys).reshape(-1)
                scale = repeat(scale) if scale.ndim else scale
            noise = samplers.picture_noise(stage_keys, shape)
            z, sampler, here = stage.temperature * noise(jnp.int32(-1)), stage.sampler, None  # nor has this
            if picture is not None and stage in painters:
                factor = stages[-1].shape[0] // stage.shape[0]
                here = augment.shrink_known(
                    picture, jnp.zeros_like(picture[..., :1]) if known is None else known, factor
                )
            if "inpaint" in stage.takes:
                nothing = jnp.zeros((*z.shape[:3], z.shape[3] + 1))
                given["inpaint"] = nothing if known is None else augment.masked(*here)
            elif known is not None and here is not None:
                sampler = samplers.keep_known(sampler, *here)
            if stage in painters[:1] and strength < 1:
                steps = schedules.last(steps, strength)
                z = diffuse(here[0], jax.tree.map(lambda a: jnp.broadcast_to(a[0], keys.shape), steps.t), z)
            last = stage is stages[-1]
            guided, given = _ask_clip(stage, params, given)
            wanted, kept = given.get("text_embedding"), None
            if stage.codec is not None:
                out = write_embeddings(guided, params[stage.name], stage_keys, jax.tree.map(repeat, given), scale)
            else:
                guided, given = _encode_text(guided, params, given)
                out = samplers.sample(
                    guided_denoiser(guided, params, scale),
                    z,
                    noise,
                    steps,
                    sampler,
                    keep=keep if last else 0,
                    **jax.tree.map(repeat, given),
                )
                out, kept = out if keep and last else (out, None)
                if stage.emits == "image_embedding":
                    out = codes.unscaled(out, stage.clip.scale)
            if stage.candidates > 1:
                out = _nearest(out, wanted)
            if known is not None and reached is None and here is not None:
                out = jnp.where(here[1] > 0, here[0], out)
            made[stage.name] = cond[stage.emits] = out
        return made if every_stage else out if kept is None else (out, kept)

    return sample


def _same(a: Array) -> Array:
    return a


def write_embeddings(stage: Stage, params: Params, keys: Array, cond: Mapping[str, Array], scale: Array) -> Array:
    """Has an autoregressive prior write image embeddings, [B, D] (DALL-E 2, section 2.2).

    It is asked for pictures that fit their captions well: the bucket of the product of the two is drawn among those of
    the stage's percentile and above (the paper: the upper half).

    Args:
      stage: the stage.
      params: its parameters; 'fitted' among them is the codec.
      keys: [B] typed PRNG keys.
      cond: what its network takes, [B, ...] each.
      scale: of classifier-free guidance, if the stage has that; scalar or [B].
    """
    codec = codes.Codec(**nn.meta.unbox(params["fitted"]))
    buckets = codec.similarity_edges.shape[0] + 1
    lowest = min(round(buckets * stage.percentile / 100), buckets - 1)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), lowest, buckets))
    cond = {k: cond[k] for k in stage.takes} | {"similarity": draw(_fold_in(keys, -1))}  # a number that no code has
    example = jnp.zeros((len(keys), codec.directions.shape[1]))

    def encode(cond: Mapping[str, Array]) -> networks.Context:
        found = stage.net.apply({"params": params}, cond, example, method="encode_conditions")
        return networks.merge([found[name] for name, _ in stage.net.conditioners])

    withheld = None
    if "classifier_free" in stage.guidance:
        null = {k: jnp.broadcast_to(jnp.asarray(v, cond[k].dtype), cond[k].shape) for k, v in stage.null.items()}
        withheld = encode(cond | null)
    row = networks.sample_codes(
        stage.net.unet,
        params["code_prior"],
        encode(cond),
        keys,
        withheld=withheld,
        scale=scale,
        temperature=stage.temperature,
    )
    return _of_norm(stage.clip, codes.read(row, codec))


def _nearest(embeddings: Array, wanted: Array) -> Array:
    """Of several embeddings [B * N, E] of each caption the one whose dot product with `wanted` [B, E] is the largest
    (DALL-E 2, section 2.2): [B, E]."""
    candidates = embeddings.reshape(len(wanted), -1, wanted.shape[-1])
    best = jnp.argmax(jnp.einsum("bne,be->bn", candidates, wanted, precision="highest"), axis=1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]


def _ask_clip(stage: Stage, params: Mapping[str, Params], cond: dict[str, Array]) -> tuple[Stage, dict[str, Array]]:
    """Has a caption read by the stage's CLIP, and by that which guides it: none of the steps changes what it says."""
    cond = dict(cond)
    ids = cond.pop("clip_text", None)
    if names := [name for name in BY_TEXT_ENCODER if name in stage.takes]:
        own = params[stage.clip.name]
        text = embed_text(stage.clip, own, ids)
        cond |= {name: text[name] for name in names}
        stage = withholding_captions(stage, own)
    if isinstance(stage.guide, Clip):
        own, net = params[stage.guide.name], stage.guide.net
        cond["clip_text"], _ = net.apply({"params": own}, ids, method="encode_text")
    return stage, cond


def _encode_text(stage: Stage, params: Mapping[str, Params], cond: dict[str, Array]) -> tuple[Stage, dict[str, Any]]:
    """Reads the text and the embeddings, and their absence, before the steps (GLIDE, section 3.1)."""
    once = {name: cond[name] for name in stage.takes if name in READ_ONCE}
    if not once:
        return stage, cond

    def encode(cond: Mapping[str, Array]) -> dict[str, networks.Context]:
        z = jnp.zeros((len(next(iter(cond.values()))), *stage.shape))
        return stage.net.apply({"params": params[stage.name]}, cond, z, method="encode_conditions")

    withheld = {
        name: jnp.broadcast_to(jnp.asarray(stage.null[name], a.dtype), (1, *a.shape[1:]))
        for name, a in once.items()
        if name in stage.null
    }
    if withheld:
        nothing = jax.tree.map(lambda a: a[0], encode(withheld))
        stage = dataclasses.replace(stage, null={**stage.null, **nothing})
    return stage, {**cond, **encode(once)}


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
                augment.area_downsample(image, c.factor),
                stage.schedule(jnp.full(keys.shape, c.level)),
            )
            cond |= _as_sampled(low_res, stage, level, _fold_in(keys, -2))
        if "inpaint" in stage.takes:
            cond["inpaint"] = jnp.zeros((*image.shape[:3], image.shape[3] + 1))
        return losses.bits_per_dim(denoise, image, noise, stage.sampling, **cond)

    return evaluate
