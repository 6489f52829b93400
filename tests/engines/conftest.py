from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.eval.conftest import benchmark_folder, evaluate, model_folder, one_thread

__all__ = ["benchmark_folder", "evaluate", "model_folder", "one_thread"]


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Skips where there is no Ray; takes the cluster that the engine started down again."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vprune[ray]'")
    yield
    import ray

    ray.shutdown()
