"""What each method computes, against the plainest way to compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vprune
from tests.conftest import GRID
from tests.exactness.prompts import KINDS, batch

IMAGE = 4


def eager_maps(model: Any, inputs: dict[str, torch.Tensor], layer: int, pool: str) -> list[torch.Tensor]:
    """The definition: N x N attention of the whole eager model, instruction rows, visual columns."""
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[layer]
    maps = []
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero().squeeze(-1)
        if len(visual):
            rows = attention[row, :, int(visual[-1]) + 1 :].flatten(0, 1)
            pooled = rows.mean(0) if pool == "mean" else rows.amax(0)
            maps += list(pooled[visual].view(-1, GRID, GRID))
    return maps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "pool"), [("attention", "mean"), ("attention_max", "max")])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_text_attention_is_the_models_own(
    tiny_vlm: Any, tiny_processor: Any, layer: int, method: str, pool: str, kind: str
) -> None:
    inputs = batch(tiny_processor, kind)
    expected = eager_maps(tiny_vlm(attention="eager"), inputs, layer, pool)
    for attention in ("sdpa", "eager"):
        model = tiny_vlm(attention=attention)
        with torch.no_grad(), vprune.prune(model, method, keep=4, layer=layer) as pruning:
            model(**inputs)
        assert pruning.last is not None and len(pruning.last) == len(expected)
        for report, mine in zip(pruning.last, expected, strict=True):
            torch.testing.assert_close(report.importance[0], mine, rtol=1e-4, atol=1e-7)
            best = mine.flatten().topk(4).indices.sort().values
            assert torch.equal(report.kept, best)


@pytest.mark.parametrize("layer", [0, 1])
def test_text_attention_in_a_second_turn_sees_the_first(tiny_vlm: Any, tiny_processor: Any, layer: int) -> None:
    """Nothing was dropped before: the map must be that of the whole conversation in one go."""
    model, inputs = tiny_vlm(attention="eager", dtype=torch.float32), batch(tiny_processor, "several")
    ids, pixels = inputs["input_ids"][:1], inputs["pixel_values"][:2]
    split = int((ids[0] == IMAGE).nonzero()[GRID * GRID])  # where the second image begins
    expected = eager_maps(model, {"input_ids": ids, "pixel_values": pixels}, layer, "mean")[1]
    with torch.no_grad(), vprune.prune(model, "attention", keep=1.0, layer=layer) as pruning:
        out = model(input_ids=ids[:, :split], pixel_values=pixels[:1])
        model(input_ids=ids[:, split:], pixel_values=pixels[1:], past_key_values=out.past_key_values)
    assert pruning.last is not None
    torch.testing.assert_close(pruning.last.importance[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_is_what_the_tower_attends_to(tiny_vlm: Any, tiny_processor: Any, attention: str, tower: str) -> None:
    inputs = batch(tiny_processor, "several")
    eager = tiny_vlm(tower=tower, attention="eager")
    with torch.no_grad():
        seen = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
    expected = seen[:, :, 0, 1:].mean(1) if tower == "clip" else seen.mean((1, 2))
    model = tiny_vlm(tower=tower, attention=attention)
    with vprune.prune(model, "vision", keep=4) as pruning:
        model.generate(**inputs, max_new_tokens=2)
    for report, mine in zip(pruning.last or [], expected, strict=True):
        torch.testing.assert_close(report.importance.flatten(), mine, rtol=1e-5, atol=1e-7)


def test_beams_repeat_the_images_and_their_evidence(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    masks = [np.zeros((12, 12), dtype=bool) for _ in range(2)]
    for number, mask in enumerate(masks):
        mask[4 * number : 4 * number + 2] = True
    for method in ("oracle", "vision", "random"):
        with vprune.prune(model, method, keep=4) as pruning:
            pruning.evidence = masks
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            single = {(r.sample, r.image): r.kept for r in pruning.last or []}
            pruning.evidence = masks
            model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
            assert pruning.last is not None and len(pruning.last) == 4
            for report in pruning.last:
                assert torch.equal(report.kept, single[report.sample // 2, report.image])


def test_oracle_is_the_covered_fraction_with_a_falloff(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    mask = np.zeros((60, 120), dtype=bool)  # patches are 10 x 20 pixels
    mask[20:35, 40:80] = True  # two columns of patches: one row whole, the next to a half
    with torch.no_grad(), vprune.prune(model, "oracle", keep=4) as pruning:
        pruning.evidence = [mask]
        model(**inputs)
        assert pruning.last is not None
        importance = pruning.last.importance[0]
        assert pruning.last.kept.tolist() == [14, 15, 20, 21]
        model(**inputs)
        flat = pruning.last.kept
    assert torch.allclose(importance[2, 2:4], torch.tensor(1.05)) and torch.allclose(
        importance[3, 2:4], torch.tensor(0.55)
    )
    outside = importance.clone()
    outside[2:4, 2:4] = 0.0
    assert 0 < float(outside.max()) < 0.05 and float(outside[2, 1]) > float(outside[2, 0]) > 0
    rows, columns = flat // GRID, flat % GRID  # no evidence: spread over the four quarters
    assert {(int(y) // 3, int(x) // 3) for y, x in zip(rows, columns, strict=True)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_uniform_is_a_stride(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with torch.no_grad(), vprune.prune(model, "uniform", keep=4) as pruning:
        model(**inputs)
    assert (
        pruning.last is not None and pruning.last.kept.tolist() == [4, 13, 22, 31] and pruning.last.importance is None
    )


def test_pool_and_resize_fill_the_budget_with_a_grid() -> None:
    from vprune.selection import cells_within

    assert [cells_within(24, 24, budget) for budget in (576, 288, 144, 57, 28, 1)] == [
        (24, 24), (18, 16), (12, 12), (8, 7), (7, 4), (1, 1),
    ]  # fmt: skip
    assert cells_within(6, 24, 57)[0] * cells_within(6, 24, 57)[1] >= 54
    for h, w in ((24, 24), (6, 24), (37, 50)):
        for budget in range(2, h * w + 1):
            rows, columns = cells_within(h, w, budget)
            assert rows <= h and columns <= w and rows * columns <= budget
            assert rows * columns >= 0.8 * budget - 2, (h, w, budget, rows, columns)


def test_grid_recycling_spends_the_budget_to_the_row() -> None:
    from vprune.recycling import Recycler

    generator = torch.Generator().manual_seed(0)
    for budget in range(1, 65):
        for cells in (1, 4, 7, 16, 64):
            order = torch.randperm(64, generator=generator)
            made = Recycler("grid", cells).plan(order, (1, 8, 8), budget)
            assert made.kept.numel() == budget
            if budget >= 2:
                assert int(made.sizes.sum()) == 64
            weights = torch.zeros(budget, dtype=torch.float64).index_add(0, made.source.clamp(min=0), made.weights)
            assert torch.allclose(weights, torch.ones(budget, dtype=torch.float64))
            for row in (made.sizes > 1).nonzero().flatten().tolist():
                members = (made.source == row).nonzero().flatten()
                assert int(made.kept[row]) == int(members[(len(members) - 1) // 2])


def test_a_full_cell_gives_its_row_back() -> None:
    from vprune.recycling import Recycler

    first_cell = torch.tensor([0, 1, 8, 9])  # a 4 x 4 grid of cells over 8 x 8 tokens
    rest = torch.tensor([n for n in range(64) if n not in first_cell.tolist()])
    made = Recycler("grid").plan(torch.cat([first_cell, rest]), (1, 8, 8), 32)
    pure = made.sizes == 1
    assert int((~pure).sum()) < 16 and made.kept.numel() == 32
    assert set(first_cell.tolist()) <= set(made.kept[pure].tolist())
