"""Runners of the golden cases about metrics: ADM's and torch-fidelity's (kinds by name)."""

import numpy as np

from diffax.evaluation import metrics


def fid(meta, inputs, params):
    got = {}
    for pair in sorted({name.rpartition("_")[0] for name in inputs}):
        first, second = (inputs[f"{pair}_{i}"].reshape(len(inputs[f"{pair}_{i}"]), -1) for i in (1, 2))
        got[f"distance.{pair}"] = metrics.frechet_distance(first, second)
    for i in (1, 2):
        moments = metrics.moments(inputs[f"pool_{i}"])
        got |= {f"mu_{i}": moments.mean, f"sigma_{i}": moments.covariance}
    return got


def inception_score(meta, inputs, params):
    got, config = {}, meta["config"]
    for size in config["split_sizes"]:
        got[f"split_size.{size}"], _ = metrics.inception_score(inputs["logits"], split_size=size)
    for splits in config["splits"]:
        mean, std = metrics.inception_score(inputs["logits"], splits=splits)
        got |= {f"splits.{splits}.mean": mean, f"splits.{splits}.std": std}
    return got


def precision_recall(meta, inputs, params):
    k, real, made = meta["config"]["k"], inputs["ref"], inputs["sample"]
    radii = {"ref": metrics.neighbour_radii(real, k), "sample": metrics.neighbour_radii(made, k)}
    precision, recall = metrics.precision_recall(real, made, k=k)
    return {
        "radii_sq_ref": radii["ref"],
        "radii_sq_sample": radii["sample"],
        "sample_in_ref_manifold": metrics.within(made, real, radii["ref"]),
        "ref_in_sample_manifold": metrics.within(real, made, radii["sample"]),
        "precision": precision,
        "recall": recall,
    }


def kid(meta, inputs, params):
    first, second, c = inputs["act_1"], inputs["act_2"], meta["config"]
    mean, std = metrics.kid(
        first, second, subsets=c["kid_subsets"], subset_size=c["kid_subset_size"], seed=c["rng_seed"]
    )
    return {"mmd2_all": metrics.squared_mmd(first, second), "kid_mean": np.asarray(mean), "kid_std": np.asarray(std)}


RUNNERS = {
    "metrics.fid": fid,
    "metrics.inception_score": inception_score,
    "metrics.precision_recall": precision_recall,
    "metrics.kid": kid,
}
# Computed in float64, as the published programs do; ADM takes some means in float32.
TOLERANCES = {
    "metrics.fid": 1e-6,
    "metrics.inception_score": 1e-7,
    "metrics.precision_recall": 1e-9,
    "metrics.kid": 1e-9,
}
