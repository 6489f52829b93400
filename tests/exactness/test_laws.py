"""Laws 3, 4 and 6, for every YAML in conf/method/: budgets, order, batches, backends, sources and sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vprune
from tests.conftest import GRID
from tests.exactness.prompts import KINDS, batch
from vprune.method_files import read_method

METHODS = [name for name in vprune.method_names() if name != "full"]
BASELINES = [name for name in METHODS if read_method(name)["_target_"].startswith("vprune.baselines.")]
TOKENS = GRID * GRID
PROGRESSIVE = ("vflowopt",)  # fewer and fewer rows: the mean over the layers is the budget, test_vflow.py
STAGED = ("fastv", "pyramiddrop", "sparsevlm", "vtw", "dart", "fitprune")  # the same, tests/methods
AT_MOST = ("pool", "resize")  # whole grids of cells: as near the budget as a grid comes
OPTIONS: list[dict[str, Any]] = [
    {"recycle": "none", "size_aware": False},
    {"recycle": "grid", "size_aware": False},
    {"recycle": "grid", "cells": 4, "size_aware": True},
    {"recycle": "weighted", "cells": 4, "size_aware": False},
    {"recycle": "nearest", "size_aware": True},
    {"recycle": "anchors", "size_aware": True},
]
OPTION_NAMES = ["plain", "grid", "sizes", "weighted", "nearest", "anchors"]
KEEPS: list[float | int] = [1, 2, 5, 17, 35, 36, 0.01, 0.1, 0.333, 0.5, 1.0]


def crossed(method: str) -> Iterator[Any]:
    """Every option with every budget; baselines share the code behind both, so that a sample of them is quick."""
    for name, options in zip(OPTION_NAMES, OPTIONS, strict=True):
        for keep in KEEPS:
            sampled = method not in BASELINES or keep in (17, 0.1)[: 2 if name == "plain" else 1]
            marks = () if sampled else (pytest.mark.slow,)
            yield pytest.param(method, options, keep, id=f"{method}-{name}-{keep}", marks=marks)


def evidence(images: int) -> list[Any]:
    """Masks of all sorts, in turn: a blob, none, an empty one."""
    blob = np.zeros((64, 80), dtype=bool)
    blob[20:40, 30:70] = True
    return [(blob, None, np.zeros((10, 10), dtype=bool))[number % 3] for number in range(images)]


def prefill(model: Any, inputs: dict[str, torch.Tensor], method: str, keep: float | int, **options: Any) -> Any:
    with torch.no_grad(), vprune.prune(model, method, keep=keep, **options) as pruning:
        pruning.evidence = evidence(len(inputs["pixel_values"]))
        model(**inputs)
        assert pruning.evidence is None, "consumed by the prefill"
    return pruning.last


@pytest.mark.parametrize(("method", "options", "keep"), [case for method in METHODS for case in crossed(method)])
def test_budget_order_source_and_sizes(
    tiny_vlm: Any, tiny_processor: Any, method: str, options: dict[str, Any], keep: float | int
) -> None:
    recycled = options.get("recycle", "none") != "none"
    if type(keep) is int and keep == 1 and recycled and options["recycle"] != "nearest" and method not in AT_MOST:
        with pytest.raises(vprune.VPruneError, match="keep=1 leaves no room for the recycled tokens"):
            vprune.prune(tiny_vlm(), method, keep=keep, **options)
        return
    reports = prefill(tiny_vlm(), batch(tiny_processor, "several"), method, keep, **options)
    budget = keep if isinstance(keep, int) else max(1, math.floor(keep * TOKENS + 1e-9))
    assert len(reports) == 3 and [(r.sample, r.image) for r in reports] == [(0, 0), (0, 1), (1, 0)]
    for report in reports:
        rows = report.tokens_after
        fewer = method in PROGRESSIVE and isinstance(keep, float) and 0.5 * budget - 1 <= rows <= budget
        fewer |= method in STAGED and isinstance(keep, float) and 1 <= rows <= budget
        assert rows == budget or fewer or (method in AT_MOST and 0.6 * budget <= rows <= budget)
        assert report.grid == (1, GRID, GRID) and report.tokens_before == TOKENS == len(report.source)
        assert len(report.kept) == len(report.sizes) == rows
        assert (report.kept.diff() > 0).all() and report.kept[0] >= 0 and report.kept[-1] < TOKENS
        # Every row stands on a token of its own, every token has a row or is dropped, sizes count them.
        assert torch.equal(report.source[report.kept], torch.arange(rows))
        assert torch.equal(torch.bincount(report.source[report.source >= 0], minlength=rows), report.sizes)
        dropped = int((report.source < 0).sum())
        assert int(report.sizes.sum()) == TOKENS - dropped
        if (recycled and rows >= 2) or method in AT_MOST:
            assert dropped == 0
        if report.importance is not None:
            assert report.importance.shape == (1, GRID, GRID) and report.importance.dtype == torch.float32
            assert report.importance.isfinite().all() and (report.importance >= 0).all()


@pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[2:]], ids=[OPTION_NAMES[0], *OPTION_NAMES[2:]])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_two_is_two_batches_of_one(
    tiny_vlm: Any, tiny_processor: Any, method: str, options: dict[str, Any]
) -> None:
    model, both = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "padded", torch.float64)
    with torch.no_grad(), vprune.prune(model, method, keep=0.3, **options) as pruning:
        together = model(**both).logits[:, -1]
        reports = list(pruning.last or [])
        for row in range(2):
            own = both["attention_mask"][row].bool()
            alone = model(
                input_ids=both["input_ids"][row, own][None],
                attention_mask=both["attention_mask"][row, own][None],
                position_ids=None,
                pixel_values=both["pixel_values"][row : row + 1],
            ).logits[:, -1]
            assert pruning.last is not None
            for name in ("kept", "source", "sizes"):
                assert torch.equal(getattr(pruning.last, name), getattr(reports[row], name))
            if pruning.last.importance is not None:
                torch.testing.assert_close(pruning.last.importance, reports[row].importance, rtol=1e-5, atol=1e-9)
            if own.all():  # a shorter prompt alone stands at other positions than left-padded without position ids
                # Weighted means are as exact as their weights, which a network in float32 tells to its own precision.
                exact = method != "learned" or options.get("recycle") != "weighted"
                torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["attention", "attention_max", "vision"])
def test_scores_do_not_depend_on_the_backend(
    tiny_vlm: Any, tiny_processor: Any, method: str, kind: str, layer: int
) -> None:
    inputs = batch(tiny_processor, kind)
    maps = [
        [report.importance for report in prefill(tiny_vlm(attention=name), inputs, method, 0.3, layer=layer)]
        for name in ("sdpa", "eager")
    ]
    for mine, theirs in zip(*maps, strict=True):
        # Below a decoder layer everything runs alike; the tower is the model's own, and differs by rounding.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_text_stays_as_it_is(tiny_vlm: Any, tiny_processor: Any, method: str, kind: str) -> None:
    """What the first decoder layer gets: text embeddings and positions untouched, in order, nothing else but `kept`."""
    model, inputs = tiny_vlm(), batch(tiny_processor, kind)
    met: dict[str, torch.Tensor] = {}

    def look(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        met.update(hidden=args[0], positions=kwargs["position_ids"])

    handle = model.get_decoder().layers[0].register_forward_pre_hook(look, with_kwargs=True)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        reports = prefill(model, {**inputs, "position_ids": positions}, method, 0.2)
    finally:
        handle.remove()
    table = model.get_input_embeddings().weight
    for row in range(len(mask)):
        visual = (inputs["input_ids"][row] == 4).nonzero().squeeze(-1).split(TOKENS)
        stays = mask[row].bool() & (inputs["input_ids"][row] != 4)
        for report in (r for r in reports if r.sample == row):
            stays[visual[report.image][report.stages[0].kept]] = True
        columns = stays.nonzero().squeeze(-1)
        own = slice(met["hidden"].shape[1] - len(columns), None)
        assert torch.equal(met["positions"][row, own], positions[row, columns])
        text = inputs["input_ids"][row, columns] != 4
        assert torch.equal(met["hidden"][row, own][text], table[inputs["input_ids"][row, columns][text]])


class Syncs(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            name in str(func)
            for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "masked_select")
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["single", "padded", "mixed"])
@pytest.mark.parametrize("options", [{}, {"recycle": "grid", "size_aware": True}], ids=["plain", "sizes"])
def test_no_host_sync_while_decoding(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any], kind: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, kind)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.2, **options):
        out = model(**inputs)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        with Syncs() as syncs:
            model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=mask, past_key_values=out.past_key_values)
    assert syncs.count == 0


def test_random_differs_between_images_and_seeds_and_repeats(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "several")
    first = [report.kept for report in prefill(model, inputs, "random", 8)]
    again = [report.kept for report in prefill(model, inputs, "random", 8)]
    other = [report.kept for report in prefill(model, inputs, "random", 8, seed=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
