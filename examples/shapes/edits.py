"""Scores of edits on the embedded captioned shapes, by the evaluation classifier of `examples.shapes.evaluation`.

    python -m examples.shapes.edits --what=inpaint,image_to_image --glide=runs/glide --inpaint=runs/glide_inpaint_64
    python -m examples.shapes.edits --what=reconstruct,variations,interpolate,diff --unclip=runs/dalle2
    python -m examples.shapes.edits --what=prior,diversity --glide=runs/glide --unclip=runs/dalle2 --ar=runs/dalle2_ar

Every section prints a table in Markdown, and writes it with its pictures to --out. Workdirs are of `:tiny` systems: of
GLIDE (configs/glide.py), of its inpainting model (glide_inpaint_64.py), and of unCLIP (dalle2.py) with a diffusion
prior and with an autoregressive one (dalle2.py:ar). All is scored on what the first stage that makes pictures makes:
those that enlarge change no attribute. The classifier is trained first, in a minute or two.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import diffax
from diffax.components import build
from diffax.data import images, plots
from diffax.data.pipeline import Column, examples
from diffax.errors import RunError, UserError
from diffax.evaluation import metrics, report
from diffax.sampling import grids, latents
from diffax.sampling.sample_fn import SampleFn
from diffax.training import cpu_flags
from examples.shapes import data as shapes
from examples.shapes import evaluation

SAID = ("shape", "colour", "size", "place")
SHOWN = 12  # columns of the pictures that are written


class Bench(NamedTuple):
    """What all sections read.

    Attributes:
      systems: {flag: model}, each ends at the first stage that makes pictures.
      classifier: of such pictures.
      section: the section of that stage.
      args: of the command line.
    """

    systems: Mapping[str, SampleFn]
    classifier: evaluation.FittedCaptions
    section: Mapping[str, Any]
    args: argparse.Namespace

    def draw(self, name: str, rows: Sequence[np.ndarray], labels: Sequence[Sequence[str]]) -> None:
        """Writes rows of pictures [N, H, W, C], of each the first ones, with what stands under them."""
        count = min(SHOWN, *map(len, rows))
        texts = [[*of[:count], *[""] * (count - len(of))] for of in labels]
        path = pathlib.Path(self.args.out) / f"{name}.png"
        grids.draw_grid(path, np.concatenate([row[:count] for row in rows]), columns=count, labels=sum(texts, []))

    def plot(self, name: str, panels: Sequence[plots.Panel]) -> None:
        """Draws curves."""
        plots.line_plots(pathlib.Path(self.args.out) / f"{name}.png", panels)


# ---- pictures of shapes, and what is seen in them without a network --------------------------------------------------


def things(bench: Bench, num: int, split: str = "test") -> dict[str, np.ndarray]:
    """The first `num` pictures of single shapes of a split: 'image', 'caption' and their attributes, by name."""
    section, names = bench.section, (*SAID, "background")
    source = build({**section["data"], "split": split}, "data").open(tuple(section["shape"]))
    columns = {name: Column(name) for name in (*names, "caption")}
    found = examples(source, section["loader"], shape=tuple(section["shape"]), limit=num, columns=columns)
    named = {name: np.asarray(shapes.ATTRIBUTES[name])[found[name]] for name in names}
    return {"image": found["image"], "caption": np.asarray(found["caption"], object), **named}


def caption(of: Mapping[str, str], **changed: str) -> str:
    """The caption of a single thing with these attributes, some of them changed."""
    of = {**of, **changed}
    where = "" if of["place"] == "none" else f" at the {of['place']}"
    return f"a {of['size']} {of['colour']} {of['shape']}{where}"


def record(of: Mapping[str, np.ndarray], i: int) -> dict[str, str]:
    """The attributes of picture i."""
    return {name: str(of[name][i]) for name in SAID}


def another(bench: Bench, of: Mapping[str, np.ndarray], *names: str) -> list[dict[str, str]]:
    """For each picture other values of these attributes, drawn among the combinations that training showed."""
    rng, held_out = np.random.default_rng(bench.args.seed), bench.section["data"]["holdout"]
    drawn = []
    for i in range(len(of["image"])):
        own = record(of, i)
        others = ([v for v in shapes.ATTRIBUTES[name] if v not in (own[name], "none")] for name in names)
        combined = [dict(zip(names, values, strict=True)) for values in itertools.product(*others)]
        pairs = [{**own, **new} for new in combined]
        shown = [
            new
            for new, pair in zip(combined, pairs, strict=True)
            if {"colour", "shape"}.isdisjoint(names) or f"{pair['colour']} {pair['shape']}" not in held_out
        ]
        drawn.append(shown[rng.integers(len(shown))])
    return drawn


def edge_colour(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, C], the median of the outermost pixels: the background's colour."""
    rim = np.ones(pictures.shape[1:3], bool)
    rim[1:-1, 1:-1] = False
    return np.median(pictures[:, rim], axis=1)


def background(pictures: np.ndarray) -> np.ndarray:
    """The names of the backgrounds, by the nearest colour."""
    colours = images.from_uint8(np.array(list(shapes.BACKGROUNDS.values()), np.uint8))
    distance = np.abs(edge_colour(pictures)[:, None] - colours).sum(-1)
    return np.asarray(list(shapes.BACKGROUNDS))[distance.argmin(1)]


def foreground(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W] whether a pixel is clearly not of the background's colour."""
    return np.abs(pictures - edge_colour(pictures)[:, None, None]).max(-1) > 0.35


def moved(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """How far things went, by their foregrounds: mean distance of the centres in pixels, and mean overlap (IoU).

    Pictures without a foreground are left out of the distance, and have no overlap.
    """
    a, b = foreground(first), foreground(second)
    both = a.any((1, 2)) & b.any((1, 2))
    union = (a | b).sum((1, 2))
    overlap = np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 0)
    distance = np.linalg.norm(_centres(a[both]) - _centres(b[both]), axis=1)
    return float(distance.mean()) if both.any() else float("nan"), float(overlap.mean())


def _centres(masks: np.ndarray) -> np.ndarray:
    """[N, H, W] -> [N, 2] pixels."""
    weight = masks.sum((1, 2))[:, None]
    along = [(masks * np.arange(n).reshape(shape)).sum((1, 2)) for n, shape in
             ((masks.shape[1], (-1, 1)), (masks.shape[2], (1, -1)))]  # fmt: skip
    return np.stack(along, axis=1) / np.maximum(weight, 1)


def outside_the_thing(pictures: np.ndarray, margin: int = 2) -> np.ndarray:
    """[N, H, W] bool: false in the box around the foreground, some pixels wider: what is known in inpainting."""
    known = np.ones(pictures.shape[:3], bool)
    for mask, keep in zip(foreground(pictures), known, strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if len(rows):
            keep[max(rows[0] - margin, 0) : rows[-1] + margin + 1,
                 max(columns[0] - margin, 0) : columns[-1] + margin + 1] = False  # fmt: skip
    return known


def changed_pixels(made: np.ndarray, picture: np.ndarray, known: np.ndarray) -> int:
    """How many known pixels are not bit by bit what they were, in all pictures."""
    return int(((made != picture).any(-1) & known).sum())


def border_step(pictures: np.ndarray, known: np.ndarray) -> float:
    """The mean difference of neighbouring pixels across the border of what is known, on the scale of 0 to 255."""
    steps = []
    for axis in (1, 2):
        across = np.diff(known.astype(np.int8), axis=axis) != 0
        steps.append(np.abs(np.diff(pictures, axis=axis)).mean(-1)[across])
    return float(127.5 * np.concatenate(steps).mean())


# ---- scores ---------------------------------------------------------------------------------------------------------


def share(hits: np.ndarray, among: np.ndarray | None = None) -> float:
    """The share of true ones, of all or of some; NaN of none."""
    hits = np.asarray(hits) if among is None else np.asarray(hits)[np.asarray(among)]
    return float(hits.mean()) if len(hits) else float("nan")


def kept(bench: Bench, made: np.ndarray, of: Mapping[str, np.ndarray], names: Sequence[str] = SAID) -> dict[str, float]:
    """The share of pictures that still show attributes of the originals; of places, where these had a clear one."""
    seen = bench.classifier.read(made)
    clear = np.asarray(of["place"]) != "none"
    return {name: share(seen[name] == of[name], clear if name == "place" else None) for name in names}


def followed(bench: Bench, made: np.ndarray, wanted: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """The share of pictures that show wanted attributes: each, and 'all' of them."""
    seen = bench.classifier.read(made)
    hits = {name: seen[name] == np.array([w[name] for w in wanted]) for name in wanted[0]}
    return {name: share(of) for name, of in hits.items()} | {"all": share(np.all([*hits.values()], axis=0))}


def spread_within(bench: Bench, made: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """How different the pictures of one caption are.

    Args:
      bench: whose classifier has features.
      made: [N, H, W, C].
      groups: [N] the number of each one's caption.

    Returns:
      'distance', the RMS distance of the classifier's features between two of them; 'distinct', the number of different
      pairs of place and background over that of pictures, averaged over captions.
    """
    where = list(zip(bench.classifier.read(made)["place"], background(made), strict=True))
    distinct = [len({where[i] for i in np.flatnonzero(groups == g)}) / (groups == g).sum() for g in np.unique(groups)]
    return {
        "distance": metrics.spread(np.asarray(bench.classifier.features(made)), groups),
        "distinct": float(np.mean(distinct)),
    }


def real_row(bench: Bench, of: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What the classifier reads correctly in the originals: no score can be expected to be above these."""
    return kept(bench, of["image"], of)


# ---- the sections ---------------------------------------------------------------------------------------------------


def inpaint(bench: Bench) -> list[dict]:
    """The thing is erased with its box, and the caption says another colour and shape (GLIDE)."""
    args, of = bench.args, things(bench, bench.args.num)
    picture, known = of["image"], outside_the_thing(of["image"])
    wanted = another(bench, of, "colour", "shape")
    prompts = [caption(record(of, i), **w) for i, w in enumerate(wanted)]
    rows, drawn, labels = [], [picture, np.where(known[..., None], picture, 0)], [["input"], prompts]
    results = {"untouched": picture}
    for name in ("inpaint", "glide"):
        if name in bench.systems:
            sample_fn = bench.systems[name]
            results[name] = sample_fn(args.seed, prompt=prompts, image=picture, mask=known, batch_size=args.batch)
    for name, made in results.items():
        channels = name in bench.systems and "inpaint" in bench.systems[name].first.conditions
        how = "trained to fill" if channels else "replacement" if name in bench.systems else ""
        old = bench.classifier.read(made)
        rows.append(
            {"pictures": name, "method": how, "count": len(made), **followed(bench, made, wanted)}
            | {"still the old": share((old["shape"] == of["shape"]) & (old["colour"] == of["colour"]))}
            | {name: value for name, value in kept(bench, made, of, ("size", "place")).items()}
            | {"known pixels changed": changed_pixels(made, picture, known)}
            | {"step at the border": border_step(made, known)}
        )
        if name != "untouched":
            drawn, labels = [*drawn, made], [*labels, [f"{name}: {how}"]]
    bench.draw("inpaint", drawn, labels)
    return rows


def image_to_image(bench: Bench) -> list[dict]:
    """A picture is painted over by a caption with another colour and shape and no place, by strength (GLIDE)."""
    args, sample_fn, of = bench.args, bench.systems["glide"], things(bench, bench.args.num)
    wanted = another(bench, of, "colour", "shape")
    prompts = [caption(record(of, i), place="none", **w) for i, w in enumerate(wanted)]
    rows, drawn, labels = [], [of["image"]], [["input"]]
    for strength in args.strengths:
        made = sample_fn(args.seed, prompt=prompts, image=of["image"], strength=strength, batch_size=args.batch)
        distance, overlap = moved(of["image"], made)
        rows.append(
            {"strength": strength, "count": len(made), **followed(bench, made, wanted)}
            | {f"{name} kept": value for name, value in kept(bench, made, of, ("size", "place")).items()}
            | {"background kept": share(background(made) == of["background"])}
            | {"centre moved, pixels": distance, "overlap": overlap}
        )
        drawn, labels = [*drawn, made], [*labels, [f"{strength:g} {prompt}" for prompt in prompts]]
    bench.draw("image_to_image", drawn, labels)
    x = [row["strength"] for row in rows]
    names = {"caption followed": "all", "place kept": "place kept", "background kept": "background kept"}
    curves = {name: (x, [row[key] for row in rows]) for name, key in {**names, "overlap": "overlap"}.items()}
    bench.plot("image_to_image_plot", [plots.Panel("strength", "share", curves)])
    return rows


def reconstruct(bench: Bench) -> list[dict]:
    """DDIM inversion and back, beside the same embedding with other noise (unCLIP)."""
    args, sample_fn, of = bench.args, bench.systems["unclip"], things(bench, bench.args.num)
    rng, rows = np.random.default_rng(args.seed), []
    drawn, labels = [of["image"]], [["input"]]
    other = rng.standard_normal(of["image"].shape, np.float32)
    for steps in args.steps:
        found = latents.encode(sample_fn, of["image"], steps=steps, batch_size=args.batch)
        for name, noise in (("its own", found.noise), ("another", other)):
            of_noise = found._replace(noise=noise)
            made = latents.decode(sample_fn, of_noise, steps=steps, batch_size=args.batch)
            row = {"steps": steps, "noise": name, "count": len(made), "psnr": metrics.psnr(made, of["image"])}
            rows.append(row | kept(bench, made, of) | {"background": share(background(made) == of["background"])})
            drawn, labels = [*drawn, made], [*labels, [f"{steps} steps, {name} noise"]]
    rows.append({"noise": "(the originals)", "count": len(of["image"]), **real_row(bench, of), "background": 1.0})
    bench.draw("reconstruct", drawn, labels)
    return rows


def variations(bench: Bench) -> list[dict]:
    """What is kept by pictures of one embedding, with DDIM from its noise or with noise of their own (unCLIP)."""
    args, sample_fn = bench.args, bench.systems["unclip"]
    of = things(bench, max(args.num // args.each, 1))
    found = latents.encode(sample_fn, of["image"], batch_size=args.batch)
    groups = np.repeat(np.arange(len(of["image"])), args.each)
    many = latents.Latents(*(part[groups] for part in found))
    repeated = {name: of[name][groups] for name in of}
    decoder, rows = latents.decoder_of(sample_fn), []
    caption_of = {"prompt": ""} if decoder.reads_text else {}
    ways: dict[str, Callable[[], np.ndarray]] = {
        f"DDIM, eta {eta:g}": lambda eta=eta: latents.decode(
            sample_fn, many, seed=args.seed, eta=eta, guidance=None, same_noise=False, batch_size=args.batch
        )
        for eta in args.etas
    }
    ways["new noise"] = lambda: decoder(args.seed, image_embedding=many.embedding, batch_size=args.batch, **caption_of)
    drawn, labels = [repeated["image"]], [["input"]]
    for name, way in ways.items():
        made = way()
        distance, overlap = moved(repeated["image"], made)
        row = {"variations": name, "count": len(made), **kept(bench, made, repeated)}
        row |= {"background": share(background(made) == repeated["background"]), "overlap": overlap}
        rows.append(row | {"centre moved, pixels": distance, **spread_within(bench, made, groups)})
        drawn, labels = [*drawn, made], [*labels, [name]]
    rows.append({"variations": "(the originals)", "count": len(of["image"]), **real_row(bench, of), "background": 1.0})
    bench.draw("variations", drawn, labels)
    return rows


def interpolate(bench: Bench) -> list[dict]:
    """What the classifier reads on the way from one picture to another of other colour and shape (unCLIP)."""
    args, sample_fn = bench.args, bench.systems["unclip"]
    weights, pairs = np.linspace(0, 1, args.points), max(args.num // args.points, 1)
    of = things(bench, 2 * pairs + 10)
    differ = [all(of[n][i] != of[n][i + 1] for n in ("shape", "colour")) for i in range(len(of["image"]) - 1)]
    first = np.flatnonzero(differ)[:pairs]
    at, after = (latents.encode(sample_fn, of["image"][i], batch_size=args.batch) for i in (first, first + 1))
    between = latents.Latents(
        np.concatenate(
            [latents.slerp_embeddings(*ends, weights) for ends in zip(at.embedding, after.embedding, strict=True)]
        ),
        np.concatenate([latents.slerp(*ends, weights) for ends in zip(at.noise, after.noise, strict=True)]),
    )
    made = latents.decode(sample_fn, between, batch_size=args.batch)
    paths = {name: values.reshape(len(first), -1) for name, values in bench.classifier.read(made).items()}
    curves, smooth = {}, {}
    for name in ("colour", "shape"):
        ends = of[name][first][:, None], of[name][first + 1][:, None]
        read = [paths[name] == end for end in ends]
        curves[f"{name} of the first"], curves[f"{name} of the second"] = (hits.mean(0) for hits in read)
        smooth[name] = share([one_way(a, b) for a, b in zip(*read, strict=True)])
    rows = [
        {
            "weight": round(float(w), 3),
            "pairs": len(first),
            **{name: float(values[k]) for name, values in curves.items()},
        }
        for k, w in enumerate(weights)
    ]
    names = {f"{name} of the second": smooth[name] for name in smooth}
    rows.append({"weight": "paths that go from first to second and never back", "pairs": len(first), **names})
    bench.plot(
        "interpolate_plot",
        [plots.Panel("weight of the second", "share", {n: (weights, v) for n, v in curves.items()})],
    )
    shown = list(made.reshape(len(first), -1, *made.shape[1:])[:8])
    bench.draw("interpolate", shown, [[f"{w:.2f}" for w in weights]] * len(shown))
    return rows


def one_way(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether a path [K] reads as the first, then perhaps as neither, then as the second, each without a way back."""
    state = np.where(first, 0, np.where(second, 2, 1))
    return bool(first[0] and second[-1] and (np.diff(state) >= 0).all())


def diff(bench: Bench) -> list[dict]:
    """One attribute is changed by the difference of two captions, the others should stay (unCLIP)."""
    args, sample_fn = bench.args, bench.systems["unclip"]
    every = things(bench, max(args.num // len(SAID), 1) * 2)
    every = {name: values[every["place"] != "none"] for name, values in every.items()}
    of = {name: values[: max(args.num // len(SAID), 1)] for name, values in every.items()}
    found = latents.encode(sample_fn, of["image"], batch_size=args.batch)
    rows, drawn, labels = [], [], []
    for name in SAID:
        wanted = another(bench, of, name)
        towards = [
            latents.text_difference(sample_fn, caption(record(of, i), **w), caption(record(of, i)))
            for i, w in enumerate(wanted)
        ]
        for weight in args.weights:
            embedding = [
                latents.slerp_embeddings(own, np.linalg.norm(own) * t, [weight])[0]
                for own, t in zip(found.embedding, towards, strict=True)
            ]
            made = latents.decode(sample_fn, found._replace(embedding=np.stack(embedding)), batch_size=args.batch)
            rest = [other for other in SAID if other != name]
            same = kept(bench, made, of)
            row = {"changed": name, "weight": weight, "count": len(made), "new": followed(bench, made, wanted)[name]}
            row |= {"old": same[name], "others kept": float(np.mean([same[other] for other in rest]))}
            rows.append(row | {"background kept": share(background(made) == of["background"])})
        drawn += [of["image"], made]
        labels += [["input"], [caption(record(of, i), **w) for i, w in enumerate(wanted)]]
    bench.draw("diff", drawn, labels)
    return rows


def known_captions(bench: Bench) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions that at least `each` training pictures have: [N] captions, their numbers [N], and such pictures."""
    of = things(bench, 10**6, "train")
    number, each = max(bench.args.num // bench.args.each, 1), bench.args.each
    texts, counts = np.unique(of["caption"].astype(str), return_counts=True)
    texts = np.random.default_rng(bench.args.seed).permutation(texts[counts >= each])[:number]
    if not len(texts):
        raise UserError(f"no caption has {each} real pictures; --each; use fewer")
    pictures = np.concatenate([of["image"][of["caption"] == text][:each] for text in texts])
    return np.repeat(texts, each).tolist(), np.repeat(np.arange(len(texts)), each), pictures


def quality(bench: Bench, made: np.ndarray, prompts: Sequence[str], groups: np.ndarray) -> dict[str, float]:
    """How well pictures show what their captions say, and how different those of one caption are."""
    images.check_finite(made)
    names = ("accuracy", "whole", *SAID)
    scores = evaluation.caption_scores(bench.classifier.read(made), prompts)
    return {name: scores[name] for name in names if name in scores} | spread_within(bench, made, groups)


def prior(bench: Bench) -> list[dict]:
    """The same captions through each prior, through the text embedding alone, and without an embedding (unCLIP)."""
    args, (prompts, groups, real) = bench.args, known_captions(bench)
    results = {}
    for flag, name in (("unclip", "diffusion prior"), ("ar", "autoregressive prior")):
        if flag not in bench.systems:
            continue
        if results:
            made = bench.systems[flag](args.seed, prompt=prompts, batch_size=args.batch)
        else:
            results = latents.with_and_without_prior(
                bench.systems[flag], prompts, seed=args.seed, batch_size=args.batch
            )
            made = results.pop("prior")
        results[name] = made
    results["(real pictures)"] = real
    bench.draw("prior", [made[:: args.each] for made in results.values()],
               [[f"{name}: {prompt}" for prompt in prompts[:: args.each]] for name in results])  # fmt: skip
    return [
        {"embedding": name, "count": len(made), **quality(bench, made, prompts, groups)}
        for name, made in results.items()
    ]


def diversity(bench: Bench) -> list[dict]:
    """Accuracy and diversity of every system given against the guidance of the stage that makes pictures."""
    args, (prompts, groups, real) = bench.args, known_captions(bench)
    rows = [{"system": "(real pictures)", "count": len(real), **quality(bench, real, prompts, groups)}]
    curves, drawn, labels = {}, [], []
    for name, sample_fn in bench.systems.items():
        for scale in args.guidance:
            made = sample_fn(args.seed, prompt=prompts, guidance={sample_fn.first.name: scale}, batch_size=args.batch)
            rows.append(
                {"system": name, "guidance": scale, "count": len(made), **quality(bench, made, prompts, groups)}
            )
            drawn, labels = [*drawn, made], [*labels, [f"{name}, {scale:g}: {prompts[0]}"]]
        own = [row for row in rows if row["system"] == name]
        curves[name] = [[row[key] for row in own] for key in ("distance", "distinct", "accuracy")]
    level = min(max(accuracy) for _, _, accuracy in curves.values())
    for name, (*measures, accuracy) in curves.items():
        reached = {
            key: at_level(accuracy, of, level) for key, of in zip(("distance", "distinct"), measures, strict=True)
        }
        rows.append({"system": f"{name}, where it reaches the others' accuracy", "accuracy": level, **reached})
    bench.draw("diversity", drawn, labels)
    notes = [f"{scale:g}" for scale in args.guidance]
    bench.plot(
        "diversity_plot",
        [
            plots.Panel(xlabel, "accuracy", {name: (of[k], of[2]) for name, of in curves.items()}, notes)
            for k, xlabel in enumerate(("distance within a caption", "distinct places and backgrounds"))
        ],
    )
    return rows


def at_level(rising: Sequence[float], values: Sequence[float], level: float) -> float:
    """The value where a curve first reaches a level, between its points on straight lines."""
    k = next(k for k, height in enumerate(rising) if height >= level)
    if k == 0:
        return float(values[0])
    share_of_k = (level - rising[k - 1]) / (rising[k] - rising[k - 1])
    return float((1 - share_of_k) * values[k - 1] + share_of_k * values[k])


# Each with the systems of which it wants one or more.
SECTIONS: dict[str, tuple[Callable[[Bench], list[dict]], tuple[str, ...]]] = {
    "inpaint": (inpaint, ("glide", "inpaint")),
    "image_to_image": (image_to_image, ("glide",)),
    "reconstruct": (reconstruct, ("unclip",)),
    "variations": (variations, ("unclip",)),
    "interpolate": (interpolate, ("unclip",)),
    "diff": (diff, ("unclip",)),
    "prior": (prior, ("unclip", "ar")),
    "diversity": (diversity, ("glide", "unclip", "ar")),
}
SYSTEMS = ("glide", "inpaint", "unclip", "ar")


def without_upsamplers(sample_fn: SampleFn) -> SampleFn:
    """The system without the stages that enlarge."""
    if sample_fn.first is None or sample_fn.enlarges:
        raise UserError(f"{sample_fn.models[0].name} makes no pictures alone; edits; pass a whole system")
    count = sample_fn.models.index(sample_fn.first) + 1
    return dataclasses.replace(sample_fn, models=sample_fn.models[:count])


def numbers(text: str) -> list[float]:
    """'0,0.5,1' -> [0.0, 0.5, 1.0]."""
    return [float(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--what", default=",".join(SECTIONS), help=f"sections: {','.join(SECTIONS)} (default all)")
    for name in SYSTEMS:
        p.add_argument(f"--{name}", metavar="WORKDIR", help="a trained system, see above")
    p.add_argument("--out", default="runs/edits", help="where tables and pictures go")
    p.add_argument("--num", type=int, default=200, help="pictures that are scored, of every setting")
    p.add_argument(
        "--each", type=int, default=8, help="variations, prior, diversity: pictures of one original or caption"
    )
    p.add_argument("--batch", type=int, default=50, help="pictures made at once")
    p.add_argument("--seed", type=int, default=0, help="of the noise and of the new attributes")
    p.add_argument("--classifier_steps", type=int, default=2000, help="how long the classifier is trained")
    p.add_argument("--points", type=int, default=9, help="interpolate: pictures on a path")
    p.add_argument("--steps", type=lambda text: text.split(","), default=["10", "25", "50", "100"],
                   help="reconstruct: numbers of steps, comma between")  # fmt: skip
    for name, default, what in (
        ("strengths", "0.2,0.4,0.6,0.8,1", "image_to_image"),
        ("etas", "0.25,0.5,1", "variations"),
        ("weights", "0,0.1,0.2,0.3,0.4,0.5", "diff"),
        ("guidance", "1,2,3,5", "diversity"),
    ):
        p.add_argument(f"--{name}", type=numbers, default=numbers(default), help=f"{what} (default {default})")
    return p


def measure(args: argparse.Namespace) -> None:
    """Loads the systems, trains the classifier, and runs the sections."""
    chosen = args.what.split(",")
    for name in chosen:
        if name not in SECTIONS:
            raise UserError(f"unknown section {name!r}; --what; choose of {', '.join(SECTIONS)}")
    given = [name for name in SYSTEMS if getattr(args, name)]
    for name in chosen:
        wanted = SECTIONS[name][1]
        if not {*wanted} & {*given}:
            raise UserError(f"{name} needs a system; --what; pass --{' or --'.join(wanted)}=WORKDIR")
    systems = {name: without_upsamplers(diffax.load(getattr(args, name))) for name in given}
    sections = {name: fn.config[fn.first.name] for name, fn in systems.items()}
    first = sections[given[0]]
    for name, section in sections.items():
        same = tuple(section["shape"]) == tuple(first["shape"]) and section["data"]["single"]
        if not same or section["data"]["name"] != evaluation.DATA:
            raise UserError(f"{name} does not make single shapes of {first['shape']}; --{name}; use :tiny systems")
    classifier = evaluation.captions(steps=args.classifier_steps).fit(first, tuple(first["shape"]))
    bench = Bench(systems, classifier, first, args)
    header = {
        "num": args.num,
        "seed": args.seed,
        "training_step": {name: dict(fn.step) for name, fn in systems.items()},
    }
    header["classifier_on_real"] = dict(classifier.accuracies)
    print("classifier on real pictures: " + ", ".join(f"{name} {of:.3f}" for name, of in classifier.accuracies.items()))
    for name in chosen:
        table = report.write_report(pathlib.Path(args.out), SECTIONS[name][0](bench), header, name=name)
        print(f"\n## {name}\n\n{table}", flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Measures, and returns the exit status."""
    args = parser().parse_args(argv)
    cpu_flags.set_cpu_flags()
    try:
        measure(args)
    except (UserError, RunError) as error:
        print(f"edits: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
