from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval.conftest import benchmark_folder, evaluate, model_folder, one_thread

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["benchmark_folder", "evaluate", "model_folder", "one_thread"]


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Skips where there is no Ray; takes the cluster that the engine started down again."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vprune[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{ROOT}")  # workers import tests.engines.orders
        yield
    import ray

    ray.shutdown()
