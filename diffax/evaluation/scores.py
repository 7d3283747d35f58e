"""How good a trained model is, in numbers that need no published network."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffax.components import build
from diffax.conditions.base import Offer
from diffax.data import images
from diffax.diffusion import losses
from diffax.evaluation import metrics
from diffax.evaluation.classifiers import EvaluationClassifier, Fitted
from diffax.evaluation.rate_distortion import rate_distortion
from diffax.models.base import Sampling
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn, embedder, noised_conditions, text_embedder
from diffax.training import parallel, processes, reporting

Params = Any
Row = dict[str, Any]
LEVELS = 20  # noise levels at which classifiers and CLIPs are scored


def held_out_for(section: Mapping[str, Any], model: Any, limit: int) -> dict[str, np.ndarray]:
    """At most `limit` held-out examples: the columns that a model reads, and labels and captions where there are any.

    Args:
      section: of the model.
      model: any model.
      limit: how many.
    """
    columns = grids.columns_there(section, model.data_shape) | model.columns()
    return grids.held_out_examples(section, model.data_shape, limit, columns)


# ---- generators -----------------------------------------------------------------------------------------------------


def bits_per_dim(
    model: Any,
    params: Params,
    batch: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int = 0,
    mode: str = "pmap",
) -> losses.BitsPerDim:
    """The variational bound of pictures, along the model's sampling steps (DDPM section 4; Improved DDPM section 3).

    Args:
      model: a generator of pictures that `has_bound`.
      params: its parameters.
      batch: 'image' [N, H, W, C] and the model's columns.
      batch_size: pictures at once.
      seed: of the noise, one draw for every term.
      mode: of `parallel.sampling_mode`; under 'fsdp' the devices of a process share the parameters.

    Returns:
      The bound and its terms, as numpy.
    """
    run, params = parallel.map_batch(model.bits_per_dim, mode=mode), parallel.settled(params, mode)
    image = batch["image"]
    keys = _keys(seed, len(image))
    given = {name: condition.from_batch(batch) for name, condition in model.conditions.items()}

    def some(part: slice) -> losses.BitsPerDim:
        done = []
        for start in reporting.progress_bar(range(part.start, part.stop, batch_size), "bits per dimension"):
            index = np.minimum(np.arange(start, start + batch_size), part.stop - 1)
            out = run(params, image[index], keys[index], jax.tree.map(lambda a, i=index: np.asarray(a)[i], given))
            done.append(jax.tree.map(lambda a, left=part.stop - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    return processes.share(some, len(image))


def _keys(seed: int, n: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))


def patch_distance(made: np.ndarray, real: np.ndarray) -> float:
    """The Frechet distance of `metrics.patches` of two sets of pictures."""
    return metrics.frechet_distance(metrics.patches(made), metrics.patches(real))


class Wanted(NamedTuple):
    """What samples are made of.

    Attributes:
      values: {argument of a call: [N] values}.
      num: how many of them are as the held-out data are; the rest are `others`.
      others: {name: place among the N} of further values, see `classifiers.Fitted.others`.
    """

    values: Mapping[str, Sequence[Any]]
    num: int
    others: Mapping[str, slice]

    @property
    def total(self) -> int:
        """N."""
        return self.num + sum(part.stop - part.start for part in self.others.values())


class _Plan(NamedTuple):
    """What `scores` measures of every combination of settings."""

    sample_fn: SampleFn
    settings: Mapping[str, Any]
    real: Mapping[str, np.ndarray]
    wanted: Wanted
    argument: str
    classifier: Fitted | None
    class_names: Sequence[str]


def scores(
    sample_fn: SampleFn, settings: Mapping[str, Any] | None = None, class_names: Sequence[str] = ()
) -> Iterator[Row]:
    """Scores every combination of `settings` guidance, levels, samplers and steps; the config's own where one is empty.

    Several processes share the sampling and the bounds; each has all of the rows, and trains the same classifier.

    Args:
      sample_fn: the trained model, from its first stage on.
      settings: the fields of `config.eval`, by default those of its config.
      class_names: of the labels.

    Yields:
      Rows: steps and sampler (of the last stage), guidance (of the stages that make pictures; a prior keeps its own)
      and level (of the last stage's smaller picture); bits_per_dim (of the steps and the last stage, whatever the rest
      is); and of `settings['num']` samples what the evaluation classifier measures, and the Frechet distance of patches
      to held-out pictures. For pictures: `_samples` (the first ones), `_labels` (below them), `_columns` and `_curve`
      (a `RateDistortion`); `_shares`, names of shares that are worth drawing against the guidance.
    """
    settings = sample_fn.config["eval"] if settings is None else settings
    bounded = settings["bpd_num"] if sample_fn.models[-1].has_bound else 0
    plan = _plan(sample_fn, settings, bounded, class_names)
    grid = settings["steps"] or (None,)
    bounds = {steps: _bound(plan, steps, bounded) for steps in grid if bounded}
    choices = (settings["guidance"] or (None,), _levels(sample_fn, settings), settings["samplers"] or (None,), grid)
    for guidance, level, sampler, steps in itertools.product(*choices):
        row = _header(sample_fn, guidance, level, sampler, steps)
        if steps in bounds:
            row["bits_per_dim"] = float(np.mean(bounds[steps].total))
            row["_curve"] = rate_distortion(bounds[steps])
        if plan.wanted.num:
            row |= _measured(plan, _call(sample_fn, guidance, level, sampler, steps))
        yield row


def _plan(sample_fn: SampleFn, settings: Mapping[str, Any], bounded: int, class_names: Sequence[str]) -> _Plan:
    """Fits the evaluation classifier, and reads what samples are compared with and made of."""
    last, num = sample_fn.models[-1], 0 if sample_fn.enlarges else settings["num"]
    section = sample_fn.config[last.name]
    component: EvaluationClassifier = build(settings["classifier"], "evaluation", path="config.eval.classifier")
    argument, used = component.argument, num > 0 and component.argument in sample_fn.arguments
    classifier = component.fit(section, tuple(last.shape)) if used else None
    columns = grids.columns_there(section, last.shape) | (last.columns() if bounded else {})
    columns |= component.columns if used else {}
    real = grids.held_out_examples(section, last.shape, max(bounded, num, 1), columns)
    wanted = _wanted(sample_fn, num, real, argument, classifier.others(num) if used else {})
    return _Plan(sample_fn, settings, real, wanted, argument, classifier, class_names)


def _wanted(
    sample_fn: SampleFn, num: int, real: Mapping[str, np.ndarray], argument: str, others: Mapping[str, Sequence[Any]]
) -> Wanted:
    """Values of the arguments: labels in turn, captions of the held-out pictures, and the classifier's further ones."""
    ends = np.cumsum([num, *(len(values) for values in others.values())]).tolist()
    if not num:
        return Wanted({}, 0, {})
    offer = Offer([], lambda n: real, lambda image: sample_fn.embed(image))
    values = {name: condition.choose(ends[-1], offer) for name, condition in sample_fn.arguments.items()}
    if others:
        values[argument] = [*values[argument][:num], *itertools.chain(*others.values())]
    parts = [slice(*part) for part in itertools.pairwise(ends)]
    return Wanted(values, num, dict(zip(others, parts, strict=True)))


def _levels(sample_fn: SampleFn, settings: Mapping[str, Any]) -> Sequence[float | None]:
    condition = noised_conditions(sample_fn.models).get(sample_fn.models[-1].name)
    return [level for level in settings["levels"] if condition and level <= condition.noise] or [None]


def _header(
    sample_fn: SampleFn, guidance: float | None, level: float | None, sampler: str | None, steps: str | None
) -> Row:
    """The choices of a row."""
    last = sample_fn.models[-1]
    own = sample_fn.config[last.name].get("sampler", {}).get("name")
    row: Row = {"steps": last.resampled(Sampling(steps=steps)).num_steps, "sampler": sampler or own}
    scales = _scales(sample_fn)
    if scales:
        row["guidance"] = next(iter(scales.values())) if guidance is None else guidance
    condition = noised_conditions(sample_fn.models).get(last.name)
    if condition:
        row["level"] = condition.level if level is None else level
    return row


def _scales(sample_fn: SampleFn) -> dict[str, float]:
    """{stage that makes pictures: its scale of guidance}; of a prior, which keeps its own, only where it is alone."""
    scales = {model.name: model.scale for model in sample_fn.models if model.scale is not None}
    pictures = {model.name for model in sample_fn.models if len(model.shape) == 3}
    return {name: scale for name, scale in scales.items() if name in pictures} or scales


def _call(sample_fn: SampleFn, guidance: float | None, level: float | None, sampler: Any, steps: Any) -> dict[str, Any]:
    """Arguments of a call of `sample_fn`."""
    return {
        "guidance": None if guidance is None else dict.fromkeys(_scales(sample_fn), guidance),
        "level": None if level is None else {sample_fn.models[-1].name: level},
        "steps": steps,
        "sampler": sampler,
    }


def _bound(plan: _Plan, steps: str | None, num: int) -> losses.BitsPerDim:
    """The variational bound of the last stage along some steps, of so many held-out pictures."""
    sample_fn, last = plan.sample_fn, plan.sample_fn.models[-1]
    some = {name: values[:num] for name, values in plan.real.items()}
    how = {"batch_size": plan.settings["batch_size"], "mode": sample_fn.mode}
    return bits_per_dim(last.resampled(Sampling(steps=steps)), sample_fn.params[last.name], some, **how)


def _measured(plan: _Plan, call: Mapping[str, Any]) -> Row:
    """The numbers of the samples of one call."""
    sample_fn, wanted, classifier = plan.sample_fn, plan.wanted, plan.classifier
    size = plan.settings["batch_size"]
    made = grids.sample_together(sample_fn, 1, wanted.total, wanted.values, batch_size=size, **call)
    images.check_finite(made)
    columns = sample_fn.num_classes or 8
    shown = [*range(min(5 * columns, wanted.num))]
    own = made[: wanted.num]
    row: Row = {"samples": wanted.num, "frechet_patches": patch_distance(own, plan.real["image"])}
    if classifier is not None:
        row |= classifier.score(own, wanted.values[plan.argument][: wanted.num], plan.real)
        for name, part in wanted.others.items():
            found = classifier.score(made[part], wanted.values[plan.argument][part], plan.real)
            row |= {f"{name}_samples": part.stop - part.start, f"{name}_accuracy": found["accuracy"]}
            shown += range(part.start, min(part.start + 2 * columns, part.stop))
        shares = (*classifier.shares, *(f"{name}_accuracy" for name in wanted.others))
        row["_shares"] = shares if classifier.shares else ()
    labels = grids.captions_of(sample_fn, wanted.values, plan.class_names)
    row |= {"_samples": made[shown], "_columns": columns}
    return row | {"_labels": None if labels is None else [labels[i] for i in shown]}


def enlargements(sample_fn: SampleFn, settings: Mapping[str, Any] | None = None) -> Iterator[Row]:
    """Scores one stage on held-out pictures made smaller, beside bicubic interpolation.

    Args:
      sample_fn: of that stage alone, see `SampleFn.alone`.
      settings: the fields of `config.eval`, by default those of its config: `num` pictures at every one of `levels`.

    Yields:
      Rows: method, level, psnr in dB (fidelity to the very picture; the mean of all possible pictures wins) and
      frechet_patches (whether the set looks like the real one). For pictures: `_small`, `_made` and `_real`.
    """
    settings = sample_fn.config["eval"] if settings is None else settings
    (model,) = sample_fn.models
    section, condition = sample_fn.config[model.name], sample_fn.arguments["image"]
    columns = grids.columns_there(section, model.shape)
    real = grids.held_out_examples(section, model.shape, settings["num"], columns)
    image, given = real["image"], grids.arguments_of(sample_fn, real)
    if getattr(condition, "round", False):
        given["image"] = images.as_floats(images.to_uint8(given["image"], nearest=True))
    small = given["image"]
    noised = noised_conditions(sample_fn.models).get(model.name)

    def row(method: str, made: np.ndarray, **more: Any) -> Row:
        numbers = {"psnr": metrics.psnr(made, image), "frechet_patches": patch_distance(made, image)}
        return {"method": method, **more, **numbers, "pictures": len(image)}

    yield row("bicubic", images.bicubic(small, image.shape[1] // small.shape[1]))
    for level in [level for level in settings["levels"] if noised and 0 < level <= noised.noise] or (None,):
        how = {"level": level, "batch_size": settings["batch_size"]}
        made = grids.sample_together(sample_fn, 1, len(image), given, **how)
        images.check_finite(made)
        more = {"level": noised.level if level is None else level} if noised else {}
        yield row(model.name, made, **more) | {"_small": small[:8], "_made": made[:8], "_real": image[:8]}


# ---- noised classifiers and CLIPs -----------------------------------------------------------------------------------


def guide_accuracy(
    model: Any,
    params: Params,
    batch: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    levels: int = LEVELS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How well a noised classifier recognises pictures, or a CLIP finds captions, from clean data to noise.

    Several processes share the noise levels; each has all of the result.

    Args:
      model: the classifier or CLIP: it has `terms`, `schedule` and `noised`.
      params: its parameters.
      batch: 'image' [N, H, W, C] and the model's columns.
      batch_size: pictures at once; a CLIP finds its captions among as many as a device has of them.
      levels: number of noise levels, u = 1 / levels .. 1; a CLIP of clean pictures, which none of them reaches, is
        scored once.
      seed: of the noise.

    Returns:
      u, loss and the accuracies (top1 and top5, or image_top1 and text_top1), [levels] each.
    """
    n, u = len(batch["image"]), np.arange(1, levels + 1, dtype=np.float32) / levels
    scored = u if model.noised else u[:1]
    rows = {name: batch[name] for name in model.batch_example()}
    measure = _terms_at(model, params, rows, _keys(seed, n), batch_size)

    def some(part: slice) -> dict[str, np.ndarray]:
        found = [measure(level) for level in reporting.progress_bar(scored[part], "noise levels")]
        return {name: np.array([row[name] for row in found]) for name in found[0]}

    found = processes.share(some, len(scored))
    return {"u": u} | {name: np.broadcast_to(values, u.shape) for name, values in found.items()}


def _terms_at(
    model: Any, params: Params, batch: Mapping[str, np.ndarray], keys: jax.Array, batch_size: int
) -> Callable[[float], dict[str, float]]:
    """Noise level -> the means of `model.terms` over a batch."""
    n = len(keys)

    def terms(params, rows, keys, u):
        eps = jax.vmap(lambda key: jax.random.normal(key, model.shape))(keys)
        return model.terms(params, rows, model.schedule(u), eps)

    run = parallel.map_batch(terms)

    def measure(level: float) -> dict[str, float]:
        done = []
        for start in range(0, n, batch_size):
            index = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
            rows = {name: values[index] for name, values in batch.items()}
            out = run(params, rows, keys[index], np.full(len(index), level, np.float32))
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts).mean(), *done)

    return measure


def zero_shot_accuracy(
    clip: Any,
    params: Params,
    batch: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    *,
    template: str,
    batch_size: int,
) -> float:
    """The share of pictures to which the caption of their class is the nearest of all classes' (Radford et al. 2021).

    Args:
      clip: a CLIP of clean pictures.
      params: its parameters.
      batch: 'image' [N, H, W, C] and 'label' [N].
      class_names: of the labels.
      template: the caption of a class; {} stands for its name.
      batch_size: pictures at once.
    """
    ids = clip.tokenizer([template.format(name.replace("_", " ")) for name in class_names])
    classes = np.asarray(text_embedder(clip)(params, ids))
    classes = classes / np.linalg.norm(classes, axis=1, keepdims=True)
    run, image = embedder(clip), batch["image"]
    parts = [np.asarray(run(params, image[i : i + batch_size])) for i in range(0, len(image), batch_size)]
    return float(np.mean(np.argmax(np.concatenate(parts) @ classes.T, axis=1) == batch["label"]))


def guide_scores(
    config: Mapping[str, Any],
    model: Any,
    params: Params,
    batch: Mapping[str, np.ndarray],
    class_names: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """`guide_accuracy`; of a CLIP of clean pictures and data with classes, zero-shot accuracy too.

    Args:
      config: the whole config, of which `eval` counts.
      model: the classifier or CLIP.
      params: its parameters.
      batch: from `held_out_for`.
      class_names: of the labels.
    """
    settings = config["eval"]
    found = guide_accuracy(model, params, batch, batch_size=settings["batch_size"])
    if model.noised or not hasattr(model, "embed_text") or not class_names or "label" not in batch:
        return found
    how = {"template": settings["template"], "batch_size": settings["batch_size"]}
    accuracy = zero_shot_accuracy(model, params, batch, class_names, **how)
    return found | {"zero_shot": np.full(len(found["u"]), accuracy)}
