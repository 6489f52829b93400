"""VFlowOpt: its map against the definition with the whole N x N attention, and its three stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vprune
from tests.conftest import GRID, PATCH
from tests.exactness.families import batch as family_batch
from tests.exactness.families import build
from tests.exactness.prompts import batch
from tests.exactness.test_families import generated, stepped
from tests.exactness.test_stages import agree, masked_by_stages
from vprune.progressive import Progressive, thirds
from vprune.pruner import load_method
from vprune.records import Prefill, VisualTokens
from vprune.scoring.vflow import VisualFlow, histogram_entropy


def relevance(attention: Tensor, threshold: float) -> Tensor:
    """The definition, A [N + class, N + class]."""
    own = attention[-GRID * GRID :]
    received = own.sum(0)
    votes = received[-GRID * GRID :] > threshold * attention.mean()
    if not votes.any():
        votes[:] = True
    return own[votes].sum(0)[-GRID * GRID :]


@pytest.mark.parametrize("threshold", [0.0, 20.0, 36.0, 60.0, 1e6])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_context_relevance_with_calibration(
    tiny_vlm: Any, tiny_processor: Any, attention: str, tower: str, threshold: float
) -> None:
    inputs = batch(tiny_processor, "several")
    eager = tiny_vlm(tower=tower, attention="eager")
    with torch.no_grad():
        seen = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2].mean(1)
    expected = [relevance(one, threshold) for one in seen]
    model = tiny_vlm(tower=tower, attention=attention)
    with torch.no_grad(), vprune.prune(model, "vflowopt", threshold=threshold) as pruning:
        model(**inputs)
    for report, mine in zip(pruning.last or [], expected, strict=True):
        torch.testing.assert_close(report.importance.flatten(), mine, rtol=1e-4, atol=1e-6)
    if threshold == 36.0:
        assert any(not torch.allclose(one, relevance(full, 0.0)) for one, full in zip(expected, seen, strict=True))


def test_entropy_is_that_of_the_raw_pixels(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "several")
    raw = ((inputs["pixel_values"] * 0.5 + 0.5).mean(1) * 255).round().numpy()
    expected = []
    for picture in raw:
        for y in range(0, GRID * PATCH, PATCH):
            for x in range(0, GRID * PATCH, PATCH):
                counts = np.unique(picture[y : y + PATCH, x : x + PATCH], return_counts=True)[1] / PATCH**2
                expected.append(-(counts * np.log(counts)).sum())
    entropies = torch.tensor(np.array(expected)).view(-1, GRID * GRID).float()
    maps = {}
    for alpha in (0.0, 50.0):
        with torch.no_grad(), vprune.prune(model, "vflowopt", alpha=alpha) as pruning:
            model(**inputs)
        maps[alpha] = torch.stack([report.importance.flatten() for report in pruning.last or []])
    torch.testing.assert_close(maps[50.0] - maps[0.0], 50 * entropies.softmax(-1), rtol=1e-4, atol=1e-5)
    flat = histogram_entropy(torch.full((1, 16, 16), 0.3), 8)
    assert flat.tolist() == [[0.0] * 4]
    # Every grey once: as much as 256 bins can hold.
    every = histogram_entropy((torch.arange(256.0) / 255).view(1, 16, 16), 16)
    torch.testing.assert_close(every, torch.full((1, 1), np.log(256.0), dtype=torch.float32))


def test_pixels_of_another_processor_are_noticed(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    inputs["pixel_values"] = inputs["pixel_values"] * 2
    with (
        torch.no_grad(),
        vprune.prune(model, "vflowopt", alpha=1.0),
        pytest.raises(vprune.VPruneError, match="not within 0 to 255: give the image processor's image_mean"),
    ):
        model(**inputs)
    with torch.no_grad(), vprune.prune(model, "vflowopt", alpha=1.0, mean=[0.5] * 3, std=[0.25] * 3):
        model(**inputs)


@pytest.mark.parametrize("keep", [0.01, 0.05, 0.1, 0.25, 0.34, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (1.17, 1.17), (1.5, 1), (2, 0.5), (2.9, 0.1), (1.5, 1.5)])
@pytest.mark.parametrize("lengths", [(3, 2, 3), (9, 10, 9), (1, 1, 1)])
def test_thirds_keep_the_budget(keep: float, first: float, second: float, lengths: tuple[int, int, int]) -> None:
    shares = thirds(keep, first, second, lengths)
    assert 1 >= shares[0] >= shares[1] >= shares[2] > 0 and shares[0] >= keep
    mean = sum(share * length for share, length in zip(shares, lengths, strict=True)) / sum(lengths)
    assert abs(mean - keep) < 1e-5


def test_stages_follow_the_depth() -> None:
    method = load_method("vflowopt", keep=0.1, first=1.5, second=1.0)
    assert isinstance(method, Progressive)
    assert [layer for layer, _ in method.fitted(28).schedule] == [0, 9, 19]
    assert [round(share, 4) for _, share in method.fitted(24).schedule] == [0.15, 0.1, 0.05]
    assert [layer for layer, _ in method.fitted(2).schedule] == [0, 1]
    assert method.with_keep(64).fitted(28).schedule == ((0, 64),)
    assert method.with_keep(1.0).fitted(28).schedule == ((0, 1.0),)


@pytest.mark.parametrize("size_aware", [False, True], ids=["plain", "sizes"])
@pytest.mark.parametrize("recycle", ["none", "weighted"])
@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_it_equals_the_masked_model(family: str, recycle: str, size_aware: bool) -> None:
    model, inputs = build(family, torch.float64), family_batch(family, "mixed", torch.float64)
    more: dict[str, Any] = {"keep": 0.5, "first": 1.6, "second": 0.8, "recycle": recycle, "size_aware": size_aware}
    with vprune.prune(model, "vflowopt", **more) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert {tuple(stage.layer for stage in report.stages) for report in reports} == {(0, 1, 2)}
    assert {tuple(stage.tokens_after for stage in report.stages) for report in reports} == {(12, 6, 4)}
    with masked_by_stages(model, inputs, reports, size_aware, recycle == "weighted"):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))


@pytest.mark.parametrize(
    "options",
    [
        {"first": 0.9},
        {"first": 2, "second": 2},
        {"second": 0},
        {"first": "1"},
        {"threshold": -1},
        {"alpha": True},
        {"mean": [0.5]},
    ],
)
def test_impossible_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vprune.VPruneError, match=f"{next(iter(options))}="):
        load_method("vflowopt", **options)


def test_a_map_needs_a_tower_that_was_watched() -> None:
    image, hidden = VisualTokens(0, 0, torch.arange(4), (1, 2, 2)), torch.zeros(1, 4, 8)
    valid = torch.ones(1, 4, dtype=torch.bool)
    anything: Any = None
    prefill = Prefill(anything, hidden, torch.arange(4), valid, valid, [image], [], None, None, 0, anything)
    with pytest.raises(vprune.VPruneError, match="tower was not watched while it read image 0 of sample 0"):
        VisualFlow()(prefill)
