"""How good a trained model is, in numbers (floor 4)."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffax import data, editing, images, losses, parallel, pipeline, reporting, stages
from diffax.errors import UserError

# An SVC on more pictures than this takes longer than the pictures themselves.
JUDGE_EXAMPLES = 5000


def held_out(section: Mapping[str, Any]) -> data.Source:
    """The test split of a stage's data, or all of it where there is none."""
    split = {"digits": "test", "shapes": "test", "photos": "test", "cifar10": "test", "mnist": "test"}
    chosen = {**section["data"], "split": split.get(section["data"]["name"], section["data"]["split"])}
    return data.load_source(chosen, shape=section["shape"])


def examples(source: data.Source, section: Mapping[str, Any], limit: int) -> dict[str, np.ndarray]:
    """The first `limit` records, in order: image [N, H, W, C] in [-1, 1], index and what else they hold."""
    stream = data.batches(
        source, section["data"], shape=section["shape"], batch_size=min(limit, len(source)), seed=0, train=False
    )
    return next(iter(stream))


def judge(section: Mapping[str, Any]) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """A support vector classifier of the real pictures, to tell what the generated ones show.

    Args:
      section: a stage's section; its data have labels.

    Returns:
      (pictures [N, H, W, C] in [-1, 1] -> labels [N], accuracy on held-out real pictures).

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("scikit-learn is not installed; evaluate; pip install diffax[demo]") from None
    real = examples(data.load_source(section["data"], shape=section["shape"]), section, JUDGE_EXAMPLES)
    test = examples(held_out(section), section, JUDGE_EXAMPLES)
    svc = SVC(C=10.0).fit(real["image"].reshape(len(real["image"]), -1), real["label"])

    def classify(pictures: np.ndarray) -> np.ndarray:
        return svc.predict(pictures.reshape(len(pictures), -1))

    return classify, float(np.mean(classify(test["image"]) == test["label"]))


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
    """Scores every respacing in `settings['steps']`, or the last stage's own if there is none.

    Args:
      sample_fn: the trained model.
      section: the section of its last stage.
      settings: the config's `eval`: num, batch_size, bpd_num, steps.

    Yields:
      Rows: steps, bits_per_dim, accuracy of `settings['num']` labelled samples; and for pictures `_samples` (the first
      ones) and `_curve` (a `RateDistortion`).
    """
    stage = sample_fn.stages[-1]
    labelled = "label" in stage.takes
    classify, real_accuracy = judge(section) if labelled and settings["num"] else (None, None)
    real = examples(held_out(section), section, max(settings["bpd_num"], 1))
    for steps in settings["steps"] or (section["steps"],):
        respaced = stages.build_steps(stage.schedule, stage.train_steps, steps)
        row: dict[str, Any] = {"steps": len(respaced.t.time)}
        if settings["bpd_num"] and stage.train_steps:
            shorter = dataclasses.replace(stage, sampling=respaced)
            bound = bits_per_dim(shorter, sample_fn.params[stage.name], real, batch_size=settings["batch_size"])
            row["bits_per_dim"] = float(np.mean(bound.total))
            row["_curve"] = editing.rate_distortion(bound)
        if classify is not None:
            label = pipeline.spread_labels(settings["num"], stage.num_classes)
            made = sample_fn(1, label=label, steps=steps, batch_size=settings["batch_size"])
            images.check_finite(made)
            row |= {
                "accuracy": float(np.mean(classify(made) == label)),
                "accuracy_of_judge_on_real": real_accuracy,
                "samples": settings["num"],
                "_samples": made[: 5 * stage.num_classes],
            }
        yield row


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
