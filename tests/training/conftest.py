"""Checkpoints that several files of tests read."""

import pathlib
import shutil

import pytest

from tests.training.states import save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """Steps 10, 20 and 30; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))
