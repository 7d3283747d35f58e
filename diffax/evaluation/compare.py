"""Two sets of pictures compared by the numbers that papers print: `python -m diffax.evaluation A B`."""

import argparse
import functools
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffax.conditions.text import read_prompts
from diffax.data import images
from diffax.errors import RunError, UserError
from diffax.evaluation import metrics
from diffax.evaluation.clip_score import clip_scorer
from diffax.evaluation.features import KID_SUBSET, NEIGHBOUR, Statistics, measurement, statistics_of
from diffax.evaluation.pictures import MARK, open_pictures, size_in_words
from diffax.training import reporting
from diffax.weights import inception as inception_weights


def _moments(found: Statistics, suffix: str = "") -> metrics.Moments:
    return metrics.Moments(int(found["count"]), found["mu" + suffix], found["sigma" + suffix])


def _frechet(name: str, suffix: str, made: Statistics, real: Statistics) -> dict[str, float]:
    return {name: metrics.frechet_of_moments(_moments(made, suffix), _moments(real, suffix))}


def _score(made: Statistics, real: Statistics) -> dict[str, float]:
    return dict(zip(("inception_score", "inception_score_std"), map(float, made["score"]), strict=True))


def _precision_recall(made: Statistics, real: Statistics) -> dict[str, float]:
    return metrics.precision_recall(real["features"], made["features"], k=NEIGHBOUR)._asdict()


def _kid(made: Statistics, real: Statistics) -> dict[str, float]:
    size = min(KID_SUBSET, len(made["features"]), len(real["features"]))
    mean, deviation = metrics.kid(made["features"], real["features"], subset_size=size)
    return {"kid": mean, "kid_std": deviation, "kid_subset_size": size}


class Number(NamedTuple):
    """A row of the table: what it needs of A and of B, and the function of both that gives it."""

    of_made: tuple[str, ...]
    of_real: tuple[str, ...]
    compute: Callable[[Statistics, Statistics], dict[str, float]]


MOMENTS, SPATIAL_MOMENTS, FEATURES = ("mu", "sigma"), ("mu_s", "sigma_s"), ("features",)
NUMBERS: dict[str, dict[str, Number]] = {
    "inception": {
        "fid": Number(MOMENTS, MOMENTS, functools.partial(_frechet, "fid", "")),
        "sfid": Number(SPATIAL_MOMENTS, SPATIAL_MOMENTS, functools.partial(_frechet, "sfid", "_s")),
        "inception_score": Number(("score",), (), _score),
        "precision_recall": Number(FEATURES, FEATURES, _precision_recall),
        "kid": Number(FEATURES, FEATURES, _kid),
    },
    "patches": {"frechet_patches": Number(MOMENTS, MOMENTS, functools.partial(_frechet, "frechet_patches", ""))},
}


def compare(
    made: Statistics, real: Statistics, *, features: str = "inception", only: Sequence[str] = ()
) -> tuple[dict[str, float], list[str]]:
    """The numbers of samples beside real pictures.

    Args:
      made: statistics of the samples; real: of the real pictures.
      features: a key of `NUMBERS`.
      only: names of the numbers to compute; by default all that can be.

    Returns:
      {name: number}, and notes on what they are worth.

    Raises:
      UserError: the pictures are not of the same size, or a number that is asked for cannot be had.
    """
    sizes = [size_in_words(found["size"]) for found in (made, real) if "size" in found]
    if len(set(sizes)) > 1:
        raise UserError(f"A has pictures of {sizes[0]} and B of {sizes[1]}; A and B; compare pictures of one size")
    wanted = {name: number for name, number in NUMBERS[features].items() if not only or name in only}
    if unknown := [name for name in only if name not in NUMBERS[features]]:
        raise UserError(f"no number {unknown[0]!r}; --only; there are {', '.join(NUMBERS[features])}")
    results, notes = {}, []
    for name, number in reporting.progress_bar(wanted.items(), "numbers"):
        sides = (("A", number.of_made, made), ("B", number.of_real, real))
        missing = [f"{side} has no {key}" for side, keys, found in sides for key in keys if key not in found]
        if missing and only:
            raise UserError(f"{name} cannot be had: {missing[0]}; --only; give the pictures")
        if missing:
            notes.append(f"{name} is left out: {missing[0]}")
            continue
        results |= number.compute(made, real)
    width = len(made["mu"])
    for side, found in (("A", made), ("B", real)):
        if features == "inception" and 0 < int(found["count"]) <= width:
            notes.append(
                f"{side} has {int(found['count'])} pictures, not more than the {width} features: its FID is too high; "
                "papers take 50,000"
            )
    return results, notes


def table(results: Mapping[str, float]) -> str:
    """The numbers as a Markdown table."""
    rows = [("", "value"), ("---", "---:"), *((name, f"{value:.6g}") for name, value in results.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    p = _Parser(
        prog="python -m diffax.evaluation",
        description="Compares samples A with real pictures B: folders of images or of .npz files, or .npz files "
        "(arr_0, uint8 [N, H, W, 3]); also files of statistics, such as ADM's references (mu, sigma, mu_s, sigma_s). "
        "With --clip and --prompts, also A with the captions that it was made from.",
        allow_abbrev=False,
    )
    p.add_argument("samples", metavar="A")
    p.add_argument("reference", metavar="B", nargs="?", help="may be left out with --clip")
    p.add_argument(
        "--inception", metavar="FILE", help=f"weights of the FID's network (default: of ${inception_weights.VARIABLE})"
    )
    p.add_argument("--features", default="inception", help=f"{' or '.join(NUMBERS)} (default inception)")
    p.add_argument(
        "--clip",
        metavar="PATH",
        help="CLIP score of A: a CLIP's published weights, or a workdir (GLIDE: of ViT-B-16.pt)",
    )
    p.add_argument(
        "--prompts", metavar="FILE", help="the captions of A, one a line, in the order of the pictures' names"
    )
    p.add_argument("--num", type=int, help="at most so many pictures of A and of B, the first ones")
    p.add_argument("--only", default="", metavar="NAME,...", help="these numbers alone")
    p.add_argument("--batch_size", type=int, default=64, help="pictures at once (default 64)")
    p.add_argument("--output", metavar="FILE.json", help="also write the numbers here")
    p.add_argument("--no-cache", action="store_true", help=f"keep no statistics beside the pictures (*{MARK}*.npz)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def _checked(argv: Sequence[str]) -> argparse.Namespace:
    args = parser().parse_args(argv)
    if (args.clip is None) != (args.prompts is None):
        raise UserError("--clip and --prompts go together; command line; give both")
    if args.reference is None and not args.clip:
        raise UserError("the following arguments are required: B, or --clip and --prompts; command line; see --help")
    if args.features not in NUMBERS:
        raise UserError(f"unknown --features={args.features}; command line; use one of {', '.join(NUMBERS)}")
    if args.batch_size < 1 or (args.num is not None and args.num <= NEIGHBOUR):
        raise UserError(f"--batch_size and --num; command line; use at least 1 and {NEIGHBOUR + 1}")
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        raise UserError(f"no such folder; --output={args.output}; make it, or choose another")
    args.only = [name for name in args.only.split(",") if name]
    if unknown := [name for name in args.only if name not in NUMBERS[args.features]]:
        raise UserError(f"no number {unknown[0]!r}; --only; there are {', '.join(NUMBERS[args.features])}")
    return args


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Compares as the flags say; returns what --output holds."""
    found: dict[str, Any] = {"A": args.samples, "B": args.reference}
    results: dict[str, float] = {}
    notes: list[str] = []
    score = clip_scorer(args.clip, batch_size=args.batch_size) if args.clip else None
    prompts = read_prompts(args.prompts) if args.clip else []
    if args.reference is not None:
        about, measure = measurement(args.features, args.inception, batch_size=args.batch_size)
        options = dict(about=about, limit=args.num, cache=not args.no_cache)
        made, notes = statistics_of(args.samples, measure, **options)
        real, more = statistics_of(args.reference, measure, **options)
        results, last = compare(made, real, features=args.features, only=args.only)
        notes = notes + more + last
        found |= {**about, "pictures": int(made["count"]), "reference_pictures": int(real["count"]) or None}
    if score:
        pictures = open_pictures(args.samples, args.num)
        results |= {"clip_score": score(pictures, prompts)}
        found |= {"clip": args.clip, "prompts": args.prompts, "pictures": pictures.count}
        if pictures.count % len(prompts):
            notes = [*notes, f"{len(prompts)} prompts in turn for {pictures.count} pictures"]
    return found | {"results": results, "notes": notes}


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _checked(argv)
        found = report(args)
        for note in found["notes"]:
            print(f"diffax: note: {note}", file=sys.stderr)
        print(table(found["results"]))
        if args.output:
            text = json.dumps(found, indent=2) + "\n"
            images.write_atomically(args.output, lambda file: file.write(text.encode()))
            print(f"report: {args.output}")
        return 0
    except (UserError, RunError) as error:
        if "--debug" in argv:
            traceback.print_exception(error)
        print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("diffax: interrupted", file=sys.stderr)
        return 130
