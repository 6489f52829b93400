"""Families that nobody named: pruned as exactly as the others, or refused; never wrong in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from tests.exactness.more_families import inputs_of, made, of_kind, seen_columns
from tests.exactness.test_families import generated, stepped, text_positions
from tests.exactness.test_family_scenarios import agree, differ, oracle, rows_of

UNNAMED = ("vipllava", "llava_next_video")


@pytest.mark.parametrize("kind", ["padded", "mixed"])
@pytest.mark.parametrize("family", UNNAMED)
def test_families_that_nobody_named_are_pruned_as_well(family: str, kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    plain = generated(model, inputs)
    with vprune.prune(model, "attention", keep=1.0):
        kept = generated(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, kept.logits, strict=True))
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    with oracle(model, inputs, reports):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))
    differ(pruned.logits, stepped(model, inputs, pruned.sequences), rows_of(reports))


# Families whose towers give the decoder fewer tokens than they have patches, in ways that the library does not know.
MERGING = ("aya_vision", "cohere2_vision", "ovis2", "mistral3")


@pytest.mark.parametrize("kind", ["padded", "several", "mixed"])
@pytest.mark.parametrize("family", MERGING)
def test_towers_that_merge_patches_in_unknown_ways_are_refused(family: str, kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    plain = generated(model, inputs)
    with (
        vprune.prune(model, "attention", keep=0.3),
        pytest.raises(vprune.VPruneError, match="are no whole images"),
    ):
        generated(model, inputs)
    again = generated(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, again.logits, strict=True))


def test_videos_without_line_breaks_are_refused() -> None:
    model, inputs = made("llava_next_video"), inputs_of("llava_next_video", "padded", video=True)
    generated(model, inputs)
    with (
        vprune.prune(model, "attention", keep=0.3),
        pytest.raises(vprune.VPruneError, match="are no whole images"),
    ):
        generated(model, inputs)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", ["single", "padded"])
def test_a_prefix_that_sees_itself_both_ways(kind: str, fixed: bool) -> None:
    model, inputs = made("paligemma"), inputs_of("paligemma", kind)
    static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if fixed else {}
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        if kind == "single" and not fixed:  # `generate` hands over a finished mask alone: refused, never wrong
            with pytest.raises(vprune.VPruneError, match="needs the 2-D mask"):
                generated(model, inputs, **static)
            return
        pruned = generated(model, inputs, **static)
    seen = seen_columns(model, inputs, list(pruning.last or []), None)

    def hide(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        alone = torch.eye(seen.shape[1], dtype=torch.bool)
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] & (seen[:, None, None] | alone)}

    hook = model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
    positions = text_positions(inputs["attention_mask"]) + 1  # PaliGemma counts from 1
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
    hook.remove()
    agree(pruned.logits[:1], [expected])


@pytest.mark.xfail(strict=True, reason="four pictures of 16 tokens pass for one of 64, the size before merging")
@pytest.mark.parametrize("family", MERGING)
def test_pictures_are_never_taken_for_one(family: str) -> None:
    with of_kind("four", [[(32, 32)] * 4]) as kind:
        model, inputs = made(family), inputs_of(family, kind)
    with torch.no_grad(), vprune.prune(model, "uniform", keep=0.3) as pruning:
        try:
            model(**inputs)
        except vprune.VPruneError:
            return
    assert len(pruning.last or []) == 4
