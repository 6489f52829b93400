"""What only a GPU shows: the half-precision kernels, flex attention, and that no decoding step waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from tests.conftest import build_model
from tests.exactness.agreement import agree, generate
from tests.exactness.oracle import full_sight, oracle_generate, without_pruned
from tests.exactness.prompts import KINDS, batch
from vprune.places import in_order
from vprune.recycling import Absorption
from vprune.scoring.network import ScorerConfig, ScorerNetwork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = (torch.float32, torch.bfloat16)
SIZES = {"recycle": "grid", "cells": 4, "size_aware": True}


def on_gpu(processor: Any, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: part.cuda() for name, part in batch(processor, kind, dtype).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_keeping_all_is_the_unhooked_model(tiny_processor: Any, attention: str, dtype: torch.dtype, kind: str) -> None:
    model = build_model(attention=attention, dtype=dtype, width=64).cuda()
    inputs = on_gpu(tiny_processor, kind, dtype)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with vprune.prune(model, "attention", keep=1.0):
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("method", ["attention", "vision", "random", "pool"])
def test_it_equals_the_masked_model(tiny_processor: Any, method: str, options: dict[str, Any], kind: str) -> None:
    model = build_model(dtype=torch.float64, width=64).cuda()
    inputs = on_gpu(tiny_processor, kind, torch.float64)
    more: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with vprune.prune(model, method, keep=0.3, **options) as pruning:
        pruned = generate(model, **inputs, **more)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sight = full_sight(model, ids, mask, inputs["pixel_values"])
    sight = without_pruned(sight, ids, list(pruning.last or []), bool(options))
    oracle = oracle_generate(model, sight, ids, mask, **more)
    assert torch.equal(pruned.sequences, oracle.sequences)
    agree(pruned.logits, oracle.logits, 1e-9)


def scored_and_grouped(images: int, grid: tuple[int, int, int], device: str) -> tuple[list[torch.Tensor], Any]:
    """Scores of a network, channels and question, and who joins whom, of images drawn alike for every device."""
    draw, tokens = torch.Generator().manual_seed(0), grid[0] * grid[1] * grid[2]
    torch.manual_seed(0)
    network = ScorerNetwork(ScorerConfig(heads=4, width=64)).eval().to(device)
    sizes = ((8, tokens), (tokens, 64), (5, 64))
    maps, visual, text = (torch.rand(images, *size, generator=draw).to(device) for size in sizes)
    places = torch.arange(tokens).expand(images, -1)
    chosen = torch.stack([torch.randperm(tokens, generator=draw)[:9] for _ in range(images)])
    plan = Absorption(grid, chosen[:, :5], chosen[:, 5:].sort().values, places, 0.5).to(torch.device(device))
    with torch.no_grad():
        seen = network.seen(maps / tokens, grid, network.read(visual, text))
    return [part.cpu() for part in seen if part is not None], [plan.settled(visual.to(t)) for t in HALVES]


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("grid", [(1, 6, 6), (2, 5, 7)])
def test_scores_and_groups_are_those_of_a_cpu(images: int, grid: tuple[int, int, int]) -> None:
    """Norms, distances and likeness are computed in other ways there."""
    (seen, groups), (wanted, others) = (scored_and_grouped(images, grid, device) for device in ("cuda", "cpu"))
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for own, exact in zip(groups, others, strict=True):
        assert torch.equal(own.kept.cpu(), exact.kept) and torch.equal(own.source.cpu(), exact.source)


@pytest.mark.parametrize("count", [1, 256, 257, 32768, 40000])
def test_numbers_are_put_in_order_as_on_a_cpu(count: int) -> None:
    """Narrower keys are sorted there."""
    numbers = torch.randint(0, count, (3, 2, 700), generator=torch.Generator().manual_seed(0))
    numbers[..., :2] = count - 1
    assert torch.equal(in_order(numbers.cuda(), count).cpu(), numbers.argsort(dim=-1, stable=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_backends_agree_on_a_pruned_prompt(tiny_processor: Any, attention: str, kind: str) -> None:
    inputs = on_gpu(tiny_processor, kind, torch.float32)
    logits = []
    for name in ("sdpa", attention):
        model = build_model(attention=name, width=64).cuda()
        with torch.no_grad(), vprune.prune(model, "uniform", keep=0.3):
            out = generate(
                model,
                **inputs,
                max_new_tokens=4,
                do_sample=False,
            )
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decoding_never_waits_and_repeats_itself(
    tiny_processor: Any, dtype: torch.dtype, options: dict[str, Any], kind: str
) -> None:
    model = build_model(dtype=dtype, width=64).cuda()
    inputs = on_gpu(tiny_processor, kind, dtype)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    runs = []
    for _ in range(2):
        with torch.no_grad(), vprune.prune(model, "attention", keep=0.2, **options):
            out = model(**inputs)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.set_sync_debug_mode("error")
            try:
                runs.append(model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values).logits)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert runs[0].isfinite().all() and torch.equal(runs[0], runs[1])
