"""Every golden case of the folder in DIFFAX_GOLDEN (default tests/golden), run by the runner of its kind.

`DIFFAX_GOLDEN=dir DIFFAX_VOCAB=vocabularies pytest tests/parity` runs any folder of such cases. A kind without a
runner, and an option that a runner does not know, are reported by name as not covered.
"""

import numpy as np
import pytest

from tests.parity import clip, diffusion, golden, inception, metrics, models, tokenizers, unclip

RUNNERS = {
    kind: run
    for module in (clip, diffusion, inception, metrics, models, tokenizers, unclip)
    for kind, run in module.RUNNERS.items()
}


def disagreement(got, want, tolerance):
    """(what is wrong, how many times the tolerance it deviates)."""
    if np.issubdtype(want.dtype, np.integer) or want.dtype == bool:
        same = np.array_equal(got, want)
        return ("" if same else f"integers differ: {got} instead of {want}"), 0.0
    ratio = golden.deviation(got, want) / tolerance
    return (f"deviates {ratio:.3g} times the tolerance {tolerance:.3g}" if ratio > 1 else ""), ratio


@pytest.mark.parametrize("name", golden.case_names())
def test_golden(name, record_property):
    meta, inputs, outputs = golden.load_case(name)
    kind = meta["kind"]
    if kind not in RUNNERS:
        pytest.skip(f"not covered: {name}: no runner for kind {kind}")
    try:
        got = RUNNERS[kind](meta, inputs, golden.parameters(meta))
    except NotImplementedError as missing:
        # a case of our own is covered, or else something has been lost; vocabularies are not in the repository
        assert golden.FOLDER.resolve() != golden.OWN or "DIFFAX_VOCAB" in str(missing), f"{name}: {missing}"
        pytest.skip(f"not covered: {name}: {missing}")
    masks = clip.MASKS[kind](inputs, outputs) if kind in clip.MASKS else {}
    failures, worst = [], 0.0
    for key, want in outputs.items():
        if key not in got:
            failures.append(f"{key}: the runner gives no such output")
            continue
        ours = np.asarray(got[key])
        if key in masks:
            ours, want = (np.where(masks[key], a, 0) for a in (ours, want))
        wrong, ratio = disagreement(ours, want, metrics.TOLERANCES.get(kind, golden.tolerance(meta, key)))
        failures += [f"{key}: {wrong}"] * bool(wrong)
        worst = max(worst, ratio)
    record_property("worst", worst)
    assert not failures, f"{name}: " + "; ".join(failures)


def test_the_folder_has_cases():
    assert golden.case_names(), f"no golden cases in {golden.FOLDER}"


@pytest.mark.skipif(golden.FOLDER.resolve() != golden.OWN, reason="DIFFAX_GOLDEN names a folder of other cases")
def test_every_runner_has_a_case():
    assert {golden.load_case(name)[0]["kind"] for name in golden.case_names()} >= set(RUNNERS)
