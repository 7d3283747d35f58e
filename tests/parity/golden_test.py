"""Every golden case of the folder in DIFFAX_GOLDEN (default tests/golden), run by the runner of its kind.

`DIFFAX_GOLDEN=dir pytest tests/parity` runs any folder of such cases. A kind without a runner, and an option that a
runner does not know, are reported by name as not covered.
"""

import numpy as np
import pytest

from tests.parity import diffusion, golden, models

RUNNERS = diffusion.RUNNERS | models.RUNNERS


@pytest.mark.parametrize("name", golden.case_names())
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
