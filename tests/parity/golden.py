"""Reading golden cases: numbers of the papers' public PyTorch programs (see tests/golden/README.md)."""

import json
import math
import os
import pathlib
import zlib

import numpy as np

OWN = pathlib.Path(__file__).parent.parent / "golden"
FOLDER = pathlib.Path(os.environ.get("DIFFAX_GOLDEN") or OWN)


def case_names() -> list[str]:
    """Names of all cases in the folder: every NAME.json with a NAME.npz beside it."""
    return sorted(p.stem for p in FOLDER.glob("*.npz") if p.with_suffix(".json").exists())


def load_case(name: str) -> tuple[dict, dict, dict]:
    """(meta, inputs, outputs) of one case."""
    meta = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{name}.npz") as arrays:
        inputs = {k.removeprefix("in."): arrays[k] for k in arrays.files if k.startswith("in.")}
        outputs = {k.removeprefix("out."): arrays[k] for k in arrays.files if k.startswith("out.")}
    return meta, inputs, outputs


def weight(name: str, shape, norm_suffixes=("weight",), gain: float = 1.0) -> np.ndarray:
    """The golden value of a state_dict entry: a function of its key and shape alone."""
    shape = tuple(int(n) for n in shape)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    z = np.asarray(rng.standard_normal(shape, dtype=np.float32))
    if len(shape) >= 2:
        return np.float32(gain) * (z / np.float32(math.sqrt(math.prod(shape[1:]))))
    if len(shape) == 1 and name.endswith(tuple(norm_suffixes)):
        return np.float32(1) + np.float32(0.1) * z
    return np.asarray(np.float32(0.1) * z)


def parameters(meta: dict) -> dict[str, np.ndarray]:
    """The state_dict of a model case, buffers included."""
    config = meta.get("config", {})
    options = {k: config[k] for k in ("norm_suffixes", "gain") if k in config}
    params = {k: weight(k, shape, **options) for k, shape in meta.get("state_dict", {}).items()}
    for name, b in meta.get("buffers", {}).items():
        values = b.get("values", b.get("fill"))
        params[name] = np.broadcast_to(np.array(values, b["dtype"]).reshape(-1), (math.prod(b["shape"]),))
        params[name] = params[name].reshape(b["shape"])
    return params


def tolerance(meta: dict, output: str) -> float:
    """The largest fair deviation of a float32 program, relative to the largest magnitude of the output."""
    return max(2e-5, 10 * meta["outputs"].get(output, {}).get("float32_rel_err", 0.0))


def deviation(got, want) -> float:
    """max|got - want| / max|want|; inf for another shape or a non-finite value."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not np.all(np.isfinite(got)):
        return math.inf
    if not want.size:
        return 0.0
    error = np.max(np.abs(got.astype(np.float64) - want.astype(np.float64)))
    scale = np.max(np.abs(want.astype(np.float64)))
    return float(error / scale if scale else error)
