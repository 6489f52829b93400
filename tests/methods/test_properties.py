"""What holds for every method in conf/method/: budgets, order, batches, repeats, families, keeping everything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.conftest import GRID
from tests.exactness.agreement import agree
from tests.exactness.families import VIDEOS
from tests.exactness.more_families import inputs_of, made
from tests.exactness.prompts import batch
from tests.exactness.test_families import generated, stepped
from tests.exactness.test_laws import evidence
from tests.exactness.test_stages import masked_by_stages
from tests.methods.prefills import deep_vlm
from vprune.amounts import RECYCLERS
from vprune.baselines.staged import Staged
from vprune.progressive import Progressive
from vprune.pruner import load_method

METHODS = [name for name in vprune.method_names() if name != "full"]
OPTIONS: dict[str, dict[str, Any]] = {"relevance": {"tokens": 1}}  # it costs a backward pass for every token
STAGED = [name for name in METHODS if isinstance(load_method(name), (Staged, Progressive))]
WATCHING = [name for name in METHODS if getattr(load_method(name).scorer, "tower_layer", None) is not None]
AT_MOST = ("pool", "resize")  # whole grids of cells: as near the budget as a grid comes
TOKENS, LAYERS = GRID * GRID, 8


@pytest.fixture(scope="module")
def deep() -> Any:
    """`deep(tower)`: eight layers of grouped-query decoder, around a tower with a class token (clip) or without."""
    models: dict[str, Any] = {}

    def make(tower: str) -> Any:
        if tower not in models:
            models[tower] = deep_vlm(LAYERS, tower)
        return models[tower]

    return make


def reports_of(model: Any, inputs: dict[str, Tensor], method: str, **options: Any) -> list[Any]:
    with torch.no_grad(), vprune.prune(model, method, **OPTIONS.get(method, {}), **options) as pruning:
        pruning.evidence = evidence(len(inputs["pixel_values"])) if method == "oracle" else None
        model(**inputs)
    return list(pruning.last or [])


def rows_over_layers(report: Any) -> list[int]:
    """How many rows of an image each layer reads."""
    rows, left = [], report.tokens_before
    for layer in range(LAYERS):
        left = next((stage.tokens_after for stage in report.stages if stage.layer == layer), left)
        rows.append(left)
    return rows


@pytest.mark.parametrize("keep", [7, 0.1, 0.6])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_budget_and_order(deep: Any, tiny_processor: Any, method: str, tower: str, keep: float | int) -> None:
    inputs = batch(tiny_processor, "several", torch.float64)
    reports = reports_of(deep(tower), inputs, method, keep=keep)
    budget = keep if isinstance(keep, int) else math.floor(keep * TOKENS + 1e-9)
    assert [(report.sample, report.image) for report in reports] == [(0, 0), (0, 1), (1, 0)]
    for report in reports:
        rows = rows_over_layers(report)
        assert rows == sorted(rows, reverse=True) and rows[-1] == report.tokens_after == len(report.kept)
        assert report.mean_tokens == sum(rows) / LAYERS
        if method in STAGED and isinstance(keep, float):
            # No more than the budget in the mean; each stage rounds down (and leaves one token at least).
            assert keep * TOKENS - 1 <= sum(rows) / LAYERS <= keep * TOKENS + (1 if rows[-1] == 1 else 0)
        else:
            assert rows == [budget] * LAYERS or (method in AT_MOST and 0.6 * budget <= rows[-1] <= budget)
        for stage in report.stages:
            assert (stage.kept.diff() > 0).all() and stage.kept[0] >= 0 and stage.kept[-1] < TOKENS
            assert torch.equal(stage.source[stage.kept], torch.arange(stage.tokens_after))
            assert torch.equal(torch.bincount(stage.source[stage.source >= 0]), stage.sizes)
        if report.importance is not None:
            assert report.importance.isfinite().all() and (report.importance >= 0).all()


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_two_is_two_batches_of_one(deep: Any, tiny_processor: Any, method: str, tower: str) -> None:
    model, both = deep(tower), batch(tiny_processor, "padded", torch.float64)
    together = reports_of(model, both, method, keep=0.3)
    again = reports_of(model, both, method, keep=0.3)
    for row in range(2):
        own = both["attention_mask"][row].bool()
        ids, mask = both["input_ids"][row, own][None], both["attention_mask"][row, own][None]
        pixels = both["pixel_values"][row : row + 1]
        masks = evidence(2)[row : row + 1] if method == "oracle" else None
        with torch.no_grad(), vprune.prune(model, method, keep=0.3, **OPTIONS.get(method, {})) as pruning:
            pruning.evidence = masks
            model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        assert pruning.last is not None
        for name in ("kept", "source", "sizes"):
            assert torch.equal(getattr(pruning.last, name), getattr(together[row], name))
            assert torch.equal(getattr(again[row], name), getattr(together[row], name))


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_nothing(deep: Any, tiny_processor: Any, method: str) -> None:
    model, inputs = deep("clip"), batch(tiny_processor, "several", torch.float64)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vprune.prune(model, method, keep=1.0) as pruning:
            kept = model(**inputs).logits
    assert torch.equal(kept, plain)
    assert pruning.last is not None
    assert all(report.kept.tolist() == list(range(TOKENS)) for report in pruning.last)


@pytest.mark.parametrize("recycle", [one for one in RECYCLERS if one != "none"])
@pytest.mark.parametrize("method", ["visionzip", "prumerge", "tome", "restore", "trim", "divprune", "dart"])
def test_recycling_takes_the_place_of_own_merging(deep: Any, tiny_processor: Any, method: str, recycle: str) -> None:
    inputs = batch(tiny_processor, "several", torch.float64)
    for report in reports_of(deep("clip"), inputs, method, keep=12, recycle=recycle, size_aware=True):
        assert report.tokens_after == 12 and int(report.sizes.sum()) == TOKENS


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_of_ones_own(deep: Any, tiny_processor: Any, method: str) -> None:
    """Every method can be asked for stages: the second goes on from what the first has left."""
    if method in ("resize", "relevance"):  # the one has no stages, the other answers before the first layer only
        return
    inputs = batch(tiny_processor, "several", torch.float64)
    for report in reports_of(deep("clip"), inputs, method, keep=0.3, stages=[[0, 0.5], [3, 0.2]]):
        first, second = report.stages
        assert (first.layer, second.layer) == (0, 3)
        assert (first.tokens_after, second.tokens_after) == (18, 7) or method == "pool"
        assert set(second.kept.tolist()) <= set(first.kept.tolist())
        assert int(second.sizes.sum()) == int((second.source >= 0).sum()) <= int((first.source >= 0).sum())


def options_of(method: str, family: str) -> dict[str, Any]:
    """Token counts put every stage before the first layer: what a family of three layers with DeepStack can have."""
    count = method in STAGED and method != "vflowopt" and family == "qwen3_vl"
    return {"keep": 3 if count else 0.3, **OPTIONS.get(method, {})}


# What is refused, and with which words.
REFUSED = {
    **{(name, family): "whose attention cannot be" for name in WATCHING
       for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")},
    **{("relevance", family): "a plain decoder" for family in ("qwen3_vl", "gemma3")},
    **{("resize", family): "choose pool|not resize" for family in
       ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3")},
    ("fastv", "qwen3_vl"): "layer=1: features are added after the first 2 layers",
    ("fastv", "gemma3"): "layer=1: the layers of this decoder are of several kinds",
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "video"),
    [
        *((one, False) for one in ("qwen2_vl", "qwen3_vl", "internvl", "idefics3", "gemma3", "llava_next")),
        *((one, True) for one in VIDEOS),
    ],
)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "oracle"])
def test_families(method: str, family: str, video: bool) -> None:
    """Rows of several pictures of unequal size, or videos, into grouped-query decoders: a budget each, or refused."""
    model, inputs = made(family), inputs_of(family, "mixed", video=video)
    options = options_of(method, family)
    if (method, family) in REFUSED:
        words = pytest.raises(vprune.VPruneError, match=REFUSED[method, family])
        with words, torch.no_grad(), vprune.prune(model, method, **options):
            model(**inputs)
        return
    with torch.no_grad(), vprune.prune(model, method, **options) as pruning:
        model(**inputs)
    reports = list(pruning.last or [])
    assert len(reports) >= 3 and {report.sample for report in reports} == {1, 2}
    groups = 1 if isinstance(options["keep"], float) else 0
    for report in reports:
        budget = max(1, math.floor(options["keep"] * report.tokens_before + 1e-9)) if groups else options["keep"]
        staged = method in STAGED and 1 <= report.tokens_after <= report.tokens_before
        shared = method == "hired" and family == "internvl"  # crops of one picture share a budget
        assert report.tokens_after == budget or staged or shared or method in AT_MOST
        assert (report.kept.diff() > 0).all()
    if method not in STAGED and method not in AT_MOST and groups:
        before = [max(1, math.floor(0.3 * report.tokens_before + 1e-9)) for report in reports]
        assert sum(report.tokens_after for report in reports) == sum(before)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "vtw", "dart", "fitprune"])
def test_stages_equal_the_masked_model(method: str) -> None:
    """From every stage on the full model, in which dropped tokens are masked out and clusters put in."""
    model, inputs = made("idefics3"), inputs_of("idefics3", "mixed")
    options = {"layer": 1} if method in ("fastv", "dart") else {}
    with vprune.prune(model, method, keep=2 / 3, **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert all(stage.layer for report in reports for stage in report.stages[1:]) and reports[0].tokens_after < 16
    assert method in ("pyramiddrop", "fitprune") or reports[0].stages[0].layer > 0
    with masked_by_stages(model, inputs, reports, False):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "prumerge_plus", "tome", "sparsevlm", "restore"])
def test_merging_over_frames_is_refused(method: str) -> None:
    with pytest.raises(vprune.VPruneError, match=r"budget='frame': .* merges tokens of all frames"):
        load_method(method, budget="frame")
    assert load_method(method, budget="frame", recycle="grid").budget == "frame"


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("pyramiddrop", "ratio", 1.0),
        ("pyramiddrop", "ratio", True),
        ("sparsevlm", "ratio", 0),
        ("sparsevlm", "recycled", 1.5),
        ("dart", "image_pivots", 0),
        ("dart", "layer", 0),
        ("visionzip", "contextual", 1),
        ("prumerge", "neighbours", 0),
        ("prumerge", "outliers", 2.0),
        ("prumerge", "adaptive", "yes"),
        ("trim", "adaptive", 1),
        ("trim", "negated", "no"),
        ("restore", "decay", -1),
    ],
)
def test_impossible_values_are_refused(method: str, option: str, value: Any) -> None:
    with pytest.raises(vprune.VPruneError, match=f"{option}={value!r}"):
        load_method(method, **{option: value})
