"""What the host knows of a prompt saves work, not truth: text at its end, images in one piece, positions met before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vprune
from tests.exactness.families import FAMILIES, batch, build
from vprune.models import rotary
from vprune.models.anatomy import dissect
from vprune.models.rotary import rotations
from vprune.places import in_order, rows_of, slice_of
from vprune.pruner import load_method
from vprune.records import Prefill, Selection
from vprune.scoring.learned import read_features
from vprune.shortening import shorten_batch
from vprune.training.prompts import read_prompt


def unknowing(prefill: Prefill) -> Prefill:
    """The same prompt without what the host knows of it."""
    return replace(prefill, instruction_tail=0, images=[replace(image, start=-1) for image in prefill.images])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["single", "mixed"])
def test_features_are_the_same(family: str, kind: str) -> None:
    model, inputs = build(family, torch.float64), batch(family, kind, torch.float64)
    prefill = read_prompt(model, inputs)
    layer = 0
    known, found_out = read_features(prefill, layer), read_features(unknowing(prefill), layer)
    torch.testing.assert_close(known.attention, found_out.attention, rtol=1e-6, atol=1e-9)
    assert torch.equal(known.text, found_out.text)
    for image in prefill.images:
        plain = replace(image, start=-1)
        for mine, theirs in zip(known.of([image], image.grid), found_out.of([plain], image.grid), strict=True):
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
        assert torch.equal(rows_of(prefill.hidden, [image]), rows_of(prefill.hidden, [plain]))
        wanted = prefill.hidden[image.sample, image.columns]
        assert torch.equal(rows_of(prefill.hidden, [image])[0], wanted)


def test_the_shortcuts_are_taken() -> None:
    prefill = read_prompt(build("llava_onevision", torch.float32), batch("llava_onevision", "single", torch.float32))
    rows, valid = prefill.instruction_on_device
    assert prefill.instruction_tail == rows.shape[1] and bool(valid.all())
    for image in prefill.images:
        one_piece = bool((image.columns.diff() == 1).all())
        assert image.start == (int(image.columns[0]) if one_piece else -1)
        assert (slice_of([image], 1) is not None) == one_piece


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", ["single", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_in_one_piece_are_laid_out_alike(family: str, kind: str, padding: int) -> None:
    prefill = read_prompt(build(family, torch.float64), batch(family, kind, torch.float64))
    pruner = load_method("uniform", keep=0.3, recycle="anchors", size_aware=True)
    plans = pruner.plan(prefill, pruner.score(prefill), 0.3)
    if padding:
        valid = prefill.valid.clone()
        valid[0, :padding] = False
        counts = tuple(int(row.sum()) for row in valid)
        prefill = replace(prefill, valid=valid, counts=counts)
    known, found_out = (shorten_batch(one, plans, True) for one in (prefill, unknowing(prefill)))
    assert known.counts == found_out.counts and known.tail == found_out.tail and known.padded == found_out.padded
    assert torch.equal(known.index, found_out.index)
    for mine, theirs in zip(known.images, found_out.images, strict=True):
        assert torch.equal(mine.columns, theirs.columns)
    assert known.bias is not None and found_out.bias is not None and torch.equal(known.bias, found_out.bias)
    for one, other in zip(
        known.shorten_all(prefill.hidden, prefill.positions, prefill.visual),
        found_out.shorten_all(prefill.hidden, prefill.positions, prefill.visual),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_text_that_is_not_at_the_end_is_looked_up() -> None:
    model, inputs = build("llava_onevision", torch.float64), batch("llava_onevision", "single", torch.float64)
    ids = inputs["input_ids"]
    padded: dict[str, Any] = {
        **inputs,
        "input_ids": torch.cat([ids, ids.new_zeros(1, 3)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), ids.new_zeros(1, 3)], 1),
    }
    right = read_prompt(model, padded)
    assert right.instruction_tail == 0
    plain = read_features(read_prompt(model, inputs), 0)
    found = read_features(right, 0)
    torch.testing.assert_close(found.attention[..., : ids.shape[1]], plain.attention, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.text, plain.text)


def test_rotations_of_one_prompt_serve_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava_onevision", torch.float32)
    decoder: Any = dissect(model).decoder
    rotary._KNOWN.clear()
    calls: list[int] = []
    own = type(decoder.rotary_emb).forward
    monkeypatch.setattr(
        type(decoder.rotary_emb), "forward", lambda self, x, ids: calls.append(ids.shape[1]) or own(self, x, ids)
    )

    def asked(positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        hidden = torch.zeros(1, 1, 1, dtype=dtype)
        told = rotations(decoder, 0, False, hidden, positions)
        for mine, true in zip(told, own(decoder.rotary_emb, hidden, positions), strict=True):
            assert torch.equal(mine.expand_as(true), true) and mine.dtype == dtype
        return told

    long = torch.arange(40)[None]
    asked(long)
    asked(long[:, :17])
    asked(long[:, :17].expand(3, -1))
    assert calls == [40]
    asked(long + 1)  # a turn later
    asked(torch.cat([long, long + 1]))  # rows that differ
    asked(long, torch.float64)
    asked(torch.arange(50)[None])
    assert calls == [40, 40, 40, 40, 50]
    decoder.rotary_emb.inv_freq.mul_(2.0)  # another base
    asked(torch.arange(50)[None])
    decoder.rotary_emb.inv_freq = decoder.rotary_emb.inv_freq.clone()
    asked(torch.arange(50)[None])
    monkeypatch.setattr(decoder.rotary_emb, "rope_type", "dynamic")  # how long the prompt is counts
    asked(torch.arange(50)[None])
    assert calls[5:] == [50, 50, 50]


def test_what_was_made_without_gradients_serves_a_model_that_learns() -> None:
    model, inputs = build("llava_onevision", torch.float32), batch("llava_onevision", "single", torch.float32)
    rotary._KNOWN.clear()
    with vprune.prune(model, "attention_max", keep=0.3):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.sum().backward()
    assert any(one.grad is not None for one in model.parameters())
    assert not any(
        part.is_inference() for known in rotary._KNOWN.values() for one in known.values() for part in one.made
    )


def test_what_was_unbound_is_not_stacked_again() -> None:
    kept = torch.tensor([[0, 2], [1, 3], [0, 1]])
    whole = Selection.grouped(kept, torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]]), whole=True)
    pieces = whole.unbind()
    assert Selection.stacked(pieces) is whole
    for some in (pieces[:2], pieces[::-1], pieces[1:], [*pieces, pieces[0]], [*pieces[:2], replace(pieces[2])]):
        made = Selection.stacked(some)
        assert made is not whole and made.kept.tolist() == [one.kept.tolist() for one in some]
        assert made.source.tolist() == [one.source.tolist() for one in some]


@pytest.mark.parametrize("count", [1, 200, 256, 257, 32768, 40000])
def test_numbers_are_put_in_order(count: int) -> None:
    numbers = torch.randint(0, count, (2, 600), generator=torch.Generator().manual_seed(0))
    numbers[0, :2] = count - 1
    assert torch.equal(in_order(numbers, count), numbers.argsort(dim=-1, stable=True))
