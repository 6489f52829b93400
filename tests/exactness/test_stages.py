"""Pruning before later layers: pruned = the full model, where from every stage on the dropped tokens are masked out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.exactness.agreement import agree, refused
from tests.exactness.families import QWEN
from tests.exactness.more_families import TEN, inputs_of, made
from tests.exactness.test_families import deepstacked, generated, line_breaks, stepped, visual_columns

SIZES: dict[str, Any] = {"recycle": "grid", "cells": 4, "size_aware": True}
SCHEDULES: dict[str, Any] = {
    "middle": [[2, 0.3]],
    "input-middle": [[0, 0.6], [2, 0.3]],
    "every": [[0, 0.6], [1, 0.4], [2, 0.2]],
}
ROWS_OF_DEEPSTACK = 2  # tests/exactness/families.py: features after layers 0 and 1
NEVER_AHEAD = {
    "qwen3_vl": r"layer=1: features are added after the first 2 layers \(DeepStack\); only layer=0 is possible here",
    "gemma3": r"layer=1: the layers of this decoder are of several kinds; only the layer of the stage is possible",
}
families = pytest.mark.parametrize("family", TEN)


def columns_of(model: Any, inputs: dict[str, Tensor], reports: list[Any]) -> list[Tensor]:
    """The columns of every image of `reports`, in the prompt."""
    visual = visual_columns(model, inputs["input_ids"], line_breaks(model, inputs))
    starts: dict[int, int] = {}
    columns = []
    for report in reports:
        begin = starts.get(report.sample, 0)
        columns.append(visual[report.sample].nonzero().squeeze(-1)[begin : begin + report.tokens_before])
        starts[report.sample] = begin + report.tokens_before
    return columns


@contextmanager
def masked_by_stages(
    model: Any, inputs: dict[str, Tensor], reports: list[Any], size_aware: bool, weighted: bool = False
) -> Iterator[None]:
    """The full model, no cache: before each stage's layer rows are merged, from there on dropped columns are masked."""
    columns = columns_of(model, inputs, reports)
    stages = sorted({stage.layer for report in reports for stage in report.stages})
    text = model.get_decoder()

    def before_text(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        marks, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if marks is None or 0 not in stages:
            return args, kwargs
        dense = [deepstacked(marks.shape, marks, rows) for rows in features]  # added between layers: merged alike
        return args, {**kwargs, "deepstack_visual_embeds": [merge(0, rows)[marks] for rows in dense]}

    def merge(layer: int, hidden: Tensor) -> Tensor:
        merged = hidden.clone()
        for report, places in zip(reports, columns, strict=True):
            number = [stage.layer for stage in report.stages].index(layer)
            now = report.stages[number]
            earlier = report.stages[number - 1] if number else None
            before = torch.arange(len(places)) if earlier is None else earlier.kept
            weight = torch.ones(len(places)) if earlier is None else earlier.sizes
            for row, place in enumerate(now.kept.tolist()):
                members = [n for n, token in enumerate(before.tolist()) if int(now.source[token]) == row]
                if len(members) > 1:
                    share = weight[members].double()
                    if weighted:
                        share = share * now.importance.flatten()[before[members]].double()
                    share = (share / share.sum()).to(hidden.dtype)
                    rows = hidden[report.sample, places[before[members]]]
                    merged[report.sample, places[place]] = (share[:, None] * rows).sum(0)
        return merged

    def mask(layer: int, total: int, dtype: torch.dtype, given: Any) -> Tensor:
        seen = torch.nn.functional.pad(
            inputs["attention_mask"].bool(), (0, total - inputs["input_ids"].shape[1]), value=True
        )
        bias = torch.zeros(seen.shape, dtype=torch.float64)
        for report, places in zip(reports, columns, strict=True):
            done = [stage for stage in report.stages if stage.layer <= layer]
            if done:
                seen[report.sample, places] = False
                seen[report.sample, places[done[-1].kept]] = True
                if size_aware:
                    bias[report.sample, places[done[-1].kept]] = done[-1].sizes.double().log()
        if "sliding_attention" in (getattr(text.config, "layer_types", None) or ()):  # pictures see both ways there
            allowed = given & (seen[:, None, None] | torch.eye(total, dtype=torch.bool))
        else:
            allowed = seen[:, None, None] & torch.ones(total, total, dtype=torch.bool).tril()
        return torch.where(allowed, bias[:, None, None].to(dtype), torch.finfo(torch.float32).min)

    def before_layer(number: int) -> Any:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = merge(number, args[0]) if number in stages else args[0]
            own = mask(number, hidden.shape[1], hidden.dtype, kwargs.get("attention_mask"))
            return (hidden, *args[1:]), {**kwargs, "attention_mask": own}

        return hook

    handles = [
        layer.register_forward_pre_hook(before_layer(number), with_kwargs=True)
        for number, layer in enumerate(text.layers)
    ]
    handles.append(text.register_forward_pre_hook(before_text, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["padded", "mixed"])
@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@families
def test_every_layer_sees_what_its_stage_left(family: str, schedule: str, options: dict[str, Any], kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    if family == "qwen3_vl" and schedule == "every":
        said = r"layer 1 lies among the first 2 layers, .* \(DeepStack\); choose 0, or 2 and above"
        with refused(said), vprune.prune(model, "attention", stages=SCHEDULES[schedule]):
            generated(model, inputs)
        return
    with vprune.prune(model, "attention", stages=SCHEDULES[schedule], **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    layers = [layer for layer, _ in SCHEDULES[schedule]]
    assert reports and all([stage.layer for stage in report.stages] == layers for report in reports)
    for report in reports:
        for stage, (_, keep) in zip(report.stages, SCHEDULES[schedule], strict=True):
            assert stage.tokens_after == max(1, int(report.tokens_before * keep + 1e-9))
    with masked_by_stages(model, inputs, reports, "size_aware" in options):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))
    full = stepped(model, inputs, pruned.sequences)
    assert all(float((pruned.logits[0] - full[0])[row].abs().max()) > 1e-3 for row in {one.sample for one in reports})


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@families
def test_a_second_turn_of_text_after_stages(family: str, options: dict[str, Any]) -> None:
    from transformers import DynamicCache

    model, inputs = made(family), inputs_of(family, "padded")
    cache = DynamicCache(config=model.config.get_text_config())
    rows, prompt = inputs["input_ids"].shape
    with vprune.prune(model, "attention", stages=[[0, 0.6], [2, 0.3]], **options) as pruning:
        said = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[90, 91], past_key_values=cache
        )
        reports = list(pruning.last or [])
        asked = torch.cat([said, torch.tensor([[30, 31, 32]]).expand(rows, -1)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, asked.shape[1] - prompt), value=1)
        pruned = generated(model, {"input_ids": asked, "attention_mask": mask}, past_key_values=cache)
    stored = [layer.keys.shape[-2] for layer in cache.layers]
    assert stored[0] == stored[1] > stored[2] and cache.get_seq_length() == pruned.sequences.shape[1] - 1
    with masked_by_stages(model, inputs, reports, "size_aware" in options):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences)[-len(pruned.logits) :])


@families
def test_hidden_states_come_back_at_full_length(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "padded")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), vprune.prune(model, "attention", stages=[[0, 0.6], [2, 0.3]]) as pruning:
        out = model(**inputs, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and all(state.shape[1] == length for state in out.hidden_states)
    reports = list(pruning.last or [])
    for report, places in zip(reports, columns_of(model, inputs, reports), strict=True):
        for number, stage in ((0, 0), (1, 0), (2, 0), (3, 1)):
            alive = out.hidden_states[number][report.sample, places].abs().sum(-1) > 0
            assert alive.nonzero().squeeze(-1).tolist() == report.stages[stage].kept.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
def test_stages_that_keep_all_change_nothing(family: str, attention: str) -> None:
    model, inputs = made(family, torch.float32, attention), inputs_of(family, "mixed", torch.float32)
    plain = generated(model, inputs)
    with vprune.prune(model, "attention", stages=[[0, 1.0], [2, 1.0]]):
        kept = generated(model, inputs)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@families
def test_eager_attention_agrees_after_stages(family: str) -> None:
    inputs = inputs_of(family, "mixed", torch.float32)
    logits = []
    for attention in ("sdpa", "eager"):
        model = made(family, torch.float32, attention)
        with torch.no_grad(), vprune.prune(model, "uniform", stages=[[0, 0.6], [2, 0.3]]):
            logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
def test_guesses_after_stages(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any]) -> None:
    """Guesses crop caches whose layers store different numbers of rows."""
    from tests.conftest import picture

    model = tiny_vlm(dtype=torch.float64)
    text = "<s> <image> the red circle of the blue circle of the"
    inputs = dict(tiny_processor(images=[picture(0)], text=[text], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    more = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2}
    with vprune.prune(model, "uniform", stages=[[0, 0.5], [1, 0.3], [2, 0.1]], **options):
        plain = model.generate(**inputs, **more)
        guessed = model.generate(**inputs, **more, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, guessed)


@families
def test_beams_score_as_the_masked_model_does(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "padded")
    with vprune.prune(model, "attention", stages=[[0, 0.6], [2, 0.3]]) as pruning:
        pruned = generated(model, inputs, num_beams=3, output_scores=True)
    firsts = [report for report in pruning.last or [] if report.sample % 3 == 0]
    for report in firsts:
        object.__setattr__(report, "sample", report.sample // 3)
    with masked_by_stages(model, inputs, firsts, False):
        oracle = torch.stack(stepped(model, inputs, pruned.sequences), 1)
    told = pruned.sequences[:, inputs["input_ids"].shape[1] :, None]
    scores = oracle.log_softmax(-1).gather(-1, told).squeeze(-1).mean(-1)
    torch.testing.assert_close(pruned.sequences_scores, scores.to(pruned.sequences_scores.dtype), rtol=0, atol=1e-5)


def test_one_layer_alone_keeps_keep(tiny_vlm: Any, tiny_processor: Any) -> None:
    from tests.exactness.prompts import batch as prompts

    model = tiny_vlm()
    with torch.no_grad(), vprune.prune(model, "attention", keep=9, stages=[2]) as pruning:
        cache = model(**prompts(tiny_processor, "single")).past_key_values
    assert pruning.last is not None and pruning.last.tokens_after == 9
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths[0] == lengths[1] == lengths[2] + 27 and [stage.layer for stage in pruning.last.stages] == [2]


def test_the_layer_that_scores_may_lie_before_the_stage(tiny_vlm: Any, tiny_processor: Any) -> None:
    """FastV's order: the attention of layer 1 decides what layer 2 sees."""
    from tests.exactness.prompts import batch as prompts

    model, inputs = tiny_vlm(), prompts(tiny_processor, "padded")
    maps = {}
    for name, options in {"before": {"stages": [2], "layer": 1}, "input": {"layer": 1}, "own": {"stages": [1]}}.items():
        with torch.no_grad(), vprune.prune(model, "attention", keep=9, **options) as pruning:
            model(**inputs)
        maps[name] = [report.importance for report in pruning.last or []]
    for before, at_input, own in zip(maps["before"], maps["input"], maps["own"], strict=True):
        torch.testing.assert_close(before, at_input, rtol=0, atol=1e-5)
        torch.testing.assert_close(before, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("2", "stages='2'"),
        ([], r"stages=\[\]"),
        ([[2, 0.1], [1, 0.05]], "layer 1 comes after layer 2"),
        ([-1], "-1 is no stage"),
        ([[0, 0.5, 1]], "is no stage"),
        ([[0, 0.0]], r"outside \(0, 1\]"),
        ([7], "layer 7: the decoder has layers 0 to 2"),
    ],
)
def test_impossible_stages_are_refused(tiny_vlm: Any, stages: Any, said: str) -> None:
    with pytest.raises(vprune.VPruneError, match=said), vprune.prune(tiny_vlm(), "attention", stages=stages):
        pass


def test_a_stage_cannot_bring_tokens_back(tiny_vlm: Any, tiny_processor: Any) -> None:
    from tests.exactness.prompts import batch as prompts

    inputs = prompts(tiny_processor, "single")
    with (
        vprune.prune(tiny_vlm(), "attention", stages=[[0, 5], [1, 9]]),
        pytest.raises(vprune.VPruneError, match="leave 9 tokens of an image of which an earlier stage left 5"),
    ):
        tiny_vlm()(**inputs)


def test_checkpointed_layers_are_refused(tiny_processor: Any) -> None:
    from tests.conftest import build_model
    from tests.exactness.prompts import batch as prompts

    model = build_model()
    model.gradient_checkpointing_enable()
    model.train()
    with vprune.prune(model, "uniform", stages=[1]), refused("gradient checkpointing"):
        model(**prompts(tiny_processor, "single"), use_cache=False)


@pytest.mark.parametrize("family", QWEN)
def test_rotations_follow_the_rows_of_pictures(family: str) -> None:
    """A stage before the last layer keeps what it keeps at the positions of rows and columns, not of the order."""
    model, inputs = made(family), inputs_of(family, "padded")
    with vprune.prune(model, "uniform", stages=[[ROWS_OF_DEEPSTACK, 0.2]]) as pruning:
        pruned = generated(model, inputs)
    with masked_by_stages(model, inputs, list(pruning.last or []), False):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))


@families
def test_maps_of_layers_that_would_have_to_run_ahead(family: str) -> None:
    """The layers before run on a copy of the rows, and give the map that is seen when that layer is reached."""
    model, inputs = made(family), inputs_of(family, "padded")
    if family in NEVER_AHEAD:
        with torch.no_grad(), refused(NEVER_AHEAD[family]), vprune.prune(model, "attention", layer=1):
            model(**inputs)
        with torch.no_grad(), vprune.prune(model, "attention", stages=[2]) as pruning:  # run by then
            model(**inputs)
        assert all(report.importance is not None for report in pruning.last or [])
        return
    maps = []
    for options in ({"layer": 1}, {"stages": [1]}, {"layer": 0}):
        with torch.no_grad(), vprune.prune(model, "attention", keep=9, **options) as pruning:
            model(**inputs)
        maps.append([report.importance for report in pruning.last or []])
    for ahead, reached, other in zip(*maps, strict=True):
        torch.testing.assert_close(ahead, reached, rtol=0, atol=1e-6)
        assert float((ahead - other).abs().max()) > 1e-3  # the control


def test_a_scorer_that_runs_the_layers_itself_serves_later_stages_again_and_again(
    tiny_vlm: Any, tiny_processor: Any
) -> None:
    from tests.exactness.prompts import batch as prompts

    model, inputs = tiny_vlm(), prompts(tiny_processor, "padded")
    with torch.no_grad(), vprune.prune(model, "relevance", stages=[(1, 0.5), (2, 0.25)]) as pruning:
        first = model(**inputs).logits
        again = model(**inputs).logits
    assert torch.equal(first, again)
    assert [[stage.tokens_after for stage in one.stages] for one in pruning.last or ()] == [[18, 9], [18, 9]]
