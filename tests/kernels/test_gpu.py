"""Every kernel compiled, on a CUDA device; and what only a device shows: graphs, and that the host never waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from vprune import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
]

if find_spec("triton") is not None:
    from tests.kernels.triton_cases import *  # noqa: F403
    from tests.kernels.triton_cases import draw, groups_of, path_inputs, whole_path


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_chooses_the_kernels() -> None:
    tokens, index = torch.zeros(1, 4, 8, device="cuda"), torch.zeros(1, 2, dtype=torch.long, device="cuda")
    assert kernels.backend_module("auto", "compact", tokens, index).__name__ == "vprune.kernels.triton_ops"
    assert kernels.backend_module("auto", "compact", tokens, index.cpu()).__name__ == "vprune.kernels.reference"
    assert kernels.backend_module("torch", "compact", tokens, index).__name__ == "vprune.kernels.reference"


def test_the_host_never_waits() -> None:
    inputs = path_inputs()
    whole_path(*inputs, backend="triton")  # compiling may wait
    counts = torch.tensor([3, 5], device="cuda")
    with no_waiting():
        whole_path(*inputs, backend="auto")
        for backend in ("torch", "triton"):
            kernels.select(inputs[0][..., 0], counts, width=7, backend=backend)


def test_graphs_replay_with_new_numbers() -> None:
    inputs = path_inputs()
    for _ in range(2):
        whole_path(*inputs, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_path(*inputs, backend="triton")
    inputs[0].copy_(draw(*inputs[0].shape, seed=11))
    inputs[1].copy_(draw(*inputs[1].shape, seed=12))
    graph.replay()
    for mine, wanted in zip(captured, whole_path(*inputs, backend="torch"), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_results_repeat_to_the_bit() -> None:
    tokens, (source, lengths, weights) = draw(7290, 3584, dtype=torch.bfloat16), groups_of(7290)
    query, key = draw(1, 28, 64, 128, dtype=torch.bfloat16), draw(1, 4, 7290, 128, seed=1, dtype=torch.bfloat16)
    merged = [kernels.recycle(tokens, source, lengths, weights, backend="triton") for _ in range(5)]
    masses = [kernels.column_mass(query, key, scale=0.1, backend="triton") for _ in range(5)]
    assert all(torch.equal(merged[0], one) for one in merged)
    assert all(torch.equal(masses[0], one) for one in masses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_sizes(dtype: torch.dtype) -> None:
    query, key = draw(1, 28, 64, 128, dtype=dtype), draw(1, 4, 29160, 128, seed=1, dtype=dtype)
    rows = torch.arange(29096, 29160, device="cuda")[None]
    options: dict[str, Any] = {"scale": 0.1, "rows": rows}
    for pool in ("mean", "max"):
        mass = kernels.column_mass(query, key, pool=pool, backend="triton", **options)
        wanted = kernels.column_mass(query.float(), key.float(), pool=pool, backend="torch", **options)
        torch.testing.assert_close(mass, wanted, rtol=1e-3, atol=1e-7)
    tokens, (source, lengths, weights) = draw(29160, 3584, dtype=dtype), groups_of(29160)
    merged = kernels.recycle(tokens, source, lengths, weights, backend="triton")
    wanted = kernels.recycle(tokens.float(), source, lengths, weights, backend="torch")
    torch.testing.assert_close(merged.float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    inputs = tuple(one.to("cuda:1") for one in path_inputs())
    for mine, wanted in zip(whole_path(*inputs, backend="triton"), whole_path(*inputs, backend="torch"), strict=True):
        assert mine.device == wanted.device == torch.device("cuda:1")
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
