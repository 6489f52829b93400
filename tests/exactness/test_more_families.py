"""Families that nobody named: pruned as exactly as the others, or refused; never wrong in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging import version

import vprune
from tests.exactness.agreement import agree, differ, refused
from tests.exactness.families import IMAGE, KINDS, VIDEO
from tests.exactness.more_families import MARKS, MERGING, inputs_of, made, of_kind, seen_columns
from tests.exactness.test_families import SIZES, generated, line_breaks, masked, stepped, text_positions
from tests.exactness.test_family_scenarios import rows_of

UNNAMED = ("vipllava", "llava_next_video", "pixtral", *MERGING)
SAID: dict[str, Any] = {"suppress_tokens": [IMAGE, VIDEO, *MARKS]}


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("kind", ["padded", "several", "mixed"])
@pytest.mark.parametrize("family", UNNAMED)
def test_families_that_nobody_named_are_pruned_as_well(family: str, kind: str, options: dict[str, Any]) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    plain = generated(model, inputs, **SAID)
    with vprune.prune(model, "attention", keep=1.0, **options):
        kept = generated(model, inputs, **SAID)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, kept.logits, strict=True))
    with vprune.prune(model, "attention", keep=0.3, **options) as pruning:
        pruned = generated(model, inputs, **SAID)
    reports = list(pruning.last or [])
    assert len(reports) == sum(map(len, KINDS[kind])) or family == "llava_next_video"
    assert all(report.tokens_after == max(1, int(report.tokens_before * 0.3)) for report in reports)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with masked(model, ids, mask, reports, bool(options), line_breaks(model, inputs)):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))
    differ(pruned.logits, stepped(model, inputs, pruned.sequences), rows_of(reports))


@pytest.mark.parametrize("family", ["mistral3", "pixtral"])
def test_grids_are_those_of_pictures_padded_to_one_size(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed")
    with torch.no_grad(), vprune.prune(model, "uniform", keep=0.5) as pruning:
        model(**inputs)
    assert [report.grid for report in pruning.last or []] == [(1, 3, 5), (1, 4, 4), (1, 2, 6)]


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "of-one-size"])
def test_the_attention_of_pictures_in_one_row_is_refused(sized: bool) -> None:
    with of_kind("two", [[(32, 32)] * 2]) as kind:
        model, inputs = made("pixtral"), inputs_of("pixtral", kind)
    if not sized:
        del inputs["image_sizes"]
    with refused("in one row|in 1 rows"), vprune.prune(model, "vision", keep=0.3):
        generated(model, inputs)


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name the sides of what is merged in words that the library does not know."""
    monkeypatch.setattr("vprune.models.merging._SIDES", ())


@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize("kind", ["padded", "several", "mixed"])
@pytest.mark.parametrize("family", MERGING)
def test_towers_that_merge_patches_in_unknown_ways_are_refused(family: str, kind: str) -> None:
    unknown(family, kind)


@pytest.mark.parametrize("kind", ["single", "padded", "several", "mixed"])
def test_a_family_that_merges_patches_without_saying_so_is_refused(kind: str) -> None:
    unknown("got_ocr2", kind)


def unknown(family: str, kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    plain = generated(model, inputs)
    words = "are no whole images .* merges patches in a way that its config does not name"
    with vprune.prune(model, "attention", keep=0.3), refused(words):
        generated(model, inputs)
    again = generated(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, again.logits, strict=True))


FOUR = pytest.mark.parametrize("encoded", [False, True], ids=["in-the-forward", "before"])


def of_four(family: str, encoded: bool) -> Any:
    """The report of four pictures of 16 tokens, which are as many as one has patches."""
    with of_kind("four", [[(32, 32)] * 4]) as kind:
        model, inputs = made(family), inputs_of(family, kind)
    with torch.no_grad(), vprune.prune(model, "uniform", keep=0.3) as pruning:
        model.generate(**inputs, max_new_tokens=1) if encoded else model(**inputs)
    return pruning.last


@FOUR
@pytest.mark.parametrize("family", MERGING)
def test_pictures_are_never_taken_for_one(family: str, encoded: bool) -> None:
    assert [report.grid for report in of_four(family, encoded)] == [(1, 4, 4)] * 4


@FOUR
@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize("family", MERGING)
def test_pictures_are_never_taken_for_one_where_sides_are_unknown(family: str, encoded: bool) -> None:
    with refused("are no whole images"):
        of_four(family, encoded)


def test_videos_without_line_breaks_are_refused() -> None:
    model, inputs = made("llava_next_video"), inputs_of("llava_next_video", "padded", video=True)
    generated(model, inputs)
    with vprune.prune(model, "attention", keep=0.3), refused("are no whole images"):
        generated(model, inputs)


# Where nothing is padded, `generate` hands over a finished mask alone: refused, never wrong.
HANDED_OVER = version.parse(transformers.__version__) >= version.parse("5.18")


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", ["single", "padded"])
def test_a_prefix_that_sees_itself_both_ways(kind: str, fixed: bool) -> None:
    model, inputs = made("paligemma"), inputs_of("paligemma", kind)
    static: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if fixed else {}
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        if kind == "single" and not fixed and HANDED_OVER:
            with refused("needs the 2-D mask"):
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
