"""diffax's Inception features, FID, IS, KID, precision and recall beside those of torch-fidelity and pytorch-fid.

All read the same pictures and the same weights, random ones unless a file is given; printed are the numbers, how far
they are from diffax's, and the seconds that each took, of which diffax's are without compiling. It is no test: nothing
in diffax needs PyTorch.

    pip install diffax torch torchvision torch-fidelity pytorch-fid
    python benchmarks/metrics.py --num=64 --side=64

torch-fidelity enlarges and scales pictures as the graph of the FID does, as diffax does too. pytorch-fid does both in
another way, so that its FID is another; in the line "same input" its network is given the pixels that diffax's sees.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytorch_fid.inception
import torch
import torch_fidelity.feature_extractor_inceptionv3
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid.inception import InceptionV3
from torch_fidelity import metric_fid as fid
from torch_fidelity import metric_isc as isc
from torch_fidelity import metric_kid as kid
from torch_fidelity import metric_prc as prc

from diffax.evaluation import compare, metrics
from diffax.networks.inception import Inception, resize
from diffax.weights import inception
from diffax.weights.table import torch_shapes

LAYERS = ("64", "192", "768", "2048")


def draw_weights(path: pathlib.Path) -> None:
    """Writes random weights of unit gain, in the form in which the network is published for PyTorch."""
    rng = np.random.default_rng(0)

    def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
        z = rng.standard_normal(shape, np.float32)
        if key.endswith(("conv.weight", "fc.weight")):
            return z * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        # a variance is positive, a scale near 1, all else near 0
        return np.exp(0.1 * z) if key.endswith(("bn.weight", "running_var")) else np.float32(0.1) * z

    arrays = {key: draw(key, shape) for key, shape in torch_shapes(inception.table()).items()}
    arrays["fc.bias"] = np.zeros(1008, np.float32)
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, path)


def draw_pictures(folder: pathlib.Path, num: int, side: int, seed: int, smooth: int) -> None:
    """Writes coloured noise of patches of `smooth` pixels on a gradient, as .png."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    ramp = np.linspace(0, 1, side)[:, None, None]
    for i in range(num):
        coarse = rng.uniform(size=(-(-side // smooth), -(-side // smooth), 3))
        noise = np.kron(coarse, np.ones((smooth, smooth, 1)))[:side, :side]
        mixed = 0.5 * noise + 0.5 * (ramp * rng.uniform(size=3) + (1 - ramp) * rng.uniform(size=3))
        Image.fromarray(np.uint8(255 * mixed)).save(folder / f"{i:05d}.png")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, the seconds that it took)."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def show(what: str, seconds: float) -> None:
    """Says on stderr what is done."""
    print(f"{what}: {seconds:.1f} s; so far {time.process_time():.0f} s of processors", file=sys.stderr, flush=True)


def ours(folders: list[pathlib.Path], weights: pathlib.Path, batch: int, subset: int) -> tuple[list, dict, float]:
    """diffax's ([features of a set], numbers, seconds without compiling)."""
    params, _ = inception.load(weights)
    shape = next(compare.open_pictures(folders[0]).chunks(batch))
    run = jax.jit(lambda params, pictures: Inception().apply({"params": params}, pictures))
    run, seconds = timed(lambda: run.lower(params, shape).compile())
    show("diffax, compiling", seconds)

    def features(folder: pathlib.Path) -> dict[str, np.ndarray]:
        found = [jax.device_get(run(params, chunk)) for chunk in compare.open_pictures(folder).chunks(batch)]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def measure():
        made, real = map(features, folders)
        numbers = {f"FID, {layer}": metrics.frechet_distance(made[layer], real[layer]) for layer in LAYERS}
        numbers["IS"], numbers["IS, deviation"] = metrics.inception_score(made["logits"], splits=10)
        numbers["KID"], numbers["KID, deviation"] = metrics.kid(made["2048"], real["2048"], subset_size=subset)
        numbers["precision"], numbers["recall"] = metrics.precision_recall(real["2048"], made["2048"])
        return [made, real], numbers

    (found, numbers), seconds = timed(measure)
    return found, numbers, seconds


def torch_fidelity_numbers(
    folders: list[pathlib.Path], weights: pathlib.Path, batch: int, subset: int
) -> tuple[dict, float, dict]:
    """torch-fidelity's (numbers, seconds, features of the first set)."""
    names = [*LAYERS, "logits_unbiased"]
    extract = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights)
    )

    def features(folder: pathlib.Path) -> dict[str, torch.Tensor]:
        chunks = compare.open_pictures(folder).chunks(batch)
        parts = [extract(torch.from_numpy(chunk.transpose(0, 3, 1, 2).copy())) for chunk in chunks]
        return {name: torch.cat(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}

    def measure():
        made, real = map(features, folders)
        moments = {layer: [fid.fid_features_to_statistics(found[layer]) for found in (made, real)] for layer in LAYERS}
        numbers = {
            f"FID, {layer}": fid.fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
            for layer, both in moments.items()
        }
        score = isc.isc_features_to_metric(made["logits_unbiased"], shuffle=False)
        numbers |= {"IS": score["inception_score_mean"], "IS, deviation": score["inception_score_std"]}
        found = kid.kid_features_to_metric(made["2048"], real["2048"], kid_subset_size=subset, verbose=False)
        numbers["KID"] = found["kernel_inception_distance_mean"]
        numbers["KID, deviation"] = found["kernel_inception_distance_std"]
        found = prc.prc_features_to_metric(made["2048"], real["2048"], verbose=False)
        return numbers | {name: found[name] for name in ("precision", "recall")}, made

    (numbers, made), seconds = timed(measure)
    return numbers, seconds, {name: value.numpy() for name, value in made.items()}


def pytorch_fid_numbers(folders: list[pathlib.Path], weights: pathlib.Path, batch: int) -> tuple[dict, float]:
    """pytorch-fid's (FID, seconds)."""

    def measure() -> float:
        return fid_score.calculate_fid_given_paths([str(f) for f in folders], batch, "cpu", 2048, num_workers=0)

    found, seconds = timed(measure)
    return {"FID, 2048": float(found)}, seconds


def pytorch_fid_of_same_input(folders: list[pathlib.Path], batch: int) -> dict[str, float]:
    """pytorch-fid's network and distance, on pictures that are enlarged and scaled as diffax does it."""
    network = InceptionV3([0, 1, 2, 3], resize_input=False).eval()

    @torch.no_grad()
    def moments(folder: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = []
        for chunk in compare.open_pictures(folder).chunks(batch):
            # the network makes 2 x - 1 of it, which is then (pixel - 128) / 128
            pixels = np.array(resize(chunk.astype(np.float32)) / 256).transpose(0, 3, 1, 2)
            parts.append([layer.mean((2, 3)) for layer in network(torch.from_numpy(pixels.copy()))])
        features = [torch.cat(layer).numpy() for layer in zip(*parts, strict=True)]
        return [(layer.mean(0), np.cov(layer, rowvar=False)) for layer in features]

    both = [moments(folder) for folder in folders]
    return {
        f"FID, {layer}": float(fid_score.calculate_frechet_distance(*made, *real))
        for layer, made, real in zip(LAYERS, *both, strict=True)
    }


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="pictures in a set")
    parser.add_argument("--side", type=int, default=64, help="their height and width")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once; divides num")
    parser.add_argument("--inception", type=pathlib.Path, help="the published .pth (default: random weights)")
    args = parser.parse_args()
    if args.num % args.batch:
        parser.error(f"--batch={args.batch} does not divide --num={args.num}")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        folders = [root / "made", root / "real"]
        for i, folder in enumerate(folders):
            draw_pictures(folder, args.num, args.side, seed=i, smooth=4 + 2 * i)
        weights = args.inception or root / "random.pth"
        if not args.inception:
            draw_weights(weights)
        subset = args.num // 2
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights)
        features, numbers, seconds = ours(folders, weights, args.batch, subset)
        show("diffax", seconds)
        fidelity, its_seconds, its_features = torch_fidelity_numbers(folders, weights, args.batch, subset)
        show("torch-fidelity", its_seconds)
        pytorch, other_seconds = pytorch_fid_numbers(folders, weights, args.batch)
        show("pytorch-fid", other_seconds)
        same, more_seconds = timed(lambda: pytorch_fid_of_same_input(folders, args.batch))
        show("pytorch-fid, same input", more_seconds)
    theirs = {"torch-fidelity": fidelity, "pytorch-fid": pytorch, "same input": same}
    print(f"2 x {args.num} pictures of {args.side}x{args.side}, {jax.default_backend()}")
    times = {"diffax": seconds, "torch-fidelity": its_seconds, "pytorch-fid, FID alone": other_seconds}
    print("seconds: " + ", ".join(f"{program} {spent:.1f}" for program, spent in times.items()))
    for name, value in numbers.items():
        line = f"{name:16s}{value:14.6g}"
        for program, found in theirs.items():
            if name in found:
                gap = abs(value - found[name]) / max(abs(found[name]), 1e-12)
                line += f"  {program}: {found[name]:.6g} ({gap:.1e})"
        print(line)
    for name, want in its_features.items():
        got = features[0]["logits" if name == "logits_unbiased" else name]
        print(f"features {name}: {np.abs(got - want).max() / np.abs(want).max():.1e} of the largest, at most")


if __name__ == "__main__":
    main()
