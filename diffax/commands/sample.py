"""--mode=sample: samples of a trained workdir in one picture; or edits or enlarges --input or held-out pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffax.commands import Job
from diffax.commands.trained import class_names, load_trained, output_of, prompts_of
from diffax.data import image_ops, images
from diffax.errors import UserError
from diffax.evaluation.reference import sample_many
from diffax.sampling import grids
from diffax.sampling.enlarge import enlarge
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes

# More pictures than this are written as they are made, and an interrupted run goes on where it stopped.
SAMPLES_IN_MEMORY = 1000


def run(job: Job) -> None:
    """Samples, edits or enlarges."""
    c, args = job.config["sample"], job.args
    edited = args.mask is not None or args.strength is not None
    if edited and not args.input:
        raise UserError("there is no picture to edit; --mask and --strength; pass --input=FILE")
    prompts = prompts_of(job)
    path = output_of(job, ("edited.png" if edited else "enlarged.png") if args.input else "samples.png")
    sample_fn = load_trained(job)
    _check_model(sample_fn, prompts)
    from_noise = not args.input and not sample_fn.enlarges
    if from_noise and c["save"] and max(c["num"], len(prompts)) > SAMPLES_IN_MEMORY:
        save_many(job, sample_fn, path, prompts)
    elif edited:
        edit_picture(sample_fn, job, prompts, path)
    elif args.input and not args.input.endswith(".npz"):
        enlarge_picture(_enlarging(sample_fn, args.stage), images.read_image(args.input), c, path, prompts)
    else:
        if from_noise:
            found = write_samples(sample_fn, job.config, path, class_names(job), prompts)
        else:
            sample_fn = _enlarging(sample_fn, args.stage) if args.input else sample_fn
            found = enlarge_samples(job, sample_fn, path, prompts)
        _report(job, sample_fn, path, found)


def _check_model(sample_fn: SampleFn, prompts: Sequence[str]) -> None:
    if not sample_fn.makes_pictures:
        raise UserError(
            f"{sample_fn.models[-1].name} makes embeddings and no pictures; --mode=sample; use the config of a whole "
            "system, such as configs/dalle2.py"
        )
    if prompts and not sample_fn.reads_text:
        raise UserError("this model reads no text; --prompt; leave it out")


def _enlarging(sample_fn: SampleFn, stage: str | None) -> SampleFn:
    """The system from the stage on that enlarges --input; by default the last one."""
    found = sample_fn.starting_at(stage or sample_fn.models[-1].name)
    if not found.enlarges:
        name = found.models[0].name
        raise UserError(
            f"{name} enlarges no picture; --input; pass --stage=NAME of one that has the condition 'low_res'"
        )
    return found


def _report(job: Job, sample_fn: SampleFn, path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Says where the picture is, and with sample.save writes the arrays of every stage that makes pictures."""
    if not processes.is_primary():
        return
    print(f"samples: {path}")
    for model in sample_fn.models if job.config["sample"]["save"] else ():
        if len(model.shape) != 3:
            continue
        pictures = found["made"][model.name]
        images.check_finite(pictures)
        # What a later stage reads, rounded as it would have done.
        kept = images.to_uint8(pictures, nearest=model is not sample_fn.models[-1])
        print(f"samples: {images.save_npz(job.workdir / model.name, kept, found.get('label'))}")


# ---- from noise -----------------------------------------------------------------------------------------------------


def write_samples(
    sample_fn: SampleFn,
    config: Mapping[str, Any],
    path: pathlib.Path,
    class_names: Sequence[str],
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Samples as `config.sample` says, into one labelled grid.

    Returns:
      {'made': {stage: pictures}} and the arguments that they were made with.
    """
    c = config["sample"]
    num = max(c["num"], len(prompts))
    given = grids.conditions_for(sample_fn, num, prompts)
    how = {"batch_size": c["batch_size"], "every_stage": True}
    made = grids.sample_together(sample_fn, c["seed"], num, given, **how)
    if processes.is_primary():
        labels = grids.captions_of(sample_fn, given, class_names)
        grids.draw_grid(path, made[sample_fn.models[-1].name], columns=c["columns"], labels=labels)
    return {**given, "made": made}


def save_many(job: Job, sample_fn: SampleFn, path: pathlib.Path, prompts: Sequence[str]) -> None:
    """Samples into files of WORKDIR/samples, for `python -m diffax.evaluation`; draws the first ones."""
    folder, columns = job.workdir / "samples", job.config["sample"]["columns"]
    about = {"ema": job.args.ema, "raw": job.args.raw}
    files = sample_many(sample_fn, folder, prompts=prompts, about=about)
    if not processes.is_primary():
        return
    with np.load(files[0], allow_pickle=False) as file:
        grids.draw_grid(path, images.from_uint8(file["arr_0"][: 8 * columns]), columns=columns)
    print(f"samples: {path}\nsamples: {folder}\nto score them: python -m diffax.evaluation {folder} REFERENCE")


# ---- edits and enlargements -----------------------------------------------------------------------------------------


def with_channels_of(model: Any, picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 [h, w, 3], as floats in the channels of a stage."""
    picture = images.as_floats(picture)
    return picture.mean(-1, keepdims=True) if model.shape[-1] == 1 else picture


def _mask(path: str, like: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The pixels [h, w] that are known, of a mask file: those that are white."""
    mask = images.read_image(path)
    if mask.shape != like.shape:
        raise UserError(
            f"the mask is {mask.shape[1]} x {mask.shape[0]} and the picture {like.shape[1]} x {like.shape[0]}; --mask; "
            "make them the same size"
        )
    return image_ops.center_crop(mask, *size).mean(-1) >= 128


def edit_picture(sample_fn: SampleFn, job: Job, prompts: Sequence[str], path: pathlib.Path) -> None:
    """Fills the holes of --input, or paints over it; writes the picture, what is known of it, and the results."""
    c, last, args = job.config["sample"], sample_fn.models[-1], job.args
    pixels = images.read_image(args.input)
    mask = None if args.mask is None else _mask(args.mask, pixels, last.shape[:2])
    picture = with_channels_of(last, image_ops.center_crop(pixels, *last.shape[:2]))
    num = max(c["num"], len(prompts))
    given = grids.conditions_for(sample_fn, num, prompts)
    how = {"image": picture, "mask": mask, "strength": args.strength, "batch_size": c["batch_size"]}
    made = grids.sample_together(sample_fn, c["seed"], num, given, **how)
    if not processes.is_primary():
        return
    shown, labels = [picture], ["input"]
    if mask is not None:
        shown, labels = [picture, np.where(mask[..., None], picture, 0)], ["input", "known"]
    labels += grids.captions_of(sample_fn, given, class_names(job)) or [""] * num
    grids.draw_grid(path, np.concatenate([np.stack(shown), made]), columns=c["columns"], labels=labels)
    print(f"edited: {path}")
    if c["save"]:
        print(f"samples: {images.save_npz(path.with_suffix(''), images.to_uint8(made), given.get('label'))}")


def enlarge_picture(
    sample_fn: SampleFn, pixels: np.ndarray, c: Mapping[str, Any], path: pathlib.Path, prompts: Sequence[str] = ()
) -> None:
    """Enlarges one picture, uint8 [h, w, 3]; writes it beside its bicubic enlargement, and alone."""
    if not processes.is_primary():
        return
    picture = with_channels_of(sample_fn.models[0], pixels)
    given = {name: values[0] for name, values in grids.conditions_for(sample_fn, 1, prompts).items()}
    made = enlarge(sample_fn, picture, seed=c["seed"], tile=c["tile"], batch_size=c["batch_size"], **given)
    images.check_finite(made[None])
    alone = path.with_name(f"{path.stem}_result.png")
    images.save_png(alone, images.to_uint8(made))
    grids.draw_enlargements(path, picture[None], made[None])
    print(f"input, bicubic and result: {path}\nresult: {alone}")


def enlarge_samples(job: Job, sample_fn: SampleFn, path: pathlib.Path, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Enlarges the samples of an --input file, or held-out pictures, and draws the first ones.

    Returns:
      {'made': {stage: pictures}} and the arguments that they were made with.
    """
    c, first, real = job.config["sample"], sample_fn.models[0], None
    if job.args.input:
        small, label = images.load_npz(job.args.input)
        given = {"image": images.as_floats(small[..., : first.shape[-1]])}
        given |= grids.conditions_for(sample_fn, len(small), prompts)
        if "label" in given and label is not None:
            given["label"] = label.astype(np.int32)
    else:
        columns = grids.columns_there(job.config[first.name], first.data_shape)
        found = grids.held_out_examples(job.config[first.name], first.data_shape, c["num"], columns)
        given = grids.arguments_of(sample_fn, found)
        if prompts:
            given["prompt"] = [prompts[i % len(prompts)] for i in range(len(given["image"]))]
        real = grids.smaller(found["image"], found["image"].shape[1] // first.shape[0])
    how = {"batch_size": c["batch_size"], "every_stage": True}
    made = grids.sample_together(sample_fn, c["seed"], len(given["image"]), given, **how)
    if processes.is_primary():
        last = made[sample_fn.models[-1].name][:8]
        beside = real[:8] if real is not None and len(sample_fn.models) == 1 else None
        grids.draw_enlargements(path, given["image"][:8], last, beside)
    return {**given, "made": made}
