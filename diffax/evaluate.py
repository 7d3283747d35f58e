"""How good a trained model is, in numbers (floor 4)."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import data, editing, images, judges, losses, metrics, parallel, pipeline, reporting, schedules, stages


def held_out_examples(section: Mapping[str, Any], limit: int) -> dict[str, np.ndarray]:
    """At most `limit` records of the test split, or of the split in use where there is no test split."""
    c, shape = section["data"], section["shape"]
    return data.examples(data.held_out(c, shape=shape), c, shape=shape, limit=limit)


def bits_per_dim(
    stage: stages.Stage, params: Any, batch: Mapping[str, np.ndarray], *, batch_size: int, seed: int = 0
) -> losses.BitsPerDim:
    """The variational bound of pictures, along the stage's sampling steps (DDPM section 4; Improved DDPM section 3).

    Args:
      stage: the stage.
      params: its parameters.
      batch: 'image' [N, H, W, C] and the conditions that the stage takes.
      batch_size: pictures at once.
      seed: of the noise, one draw for every term.

    Returns:
      The bound and its terms, as numpy.
    """
    pure = stages.bits_per_dim_fn(stage)
    run = parallel.map_batch(lambda params, image, keys, cond: pure(params, image, keys, **cond))
    n = len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    done = []
    for start in reporting.progress_bar(range(0, n, batch_size), "bits per dimension"):
        index = np.minimum(np.arange(start, start + batch_size), n - 1)
        out = run(
            params, batch["image"][index], keys[index], {k: batch[k][index] for k in stage.takes if k != "low_res"}
        )
        done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *done)


def scores(sample_fn: pipeline.SampleFn, section: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[dict]:
    """Scores every combination of `settings` guidance, levels, samplers and steps; the config's own where one is empty.

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
            given = {} if label is None else {"label": label}
            made = sample_fn(
                1,
                num,
                guidance=guidance,
                level=None if level is None else {stage.name: level},
                steps=steps if settings["steps"] else None,
                sampler=sampler,
                batch_size=settings["batch_size"],
                **given,
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
        made = sample_fn(1, image=small, level=level, batch_size=settings["batch_size"], **given)
        images.check_finite(made)
        more = {"level": stage.low_res.level if level is None else level} if stage.low_res.noise else {}
        shown = {"_small": small[:8], "_made": made[:8], "_real": image[:8]}
        yield row(stage.name, made, **more) | shown


def _bound(sample_fn: pipeline.SampleFn, steps: str, real: Mapping[str, np.ndarray], batch_size: int):
    """The variational bound of the last stage along other steps than its own."""
    stage = sample_fn.stages[-1]
    respaced = dataclasses.replace(stage, sampling=schedules.build_steps(stage.schedule, stage.train_steps, steps))
    return bits_per_dim(respaced, sample_fn.params[stage.name], real, batch_size=batch_size)


def trade_off(rows: Sequence[Mapping[str, Any]]) -> list[images.Panel]:
    """Accuracy and diversity against the guidance scale, and against each other; one curve for each sampler and steps.

    Empty where fewer than two scales were scored.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "guidance" in row and "accuracy" in row:
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


# ---- noised classifiers ---------------------------------------------------------------------------------------------


def classifier_accuracy(
    classifier: stages.NoisedClassifier,
    params: Any,
    batch: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    levels: int = 20,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """How well a noised classifier tells pictures, from clean data to noise.

    Args:
      classifier: the classifier.
      params: its parameters.
      batch: 'image' [N, H, W, C] and 'label' [N].
      batch_size: pictures at once.
      levels: number of noise levels, u = 1 / levels .. 1.
      seed: of the noise.

    Returns:
      u, loss, top1 and top5, [levels] each.
    """

    def terms(params, image, label, keys, u):
        eps = jax.vmap(lambda key: jax.random.normal(key, classifier.shape))(keys)
        return stages.classifier_terms(classifier, params, image, label, classifier.schedule(u), eps)

    run, n = parallel.map_batch(terms), len(batch["image"])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(n))
    rows, u = [], np.arange(1, levels + 1, dtype=np.float32) / levels
    for level in reporting.progress_bar(u, "noise levels"):
        done = []
        for start in range(0, n, batch_size):
            index = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
            of = np.full(len(index), level, np.float32)
            out = run(params, batch["image"][index], batch["label"][index], keys[index], of)
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        rows.append(jax.tree.map(lambda *parts: np.concatenate(parts).mean(), *done))
    return {"u": u} | {name: np.array([row[name] for row in rows]) for name in rows[0]}


def write_classifier_report(folder: pathlib.Path, found: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
    """Writes accuracy.png (against the noise level) and a row of held_out.jsonl (means, and by quarter of the noise
    range, quietest first); returns the row."""
    row = {name: round(float(v.mean()), 4) for name, v in found.items() if name != "u"}
    for q, part in enumerate(np.array_split(np.arange(len(found["u"])), 4)):
        row |= {f"{name}_q{q}": round(float(found[name][part].mean()), 4) for name in ("top1", "top5")}
    reporting.append_row(folder / "held_out.jsonl", step, row)
    curves = {name: (found["u"], found[name]) for name in ("top1", "top5")}
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
