"""Golden weights in files of PyTorch and of safetensors: every number comes out as it went in."""

import numpy as np
import pytest

from diffax.weights import files
from tests.parity import golden, models
from tests.weights.torch_files import state_dict

METAS = {name: golden.load_case(name)[0] for name in golden.case_names()}
CASES = [name for name, meta in METAS.items() if meta.get("state_dict") and meta["kind"] in models.RUNNERS]


def in_file(path, arrays):
    """Arrays as they come out of a file of them."""
    if path.suffix == ".pt":
        path.write_bytes(state_dict(arrays))
    else:
        files.write(path, arrays, {})
    return files.read(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_golden_weights_in_a_file(case, suffix, tmp_path):
    """Every number comes out as it went in, so the outputs are those of `tests/parity`."""
    want = golden.parameters(golden.load_case(case)[0])
    found = in_file(tmp_path / f"model{suffix}", want)
    assert set(found) == set(want)
    for key, array in want.items():
        np.testing.assert_array_equal(np.asarray(found[key]), array, err_msg=key, strict=True)


FROM_FILES = {"b_unet_ii_conv_resample": ".pt", "b_encoder_attention": ".safetensors", "d_text2im": ".pt"}


@pytest.mark.parametrize("case", [name for name in FROM_FILES if name in METAS])
def test_golden_outputs_from_a_file(case, tmp_path):
    meta, inputs, outputs = golden.load_case(case)
    found = in_file(tmp_path / f"model{FROM_FILES[case]}", golden.parameters(meta))
    got = models.RUNNERS[meta["kind"]](meta, inputs, found)
    for key, want in outputs.items():
        assert golden.deviation(got[key], want) <= golden.tolerance(meta, key), key
