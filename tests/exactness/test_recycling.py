"""Who joins whom, with what share, and what it is worth: recycling by place and by likeness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.conftest import GRID, build_model
from tests.exactness.families import VIDEOS, build
from tests.exactness.families import batch as family_batch
from tests.exactness.more_families import TEN, inputs_of, made
from tests.exactness.prompts import batch
from tests.exactness.test_families import generated, stepped
from tests.exactness.test_stages import agree, masked_by_stages
from vprune.records import Selection
from vprune.recycling import Recycler

TOKENS = GRID * GRID
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LIKENESS: dict[str, dict[str, Any]] = {
    "nearest": {"recycle": "nearest", "distance": 0.0},
    "nearest, not far": {"recycle": "nearest", "distance": 2.0},
    "anchors": {"recycle": "anchors", "share": 0.5, "distance": 0.0},
    "anchors, not far": {"recycle": "anchors", "share": 0.25, "distance": 2.0},
}


def features(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(model.model.get_image_features(pixels).pooler_output))


@pytest.mark.parametrize("options", LIKENESS.values(), ids=LIKENESS)
@pytest.mark.parametrize("keep", [2, 9, 20])
def test_every_token_joins_the_row_it_resembles_most(
    tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any], keep: int
) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "several", torch.float64)
    with torch.no_grad(), vprune.prune(model, "attention", keep=keep, **options) as pruning:
        model(**inputs)
    for report, rows in zip(pruning.last or [], features(model, inputs["pixel_values"]), strict=True):
        best = report.importance.flatten().argsort(descending=True, stable=True)
        anchors = keep if options["recycle"] == "nearest" else max(1, int(keep * options["share"]))
        pure = best[: keep - anchors] if options["recycle"] == "anchors" else best[:0]
        standing = [token for token in report.kept.tolist() if token not in pure.tolist()]
        assert set(pure.tolist()) <= set(report.kept.tolist()) and len(standing) == anchors
        if options["recycle"] == "nearest":
            assert torch.equal(report.kept, best[:keep].sort().values)
        for token in range(TOKENS):
            stands_at = int(report.kept[report.source[token]])
            if token in report.kept.tolist():
                assert stands_at == token
                continue
            likeness = torch.stack([torch.cosine_similarity(rows[token], rows[anchor], dim=0) for anchor in standing])
            y, x = divmod(token, GRID)
            apart = torch.tensor([((y - a // GRID) ** 2 + (x - a % GRID) ** 2) ** 0.5 / (GRID - 1) for a in standing])
            assert stands_at == standing[int((likeness - options["distance"] * apart).argmax())]
        assert torch.equal(report.sizes[torch.isin(report.kept, pure)], torch.ones(len(pure), dtype=torch.long))


@pytest.mark.parametrize("recycle", ["weighted", "nearest", "anchors"])
@pytest.mark.parametrize(("family", "video"), [*((one, False) for one in TEN), *((one, True) for one in VIDEOS)])
def test_recycled_in_stages_equals_the_masked_model(family: str, video: bool, recycle: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed", video=video)
    options: dict[str, Any] = {"recycle": recycle, "cells": 4, "size_aware": True}
    stages = [[0, 0.6], [2, 0.25]] if family == "qwen3_vl" else [[0, 0.6], [1, 0.4], [2, 0.25]]  # DeepStack
    with vprune.prune(model, "attention", stages=stages, **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert all(int(report.sizes.sum()) == report.tokens_before for report in reports if report.tokens_after > 1)
    with masked_by_stages(model, inputs, reports, True, recycle == "weighted"):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))


def test_anchors_are_shared_out_to_frames() -> None:
    model, inputs = build("qwen2_vl", torch.float64), family_batch("qwen2_vl", "single", torch.float64, True)
    options: dict[str, Any] = {"recycle": "anchors", "share": 0.5, "budget": "frame", "minimum": 4}
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.3, **options) as pruning:
        model(**inputs)
    (report,) = pruning.last or []
    frame = report.kept // (report.grid[1] * report.grid[2])
    assert torch.bincount(frame, minlength=report.grid[0]).tolist() == [report.tokens_after // report.grid[0]] * 2
    assert int(report.sizes.sum()) == report.tokens_before


@pytest.mark.parametrize("sizes", [None, torch.randint(1, 9, (64,), generator=torch.Generator().manual_seed(1))])
@pytest.mark.parametrize("importance", ["random", "zero", "not a number", "none"])
@pytest.mark.parametrize("cells", [1, 4, 16])
def test_weighted_cells(sizes: Tensor | None, importance: str, cells: int) -> None:
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(64, generator=draw)
    given = {
        "random": torch.rand(64, generator=draw),
        "zero": torch.zeros(64),
        "not a number": torch.full((64,), torch.nan),
        "none": None,
    }[importance]
    standing = None
    if sizes is not None:
        standing = Selection.pure(torch.arange(64), 64, sizes)
    for budget in range(2, 65):
        made = Recycler("weighted", cells).plan(order, (1, 8, 8), budget, given, standing)
        assert isinstance(made, Selection) and made.kept.numel() == budget
        own = torch.ones(64, dtype=torch.long) if sizes is None else sizes
        assert int(made.sizes.sum()) == int(own.sum())
        total = torch.zeros(budget, dtype=torch.float64).index_add(0, made.source, made.weights)
        torch.testing.assert_close(total, torch.ones_like(total))
        flat = importance != "random"
        share = own.double() * (1.0 if flat or given is None else given.double())
        for row in range(budget):
            members = (made.source == row).nonzero().flatten()
            torch.testing.assert_close(made.weights[members], share[members] / share[members].sum())


def test_a_merged_row_stands_where_its_best_token_stood() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    made = Recycler("weighted", 4).plan(order, (1, 8, 8), 20, torch.rand(64))
    rank = order.argsort()
    assert isinstance(made, Selection)
    for row in (made.sizes > 1).nonzero().flatten().tolist():
        members = (made.source == row).nonzero().flatten()
        assert int(made.kept[row]) == int(members[rank[members].argmin()])


def copies(model: Any, groups: Tensor) -> Any:
    """A hook that makes all visual tokens of a group the same."""

    def after(projector: Any, args: Any, rows: Tensor) -> Tensor:
        first = torch.stack([(groups == group).nonzero()[0, 0] for group in groups])
        return rows[:, first]

    return model.model.multi_modal_projector.register_forward_hook(after)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recycle", ["pool", "grid", "weighted", "anchors", "nearest"])
def test_identical_copies_merged_are_as_good_as_apart(tiny_processor: Any, recycle: str, attention: str) -> None:
    """softmax over n copies of a key = softmax over one with log n added: all that is said, to rounding.

    One decoder layer: in a second one, under a causal mask, the first of several copies has seen fewer than the last.
    """
    dtype = torch.float32 if attention != "sdpa" else torch.float64
    model, inputs = build_model(dtype=dtype), batch(tiny_processor, "single", dtype)
    del model.model.language_model.layers[1:]
    model.set_attn_implementation(attention)
    cell = (torch.arange(GRID)[:, None] // 2 * 3 + torch.arange(GRID) // 2).flatten()  # 2 x 2 tokens each
    visual = inputs["input_ids"][0] == 4
    positions = torch.arange(len(visual))
    positions[visual] = positions[visual][0] + cell  # copies stand at one place
    positions[int(visual.nonzero()[-1]) + 1 :] -= TOKENS - 9
    hook = copies(model, cell)
    options: dict[str, Any] = {"method": "uniform", "recycle": recycle, "cells": 9, "size_aware": True, "keep": 18}
    if recycle == "anchors":
        options |= {"share": 0.5, "distance": 1.0}
    if recycle == "pool":
        options = {"method": "pool", "size_aware": True, "keep": 9}
    with torch.no_grad():
        whole = model(**inputs, position_ids=positions[None]).logits[:, -6:]
        with vprune.prune(model, **options) as pruning:
            merged = model(**inputs, position_ids=positions[None]).logits[:, -6:]
        unsized = vprune.prune(model, **{**options, "size_aware": False})
        with unsized:
            other = model(**inputs, position_ids=positions[None]).logits[:, -6:]
    hook.remove()
    assert pruning.last is not None and int(pruning.last.sizes.sum()) == TOKENS
    for row in range(pruning.last.tokens_after):
        assert len(set(cell[pruning.last.source == row].tolist())) == 1, "a row of copies only"
    torch.testing.assert_close(merged, whole, rtol=0, atol=TOLERANCE[dtype])
    assert float((other - whole).abs().max()) > 1e-2  # the control


def test_identical_copies_at_every_layer() -> None:
    """Where pictures see themselves in both directions, copies stay copies, and three layers say the same."""
    model, inputs = build("gemma3", torch.float64), family_batch("gemma3", "single", torch.float64)
    cell = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(4) // 2).flatten()
    visual = inputs["token_type_ids"][0].bool()
    positions = torch.arange(len(visual))
    positions[visual] = positions[visual][0] + cell
    hook = copies(model, cell)
    with torch.no_grad():
        whole = model(**inputs, position_ids=positions[None]).logits[:, -2:]
        with vprune.prune(model, "pool", keep=4, size_aware=True) as pruning:
            merged = model(**inputs, position_ids=positions[None]).logits[:, -2:]
    hook.remove()
    assert pruning.last is not None and pruning.last.sizes.tolist() == [4] * 4
    torch.testing.assert_close(merged, whole, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("recycle", ["grid", "weighted", "nearest", "anchors"])
def test_nothing_to_recycle_changes_nothing(tiny_vlm: Any, tiny_processor: Any, recycle: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vprune.prune(model, "attention", keep=1.0, recycle=recycle, size_aware=True):
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("share", [0, 1, 1.0, -0.5, True, "half"])
def test_impossible_shares_are_refused(tiny_vlm: Any, share: Any) -> None:
    with pytest.raises(vprune.VPruneError, match=f"share={share!r}"):
        vprune.prune(tiny_vlm(), "attention", recycle="anchors", share=share)


@pytest.mark.parametrize("distance", [-1, float("inf"), float("nan"), True, "far"])
def test_impossible_distances_are_refused(tiny_vlm: Any, distance: Any) -> None:
    with pytest.raises(vprune.VPruneError, match="distance="):
        vprune.prune(tiny_vlm(), "attention", recycle="anchors", distance=distance)


@pytest.mark.parametrize("recycle", ["grid", "weighted", "anchors"])
def test_no_room_is_told_with_numbers(tiny_vlm: Any, recycle: str) -> None:
    with pytest.raises(vprune.VPruneError, match=f"keep=1 leaves no room .* recycle={recycle} needs 2 rows"):
        vprune.prune(tiny_vlm(), "attention", keep=1, recycle=recycle)
