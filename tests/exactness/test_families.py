"""Law 1 and law 2 in other families: the same masked oracle, whose embeddings are those the model itself merges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor

import vprune
from tests.exactness.agreement import agree, generate, refused
from tests.exactness.families import FAMILIES, IMAGE, KINDS, LINED, QWEN, VIDEO, VIDEOS, batch, build, positions_behind

SIZES: dict[str, Any] = {"recycle": "grid", "cells": 4, "size_aware": True}
STEPS = 8
# transformers < 5.18 repeats every image before the next: copies of a sample with several get wrong ones, hooks or not.
COPIED = "mixed" if version.parse(transformers.__version__) >= version.parse("5.18") else "padded"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
CASES = [(family, kind, False) for family in FAMILIES for kind in KINDS]
CASES += [(family, kind, True) for family in VIDEOS for kind in KINDS]
NAMES = [f"{family}-{kind}{'-video' * video}" for family, kind, video in CASES]


@pytest.fixture(scope="module")
def made() -> Any:
    models: dict[Any, Any] = {}

    def make(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
        key = (family, dtype, attention)
        if key not in models:
            models[key] = build(*key)
        return models[key]

    return make


def deepstacked(shape: torch.Size, marks: Tensor, rows: Tensor) -> Tensor:
    """Rows at the marked places of zeros [B, L, D]."""
    return rows.new_zeros((*shape, rows.shape[-1])).masked_scatter(marks[..., None], rows)


def visual_columns(model: Any, ids: Tensor, structure: Tensor | None) -> Tensor:
    """Places of visual tokens but for line breaks, which `structure` marks."""
    visual = (ids == IMAGE) | (ids == VIDEO)
    return visual if structure is None else visual & ~structure


def line_breaks(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Where the model itself puts its line breaks: the places that move when the learned row is moved."""
    if not hasattr(model.model, "image_newline"):
        return None
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
        model.model.image_newline += 1
        model(**inputs, use_cache=False)
        model.model.image_newline -= 1
    hook.remove()
    return ((seen[1] - seen[0]).abs() > 0.5).all(-1)


@contextmanager
def masked(
    model: Any, ids: Tensor, mask: Tensor, reports: Any, size_aware: bool, structure: Tensor | None = None
) -> Iterator[None]:
    """The full model, whose decoder sees only what `reports` left of the prompt: dropped columns masked at every layer,
    merged rows put in (features added between layers too), log sizes added."""
    prompt = ids.shape[1]
    seen, bias = mask.bool().clone(), torch.zeros_like(mask, dtype=torch.float64)
    merges: list[tuple[int, int, Tensor]] = []
    starts: dict[int, int] = {}
    for report in reports:
        places = visual_columns(model, ids, structure)[report.sample].nonzero().squeeze(-1)
        begin = starts.get(report.sample, 0)
        columns = places[begin : begin + report.tokens_before]
        starts[report.sample] = begin + report.tokens_before
        seen[report.sample, columns] = False
        for row, place in enumerate(report.kept.tolist()):
            members = columns[report.source == row]
            seen[report.sample, columns[place]] = True
            if len(members) > 1:
                merges.append((report.sample, int(columns[place]), members))
            if size_aware:
                bias[report.sample, columns[place]] = math.log(len(members))

    def merged(hidden: Tensor) -> Tensor:
        own = hidden.clone()
        for sample, column, members in merges:
            own[sample, column] = hidden[sample, members].mean(0)
        return own

    def before(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["inputs_embeds"]
        total = given.shape[1]
        columns = torch.nn.functional.pad(seen, (0, total - prompt), value=True)
        log_sizes = torch.nn.functional.pad(bias, (0, total - prompt))
        allowed = columns[:, None, None] & torch.ones(total, total, dtype=torch.bool).tril()
        if isinstance(given_masks := kwargs["attention_mask"], dict):  # pictures see themselves in both directions
            visible = columns[:, None, None] | torch.eye(total, dtype=torch.bool)
            masks = {kind: one & visible for kind, one in given_masks.items()}
            if size_aware:
                sizes, least = log_sizes[:, None, None].to(given.dtype), torch.finfo(torch.float32).min
                masks = {kind: torch.where(one, sizes, least) for kind, one in masks.items()}
            return args, {**kwargs, "inputs_embeds": merged(given), "attention_mask": masks}
        own = torch.where(allowed, log_sizes[:, None, None].to(given.dtype), torch.finfo(torch.float32).min)
        more: dict[str, Any] = {"inputs_embeds": merged(given), "attention_mask": own}
        if (marks := kwargs.get("visual_pos_masks")) is not None:
            features = kwargs["deepstack_visual_embeds"]
            more["deepstack_visual_embeds"] = [
                merged(deepstacked(marks.shape, marks, rows))[marks] for rows in features
            ]
        return args, {**kwargs, **more}

    handle = model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Greedy words, which are never placeholders, and their logits in the model's own precision."""
    greedy = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    return generate(model, **inputs, **{**greedy, **options})


def stepped(model: Any, inputs: dict[str, Tensor], sequences: Tensor) -> list[Tensor]:
    """The logits of one full forward over prompt and answer, at the places that predict the answer."""
    grown = dict(inputs)
    extra = sequences.shape[1] - inputs["input_ids"].shape[1]
    grown["input_ids"] = sequences
    grown["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1)
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        grown[name] = torch.nn.functional.pad(inputs[name], (0, extra))
    pictured = {"image_grid_thw", "video_grid_thw"} & set(inputs)
    positions = (
        positions_behind(model, inputs, grown["attention_mask"])
        if pictured
        else text_positions(grown["attention_mask"])
    )
    with torch.no_grad():
        logits = model(**grown, position_ids=positions, use_cache=False).logits
    return list(logits[:, -extra - 1 : -1].unbind(1))


def text_positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize(("family", "kind", "video"), CASES, ids=NAMES)
@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_pruned_is_the_masked_model(
    made: Any, family: str, kind: str, video: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, inputs = made(family, dtype), batch(family, kind, dtype, video)
    with vprune.prune(model, "attention", keep=0.3, **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert len(reports) == sum(map(len, KINDS[kind])) or family in LINED
    assert all(report.tokens_after == max(1, int(report.tokens_before * 0.3)) for report in reports)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with masked(model, ids, mask, reports, "size_aware" in options, line_breaks(model, inputs)):
        oracle = stepped(model, inputs, pruned.sequences)
    full = stepped(model, inputs, pruned.sequences)
    agree(pruned.logits, oracle, TOLERANCE[dtype])
    pruned_rows = sorted({report.sample for report in reports})
    assert all(float((pruned.logits[0] - full[0])[row].abs().max()) > 1e-2 for row in pruned_rows)  # the control


@pytest.mark.parametrize(("family", "kind", "video"), CASES, ids=NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_all_is_the_unhooked_model(made: Any, family: str, kind: str, video: bool, attention: str) -> None:
    model, inputs = made(family, torch.float32, attention), batch(family, kind, torch.float32, video)
    plain = generated(model, inputs)
    with vprune.prune(model, "attention", keep=1.0) as pruning:
        kept = generated(model, inputs)
    assert pruning.last is not None and all(report.tokens_after == report.tokens_before for report in pruning.last)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("method", ["random", "uniform", "pool", "attention_max", "vision", "resize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_methods_equal_the_masked_model(made: Any, family: str, method: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float64)
    if method == "resize" or (method == "vision" and family in (*QWEN, *LINED)):
        hooks = [len(one._forward_pre_hooks) for one in model.modules()]
        with refused("choose .*instead|choose pool|another method"), vprune.prune(model, method, keep=0.3):
            generated(model, inputs)
        assert hooks == [len(one._forward_pre_hooks) for one in model.modules()]
        return
    with vprune.prune(model, method, keep=0.3) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert reports and all(report.tokens_after < report.tokens_before for report in reports)
    with masked(model, inputs["input_ids"], inputs["attention_mask"], reports, False, line_breaks(model, inputs)):
        oracle = stepped(model, inputs, pruned.sequences)
    agree(pruned.logits, oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_score_as_the_masked_model_does(made: Any, family: str) -> None:
    """The best beam's score is the mean log-likelihood that the masked model gives to the same answer."""
    model, inputs = made(family), batch(family, COPIED, torch.float64)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned = generated(model, inputs, num_beams=3, output_scores=True)
    firsts = [report for report in pruning.last or [] if report.sample % 3 == 0]
    for report in firsts:
        object.__setattr__(report, "sample", report.sample // 3)
    breaks = line_breaks(model, inputs)
    with masked(model, inputs["input_ids"], inputs["attention_mask"], firsts, False, breaks):
        oracle = torch.stack(stepped(model, inputs, pruned.sequences), 1)
    told = pruned.sequences[:, -STEPS:, None]
    scores = oracle.log_softmax(-1).gather(-1, told).squeeze(-1).mean(-1)
    full = torch.stack(stepped(model, inputs, pruned.sequences), 1)
    unpruned = full.log_softmax(-1).gather(-1, told).squeeze(-1).mean(-1)
    torch.testing.assert_close(pruned.sequences_scores, scores.to(pruned.sequences_scores.dtype), rtol=0, atol=1e-5)
    assert float((scores - unpruned)[1:].abs().min()) > 1e-3  # the control; row 0 may have no picture


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 2}], ids=["beam", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_in_other_ways_of_decoding(made: Any, family: str, mode: dict[str, Any]) -> None:
    model, inputs = made(family, torch.float32), batch(family, COPIED, torch.float32)
    options = {"max_new_tokens": 5, "do_sample": "num_beams" not in mode, "suppress_tokens": [IMAGE, VIDEO], **mode}
    torch.manual_seed(1)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(1)
    with vprune.prune(model, "attention", keep=1.0):
        assert torch.equal(plain, model.generate(**inputs, **options))


@pytest.mark.parametrize("family", QWEN)
def test_grids_are_those_of_the_pictures(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "mixed", torch.float64)
    with torch.no_grad(), vprune.prune(model, "uniform", keep=0.5) as pruning:
        model(**inputs)
    assert [report.grid for report in pruning.last or []] == [(1, 3, 5), (1, 4, 4), (1, 2, 6)]


@pytest.mark.parametrize("family", LINED)
def test_a_picture_in_tiles_is_an_overview_and_a_finer_grid(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float64)
    with torch.no_grad(), vprune.prune(model, "uniform", keep=0.5) as pruning:
        model(**inputs)
    # 32 x 32 becomes 2 x 2 tiles, 48 x 24 lies in 32 x 16 or 48 x 16 with its sides cut off.
    grids = [report.grid for report in pruning.last or []]
    assert grids[:3] == [(1, 4, 4), (1, 8, 8), (1, 4, 4)] and grids[3][1] > grids[3][2]


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float64)
    config = model.config.to_json_string()
    plain = generated(model, inputs)  # transformers puts hooks of its own on in the first call
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    with vprune.prune(model, "attention", keep=0.2):
        generated(model, inputs)
    assert config == model.config.to_json_string()
    assert hooks == [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    again = generated(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))


@pytest.mark.parametrize("kind", ["single", "padded"])
@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_of_text_on_the_same_cache(made: Any, family: str, options: dict[str, Any], kind: str) -> None:
    from transformers import DynamicCache

    model, inputs = made(family), batch(family, kind, torch.float64)
    rows, prompt = inputs["input_ids"].shape
    cache = DynamicCache(config=model.config.get_text_config())
    more: dict[str, Any] = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO], "past_key_values": cache}
    with vprune.prune(model, "attention", keep=0.3, **options) as pruning:
        said = model.generate(**inputs, max_new_tokens=3, **more)
        reports = list(pruning.last or [])
        asked = torch.cat([said, torch.tensor([[30, 31, 32]]).expand(rows, -1)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, asked.shape[1] - prompt), value=1)
        pruned = generate(
            model,
            input_ids=asked,
            attention_mask=mask,
            max_new_tokens=4,
            **more,
        )
    with masked(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        reports,
        "size_aware" in options,
        line_breaks(model, inputs),
    ):
        oracle = stepped(model, inputs, pruned.sequences)[-4:]
    agree(pruned.logits, oracle)
