"""What `keep` is of: every image, a sample's images together, every frame; a minimum; the tiles of one picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vprune
from tests.exactness.agreement import agree
from tests.exactness.families import VIDEOS, batch, build
from tests.exactness.more_families import TEN, inputs_of, made
from tests.exactness.prompts import batch as prompts
from tests.exactness.test_families import generated, line_breaks, masked, stepped
from vprune.budgets import Budget, contested, proportional
from vprune.records import VisualTokens


def image(tokens: int, sample: int = 0, picture: int = -1) -> VisualTokens:
    return VisualTokens(sample, 0, torch.arange(tokens), (1, 1, tokens), picture=picture)


def test_a_samples_images_compete() -> None:
    maps = [torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.tensor([6.0, 2.0, 0.0, 0.0])]
    images = [image(4), image(4)]
    assert Budget(0.5, "sample").rows_of(images, maps) == [3, 1]
    assert Budget(0.5, "image").rows_of(images, maps) == [2, 2]
    assert Budget(0.5, "sample", minimum=2).rows_of(images, maps) == [2, 2]
    assert Budget(0.5, "sample").rows_of(images, [None, None]) == [2, 2]
    assert Budget(2, "sample").rows_of(images, maps) == [3, 1]  # a count is the mean over the pictures
    others = [image(4), image(4, sample=1)]
    assert Budget(0.5, "sample").rows_of(others, maps) == [2, 2]


def test_tiles_of_a_picture_share_a_count() -> None:
    tiles = [image(16, picture=3), image(64, picture=3), image(16, picture=90)]
    assert Budget(8).rows_of(tiles, [None] * 3) == [1, 7, 8]
    assert Budget(0.25).rows_of(tiles, [None] * 3) == [4, 16, 4]
    with pytest.raises(vprune.VPruneError, match=r"keep=81 but the image has 80 visual tokens \(1 x 16 \+ 1 x 64\)"):
        Budget(81).rows_of(tiles, [None] * 3)


def test_frames_have_budgets_of_their_own() -> None:
    video = VisualTokens(0, 0, torch.arange(24), (2, 3, 4))
    assert Budget(0.3, "frame").rows_of([video], [None]) == [6]
    assert Budget(5, "frame").rows_of([video], [None]) == [10]
    assert Budget(0.01, "frame", minimum=2).rows_of([video], [None]) == [4]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_shares_use_the_budget_up(sizes: list[int], minimum: int, data: Any) -> None:
    least = sum(min(size, minimum) for size in sizes)
    total = data.draw(st.integers(1, sum(sizes)))
    draw = torch.Generator().manual_seed(total)
    maps = [torch.rand(size, generator=draw).round(decimals=1) for size in sizes]
    for shares in (
        proportional(total, sizes, minimum),
        contested(total, maps, [(1, 1, size) for size in sizes], minimum),
    ):
        assert sum(shares) == max(total, least)
        assert all(min(size, minimum) <= share <= size for share, size in zip(shares, sizes, strict=True))


@pytest.mark.parametrize("budget", ["image", "sample", "frame"])
@pytest.mark.parametrize("options", [{}, {"recycle": "grid", "cells": 4, "size_aware": True}], ids=["plain", "sizes"])
@pytest.mark.parametrize(("family", "video"), [*((one, False) for one in TEN), *((one, True) for one in VIDEOS)])
def test_every_budget_equals_the_masked_model(family: str, video: bool, options: dict[str, Any], budget: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed", video=video)
    with vprune.prune(model, "attention", keep=0.3, budget=budget, minimum=2, **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    if budget == "frame":
        for report in reports:
            t, h, w = report.grid
            frames = torch.bincount(report.kept // (h * w), minlength=t)
            assert report.tokens_after == t * max(2, int(0.3 * h * w))
            assert options or bool((frames == frames[0]).all())
    if budget == "sample":
        both = [report for report in reports if report.sample == 2]
        total = sum(report.tokens_before for report in both)
        assert sum(report.tokens_after for report in both) == int(0.3 * total)
    breaks = line_breaks(model, inputs)
    with masked(model, inputs["input_ids"], inputs["attention_mask"], reports, bool(options), breaks):
        oracle = stepped(model, inputs, pruned.sequences)
    agree(pruned.logits, oracle)


def test_a_count_holds_for_a_picture_in_tiles() -> None:
    model, inputs = build("llava_next", torch.float64), batch("llava_next", "padded", torch.float64)
    with torch.no_grad(), vprune.prune(model, "attention", keep=10) as pruning:
        model(**inputs)
    kept = torch.zeros(2, dtype=torch.long)
    for report in pruning.last or []:
        kept[report.sample] += report.tokens_after
    assert kept.tolist() == [10, 10]


@pytest.mark.parametrize("options", [{"budget": "batch"}, {"minimum": 0}, {"minimum": True}, {"minimum": 1.5}])
def test_impossible_budgets_are_refused(tiny_vlm: Any, options: dict[str, Any]) -> None:
    with pytest.raises(vprune.VPruneError, match=next(iter(options))):
        vprune.prune(tiny_vlm(), "attention", **options)


def test_a_batch_of_two_is_two_batches_of_one_when_images_compete(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), prompts(tiny_processor, "several", torch.float64)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.2, budget="sample") as pruning:
        model(**inputs)
        together = [report.kept.tolist() for report in pruning.last or []]
        alone = []
        for row, pictures in ((0, slice(0, 2)), (1, slice(2, 3))):
            own = inputs["attention_mask"][row].bool()
            one = {
                "input_ids": inputs["input_ids"][row : row + 1, own],
                "attention_mask": inputs["attention_mask"][row : row + 1, own],
                "pixel_values": inputs["pixel_values"][pictures],
            }
            model(**one)
            alone += [report.kept.tolist() for report in pruning.last or []]
    assert together == alone
