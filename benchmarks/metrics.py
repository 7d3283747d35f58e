"""diffax's Inception features, FID, IS, KID, precision and recall beside those of torch-fidelity and pytorch-fid.

All read the same pictures and the same weights, random ones unless a file is given; printed are the numbers, how far
they are from diffax's, and the seconds that each took. It is no test: nothing in diffax needs PyTorch.

    pip install diffax torch torchvision torch-fidelity pytorch-fid
    python benchmarks/metrics.py --num=64 --side=64

pytorch-fid enlarges pictures in another way than the FID's graph does (torch-fidelity and diffax do as the graph), and
so agrees at --side=299 alone, where nothing is enlarged.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
from PIL import Image

from diffax import compare, metrics
from diffax.convert import inception
from diffax.convert.table import torch_shapes
from diffax.models.inception import Inception

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


def ours(folders: list[pathlib.Path], weights: pathlib.Path, batch: int, subset: int) -> tuple[list, dict, float]:
    """diffax's ([features of a set], numbers, seconds without compiling)."""
    params, _ = inception.load(weights)
    run = jax.jit(lambda params, pictures: Inception().apply({"params": params}, pictures))
    first = next(compare.open_pictures(folders[0]).chunks(batch))
    jax.block_until_ready(run(params, first))

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
) -> tuple[dict, float]:
    """torch-fidelity's (numbers, seconds); the passes for the FID of other features are not timed."""
    options = dict(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor_weights_path=str(weights),
        batch_size=batch,
        cuda=torch.cuda.is_available(),
        cache=False,
        verbose=False,
        samples_shuffle=False,
        fid=True,
    )
    found, seconds = timed(
        lambda: torch_fidelity.calculate_metrics(**options, isc=True, kid=True, prc=True, kid_subset_size=subset)
    )
    numbers = {
        "FID, 2048": found["frechet_inception_distance"],
        "IS": found["inception_score_mean"],
        "IS, deviation": found["inception_score_std"],
        "KID": found["kernel_inception_distance_mean"],
        "KID, deviation": found["kernel_inception_distance_std"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    for layer in LAYERS[:-1]:
        other = torch_fidelity.calculate_metrics(**options, feature_layer_fid=layer)
        numbers[f"FID, {layer}"] = other["frechet_inception_distance"]
    return numbers, seconds


def torch_fidelity_features(folder: pathlib.Path, weights: pathlib.Path, batch: int) -> dict[str, np.ndarray]:
    """torch-fidelity's features of a set."""
    names = [*LAYERS, "logits_unbiased"]
    extract = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights)
    )
    parts = [
        extract(torch.from_numpy(chunk.transpose(0, 3, 1, 2).copy()))
        for chunk in compare.open_pictures(folder).chunks(batch)
    ]
    return {name: torch.cat(part).numpy() for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def pytorch_fid_numbers(folders: list[pathlib.Path], weights: pathlib.Path, batch: int) -> tuple[dict, float]:
    """pytorch-fid's (numbers, seconds)."""
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights)

    def fid(layer: str) -> float:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        paths = [str(folder) for folder in folders]
        return float(pytorch_fid.fid_score.calculate_fid_given_paths(paths, batch, device, int(layer), num_workers=0))

    last, seconds = timed(lambda: fid("2048"))
    return {f"FID, {layer}": fid(layer) for layer in LAYERS[:-1]} | {"FID, 2048": last}, seconds


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="pictures in a set")
    parser.add_argument("--side", type=int, default=64, help="their height and width")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once")
    parser.add_argument("--inception", type=pathlib.Path, help="the published .pth (default: random weights)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        folders = [root / "made", root / "real"]
        for i, folder in enumerate(folders):
            draw_pictures(folder, args.num, args.side, seed=i, smooth=4 + 2 * i)
        weights = args.inception or root / "random.pth"
        if not args.inception:
            draw_weights(weights)
        subset = args.num // 2
        features, numbers, seconds = ours(folders, weights, args.batch, subset)
        theirs = {
            "torch-fidelity": torch_fidelity_numbers(folders, weights, args.batch, subset),
            "pytorch-fid": pytorch_fid_numbers(folders, weights, args.batch),
        }
        print(f"2 x {args.num} pictures of {args.side}x{args.side}, {jax.default_backend()}")
        print(f"{'seconds':16s}{seconds:14.1f}" + "".join(f"  {n}: {s:.1f}" for n, (_, s) in theirs.items()))
        for name, value in numbers.items():
            line = f"{name:16s}{value:14.6g}"
            for program, (found, _) in theirs.items():
                if name in found:
                    gap = abs(value - found[name]) / max(abs(found[name]), 1e-12)
                    line += f"  {program}: {found[name]:.6g} ({gap:.1e})"
            print(line)
        for name, want in torch_fidelity_features(folders[0], weights, args.batch).items():
            got = features[0]["logits" if name == "logits_unbiased" else name]
            print(f"features {name}: {np.abs(got - want).max() / np.abs(want).max():.1e} of the largest, at most")


if __name__ == "__main__":
    main()
