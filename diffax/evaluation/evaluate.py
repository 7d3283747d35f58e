"""How good a trained model is, in numbers.

As a command, `python -m diffax.evaluation A B`, it compares two sets of pictures: see `diffax.evaluation.compare`.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import data
from diffax.data import images
from diffax.diffusion import losses, schedules
from diffax.errors import UserError
from diffax.evaluation import compare, judges, metrics
from diffax.models import stages
from diffax.sampling import latents as editing
from diffax.sampling import pipeline
from diffax.training import parallel, reporting
from diffax.weights.inception import VARIABLE as INCEPTION


def _no_ids(texts: Sequence[str]) -> np.ndarray:
    """Stands for a tokenizer where captions alone are wanted."""
    return np.zeros((len(texts), 1), np.int32)


def held_out_examples(section: Mapping[str, Any], limit: int, *, captions: bool = False) -> dict[str, np.ndarray]:
    """At most `limit` records of the test split, or of the split in use where there is no test split.

    Captions come with them if the section reads text, or if they are asked for.
    """
    c, shape = section["data"], section["shape"]
    tokenize = pipeline.text_tokenizer(section) or (_no_ids if captions else None)
    return data.examples(data.held_out(c, shape=shape), c, shape=shape, limit=limit, tokenize=tokenize)


def bits_per_dim(
    stage: stages.Stage,
    params: Any,
    batch: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int = 0,
    mode: str = "pmap",
) -> losses.BitsPerDim:
    """The variational bound of pictures, along the stage's sampling steps (DDPM section 4; Improved DDPM section 3).

    Args:
      stage: the stage.
      params: its parameters.
      batch: 'image' [N, H, W, C] and the conditions that the stage takes.
      batch_size: pictures at once.
      seed: of the noise, one draw for every term.
      mode: of `parallel.sampling_mode`; under 'fsdp' the devices of a process share the parameters.

    Returns:
      The bound and its terms, as numpy.
    """
    pure = stages.bits_per_dim_fn(stage)
    run = parallel.map_batch(lambda params, image, keys, cond: pure(params, image, keys, **cond), mode=mode)
    params = parallel.settled(params, mode)
    n = len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    conditions = [k for k in stage.takes if k != "low_res"]

    def some(part: slice) -> losses.BitsPerDim:
        done = []
        for start in reporting.progress_bar(range(part.start, part.stop, batch_size), "bits per dimension"):
            index = np.minimum(np.arange(start, start + batch_size), part.stop - 1)
            out = run(params, batch["image"][index], keys[index], {k: batch[k][index] for k in conditions})
            done.append(jax.tree.map(lambda a, left=part.stop - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    return parallel.share(some, n)


def scores(sample_fn: pipeline.SampleFn, section: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[dict]:
    """Scores every combination of `settings` guidance, levels, samplers and steps; the config's own where one is empty.

    Several processes share the sampling and the bounds; each has all of the rows, and trains the same judge.

    Args:
      sample_fn: the trained model, from its first stage on.
      section: the section of its last stage.
      settings: the config's `eval`.

    Yields:
      Rows: steps, sampler, guidance and level (of the last stage's smaller picture); bits_per_dim (of the steps and the
      model, whatever the rest); and of `settings['num']` samples the accuracy (share that a judge trained on real
      pictures recognises), the diversity (`metrics.spread` over that of real pictures) and Frechet distances to
      held-out pictures, of the judge's features and of patches. For pictures: `_samples` (the first ones) and `_curve`
      (a `RateDistortion`).
    """
    stage = sample_fn.stages[-1]
    num = settings["num"] if "low_res" not in sample_fn.takes else 0
    if settings["judge"] == "captions":
        yield from caption_scores(sample_fn, section, settings)
        return
    labelled = bool(stage.num_classes) and num > 0
    judge = judges.JUDGES[settings["judge"]](section) if labelled else None
    bound_examples = max(settings["bpd_num"], 1)
    real = held_out_examples(section, max(bound_examples, num))
    all_steps = settings["steps"] or (section["steps"],)
    bounds = {
        steps: _bound(sample_fn, steps, {k: v[:bound_examples] for k, v in real.items()}, settings["batch_size"])
        for steps in all_steps
        if settings["bpd_num"] and stage.train_steps
    }
    guided = any(s.is_guided for s in sample_fn.stages)
    noised = stages.chooses_level(stage, first=len(sample_fn.stages) == 1)
    levels = [level for level in settings["levels"] if noised and level <= stage.low_res.noise]
    label = pipeline.spread_labels(num, stage.num_classes) if labelled else None
    for guidance, level, sampler, steps in itertools.product(
        settings["guidance"] or (None,), levels or (None,), settings["samplers"] or (None,), all_steps
    ):
        taken = len(schedules.build_steps(stage.schedule, stage.train_steps, steps).t.time)
        row: dict[str, Any] = {"steps": taken, "sampler": sampler or section["sampler"]["name"]}
        if guided:
            row["guidance"] = stage.scale if guidance is None else guidance
        if noised:
            row["level"] = stage.low_res.level if level is None else level
        if steps in bounds:
            row["bits_per_dim"] = float(np.mean(bounds[steps].total))
            row["_curve"] = editing.rate_distortion(bounds[steps])
        if num:
            made = pipeline.sample_together(
                sample_fn,
                1,
                num,
                {} if label is None else {"label": label},
                guidance=guidance,
                level=None if level is None else {stage.name: level},
                steps=steps if settings["steps"] else None,
                sampler=sampler,
                batch_size=settings["batch_size"],
            )
            images.check_finite(made)
            row["_samples"] = made[: 5 * (stage.num_classes or 8)]
            row |= {"samples": num, "frechet_patches": _patch_distance(made, real["image"])}
        if judge:
            row |= {
                "accuracy": float(np.mean(judge.classify(made) == label)),
                "diversity": metrics.spread(made, label) / metrics.spread(real["image"], real["label"]),
                "frechet_judge": metrics.frechet_distance(judge.features(made), judge.features(real["image"])),
                "accuracy_of_judge_on_real": judge.accuracy,
            }
        yield row


def sample_to_folder(
    sample: Callable[[int, int], np.ndarray],
    folder: pathlib.Path,
    num: int,
    *,
    about: Mapping[str, Any],
    labels: np.ndarray | None = None,
    shard: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
) -> list[pathlib.Path]:
    """Makes pictures 0 to num - 1 and writes them as .npz files, such as `diffax.evaluation.compare` reads.

    Called again after an interruption, or for more pictures, it makes those that are missing. A file is there whole or
    not at all, so that at most one of them is lost. Several processes make every count-th file each, in one folder, and
    process 0 waits for the others.

    Args:
      sample: (first, count) -> pictures [count, H, W, C] in [-1, 1]; picture i must depend on i alone.
      folder: where `samples_FIRST.npz` go, and sampling.json with `about`.
      num: how many there shall be.
      about: all that the pictures depend on, such as seed, steps, guidance and training step; plain data.
      labels: [num] integers, written with the pictures.
      shard: pictures in one file.
      process_index, process_count: which of how many processes this is.

    Returns:
      The files, in order; those of other processes may be missing yet, but to process 0.

    Raises:
      UserError: the folder holds samples of other settings.
      RunError: a picture is not finite, or cannot be written.
    """
    stated = json.loads(json.dumps({**about, "shard": shard}))
    listing = folder / "sampling.json"
    if listing.exists():
        _check_same(listing, stated)
    if process_index == 0:
        images.write_atomically(listing, lambda file: file.write((json.dumps(stated, indent=2) + "\n").encode()))

    def is_there(first: int) -> bool:
        path = folder / f"samples_{first:08d}.npz"
        return path.exists() and compare.array_shape(path)[0] >= min(shard, num - first)

    every = range(0, num, shard)
    for first in reporting.progress_bar(every[process_index::process_count], "files of samples"):
        count = min(shard, num - first)
        path = folder / f"samples_{first:08d}.npz"
        if is_there(first):
            continue
        made = sample(first, count)
        images.check_finite(made, first)
        arrays = {"arr_0": images.to_uint8(made)}
        if labels is not None:
            arrays["arr_1"] = np.asarray(labels[first : first + count], np.int64)
        images.write_atomically(path, lambda file, arrays=arrays: np.savez(file, **arrays))
    if process_index == 0:
        for first in reporting.progress_bar(every, "files of all processes") if process_count > 1 else ():
            while not is_there(first):
                time.sleep(0.5)
    return [folder / f"samples_{first:08d}.npz" for first in every]


def samples_folder(workdir: pathlib.Path, choice: Mapping[str, Any]) -> pathlib.Path:
    """Where the samples of a choice are, see `choices`."""
    name = "_".join(f"{key}_{value}" for key, value in choice.items())
    return workdir / "evaluation" / f"samples_{name}" if name else workdir / "samples"


def training_pictures(section: Mapping[str, Any], source: pathlib.Path) -> compare.Pictures:
    """All pictures that a section is trained on, in order, in its size, never flipped nor cropped at random.

    Args:
      section: the section.
      source: what to call them; `compare` keeps their statistics beside it.
    """
    c, shape = section["data"], section["shape"]
    opened = data.load_source(c, shape=shape)

    def chunks(size: int) -> Iterator[np.ndarray]:
        stream = data.batches(opened, c, shape=shape, batch_size=size, seed=0, keys=(), train=False)
        for batch in stream:
            pictures = images.to_uint8(batch["image"], nearest=True)
            yield np.broadcast_to(pictures, (*pictures.shape[:3], 3))

    return compare.Pictures(source, len(opened), (), chunks, [])


def choices(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of a call of a `SampleFn`: every combination of what the config's `eval` has of guidance, samplers and
    steps; the config's own where it has none.
    """
    kinds = {"guidance": settings["guidance"], "sampler": settings["samplers"], "steps": settings["steps"]}
    kinds = {name: values for name, values in kinds.items() if values}
    return [dict(zip(kinds, chosen, strict=True)) for chosen in itertools.product(*kinds.values())]


def compared(
    make: Callable[[pathlib.Path, Mapping[str, Any]], Any],
    chosen: Sequence[Mapping[str, Any]],
    workdir: pathlib.Path,
    *,
    reference: str,
    section: Mapping[str, Any],
    inception: str | None,
    batch_size: int,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Compares samples with real pictures by the numbers of papers, or by another where their network is missing.

    Args:
      make: (folder, choice) makes the samples of a choice in a folder, those that are missing there.
      chosen: see `choices`.
      workdir: where samples and statistics go.
      reference: real pictures or their statistics, see `compare.statistics_of`; or 'data', those of the training.
      section: of the stage that makes the pictures.
      inception: weights of the FID's network, see `convert.inception.find`; where there are none, the Frechet distance
        of patches is computed, under that name.
      batch_size: pictures at once, in the network.

    Yields:
      (row, what it is about): the row has the choice, the number of samples and the numbers of `compare.compare`.

    Raises:
      UserError: there is no such reference, or it is of other pictures; told before anything is sampled if it can be.
    """
    features = "inception" if inception or os.environ.get(INCEPTION) else "patches"
    about, measure = compare.measurement(features, inception, batch_size=batch_size)
    if reference == "data":
        pictures = training_pictures(section, workdir / "training_data")
        real, notes = compare.statistics_of_pictures(pictures, measure, about=about)
    else:
        real, notes = compare.statistics_of(reference, measure, about=about)
    if "size" in real and tuple(real["size"]) != tuple(section["shape"][:2]):
        size, made = ("x".join(map(str, side)) for side in (real["size"], section["shape"][:2]))
        raise UserError(f"the reference has pictures of {size}, and the model makes {made}; {reference}; resize them")
    if features != "inception":
        notes = [*notes, f"no Inception weights (--inception, {INCEPTION}): frechet_patches is no FID"]
    for choice in chosen:
        folder = samples_folder(workdir, choice)
        make(folder, choice)
        made, more = compare.statistics_of(folder, measure, about=about)
        results, last = compare.compare(made, real, features=features)
        told = {"reference": reference, **about, "reference_pictures": int(real["count"]) or None}
        yield {**choice, "samples": int(made["count"]), **results}, {**told, "notes": [*notes, *more, *last]}


def _check_same(listing: pathlib.Path, stated: Mapping[str, Any]) -> None:
    """Raises UserError that names the first difference between what is stated and what the file says."""
    try:
        found = dict(json.loads(listing.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read what the samples are ({error}); {listing}; delete the folder") from None
    for name in {**found, **stated}:
        if found.get(name) != stated.get(name):
            raise UserError(
                f"the folder holds samples of {name} {found.get(name)!r}, not {stated.get(name)!r}; {listing.parent}; "
                "delete it or choose another"
            )


def caption_scores(
    sample_fn: pipeline.SampleFn, section: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[dict]:
    """Scores pictures of shapes against the captions that they were made from, at every one of the `guidance` scales
    of the first stage that makes pictures.

    Args:
      sample_fn: the trained model, from its first stage on; it reads text.
      section: the section of its last stage.
      settings: the config's `eval`.

    Yields:
      Rows: that stage's guidance, sampler and steps; of `num` captions of held-out pictures the scores of
      `judges.caption_scores`; of a fifth as many captions of combinations that training never showed,
      `held_out_accuracy`; Frechet distances to real pictures; what the judge reads rightly in real ones. For pictures:
      `_samples`, `_labels`.
    """
    num, painter = settings["num"], sample_fn.painter
    if not num:
        return
    judge = judges.captions(section)
    real = held_out_examples(section, num, captions=True)
    prompts = list(real["caption"])
    unseen = held_out_captions(section, num // 5) if section["data"]["holdout"] else []
    asked = [prompts[i % len(prompts)] for i in range(num)] + unseen
    for scale in settings["guidance"] or (None,):
        # A prior keeps its own scale: the paper of unCLIP varies the decoder's alone.
        scales = None if scale is None else {painter.name: scale}
        how = {"guidance": scales, "batch_size": settings["batch_size"]}
        made = pipeline.sample_together(sample_fn, 1, len(asked), {"prompt": asked}, **how)
        images.check_finite(made)
        row: dict[str, Any] = {
            "steps": painter.num_steps,
            "sampler": sample_fn.config[painter.name]["sampler"]["name"],
        }
        if painter.is_guided:
            row["guidance"] = painter.scale if scale is None else scale
        row |= {"samples": num} | judges.caption_scores(judge, made[:num], asked[:num])
        if unseen:
            row["held_out_samples"] = len(unseen)
            row["held_out_accuracy"] = judges.caption_scores(judge, made[num:], unseen)["accuracy"]
        row["frechet_judge"] = metrics.frechet_distance(judge.features(made[:num]), judge.features(real["image"]))
        row["frechet_patches"] = _patch_distance(made[:num], real["image"])
        row |= {f"judge_on_real_{name}": share for name, share in judge.accuracy.items()}
        shown = np.r_[0 : min(16, num), num : min(num + 16, len(made))]
        yield row | {"_samples": made[shown], "_labels": [asked[i] for i in shown]}


def held_out_captions(section: Mapping[str, Any], limit: int) -> list[str]:
    """At most `limit` captions of the combinations that training held out."""
    c, shape = {**section["data"], "split": "holdout"}, section["shape"]
    found = data.examples(data.load_source(c, shape=shape), c, shape=shape, limit=limit, tokenize=_no_ids)
    return list(found["caption"])


def caption_accuracy(rows: Sequence[Mapping[str, Any]]) -> list[images.Panel]:
    """Accuracies against the guidance scale; empty where fewer than two scales were scored."""
    of = [row for row in rows if "guidance" in row and "whole" in row]
    if len(of) < 2:
        return []
    x = [row["guidance"] for row in of]
    names = [name for name in ("accuracy", "whole", "held_out_accuracy") if name in of[0]]
    shares = {name: (x, [row[name] for row in of]) for name in names}
    distance = {"frechet_judge": (x, [row["frechet_judge"] for row in of])}
    return [
        images.Panel("guidance scale", "share of the captions", shares),
        images.Panel("guidance scale", "frechet_judge", distance),
    ]


def _patch_distance(made: np.ndarray, real: np.ndarray) -> float:
    return metrics.frechet_distance(metrics.patches(made), metrics.patches(real))


def enlargements(
    sample_fn: pipeline.SampleFn, section: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[dict]:
    """Scores one stage on held-out pictures made smaller, beside bicubic interpolation.

    Args:
      sample_fn: of that stage alone.
      section: its section.
      settings: the config's `eval`: `num` pictures at every one of `levels`.

    Yields:
      Rows: method, level, psnr in dB (fidelity to the very picture; the mean of all possible pictures wins) and
      frechet_patches (whether the set looks like the real one). For pictures: `_small`, `_made` and `_real`.
    """
    stage = sample_fn.stages[0]
    real = held_out_examples(section, settings["num"])
    image = real["image"]
    small = pipeline.smaller(image, stage.low_res.factor)
    small = images.as_floats(images.to_uint8(small, nearest=True)) if stage.low_res.round else small
    given = {k: real[k] for k in stage.reads if k != "low_res"}

    def row(method: str, made: np.ndarray, **more: Any) -> dict:
        return {
            "method": method,
            **more,
            "psnr": metrics.psnr(made, image),
            "frechet_patches": _patch_distance(made, image),
            "pictures": len(image),
        }

    yield row("bicubic", images.bicubic(small, stage.low_res.factor))
    for level in [level for level in settings["levels"] if 0 < stage.low_res.noise >= level] or (None,):
        how = {"level": level, "batch_size": settings["batch_size"]}
        made = pipeline.sample_together(sample_fn, 1, len(image), {"image": small, **given}, **how)
        images.check_finite(made)
        more = {"level": stage.low_res.level if level is None else level} if stage.low_res.noise else {}
        shown = {"_small": small[:8], "_made": made[:8], "_real": image[:8]}
        yield row(stage.name, made, **more) | shown


def _bound(sample_fn: pipeline.SampleFn, steps: str, real: Mapping[str, np.ndarray], batch_size: int):
    """The variational bound of the last stage along other steps than its own."""
    stage = sample_fn.stages[-1]
    respaced = dataclasses.replace(stage, sampling=schedules.build_steps(stage.schedule, stage.train_steps, steps))
    params = sample_fn.params[stage.name]
    return bits_per_dim(respaced, params, real, batch_size=batch_size, mode=sample_fn.mode)


def trade_off(rows: Sequence[Mapping[str, Any]]) -> list[images.Panel]:
    """Accuracy and diversity against the guidance scale, and against each other; one curve for each sampler and steps.

    Empty where fewer than two scales were scored.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "guidance" in row and "diversity" in row:
            curves.setdefault(f"{row['sampler']}, {row['steps']} steps", []).append(row)
    if max((len(of) for of in curves.values()), default=0) < 2:
        return []

    def panel(x: str, y: str, xlabel: str, ylabel: str, notes=None) -> images.Panel:
        drawn = {name: ([r[x] for r in of], [r[y] for r in of]) for name, of in curves.items()}
        return images.Panel(xlabel, ylabel, drawn, notes)

    scale, accuracy, diversity = "guidance scale", "accuracy", "diversity (real pictures: 1)"
    notes = [f"{row['guidance']:g}" for row in next(iter(curves.values()))]
    return [
        panel("guidance", "accuracy", scale, accuracy),
        panel("guidance", "diversity", scale, diversity),
        panel("diversity", "accuracy", diversity, accuracy, notes),
    ]


def best_level(rows: Sequence[Mapping[str, Any]]) -> list[images.Panel]:
    """Frechet distances against the noise on the smaller picture (CDM, section 3); empty for fewer than two levels."""
    of = [row for row in rows if "level" in row and "samples" in row]
    x = [row["level"] for row in of]
    if len(set(x)) < 2 or len(set(x)) < len(x):
        return []
    names = [name for name in ("frechet_judge", "frechet_patches") if name in of[0]]
    return [images.Panel("noise level u of the smaller picture", n, {n: (x, [r[n] for r in of])}) for n in names]


# ---- noised classifiers and CLIPs -----------------------------------------------------------------------------------


def guide_accuracy(
    model: stages.NoisedClassifier | stages.Clip,
    params: Any,
    batch: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    levels: int = 20,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How well a noised classifier tells pictures, or a CLIP finds captions, from clean data to noise.

    Several processes share the noise levels; each has all of the result.

    Args:
      model: the classifier or CLIP.
      params: its parameters.
      batch: 'image' [N, H, W, C] and 'label' [N], or 'text' [N, L].
      batch_size: pictures at once; a CLIP tells apart as many as a device has of them.
      levels: number of noise levels, u = 1 / levels .. 1; a CLIP of clean pictures, which none of them reaches, is
        asked once.
      seed: of the noise.

    Returns:
      u, loss and the accuracies (top1 and top5, or image_top1 and text_top1), [levels] each.
    """
    of = stages.clip_terms if isinstance(model, stages.Clip) else stages.classifier_terms
    target = model.takes[0] if isinstance(model, stages.Clip) else model.reads[0]

    def terms(params, image, wanted, keys, u):
        eps = jax.vmap(lambda key: jax.random.normal(key, model.shape))(keys)
        return of(model, params, image, wanted, model.schedule(u), eps)

    run, n = parallel.map_batch(terms), len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    u = np.arange(1, levels + 1, dtype=np.float32) / levels
    asked = u if getattr(model, "noised", True) else u[:1]

    def some(part: slice) -> dict[str, np.ndarray]:
        rows = []
        for level in reporting.progress_bar(asked[part], "noise levels"):
            done = []
            for start in range(0, n, batch_size):
                index = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
                at = np.full(len(index), level, np.float32)
                out = run(params, batch["image"][index], batch[target][index], keys[index], at)
                done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
            rows.append(jax.tree.map(lambda *parts: np.concatenate(parts).mean(), *done))
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    found = parallel.share(some, len(asked))
    return {"u": u} | {name: np.broadcast_to(values, u.shape) for name, values in found.items()}


def write_classifier_report(folder: pathlib.Path, found: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
    """Writes accuracy.png (against the noise level) and a row of held_out.jsonl (means, and by quarter of the noise
    range, quietest first); returns the row.
    """
    row = {name: round(float(v.mean()), 4) for name, v in found.items() if name != "u"}
    for q, part in enumerate(np.array_split(np.arange(len(found["u"])), 4)):
        row |= {f"{name}_q{q}": round(float(found[name][part].mean()), 4) for name in found if "top" in name}
    reporting.append_row(folder / "held_out.jsonl", step, row)
    curves = {name: (found["u"], found[name]) for name in found if "top" in name}
    images.line_plots(folder / "accuracy.png", [images.Panel("noise level u", "held-out accuracy", curves)])
    return row


def write_report(
    workdir: pathlib.Path, rows: list[dict], header: Mapping[str, Any], *, name: str = "evaluation"
) -> str:
    """Writes NAME.json and NAME.md; returns the table."""
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    text = json.dumps({**header, "rows": kept}, indent=2) + "\n"
    images.write_atomically(workdir / f"{name}.json", lambda f: f.write(text.encode()))
    names = list(dict.fromkeys(k for row in kept for k in row))

    def show(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [names, ["---"] * len(names)] + [[show(row.get(k)) for k in names] for row in kept]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    images.write_atomically(workdir / f"{name}.md", lambda f: f.write((table + "\n").encode()))
    return table
