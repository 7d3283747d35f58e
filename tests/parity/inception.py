"""Runner of the golden cases about the Inception network of FID (kinds by name)."""

import math

import jax
import numpy as np

from diffax.networks import inception
from diffax.weights import inception as converter
from diffax.weights.table import torch_shapes


def features(meta, inputs, params):
    pictures = inputs["images"].transpose(0, 2, 3, 1)
    used = {name: tuple(shape) for name, shape in meta["state_dict"].items() if not name.endswith(converter.UNUSED)}
    assert {name: shape for name, shape in torch_shapes(converter.table()).items() if name in used} == used
    assert sum(math.prod(shape) for shape in meta["state_dict"].values()) == meta["num_parameters"]

    def first_branch(module, method):
        return module.path == ("Mixed_6d", "branch1x1")

    @jax.jit
    def run(params, pictures):
        return inception.Inception().apply({"params": params}, pictures, capture_intermediates=first_branch)

    got, state = run(converter.from_torch(params), pictures)
    # spatial features are ADM's mixed_6/conv: the first channels of a branch, pixel by pixel
    branch = state["intermediates"]["Mixed_6d"]["branch1x1"]["__call__"][0]
    np.testing.assert_array_equal(got["spatial"], branch[..., :7].reshape(len(pictures), -1))
    return {**got, "logits_unbiased": got["logits"]}


RUNNERS = {"torch_fidelity.InceptionV3": features}
