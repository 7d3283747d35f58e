"""--mode=edit: edits of --input by the latents of unCLIP, drawn in rows like the figures of DALL-E 2."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffax import components
from diffax.commands import Job
from diffax.commands.sample import with_channels_of
from diffax.commands.trained import load_trained, output_of, prompts_of
from diffax.data import image_ops, images
from diffax.data.pipeline import examples
from diffax.errors import UserError
from diffax.evaluation import metrics
from diffax.sampling import grids, latents
from diffax.sampling.sample_fn import SampleFn
from diffax.training import processes

Row = list[tuple[np.ndarray, str]]  # pictures [h, w, C] and what stands below them


class Edit(NamedTuple):
    """One of `--edit`.

    Attributes:
      rows: (sample_fn, job, pictures [h, w, C], prompts) -> what is drawn, row by row.
      inputs: the least and the most pictures that it reads.
      needs: flags that must be given.
      allows: flags that may be.
    """

    rows: Callable[[SampleFn, Job, Sequence[np.ndarray], Sequence[str]], list[Row]]
    inputs: tuple[int, int]
    needs: tuple[str, ...] = ()
    allows: tuple[str, ...] = ()


def run(job: Job) -> None:
    """Edits --input by its latents, or samples with and without the prior."""
    args = job.args
    files = args.input.split(",") if args.input else []
    prompts = check(args, files, lambda: prompts_of(job))
    path = output_of(job, f"{args.edit}.png")
    pictures = [images.read_image(file) for file in files]
    sample_fn = load_trained(job)
    if args.prompt is not None and args.edit != "diff" and not latents.decoder_of(sample_fn).reads_text:
        raise UserError("this decoder reads no text; --prompt; leave it out")
    if not processes.is_primary():  # a few pictures, which one process makes
        return
    last = sample_fn.models[-1]
    pictures = [with_channels_of(last, image_ops.center_crop(picture, *last.shape[:2])) for picture in pictures]
    rows = EDITS[args.edit].rows(sample_fn, job, pictures, prompts)
    shown, labels = zip(*sum(rows, []), strict=True)
    grids.draw_grid(path, np.stack(shown), columns=len(rows[0]), labels=labels)
    print(f"{args.edit}: {path}")


def check(args: argparse.Namespace, files: Sequence[str], read_prompts: Callable[[], list[str]]) -> list[str]:
    """The prompts, if the flags fit the edit.

    Raises:
      UserError: they do not.
    """
    if args.edit not in EDITS:
        near = components.closest(args.edit or "", EDITS)
        raise UserError(f"unknown --edit={args.edit}{near}; --mode=edit; use one of {', '.join(EDITS)}")
    edit = EDITS[args.edit]
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
    prompts = read_prompts()
    if args.edit == "prior" and not prompts:
        raise UserError("--edit=prior takes a caption; --mode=edit; pass --prompt or --prompts")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"strength is {args.strength}; --strength; pass a number above 0, the picture, up to 1")
    if args.count < 2:
        raise UserError(f"--count={args.count}; --mode=edit; make two pictures in a row, or more")
    return prompts


# ---- the edits ------------------------------------------------------------------------------------------------------


def _row(pictures: Sequence[np.ndarray], labels: Sequence[Any]) -> Row:
    shown = [f"{label:.2g}" if isinstance(label, float) else str(label) for label in labels]
    return list(zip(pictures, shown, strict=True))


def _how(job: Job, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """What most edits depend on."""
    c = job.config["sample"]
    return {"seed": c["seed"], "batch_size": c["batch_size"], "prompt": prompts[0] if prompts else ""}


def _reconstruct_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    how, rng, rows = _how(job, prompts), np.random.default_rng(job.config["sample"]["seed"]), []
    for picture in pictures:
        found = latents.encode(sample_fn, picture, prompt=how["prompt"])
        other = found._replace(noise=rng.standard_normal(found.noise.shape, np.float32))
        row = _row([picture], ["input"])
        for name, of in (("its noise", found), ("another", other)):
            made = latents.decode(sample_fn, of, **how)
            row += _row(made, [f"{name}, {metrics.psnr(made, picture[None]):.1f} dB"])
        rows.append(row)
    return rows


def _variation_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    count, eta = job.args.count, job.args.strength or 1.0
    made = [latents.variations(sample_fn, p, count, eta=eta, **_how(job, prompts)) for p in pictures]
    return [_row([p, *of], ["input", *[""] * count]) for p, of in zip(pictures, made, strict=True)]


def _interpolation_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    weights = np.linspace(0, 1, job.args.count)
    made = latents.interpolations(sample_fn, *pictures, weights=weights, **_how(job, prompts))
    return [_row([pictures[0], *made, pictures[1]], ["input", *map(float, weights), "input"])]


def _diff_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    weights, to = np.linspace(0, job.args.strength or 0.5, job.args.count), job.args.to
    how = {"weights": weights, "source": prompts[0] if prompts else None, **_how(job)}
    made = [latents.text_diffs(sample_fn, p, to, **how) for p in pictures]
    labels = ["input", *map(float, weights[:-1]), f"{weights[-1]:.2g} {to}"]
    return [_row([p, *of], labels) for p, of in zip(pictures, made, strict=True)]


def _pca_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    many = _training_pictures(job.config, latents.decoder_of(sample_fn).first, 8 * sample_fn.clip.features)
    embeddings = sample_fn.embed(many)
    counts = np.unique(np.rint(np.geomspace(1, min(embeddings.shape), job.args.count)).astype(int)).tolist()
    how = _how(job, prompts)
    made = [latents.pca_reconstructions(sample_fn, p, embeddings, counts, **how) for p in pictures]
    return [_row([*of, p], [*counts, "input"]) for p, of in zip(pictures, made, strict=True)]


def _training_pictures(config: Mapping[str, Any], model: Any, limit: int) -> np.ndarray:
    """At most `limit` pictures that a model is trained on."""
    section, shape = config[model.name], model.data_shape
    data = components.build(section["data"], "data", path=f"config.{model.name}.data")
    return examples(data.open(shape), section["loader"], shape=shape, limit=limit)["image"]


def _prior_rows(sample_fn: SampleFn, job: Job, pictures, prompts) -> list[Row]:
    texts = [prompts[i % len(prompts)] for i in range(max(job.args.count, len(prompts)))]
    how = {name: value for name, value in _how(job).items() if name != "prompt"}
    made = latents.with_and_without_prior(sample_fn, texts, **how)
    return [_row(of, [f"{name}: {text}" for text in texts]) for name, of in made.items()]


EDITS = {
    "reconstruct": Edit(_reconstruct_rows, (1, 100), allows=("prompt",)),
    "variations": Edit(_variation_rows, (1, 100), allows=("prompt", "strength")),
    "interpolate": Edit(_interpolation_rows, (2, 2), allows=("prompt",)),
    "diff": Edit(_diff_rows, (1, 100), needs=("to",), allows=("prompt", "strength")),
    "pca": Edit(_pca_rows, (1, 100), allows=("prompt",)),
    "prior": Edit(_prior_rows, (0, 0), allows=("prompt", "prompts")),
}
