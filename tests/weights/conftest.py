"""Fixtures of the tests of weights."""

import textwrap

import numpy as np
import pytest

from diffax import config as configs
from diffax import weights
from diffax.weights import catalogue, files
from diffax.weights.catalogue import Published
from diffax.weights.table import torch_shapes
from tests.weights.small import CONFIGS
from tests.weights.torch_files import state_dict


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A folder of configs, and the rows and tables of what they describe, as if it had been published."""
    folder = tmp_path_factory.mktemp("configs")
    configs.load("quickstart")  # so that diffax.configs is the real folder, parts of which other configs import
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text("VARIANTS = {}\n" + textwrap.dedent(text))
    rows, made = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "_folder", lambda: folder)
        for config, section in (("small_guided", "base"), ("small_classifier", "classifier")):
            row = Published(f"small_{section}.pt", "here", "openai", 0, config, section)
            table = row.table()
            shapes = torch_shapes(table)
            rows.append(row._replace(parameters=files.count(list(shapes.values()))))
            rng = np.random.default_rng(0)
            arrays = {key: np.float32(0.1) * rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
            (folder / row.file).write_bytes(state_dict(arrays))
            made[section] = folder / row.file, weights.to_flax(arrays, table)
    return folder, tuple(rows), made


@pytest.fixture
def small(small_files, monkeypatch):
    """{section: (path of a .pt file, the parameters in it)}, and both are known."""
    folder, rows, made = small_files
    monkeypatch.setattr(configs, "_folder", lambda: folder)
    monkeypatch.setattr(catalogue, "PUBLISHED", rows)
    return made
