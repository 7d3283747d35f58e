"""Every golden case of the folder in DIFFAX_GOLDEN (default tests/golden), run by the runner of its kind.

`DIFFAX_GOLDEN=dir pytest tests/parity` runs any folder of such cases. A kind without a runner, and an option that a
runner does not know, are reported by name as not covered.
"""

import numpy as np
import pytest

from tests import clip_test, unclip_test
from tests.parity import diffusion, golden, models

RUNNERS = diffusion.RUNNERS | models.RUNNERS
# run by metrics_test, inception_test and tokenizer_test
ELSEWHERE = ("metrics.", "torch_fidelity.", "glide.tokenizer.", "karlo.tokenizer")


def elsewhere(name: str) -> bool:
    """Whether a case is run by another file, such as those about CLIP by clip_test."""
    return name in {*clip_test.CASES, *unclip_test.CASES} or golden.load_case(name)[0]["kind"].startswith(ELSEWHERE)


@pytest.mark.parametrize("name", [name for name in golden.case_names() if not elsewhere(name)])
def test_golden(name, record_property):
    meta, inputs, outputs = golden.load_case(name)
    if meta["kind"] not in RUNNERS:
        pytest.skip(f"not covered: {name}: no runner for kind {meta['kind']}")
    try:
        got = RUNNERS[meta["kind"]](meta, inputs, golden.parameters(meta))
    except NotImplementedError as missing:
        pytest.skip(f"not covered: {name}: {missing}")
    failures, worst = [], 0.0
    for key, want in outputs.items():
        if key not in got:
            failures.append(f"{key}: the runner gives no such output")
        elif np.issubdtype(want.dtype, np.integer):
            if not np.array_equal(got[key], want):
                failures.append(f"{key}: integers differ: {got[key]} instead of {want}")
        else:
            ratio = golden.deviation(got[key], want) / golden.tolerance(meta, key)
            worst = max(worst, ratio)
            if ratio > 1:
                failures.append(f"{key}: deviates {ratio:.3g} times the tolerance {golden.tolerance(meta, key):.3g}")
    record_property("worst", worst)
    assert not failures, f"{name}: " + "; ".join(failures)


def test_the_folder_has_cases():
    assert golden.case_names(), f"no golden cases in {golden.FOLDER}"
