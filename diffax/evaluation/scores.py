"""How good a trained model is, in numbers: samples, bits per dimension, enlargements, classifiers and CLIPs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax.components import build
from diffax.conditions.base import Offer
from diffax.data import images
from diffax.data.pipeline import Column
from diffax.diffusion import losses
from diffax.evaluation import metrics
from diffax.evaluation.rate_distortion import rate_distortion
from diffax.models.base import Sampling
from diffax.sampling import grids
from diffax.sampling.sample_fn import SampleFn, embedder, noised_conditions, text_embedder
from diffax.training import parallel, processes, reporting

Params = Any
Row = dict[str, Any]
Examples = Mapping[str, np.ndarray]


# ---- bits per dimension ---------------------------------------------------------------------------------------------


def bits_per_dim(
    model: Any, params: Params, batch: Examples, *, batch_size: int, seed: int = 0, mode: str = "pmap"
) -> losses.BitsPerDim:
    """The variational bound of pictures, along the model's sampling steps (DDPM, section 4; Improved DDPM, section 3).

    Args:
      model: with `has_bound`.
      params: its parameters.
      batch: 'image' [N, H, W, C] and what its conditions read of the data.
      batch_size: pictures at once.
      seed: of the noise, one draw for every term.
      mode: of `parallel.sampling_mode`; under 'fsdp' the devices of a process share the parameters.

    Returns:
      The bound and its terms, as numpy.
    """
    run = parallel.map_batch(model.bits_per_dim, mode=mode)
    params, n = parallel.settled(params, mode), len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    given = {name: condition.from_batch(batch) for name, condition in model.conditions.items()}

    def some(part: slice) -> losses.BitsPerDim:
        done = []
        for start in reporting.progress_bar(range(part.start, part.stop, batch_size), "bits per dimension"):
            index = np.minimum(np.arange(start, start + batch_size), part.stop - 1)
            out = run(params, batch["image"][index], keys[index], jax.tree.map(lambda v, i=index: v[i], given))
            done.append(jax.tree.map(lambda a, left=part.stop - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    return processes.share(some, n)


def _bounds(sample_fn: SampleFn, grid: Sequence[str | None], real: Examples, settings: Mapping) -> dict[str, Any]:
    """{sampling grid: the bound of the last model along it}, None for its own; {} of a model without one."""
    model, num = sample_fn.models[-1], settings["bpd_num"]
    if not num or not model.has_bound:
        return {}
    some = {name: values[:num] for name, values in real.items()}
    how = {"batch_size": settings["batch_size"], "mode": sample_fn.mode}
    params = sample_fn.params[model.name]
    return {steps: bits_per_dim(model.resampled(Sampling(steps)), params, some, **how) for steps in grid}


# ---- samples --------------------------------------------------------------------------------------------------------


def scores(sample_fn: SampleFn, settings: Mapping[str, Any], class_names: Sequence[str] = ()) -> Iterator[Row]:
    """Scores every combination of `settings` guidance, levels, samplers and steps; the config's own where one is empty.

    Several processes share the sampling and the bounds; each has all of the rows, and trains the same evaluation
    classifier.

    Args:
      sample_fn: the trained model, from its first stage on.
      settings: the config's `eval`.
      class_names: of the data, for pictures.

    Yields:
      Rows: steps, sampler, guidance (of the models of pictures) and level (of the last one's smaller picture);
      bits_per_dim (of the steps and the model, whatever the rest); and of `settings['num']` samples the numbers of the
      evaluation classifier and the Frechet distance of patches to held-out pictures. For pictures: `_samples`,
      `_labels` and `_curve` (a `RateDistortion`).
    """
    model = sample_fn.models[-1]
    section, grid = sample_fn.config[model.name], list(settings["steps"]) or [None]
    num = 0 if sample_fn.enlarges else settings["num"]
    classifier = build(settings["classifier"], "evaluation", path="config.eval.classifier")
    real = _real(sample_fn, max(num, settings["bpd_num"], 1), classifier.columns)
    fitted = None
    if num and classifier.argument in sample_fn.arguments and {*classifier.columns} <= {*real}:
        fitted = classifier.fit(section, tuple(model.shape))
    bounds = _bounds(sample_fn, grid, real, settings)
    given = _given(sample_fn, num, real) if num else {}
    others = fitted.others(num) if fitted else {}
    for choice in _choices(sample_fn, settings, grid):
        row = {**choice.row}
        if choice.steps in bounds:
            row["bits_per_dim"] = float(np.mean(bounds[choice.steps].total))
            row["_curve"] = rate_distortion(bounds[choice.steps])
        if num:
            made = _sample(sample_fn, given, num, choice, settings)
            row |= _shown(sample_fn, made, given, class_names)
            row |= {"samples": num, "frechet_patches": patch_distance(made, real["image"])}
            if fitted:
                row |= fitted.score(made, given[classifier.argument], real)
            for name, values in others.items():
                its = {**_given(sample_fn, len(values), real), classifier.argument: values}
                found = fitted.score(_sample(sample_fn, its, len(values), choice, settings), values, real)
                row |= {f"{name}_samples": len(values), f"{name}_accuracy": found["accuracy"]}
        yield row


def _real(sample_fn: SampleFn, limit: int, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Held-out pictures in the size of the last model, with all that its conditions and the classifier read."""
    model = sample_fn.models[-1]
    section = sample_fn.config[model.name]
    there = grids.columns_there(section, model.data_shape)
    wanted = {name: column for name, column in {**there, **model.columns(), **columns}.items() if column.key in there}
    found = grids.held_out_examples(section, model.data_shape, limit, wanted)
    return {**found, "image": grids.smaller(found["image"], found["image"].shape[1] // model.shape[0])}


def _given(sample_fn: SampleFn, n: int, real: Examples) -> dict[str, Any]:
    """Arguments of a call for n samples: labels in turn, captions of the data."""
    offer = Offer([], lambda limit: real, sample_fn.embed)
    return {name: c.choose(n, offer) for name, c in sample_fn.arguments.items() if name != "image"}


class _Choice:
    """One combination of the choices of sampling, and what stands of it in a row."""

    def __init__(
        self, sample_fn: SampleFn, guidance: float | None, level: float | None, sampler: str | None, steps: str | None
    ):
        model = sample_fn.models[-1]
        section = sample_fn.config[model.name]
        guided = [m for m in sample_fn.models if m.scale is not None and len(m.shape) == 3]
        noised = noised_conditions(sample_fn.models).get(model.name)
        self.steps, self.sampler = steps, sampler
        # A prior keeps its own scale: the paper of unCLIP varies the decoder's alone.
        self.guidance = None if guidance is None else {m.name: guidance for m in guided}
        self.level = None if level is None else {model.name: level}
        taken = model.resampled(Sampling(steps)).num_steps
        self.row: Row = {"steps": taken, "sampler": sampler or section.get("sampler", {}).get("name", "")}
        if guided:
            self.row["guidance"] = guided[-1].scale if guidance is None else guidance
        if noised is not None:
            self.row["level"] = noised.level if level is None else level


def _choices(sample_fn: SampleFn, settings: Mapping[str, Any], grid: Sequence[str | None]) -> Iterator[_Choice]:
    noised = noised_conditions(sample_fn.models).get(sample_fn.models[-1].name)
    levels = [level for level in settings["levels"] if noised is not None and level <= noised.noise]
    every = (settings["guidance"] or (None,), levels or (None,), settings["samplers"] or (None,), grid)
    for chosen in itertools.product(*every):
        yield _Choice(sample_fn, *chosen)


def _sample(sample_fn: SampleFn, given: Mapping, num: int, choice: _Choice, settings: Mapping) -> np.ndarray:
    made = grids.sample_together(
        sample_fn,
        1,
        num,
        given,
        guidance=choice.guidance,
        level=choice.level,
        steps=choice.steps,
        sampler=choice.sampler,
        batch_size=settings["batch_size"],
    )
    images.check_finite(made)
    return made


def _shown(sample_fn: SampleFn, made: np.ndarray, given: Mapping[str, Any], class_names: Sequence[str]) -> Row:
    """The first samples, and what stands below them."""
    count = min(len(made), 5 * (sample_fn.num_classes or 8))
    some = {name: values[:count] for name, values in given.items()}
    return {"_samples": made[:count], "_labels": grids.captions_of(sample_fn, some, class_names)}


def patch_distance(made: np.ndarray, real: np.ndarray) -> float:
    """The Frechet distance of patches, which needs no network."""
    return metrics.frechet_distance(metrics.patches(made), metrics.patches(real))


# ---- enlargements ---------------------------------------------------------------------------------------------------


def enlargements(sample_fn: SampleFn, settings: Mapping[str, Any]) -> Iterator[Row]:
    """Scores one model on held-out pictures made smaller, beside bicubic interpolation.

    Args:
      sample_fn: of that model alone.
      settings: the config's `eval`: `num` pictures at every one of `levels`.

    Yields:
      Rows: method, level, psnr in dB (fidelity to the very picture; the mean of all possible pictures wins) and
      frechet_patches (whether the set looks like the real one). For pictures: `_small`, `_made` and `_real`.
    """
    model, condition = sample_fn.models[0], sample_fn.arguments["image"]
    real = _real(sample_fn, settings["num"], {})
    image, given = real["image"], grids.arguments_of(sample_fn, real)
    if getattr(condition, "round", False):
        given["image"] = images.as_floats(images.to_uint8(given["image"], nearest=True))
    small, noised = given["image"], noised_conditions(sample_fn.models).get(model.name)

    def row(method: str, made: np.ndarray, **more: Any) -> Row:
        scored = {"psnr": metrics.psnr(made, image), "frechet_patches": patch_distance(made, image)}
        return {"method": method, **more, **scored, "pictures": len(image)}

    yield row("bicubic", images.bicubic(small, image.shape[1] // small.shape[1]))
    for level in [level for level in settings["levels"] if noised and level <= noised.noise] or (None,):
        how = {"level": level, "batch_size": settings["batch_size"]}
        made = grids.sample_together(sample_fn, 1, len(image), given, **how)
        images.check_finite(made)
        more = {"level": noised.level if level is None else level} if noised else {}
        yield row(model.name, made, **more) | {"_small": small[:8], "_made": made[:8], "_real": image[:8]}


# ---- classifiers and CLIPs ------------------------------------------------------------------------------------------


def guide_examples(config: Mapping[str, Any], model: Any) -> dict[str, np.ndarray]:
    """Held-out examples of what a classifier or a CLIP reads, with their labels if the data have any."""
    section = config[model.name]
    there = grids.columns_there(section, model.data_shape)
    columns = {**{name: column for name, column in there.items() if name == "label"}, **model.columns()}
    return grids.held_out_examples(section, model.data_shape, config["eval"]["num"], columns)


def guide_scores(
    config: Mapping[str, Any], model: Any, params: Params, held_out: Examples, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """`guide_accuracy`; of a CLIP of clean pictures and data with classes, zero-shot accuracy too."""
    size = config["eval"]["batch_size"]
    found = guide_accuracy(model, params, held_out, batch_size=size)
    if model.noised or not hasattr(model, "embed_text") or not class_names or "label" not in held_out:
        return found
    template = config["eval"]["template"]
    accuracy = zero_shot_accuracy(model, params, held_out, class_names, template=template, batch_size=size)
    return found | {"zero_shot": np.full(len(found["u"]), accuracy)}


def guide_accuracy(
    model: Any, params: Params, batch: Examples, *, batch_size: int, levels: int = 20, seed: int = 0
) -> dict[str, np.ndarray]:
    """How well a noised classifier classifies pictures, or a CLIP finds captions, from clean data to noise.

    Several processes share the noise levels; each has all of the result.

    Args:
      model: with `terms`.
      params: its parameters.
      batch: [N, ...] each, of what the model reads.
      batch_size: pictures at once; a CLIP distinguishes as many as a device has of them.
      levels: number of noise levels, u = 1 / levels .. 1; a model of clean pictures is computed once.
      seed: of the noise.

    Returns:
      u, loss and the accuracies (top1 and top5, or image_top1 and text_top1), [levels] each.
    """
    names = [name for name in model.batch_example() if name in batch]

    def terms(params, some, keys, u):
        eps = jax.vmap(lambda key: jax.random.normal(key, model.shape))(keys)
        return model.terms(params, some, model.schedule(u), eps)

    run, n = parallel.map_batch(terms), len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    u = np.arange(1, levels + 1, dtype=np.float32) / levels
    computed = u if model.noised else u[:1]

    def at(level: float) -> dict[str, float]:
        done = []
        for start in range(0, n, batch_size):
            index = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
            some = {name: batch[name][index] for name in names}
            out = run(params, some, keys[index], np.full(len(index), level, np.float32))
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts).mean(), *done)

    def some(part: slice) -> dict[str, np.ndarray]:
        rows = [at(level) for level in reporting.progress_bar(computed[part], "noise levels")]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    found = processes.share(some, len(computed))
    return {"u": u} | {name: np.broadcast_to(values, u.shape) for name, values in found.items()}


def zero_shot_accuracy(
    model: Any, params: Params, batch: Examples, names: Sequence[str], *, template: str, batch_size: int
) -> float:
    """The share of pictures to which the caption of their class is the nearest of all classes' (Radford et al. 2021).

    Args:
      model: a CLIP of clean pictures.
      params: its parameters.
      batch: 'image' [N, H, W, C] and 'label' [N].
      names: of the classes.
      template: the caption of a class; {} stands for its name.
      batch_size: pictures at once.
    """
    ids = model.tokenizer([template.format(name.replace("_", " ")) for name in names])
    classes = np.asarray(text_embedder(model)(params, ids))
    classes = classes / np.linalg.norm(classes, axis=1, keepdims=True)
    run, image = embedder(model), batch["image"]
    parts = [np.asarray(run(params, image[i : i + batch_size])) for i in range(0, len(image), batch_size)]
    return float(np.mean(np.argmax(np.concatenate(parts) @ classes.T, axis=1) == batch["label"]))
