"""Greedy choices of many images at once: those of every image alone, written out step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.exactness.prompts import batch
from tests.exactness.test_waits import unasked
from vprune.baselines import greedy
from vprune.baselines.greedy import chosen, farthest, likeliest, padded

RAGGED = {"alike": ([24] * 4, [9] * 4), "ragged": ([24, 7, 31, 1, 16], [9, 7, 31, 1, 2])}
STEPS = {"farthest": farthest, "likeliest": likeliest}


def by_hand_farthest(distance: Tensor, count: int) -> list[int]:
    """DivPrune's rule for one image, over lists."""
    rows, tokens = distance.tolist(), range(len(distance))
    apart = [min((rows[i][j] for j in tokens if j != i), default=0.0) for i in tokens]
    picked = [apart.index(max(apart))]
    while len(picked) < count:
        nearest = [-1e9 if i in picked else min(rows[i][j] for j in picked) for i in tokens]
        picked.append(nearest.index(max(nearest)))
    return picked


def by_hand_likeliest(kernel: Tensor, count: int) -> list[int]:
    """CDPruner's rule for one image, by the determinants themselves."""
    picked: list[int] = []
    while len(picked) < count:
        gains = [-1.0 if i in picked else float(_minor(kernel, [*picked, i]).det()) for i in range(len(kernel))]
        picked.append(gains.index(max(gains)))
    return picked


def _minor(kernel: Tensor, numbers: list[int]) -> Tensor:
    return kernel.double()[numbers][:, numbers]


def matrices(steps: str, sizes: list[int], device: str = "cpu") -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for size in sizes:
        rows = torch.nn.functional.normalize(torch.randn(size, 40, generator=generator), dim=-1)
        weight = torch.rand(size, generator=generator) + 0.1
        made.append(1 - rows @ rows.T if steps == "farthest" else weight[:, None] * (rows @ rows.T) * weight)
    return lambda image: made[image].to(device)


def alone(steps: str, matrix: Tensor, count: int) -> list[int]:
    return (by_hand_farthest if steps == "farthest" else by_hand_likeliest)(matrix, count)


@pytest.mark.parametrize("at_once", [1, 3000, 2**27], ids=["one by one", "some", "together"])
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("steps", STEPS)
def test_every_image_is_chosen_from_alone(monkeypatch: pytest.MonkeyPatch, steps: str, kind: str, at_once: int) -> None:
    monkeypatch.setattr(greedy, "_AT_ONCE_ON_CPU", at_once)
    sizes, counts = RAGGED[kind]
    matrix = matrices(steps, sizes)
    found = chosen(STEPS[steps], matrix, sizes, counts)
    for image, (count, one) in enumerate(zip(counts, found, strict=True)):
        assert one.tolist() == alone(steps, matrix(image), count)


@pytest.mark.parametrize("steps", STEPS)
def test_ties_go_to_the_first_and_nothing_comes_twice(steps: str) -> None:
    # Two directions, four tokens each, all of them as relevant: beyond the second choice nothing is gained.
    rows = torch.eye(2).repeat(4, 1)
    alike = rows @ rows.T
    matrix = 1 - alike if steps == "farthest" else alike
    wide = torch.zeros(11, 11).fill_diagonal_(1.0)  # beside it an image of another size, so that there is padding
    both = [matrix, 1 - wide if steps == "farthest" else wide]
    found, beside = chosen(STEPS[steps], both.__getitem__, [8, 11], [8, 11])
    assert found.tolist() == list(range(8)) and beside.tolist() == list(range(11))


def test_padding_is_never_chosen() -> None:
    # A zero row would be the farthest of all, and is likelier than what has no gain left.
    squares, valid = padded([torch.full((3, 3), 0.5), torch.eye(5)])
    assert valid.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    for steps in STEPS.values():
        assert sorted(steps(squares, valid, 3)[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("steps", STEPS)
def test_no_step_asks_the_device_for_a_value(monkeypatch: pytest.MonkeyPatch, steps: str) -> None:
    matrix = matrices(steps, [12, 12])
    with unasked(monkeypatch):
        STEPS[steps](*padded([matrix(0), matrix(1)]), 7)


@pytest.mark.parametrize("method", ["divprune", "cdpruner", "restore"])
def test_a_batch_chooses_as_its_samples_do(
    monkeypatch: pytest.MonkeyPatch, tiny_vlm: Any, tiny_processor: Any, method: str
) -> None:
    """Two images in the one sample and one in the other, all of them at once and one by one."""
    model, inputs = tiny_vlm(), batch(tiny_processor, "several")
    seen = []
    for at_once in (1, 2**27):
        monkeypatch.setattr(greedy, "_AT_ONCE_ON_CPU", at_once)
        with torch.no_grad(), vprune.prune(model, method, keep=0.4) as pruning:
            model(**inputs)
        seen.append([(one.kept.tolist(), one.source.tolist()) for one in pruning.last or []])
    assert seen[0] == seen[1] and len(seen[0]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("steps", STEPS)
def test_a_gpu_chooses_as_the_cpu_does_and_is_not_waited_for(steps: str, kind: str) -> None:
    sizes, counts = RAGGED[kind]
    here, there = matrices(steps, sizes), matrices(steps, sizes, "cuda")
    device = torch.device("cuda")
    expected = chosen(STEPS[steps], here, sizes, counts)
    assert all(
        torch.equal(a, b) for a, b in zip(chosen(STEPS[steps], there, sizes, counts, device), expected, strict=True)
    )
    ready = padded([there(image) for image in range(len(sizes))])
    torch.cuda.set_sync_debug_mode("error")
    try:
        STEPS[steps](*ready, max(counts))
    finally:
        torch.cuda.set_sync_debug_mode("default")
