"""The command: `python -m diffax.main --config=configs/quickstart.py` (floor 5)."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import absl.logging
import jaxlib
import numpy as np

from diffax import config as configs
from diffax import data
from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.evaluation import compare, evaluate, metrics
from diffax.models import stages
from diffax.sampling import latents as editing
from diffax.sampling import pipeline
from diffax.tools import compile_ahead
from diffax.training import checkpoint, loop, parallel

EXIT_FAILED, EXIT_USER, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class Job(NamedTuple):
    """What the command line asks for: a validated config (plain dict), where, and the other flags."""

    config: dict[str, Any]
    workdir: pathlib.Path
    args: argparse.Namespace


# ---- the modes ------------------------------------------------------------------------------------------------------


def writes() -> bool:
    """Whether this process is the one that writes and prints what all have made."""
    return parallel.process_index() == 0


def run_train(job: Job) -> None:
    """Trains the stages (and the classifiers that guide them) and ends with a grid of samples."""
    config, chosen = job.config, job.args.stage
    elsewhere = [name for name in configs.trained_sections(config) if config[name]["workdir"]]
    names = [chosen] if chosen else [n for n in configs.trained_sections(config) if n not in elsewhere]
    if chosen in elsewhere:
        raise UserError(
            f"{chosen} is trained elsewhere; config.{chosen}.workdir={config[chosen]['workdir']}; leave that empty"
        )
    sources = {name: open_data(job, name) for name in names}
    for name in names:
        check_data(name, config[name], sources[name])
        pipeline.text_tokenizer(config[name])  # a vocabulary that is missing is told of now
        if config[name]["train"]["start_from"]:
            pipeline.starting_params(config[name], name)
    with contextlib.ExitStack() as held:
        for name in names:  # not the whole workdir: its stages may be trained at the same time
            held.enter_context(checkpoint.lock(job.workdir / name))
        for name in names:
            train_stage(job, name, sources[name])
    makes_pictures = any(configs.makes_pictures(config[name]) for name in config["stages"])
    if makes_pictures and are_trained(job, configs.trained_sections(config)):
        run_sample(job)


def open_data(job: Job, name: str) -> data.Source:
    """The data that a section is trained on; with the image embeddings that lie in files, if it has any."""
    config, c = job.config, job.config[name]["data"]
    if not c["embeddings"]:
        return data.load_source(c, shape=configs.picture_shape(config, name))
    _, clip = pipeline.image_embedder(config, name, job.workdir)
    size = config[config[name]["clip"]]["net"]["features"]
    embedded = data.embedded(c["embeddings"], clip=clip, size=size)
    if configs.is_prior(config[name]):
        return embedded
    return data.with_embeddings(data.load_source(c, shape=configs.training_shape(config, name)), embedded)


def run_embed(job: Job) -> None:
    """Computes the image embeddings of the training data, into the folder that `data.embeddings` names."""
    config = job.config
    names = [n for n in ([job.args.stage] if job.args.stage else config["stages"]) if config[n]["data"]["embeddings"]]
    if not names:
        raise UserError("no folder is named; --mode=embed; pass --config.NAME.data.embeddings=FOLDER")
    for name in names:
        c, shape = config[name]["data"], tuple(config[config[name]["clip"]]["shape"])
        embed, clip = pipeline.image_embedder(config, name, job.workdir)
        files = data.write_embeddings(
            c["embeddings"],
            data.load_source(c, shape=shape),
            c,
            shape=shape,
            embed=embed,
            clip=clip,
            batch_size=max(1, config[name]["train"]["batch_size"] // parallel.process_count()),
            process_index=parallel.process_index(),
            process_count=parallel.process_count(),
        )
        for done, total in files:
            print(f"embedded: {done} of {total} files, {c['embeddings']}", file=sys.stderr, flush=True)


def are_trained(job: Job, names: Sequence[str]) -> bool:
    """Whether there are checkpoints of these sections. Every process must ask.

    All have the same answer, though another job may just be writing the first: what follows they do together.
    """
    folders = [pathlib.Path(job.config[name]["workdir"] or job.workdir) / name / "checkpoints" for name in names]
    return not parallel.agree(not all(folder.exists() for folder in folders))


def check_data(name: str, section: dict[str, Any], source: data.Source) -> None:
    """Raises UserError if the data cannot feed the stage."""
    for taken in {"text", "text_embedding", "text_features"} & {*section["takes"]}:
        if not data.can_caption(source):
            raise UserError(
                f"{name} takes {taken!r} and the data have no captions; {name}.data; see data.name='captions'"
            )
    if "label" in section["takes"] or configs.is_classifier(section):
        if "label" not in source.keys:
            raise UserError(f"{name} takes 'label' and the data have none; {name}.data; sort them into sub-folders")
        if source.class_names and len(source.class_names) > section["num_classes"]:
            raise UserError(
                f"the data have {len(source.class_names)} classes; {name}.num_classes={section['num_classes']}; "
                f"use --config.{name}.num_classes={len(source.class_names)}"
            )


def train_stage(job: Job, name: str, source: data.Source) -> None:
    """Trains one stage or classifier into its own folder of the workdir."""
    config, section = job.config, job.config[name]
    model, prepare = stages.build(config, name), None
    if section["clip"]:
        model, prepare = pipeline.with_frozen_clip(model, config, job.workdir)
    run = loop.Run(stages.objective(model), section, seed=config["seed"], mode=config["parallel"])
    folder = job.workdir / name
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as found:
        run.check(found)
        is_new = found.latest() is None
    if writes():
        text = json.dumps(config, indent=2) + "\n"
        images.write_atomically(job.workdir / "config.json", lambda f: f.write(text.encode()))
        names = json.dumps(source.class_names)
        images.write_atomically(folder / "classes.json", lambda f: f.write(names.encode()))

    def batches(first_step: int, *, shared: bool = False):
        """This process's batches from a step on; `shared`: batches as small, but the same in every process."""
        processes = parallel.process_count()
        keys = [k for k in dict.fromkeys((*model.reads, "image_embedding")) if k in source.keys]
        by_clip = prepare and "clip_text" in model.reads
        low_res = section["low_res"]
        found = data.batches(
            data.captioned(source) if by_clip else source,
            section["data"],
            shape=configs.training_shape(config, name),
            batch_size=section["train"]["batch_size"] // (processes if shared else 1),
            seed=config["seed"],
            start_step=first_step,
            process_index=0 if shared else parallel.process_index(),
            process_count=1 if shared else processes,
            keys=(*keys, *(["caption"] if by_clip else [])),
            tokenize=pipeline.text_tokenizer(section),
            low_res=low_res if low_res["jpeg"] or low_res["degrade"] != "none" else None,
        )
        return map(prepare, found) if prepare else found

    if is_new and configs.is_code_prior(section):
        model = pipeline.with_codec(model, section, folder, batches(0, shared=True))
        run = loop.Run(stages.objective(model), section, seed=config["seed"], mode=config["parallel"])
    loop.fit(
        run,
        folder,
        batches=batches,
        draw=on_the_way(job, model, folder, source),
        start_from=(lambda: pipeline.starting_params(section, name)) if section["train"]["start_from"] else None,
        tensorboard=job.args.tensorboard,
        curve=CURVES[type(model)],
    )
    if section["variance"] == "analytic":
        pipeline.fit_residual(model, config, job.workdir, lambda: batches(0, shared=True))


CURVES = {stages.Stage: ("loss",), stages.NoisedClassifier: ("loss", "top1"), stages.Clip: ("loss", "image_top1")}


def guide_scores(config: dict[str, Any], model, params, held_out, names: Sequence[str]) -> dict[str, np.ndarray]:
    """`evaluate.guide_accuracy`; of a CLIP of clean pictures and data with classes, zero-shot accuracy too."""
    size = config["eval"]["batch_size"]
    found = evaluate.guide_accuracy(model, params, held_out, batch_size=size)
    if not isinstance(model, stages.Clip) or model.noised or not names or "label" not in held_out:
        return found
    template, section = config["eval"]["template"], config[model.name]
    accuracy = pipeline.zero_shot_accuracy(model, params, section, held_out, names, template=template, batch_size=size)
    return found | {"zero_shot": np.full(len(found["u"]), accuracy)}


def on_the_way(job: Job, model, folder: pathlib.Path, source: data.Source) -> Callable[[Any, int], None] | None:
    """What is shown every `loop.sample_every` steps: samples of a stage, held-out accuracy of its guide."""
    config, section = job.config, job.config[model.name]
    if not isinstance(model, stages.Stage):
        if not config["eval"]["num"] or not data.has_held_out(section["data"]):
            return None
        held_out = evaluate.held_out_examples(section, config["eval"]["num"])

        def score(params, step):
            found = guide_scores(config, model, params, held_out, source.class_names)
            if writes():
                evaluate.write_classifier_report(folder, found, step)

        return score
    others = [other for other in model.sections if other != model.name]
    if model.emits != "low_res" or not are_trained(job, others):
        return None
    guide = {other: pipeline.load_params(config, other, job.workdir)[0] for other in others}
    real = evaluate.held_out_examples(section, 8) if model.low_res else None

    def draw(params, step):
        sample_fn = pipeline.SampleFn((model,), {model.name: params, **guide}, config, {model.name: step})
        path = folder / "samples" / f"{step:08d}.png"
        if real is None:
            write_samples(sample_fn, config, path, source.class_names)
        else:
            small = pipeline.smaller(real["image"], model.low_res.factor)
            given = {"image": small} | {k: real[k] for k in model.reads if k != "low_res"}
            made = pipeline.sample_together(sample_fn, 0, len(small), given)
            if writes():
                pipeline.draw_enlargements(path, small, made, real["image"])

    return draw


# More pictures than this are written as they are made, and an interrupted run goes on where it stopped.
SAMPLES_IN_MEMORY = 1000


def sample_many(
    job: Job, sample_fn: pipeline.SampleFn, prompts: Sequence[str], folder: pathlib.Path, choice: Mapping[str, Any]
) -> list[pathlib.Path]:
    """Samples into files of a folder, by a choice of arguments besides the config; makes those that are missing."""
    c, names = job.config["sample"], [stage.name for stage in sample_fn.stages]
    num = max(c["num"], len(prompts))
    cond = pipeline.sample_conditions(sample_fn, num, prompts)

    def sample(first: int, count: int) -> np.ndarray:
        some = {name: values[first : first + count] for name, values in cond.items()}
        return sample_fn(c["seed"], count, first=first, batch_size=c["batch_size"], **some, **choice)

    how = {
        name: {k: job.config[name].get(k) for k in ("steps", "sampler", "guidance", "guidance_scale")} for name in names
    }
    which = {"training_step": dict(sample_fn.step), "ema": job.args.ema, "raw": job.args.raw}
    about = {"seed": c["seed"], **which, "stages": how, "prompts": list(prompts), **choice}
    mine = {"process_index": parallel.process_index(), "process_count": parallel.process_count()}
    return evaluate.sample_to_folder(sample, folder, num, about=about, labels=cond.get("label"), **mine)


def save_many(job: Job, sample_fn: pipeline.SampleFn, path: pathlib.Path, prompts: Sequence[str]) -> None:
    """Samples into files of WORKDIR/samples, for `python -m diffax.evaluation`; draws the first ones."""
    folder, columns = job.workdir / "samples", job.config["sample"]["columns"]
    files = sample_many(job, sample_fn, prompts, folder, {})
    if not writes():
        return
    with np.load(files[0], allow_pickle=False) as file:
        pipeline.draw_grid(path, images.from_uint8(file["arr_0"][: 8 * columns]), columns=columns)
    print(f"samples: {path}\nsamples: {folder}\nto score them: python -m diffax.evaluation {folder} REFERENCE")


def write_samples(
    sample_fn: pipeline.SampleFn,
    config: dict,
    path: pathlib.Path,
    class_names: Sequence[str],
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Samples as the config's `sample` section says, into one labelled grid; returns what every stage made."""
    c = config["sample"]
    num = max(c["num"], len(prompts))
    cond = pipeline.sample_conditions(sample_fn, num, prompts)
    how = {"batch_size": c["batch_size"], "every_stage": True}
    made = pipeline.sample_together(sample_fn, c["seed"], num, cond, **how)
    if writes():
        last = made[sample_fn.stages[-1].name]
        pipeline.draw_grid(path, last, columns=c["columns"], labels=picture_labels(cond, class_names))
    return {"made": made, **cond}


def picture_labels(cond: dict[str, Any], class_names: Sequence[str]) -> list[str] | None:
    """What stands under pictures that were made under these conditions."""
    if "prompt" in cond:
        return list(cond["prompt"])
    if "label" in cond:
        return [class_names[i] if i < len(class_names) else str(i) for i in cond["label"]]
    return None


def asked_prompts(job: Job) -> list[str]:
    """The prompts of the command line; empty if there are none.

    Raises:
      UserError: the file of prompts cannot be read or holds none.
    """
    if job.args.prompt is not None:
        return [job.args.prompt]
    if not job.args.prompts:
        return []
    return compare.read_prompts(job.args.prompts)


def run_sample(job: Job) -> None:
    """Samples from a trained workdir into one picture; or edits or enlarges --input, or enlarges held-out pictures."""
    c, given = job.config["sample"], job.args.input
    editing = job.args.mask is not None or job.args.strength is not None
    if editing and not given:
        raise UserError("there is no picture to edit; --mask and --strength; pass --input=FILE")
    prompts = asked_prompts(job)
    name = ("edited.png" if editing else "enlarged.png") if given else "samples.png"
    path = pathlib.Path(job.args.output or job.workdir / name)
    if job.args.output and path.exists() and not job.args.overwrite:
        raise UserError(f"the output exists; {path}; pass --overwrite or another --output")
    sample_fn = load_trained(job)
    if sample_fn.stages[-1].emits != "low_res":
        raise UserError(
            f"{sample_fn.stages[-1].name} makes embeddings and no pictures; --mode=sample; use the config of a whole "
            "system, such as configs/dalle2.py"
        )
    if prompts and not sample_fn.tokenizers:
        raise UserError("this model reads no text; --prompt; leave it out")
    by_all = not given and "low_res" not in sample_fn.takes and c["save"]
    if by_all and max(c["num"], len(prompts)) > SAMPLES_IN_MEMORY:
        save_many(job, sample_fn, path, prompts)
        return
    if editing:
        edit_picture(sample_fn, job, prompts, path)
        return
    if given:
        sample_fn = sample_fn.starting_at(job.args.stage or sample_fn.stages[-1].name)
        if sample_fn.stages[0].low_res is None:
            name = sample_fn.stages[0].name
            raise UserError(f"{name} enlarges no picture; --input; pass --stage=NAME of one that takes 'low_res'")
    if given and not given.endswith(".npz"):
        if writes():
            enlarge_picture(sample_fn, images.read_image(given), c, path, prompts)
        return
    if given or "low_res" in sample_fn.takes:
        made, label = enlarge_samples(job, sample_fn, path, prompts)
    else:
        found = write_samples(sample_fn, job.config, path, class_names(job), prompts)
        made, label = found["made"], found.get("label")
    if not writes():
        return
    print(f"samples: {path}")
    for name in [stage.name for stage in sample_fn.stages if stage.emits == "low_res"] if c["save"] else ():
        pictures = made[name]
        images.check_finite(pictures)
        # What a later stage reads, rounded as it would have done.
        kept = images.to_uint8(pictures, nearest=name != sample_fn.stages[-1].name)
        print(f"samples: {images.save_npz(job.workdir / name, kept, label)}")


def as_read_by(stage: stages.Stage, picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [h, w, 3], as floats in the channels of a stage."""
    picture = images.as_floats(picture)
    return picture.mean(-1, keepdims=True) if stage.shape[-1] == 1 else picture


def edit_picture(sample_fn: pipeline.SampleFn, job: Job, prompts: Sequence[str], path: pathlib.Path) -> None:
    """Fills the holes of --input, or paints over it; writes the picture, what is known of it, and the results."""
    c, last, args = job.config["sample"], sample_fn.stages[-1], job.args
    picture, mask = images.read_image(args.input), None
    if args.mask is not None:
        mask = images.read_image(args.mask)
        if mask.shape != picture.shape:
            raise UserError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]} and the picture {picture.shape[1]} x "
                f"{picture.shape[0]}; --mask; make them the same size"
            )
        mask = data.image_ops.center_crop(mask, *last.shape[:2]).mean(-1) >= 128
    picture = as_read_by(last, data.image_ops.center_crop(picture, *last.shape[:2]))
    num = max(c["num"], len(prompts))
    cond = pipeline.sample_conditions(sample_fn, num, prompts)
    how = {"image": picture, "mask": mask, "strength": args.strength, "batch_size": c["batch_size"]}
    made = pipeline.sample_together(sample_fn, c["seed"], num, cond, **how)
    if not writes():
        return
    known = picture if mask is None else np.where(mask[..., None], picture, 0)
    shown = [picture, known] if mask is not None else [picture]
    labels = ["input", "known"][: len(shown)] + (picture_labels(cond, class_names(job)) or [""] * num)
    pipeline.draw_grid(path, np.concatenate([np.stack(shown), made]), columns=c["columns"], labels=labels)
    print(f"edited: {path}")
    if c["save"]:
        print(f"samples: {images.save_npz(path.with_suffix(''), images.to_uint8(made), cond.get('label'))}")


def enlarge_picture(
    sample_fn: pipeline.SampleFn, picture: np.ndarray, c: dict, path: pathlib.Path, prompts: Sequence[str] = ()
) -> None:
    """Enlarges one picture, uint8 [h, w, 3]; writes it beside its bicubic enlargement, and alone."""
    picture = as_read_by(sample_fn.stages[0], picture)
    cond = {k: v[0] for k, v in pipeline.sample_conditions(sample_fn, 1, prompts).items()}
    made = pipeline.enlarge(sample_fn, picture, seed=c["seed"], tile=c["tile"], batch_size=c["batch_size"], **cond)
    images.check_finite(made[None])
    alone = path.with_name(f"{path.stem}_result.png")
    images.save_png(alone, images.to_uint8(made))
    pipeline.draw_enlargements(path, picture[None], made[None])
    print(f"input, bicubic and result: {path}\nresult: {alone}")


def enlarge_samples(
    job: Job, sample_fn: pipeline.SampleFn, path: pathlib.Path, prompts: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Enlarges the samples of an --input file, or held-out pictures; draws the first ones; returns all, and labels."""
    c, first = job.config["sample"], sample_fn.stages[0]
    if job.args.input:
        small, label = images.load_npz(job.args.input)
        small, real = images.as_floats(small[..., : first.shape[-1]]), None
    else:
        found = evaluate.held_out_examples(job.config[first.name], c["num"])
        small, label = pipeline.smaller(found["image"], first.low_res.factor), found.get("label")
        real = found["image"] if len(sample_fn.stages) == 1 else None
    cond = pipeline.sample_conditions(sample_fn, len(small), prompts)
    if "label" in cond and label is not None:
        cond["label"] = label.astype(np.int32)
    how = {"batch_size": c["batch_size"], "every_stage": True}
    made = pipeline.sample_together(sample_fn, c["seed"], len(small), {"image": small, **cond}, **how)
    if writes():
        last = made[sample_fn.stages[-1].name]
        pipeline.draw_enlargements(path, small[:8], last[:8], None if real is None else real[:8])
    return made, cond.get("label")


# ---- edits by the latents of unCLIP ---------------------------------------------------------------------------------

Row = list[tuple[np.ndarray, str]]  # pictures [h, w, C] and what stands under them


class Edit(NamedTuple):
    """One of `--edit`.

    Attributes:
      rows: (sample_fn, job, pictures [h, w, C], prompts) -> what is drawn, row by row.
      inputs: the least and the most pictures that it takes.
      needs: flags that must be given; allows: those that may be.
    """

    rows: Callable[..., list[Row]]
    inputs: tuple[int, int]
    needs: tuple[str, ...] = ()
    allows: tuple[str, ...] = ()


def _row(pictures: Sequence[np.ndarray], labels: Sequence[Any]) -> Row:
    shown = [f"{label:.2g}" if isinstance(label, float) else str(label) for label in labels]
    return list(zip(pictures, shown, strict=True))


def _how(job: Job, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """What most functions of `editing` take."""
    c = job.config["sample"]
    return {"seed": c["seed"], "batch_size": c["batch_size"], "prompt": prompts[0] if prompts else ""}


def _reconstruct_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    how, rng, rows = _how(job, prompts), np.random.default_rng(job.config["sample"]["seed"]), []
    for picture in pictures:
        found = editing.encode(sample_fn, picture, prompt=how["prompt"])
        other = found._replace(noise=rng.standard_normal(found.noise.shape, np.float32))
        row = _row([picture], ["input"])
        for name, latents in (("its noise", found), ("another", other)):
            made = editing.decode(sample_fn, latents, **how)
            row += _row(made, [f"{name}, {metrics.psnr(made, picture[None]):.1f} dB"])
        rows.append(row)
    return rows


def _variation_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    count, eta = job.args.count, job.args.strength or 1.0
    made = [editing.variations(sample_fn, p, count, eta=eta, **_how(job, prompts)) for p in pictures]
    return [_row([p, *of], ["input", *[""] * count]) for p, of in zip(pictures, made, strict=True)]


def _interpolation_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    weights = np.linspace(0, 1, job.args.count)
    made = editing.interpolations(sample_fn, *pictures, weights=weights, **_how(job, prompts))
    return [_row([pictures[0], *made, pictures[1]], ["input", *map(float, weights), "input"])]


def _diff_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    weights, to = np.linspace(0, job.args.strength or 0.5, job.args.count), job.args.to
    how = {"weights": weights, "shown": prompts[0] if prompts else None, **_how(job)}
    made = [editing.text_diffs(sample_fn, p, to, **how) for p in pictures]
    labels = ["input", *map(float, weights[:-1]), f"{weights[-1]:.2g} {to}"]
    return [_row([p, *of], labels) for p, of in zip(pictures, made, strict=True)]


def _component_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    stage = editing.decoder_of(sample_fn).painter
    section, shape = job.config[stage.name]["data"], configs.picture_shape(job.config, stage.name)
    size = stage.clip.net.image.features
    many = data.examples(data.load_source(section, shape=shape), section, shape=shape, limit=8 * size)["image"]
    embeddings = sample_fn.embed(many)
    counts = np.unique(np.rint(np.geomspace(1, min(embeddings.shape), job.args.count)).astype(int)).tolist()
    made = [editing.component_views(sample_fn, p, embeddings, counts, **_how(job, prompts)) for p in pictures]
    return [_row([*of, p], [*counts, "input"]) for p, of in zip(pictures, made, strict=True)]


def _prior_rows(sample_fn: pipeline.SampleFn, job: Job, pictures, prompts) -> list[Row]:
    asked = [prompts[i % len(prompts)] for i in range(max(job.args.count, len(prompts)))]
    how = {k: v for k, v in _how(job).items() if k != "prompt"}
    made = editing.with_and_without_prior(sample_fn, asked, **how)
    return [_row(of, [f"{name}: {prompt}" for prompt in asked]) for name, of in made.items()]


EDITS = {
    "reconstruct": Edit(_reconstruct_rows, (1, 100), allows=("prompt",)),
    "variations": Edit(_variation_rows, (1, 100), allows=("prompt", "strength")),
    "interpolate": Edit(_interpolation_rows, (2, 2), allows=("prompt",)),
    "diff": Edit(_diff_rows, (1, 100), needs=("to",), allows=("prompt", "strength")),
    "pca": Edit(_component_rows, (1, 100), allows=("prompt",)),
    "prior": Edit(_prior_rows, (0, 0), allows=("prompt", "prompts")),
}


def run_edit(job: Job) -> None:
    """Edits --input by its latents, or paints with and without the prior; draws rows like the figures of DALL-E 2."""
    args = job.args
    if args.edit not in EDITS:
        near = configs.closest(args.edit or "", EDITS)
        raise UserError(f"unknown --edit={args.edit}{near}; --mode=edit; use one of {', '.join(EDITS)}")
    edit, files = EDITS[args.edit], args.input.split(",") if args.input else []
    least, most = edit.inputs
    if not least <= len(files) <= most:
        wanted = {0: "no picture", 1: "one or more pictures", 2: "two pictures"}[least]
        raise UserError(f"--edit={args.edit} takes {wanted}, got {len(files)}; --input; write it as a.png,b.png")
    given = [name for name in ("prompt", "prompts", "to", "strength", "mask") if getattr(args, name) is not None]
    for name in (*edit.needs, *given):
        if name not in (*edit.needs, *edit.allows):
            raise UserError(f"--edit={args.edit} takes no --{name}; --mode=edit; leave it out")
        if name not in given:
            raise UserError(f"--edit={args.edit} takes --{name}; --mode=edit; pass it, as in --{name}='a red ring'")
    prompts = asked_prompts(job)
    if args.edit == "prior" and not prompts:
        raise UserError("--edit=prior takes a caption; --mode=edit; pass --prompt or --prompts")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"strength is {args.strength}; --strength; pass a number above 0, the picture, up to 1")
    if args.count < 2:
        raise UserError(f"--count={args.count}; --mode=edit; ask for two pictures in a row, or more")
    path = pathlib.Path(args.output or job.workdir / f"{args.edit}.png")
    if args.output and path.exists() and not args.overwrite:
        raise UserError(f"the output exists; {path}; pass --overwrite or another --output")
    pictures = [images.read_image(file) for file in files]
    sample_fn = load_trained(job)
    if args.prompt is not None and args.edit != "diff" and not editing.decoder_of(sample_fn).tokenizers:
        raise UserError("this decoder reads no text; --prompt; leave it out")
    if not writes():  # a few pictures, which one process makes
        return
    last = sample_fn.stages[-1]
    pictures = [as_read_by(last, data.image_ops.center_crop(picture, *last.shape[:2])) for picture in pictures]
    rows = edit.rows(sample_fn, job, pictures, prompts)
    shown, labels = zip(*sum(rows, []), strict=True)
    pipeline.draw_grid(path, np.stack(shown), columns=len(rows[0]), labels=labels)
    print(f"{args.edit}: {path}")


# ---- scores ---------------------------------------------------------------------------------------------------------


def run_evaluate(job: Job) -> None:
    """Scores a trained workdir; writes evaluation.json, evaluation.md and pictures. See also `compare_samples`.

    Several processes share what is costly, and each has the numbers; process 0 writes them.
    """
    if job.args.reference is not None:
        compare_samples(job)
        return
    config = job.config
    for name in configs.trained_sections(config):
        if config["eval"]["num"] and not configs.is_sampled(config[name]) and are_trained(job, [name]):
            evaluate_guide(job, name)
    if not any(configs.makes_pictures(config[name]) for name in config["stages"]):
        return
    sample_fn = load_trained(job)
    for stage in sample_fn.stages:
        if stage.low_res and config["eval"]["num"]:
            evaluate_enlargement(job, sample_fn, stage.name)
    if "low_res" in sample_fn.takes:
        return
    stage, folder, rows = sample_fn.stages[-1], job.workdir / "evaluation", []
    for row in evaluate.scores(sample_fn, config[stage.name], config["eval"]):
        rows.append(row)
        if not writes():
            continue
        show_row(row)
        of = "_".join(str(row[k]) for k in ("guidance", "level", "sampler", "steps") if k in row)
        if "_samples" in row:
            grid = {"columns": stage.num_classes or 8, "labels": row.get("_labels")}
            pipeline.draw_grid(folder / f"samples_{of}.png", row["_samples"], **grid)
        if "_curve" in row:
            curve = {"rate-distortion": row["_curve"]}
            panel = images.Panel("rate, bits per dimension", "distortion, RMSE of 0 to 255", curve)
            images.line_plots(folder / f"rate_distortion_{row['steps']}.png", [panel])
    if not writes():
        return
    print(evaluate.write_report(job.workdir, rows, report_header(job, sample_fn)))
    plots = {
        "trade_off": evaluate.trade_off(rows),
        "best_level": evaluate.best_level(rows),
        "caption_accuracy": evaluate.caption_accuracy(rows),
    }
    for name, panels in plots.items():
        if panels:
            images.line_plots(job.workdir / f"{name}.png", panels)
            print(f"plot: {job.workdir / f'{name}.png'}")
    write_progress(sample_fn, config, job.workdir / "progressive.png")
    print(f"report: {job.workdir / 'evaluation.md'}")


def compare_samples(job: Job) -> None:
    """Compares `sample.num` samples with --reference; writes comparison.json and comparison.md."""
    sample_fn, prompts = load_trained(job), asked_prompts(job)
    stage, config = sample_fn.stages[-1], job.config
    if "low_res" in sample_fn.takes or stage.emits != "low_res":
        raise UserError(
            f"{stage.name} does not make pictures from noise alone; --reference; score the samples of a whole system"
        )
    if not writes():  # it makes its share of the samples, which process 0 waits for
        for choice in evaluate.choices(config["eval"]):
            sample_many(job, sample_fn, prompts, evaluate.samples_folder(job.workdir, choice), choice)
        return
    rows, about = [], {}
    for row, told in evaluate.compared(
        lambda folder, choice: sample_many(job, sample_fn, prompts, folder, choice),
        evaluate.choices(config["eval"]),
        job.workdir,
        reference=job.args.reference,
        section=config[stage.name],
        inception=job.args.inception,
        batch_size=config["eval"]["batch_size"],
    ):
        show_row(row)
        rows.append(row)
        about = told
    for note in about["notes"]:
        print(f"diffax: note: {note}", file=sys.stderr)
    print(evaluate.write_report(job.workdir, rows, {**report_header(job, sample_fn), **about}, name="comparison"))
    print(f"report: {job.workdir / 'comparison.md'}")


def report_header(job: Job, sample_fn: pipeline.SampleFn) -> dict[str, Any]:
    """What a report is about."""
    return {"name": job.config["name"], "training_step": dict(sample_fn.step)}


def show_row(row: dict[str, Any]) -> None:
    """Prints the numbers of a row as soon as it is known."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if not k.startswith("_")}
    print(shown, file=sys.stderr, flush=True)


def evaluate_enlargement(job: Job, sample_fn: pipeline.SampleFn, name: str) -> None:
    """Scores one stage that enlarges, on held-out pictures; writes its report and a picture."""
    alone = sample_fn.starting_at(name)
    alone = dataclasses.replace(alone, stages=alone.stages[:1])
    rows = []
    for row in evaluate.enlargements(alone, job.config[name], job.config["eval"]):
        rows.append(row)
        if not writes():
            continue
        show_row(row)
        if "_made" in row:
            path = job.workdir / name / f"enlargements{'_' + str(row['level']) if 'level' in row else ''}.png"
            pipeline.draw_enlargements(path, row["_small"], row["_made"], row["_real"])
    if not writes():
        return
    print(evaluate.write_report(job.workdir / name, rows, report_header(job, alone), name="enlargements"))


def evaluate_guide(job: Job, name: str) -> None:
    """Prints and plots the held-out accuracy of a noised classifier or a CLIP."""
    config, section = job.config, job.config[name]
    params, step = pipeline.load_params(
        config, name, job.workdir, step=job.args.step, decay=job.args.ema, raw=job.args.raw
    )
    held_out = evaluate.held_out_examples(section, config["eval"]["num"])
    model = stages.build(config, name)
    found = guide_scores(config, model, params, held_out, class_names(job))
    if not writes():
        return
    row = evaluate.write_classifier_report(job.workdir / name, found, step)
    print(f"{name} on {len(held_out['image'])} held-out pictures: {row}", file=sys.stderr, flush=True)


def write_progress(sample_fn: pipeline.SampleFn, config: dict, path: pathlib.Path) -> None:
    """A row for each of a few pictures: what the model takes them for on the way (DDPM, figure 6)."""
    rows, moments = 8, 10
    _, kept = sample_fn(config["sample"]["seed"], rows, keep=moments, **pipeline.sample_conditions(sample_fn, rows))
    pipeline.draw_grid(path, kept.reshape(rows * moments, *kept.shape[2:]), columns=moments)


def run_compile(job: Job) -> None:
    """Compiles the train step and the sampler of each section; prints what they need, and keeps it in the workdir."""
    config, args, found = job.config, job.args, []
    for name in [args.stage] if args.stage else configs.trained_sections(config):
        for program in [args.program] if args.program else compile_ahead.PROGRAMS:
            if program == "sample" and not configs.is_sampled(config[name]):
                continue
            asked = dict(topology=args.topology, effort=args.effort, folder=job.workdir / "ahead")
            row = compile_ahead.report(config, name, program, **asked)
            print(compile_ahead.describe(row), flush=True)
            if "cached" in row:
                print(f"  from {row['cached']}; delete it to compile again")
            found.append(row)
            text = compile_ahead.table(found)
            images.write_atomically(job.workdir / "ahead" / "report.md", lambda f, text=text: f.write(text.encode()))
    print(f"report: {job.workdir / 'ahead' / 'report.md'}")


MODES: dict[str, Callable[[Job], None]] = {
    "train": run_train,
    "embed": run_embed,
    "sample": run_sample,
    "edit": run_edit,
    "evaluate": run_evaluate,
    "compile": run_compile,
}


def class_names(job: Job) -> list[str]:
    """Names of the labels, from the folder of the first section that was trained on any; empty if none was."""
    for name in configs.trained_sections(job.config):
        path = pathlib.Path(job.config[name]["workdir"] or job.workdir) / name / "classes.json"
        if path.exists() and (names := json.loads(path.read_text())):
            return names
    return []


def load_trained(job: Job) -> pipeline.SampleFn:
    """The trained model of the workdir, under this job's config."""
    return pipeline.load(job.workdir, config=job.config, step=job.args.step, decay=job.args.ema, raw=job.args.raw)


# ---- the command line -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command; --config.a.b=value is taken apart by `diffax.config`."""
    p = _Parser(
        prog="python -m diffax.main",
        description="Trains, samples and evaluates diffusion models.",
        epilog="Any field of the config can be set: --config.base.train.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--config", metavar="FILE[:VARIANT]", help="such as configs/quickstart.py; see the list below")
    p.add_argument("--mode", default="train", help=f"{', '.join(MODES)} (default train)")
    p.add_argument("--workdir", help="where all is written (default runs/NAME)")
    p.add_argument("--stage", help="train this stage alone; sample --input: enlarge by the stages from this one on")
    p.add_argument("--step", type=int, help="sample, evaluate: this checkpoint instead of the newest")
    p.add_argument("--ema", help="sample, evaluate: this average of the parameters, such as 0.999")
    p.add_argument("--raw", action="store_true", help="sample, evaluate: the parameters without averaging")
    p.add_argument(
        "--input",
        metavar="FILE",
        help="sample: enlarge this picture, or the samples of an .npz file, by --stage (default the last one); edit: "
        "pictures, as a.png,b.png",
    )
    p.add_argument("--prompt", metavar="TEXT", help="sample: what the pictures show, for models that read text")
    p.add_argument("--prompts", metavar="FILE", help="sample: prompts, one a line")
    p.add_argument("--mask", metavar="FILE", help="sample: what of --input to keep, white, and what to fill in, black")
    p.add_argument("--strength", type=float, help="sample: paint over --input; 0.3 stays near it, 1 forgets it")
    p.add_argument("--edit", help=f"edit: {', '.join(EDITS)}, of a system whose decoder takes image embeddings")
    p.add_argument("--to", metavar="TEXT", help="edit, diff: the caption to go to, from --prompt, what is there")
    p.add_argument("--count", type=int, default=7, help="edit: pictures made in a row (default 7)")
    p.add_argument(
        "--reference",
        metavar="PATH",
        help="evaluate: FID, sFID, IS, precision, recall and KID of sample.num samples beside these pictures, or these "
        "statistics (see python -m diffax.evaluation --help); 'data': beside all the training data",
    )
    p.add_argument("--inception", metavar="FILE", help="evaluate: weights of the FID's network, or 'fetch'")
    p.add_argument(
        "--topology", default="", metavar="SLICE", help="compile: for this TPU slice, such as v5e:4x4 (diffax[tpu])"
    )
    p.add_argument("--program", help=f"compile: {' or '.join(compile_ahead.PROGRAMS)} alone")
    p.add_argument(
        "--effort",
        type=float,
        default=compile_ahead.QUICK,
        help="compile: XLA's, from -1 (default: soon done) to 1; 0 is that of a run, and takes many times as long",
    )
    p.add_argument("--output", help="sample, edit: the picture to write (default WORKDIR/samples.png)")
    p.add_argument("--overwrite", action="store_true", help="sample, edit: replace the output")
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (diffax[log])")
    p.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="several processes: where process 0 listens, or auto"
    )
    p.add_argument("--processes", type=int, default=0, help="several processes: how many")
    p.add_argument("--process", type=int, default=-1, help="several processes: which one this is")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def help_text() -> str:
    """--help: the flags, then every config with its variants."""
    lines = [parser().format_help(), "configs:"]
    for name, (summary, variants) in sorted(configs.available().items()):
        lines.append(f"  configs/{name}.py  {summary}")
        lines += [f"      :{variant:<10} {what}" for variant, what in variants.items()]
    return "\n".join(lines)


def set_cpu_flags() -> None:
    """Makes XLA:CPU fast, where the user did not choose otherwise; to be called before JAX meets a device.

    One device per core (a power of two), because one device computes little but convolutions on all cores. And jaxlib
    0.10.2's new kernels off: with them the weight gradient of a 3x3 convolution at 32 pixels takes ten times as long.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        flags += f" --xla_force_host_platform_device_count={min(8, 1 << (cores.bit_length() - 1))}"
    # XLA ends the process over a flag it does not know, hence the exact version.
    if "xla_cpu_experimental_ynn" not in flags and jaxlib.__version__ == "0.10.2":
        flags += " --xla_cpu_experimental_ynn_fusion_type="
    os.environ["XLA_FLAGS"] = flags.strip()


def prepare(argv: Sequence[str]) -> Job:
    """Reads the command line and the config, and validates both before anything is written or compiled."""
    args, rest = parser().parse_known_args(argv)
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; command line; see --help")
    if args.mode not in MODES:
        near = configs.closest(args.mode, MODES)
        raise UserError(f"unknown --mode={args.mode}{near}; command line; modes are {', '.join(MODES)}")
    if args.edit and args.mode != "edit":
        raise UserError(f"--edit={args.edit} is for another mode; command line; pass --mode=edit")
    if args.config is None and (args.mode == "train" or args.workdir is None):
        raise UserError("no config; command line; pass --config=configs/quickstart.py (see --help)")
    if args.config is None:
        config = configs.from_dict(pipeline.read_config(args.workdir))
        configs.override(config, rest)
    else:
        config = configs.load(args.config, rest)
    name = config.name if args.config is None else pipeline.default_name(args.config)
    workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / name)
    if args.program not in (None, *compile_ahead.PROGRAMS):
        raise UserError(f"unknown --program={args.program}; command line; use {' or '.join(compile_ahead.PROGRAMS)}")
    if not -1 <= args.effort <= 1:
        raise UserError(f"--effort={args.effort} is not from -1 to 1; command line; use 0 for what a run gets")
    if args.topology and args.mode != "compile":
        raise UserError("a slice that is not here runs nothing; --topology; pass --mode=compile with it")
    set_cpu_flags()
    if args.topology:
        parallel.compile_only()
    try:
        parallel.start(args.coordinator, args.processes, args.process)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {error}; --coordinator; see --help") from error
    count = len(parallel.slice_devices(args.topology)) if args.topology else parallel.device_count()
    configs.validate(config, device_count=count, process_count=parallel.process_count())
    if args.stage and args.stage not in configs.trained_sections(config):
        there = ", ".join(configs.trained_sections(config))
        raise UserError(f"unknown --stage={args.stage}; command line; stages are {there}")
    return Job(pipeline.with_statistics(configs.to_dict(config), workdir), workdir, args)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed), 2 (bad input) or 75 (preempted, saved)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax and Grain tell of every save and thread
    try:
        job = prepare(argv)
        if job.args.mode != "compile":  # what is read from that cache does not say what it needs
            cache_compilations(job.workdir)
        MODES[job.args.mode](job)
        return 0
    except UserError as error:
        return complain(error, EXIT_USER, argv)
    except RunError as error:
        return complain(error, EXIT_FAILED, argv)
    except loop.Preempted as error:
        print(f"diffax: {error}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("diffax: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def cache_compilations(workdir: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, so that a rerun starts at once (unless the user chose a place)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        parallel.keep_compiled(workdir / "compiled")


def complain(error: Exception, status: int, argv: Sequence[str]) -> int:
    """One line on stderr; the traceback with --debug."""
    if "--debug" in argv:
        traceback.print_exception(error)
    print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        status = run()
    except Exception as error:  # none that was thought of
        traceback.print_exception(error)
        status = EXIT_FAILED
    if status not in (0, EXIT_PREEMPTED):
        parallel.leave(status)
    sys.exit(status)
