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
        out = run(params, batch["image"][index], keys[index], {k: batch[k][index] for k in stage.takes})
        done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *done)


def scores(sample_fn: pipeline.SampleFn, section: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[dict]:
    """Scores every combination of `settings` guidance, samplers and steps; the config's own where one is empty.

    Args:
      sample_fn: the trained model.
      section: the section of its last stage.
      settings: the config's `eval`.

    Yields:
      Rows: steps, sampler and guidance; bits_per_dim (of the steps, whatever the guidance and the sampler); and of
      `settings['num']` labelled samples the accuracy (share that a judge trained on real pictures recognises) and the
      diversity (`metrics.spread` over that of real pictures). For pictures: `_samples` (the first ones) and `_curve` (a
      `RateDistortion`).
    """
    stage = sample_fn.stages[-1]
    labelled = bool(stage.num_classes) and settings["num"] > 0
    judge = judges.JUDGES[settings["judge"]](section) if labelled else None
    bound_examples = max(settings["bpd_num"], 1)
    real = held_out_examples(section, max(bound_examples, settings["num"] if labelled else 0))
    bounds = {
        steps: _bound(sample_fn, steps, {k: v[:bound_examples] for k, v in real.items()}, settings["batch_size"])
        for steps in settings["steps"] or (section["steps"],)
        if settings["bpd_num"] and stage.train_steps
    }
    guided = any(s.is_guided for s in sample_fn.stages)
    for guidance, sampler, steps in itertools.product(
        settings["guidance"] or (None,), settings["samplers"] or (None,), settings["steps"] or (section["steps"],)
    ):
        taken = len(schedules.build_steps(stage.schedule, stage.train_steps, steps).t.time)
        row: dict[str, Any] = {"steps": taken, "sampler": sampler or section["sampler"]["name"]}
        if guided:
            row["guidance"] = stage.scale if guidance is None else guidance
        if steps in bounds:
            row["bits_per_dim"] = float(np.mean(bounds[steps].total))
            row["_curve"] = editing.rate_distortion(bounds[steps])
        if judge:
            label = pipeline.spread_labels(settings["num"], stage.num_classes)
            made = sample_fn(
                1, label=label, guidance=guidance, steps=steps, sampler=sampler, batch_size=settings["batch_size"]
            )
            images.check_finite(made)
            row |= {
                "accuracy": float(np.mean(judge.classify(made) == label)),
                "diversity": metrics.spread(made, label) / metrics.spread(real["image"], real["label"]),
                "accuracy_of_judge_on_real": judge.accuracy,
                "samples": settings["num"],
                "_samples": made[: 5 * stage.num_classes],
            }
        yield row


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


def write_report(workdir: pathlib.Path, rows: list[dict], header: Mapping[str, Any]) -> str:
    """Writes evaluation.json and evaluation.md; returns the table."""
    kept = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    text = json.dumps({**header, "rows": kept}, indent=2) + "\n"
    images.write_atomically(workdir / "evaluation.json", lambda f: f.write(text.encode()))
    names = list(dict.fromkeys(k for row in kept for k in row))

    def show(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [names, ["---"] * len(names)] + [[show(row.get(k)) for k in names] for row in kept]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    images.write_atomically(workdir / "evaluation.md", lambda f: f.write((table + "\n").encode()))
    return table
