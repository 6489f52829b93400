"""One tiny run of `vprune bench model` that the tests of its table and its figures share."""

from __future__ import annotations

from pathlib import Path

import pytest

from vprune.bench.app import main

RUN = ["model", "device=cpu", "dtype=float32", "tokens=64,640", "batch=2", "keep=0.1", "new=1,3", "repeats=1"]


@pytest.fixture(scope="session")
def measured_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("results") / "model-tiny"
    assert main([*RUN, "commit=abc", f"out={folder}"]) == 0
    return folder
