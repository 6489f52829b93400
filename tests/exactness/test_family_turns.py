"""Caches that see several turns, are copied and cropped; and all of it with attention as flash kernels take it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import vprune
from tests.exactness.families import KINDS
from tests.exactness.more_families import (
    TEN,
    conversation,
    inputs_of,
    made,
    negated,
    new_turn,
    of_kind,
    words_alone,
)
from tests.exactness.test_families import generated, line_breaks, masked, stepped
from tests.exactness.test_family_scenarios import NEVER, Told, after, agree, differ, families, oracle

LATER = TEN
FLASHING = [one for one in TEN if one != "gemma3"]  # whose masks flash attention cannot take: refused, see below
# What the rows of two turns hold: the same in both, or pictures where there were none before (None: words alone).
TURNS: dict[str, tuple[Any, Any]] = {
    "padded": (KINDS["padded"], KINDS["padded"]),
    "mixed": (KINDS["mixed"], KINDS["mixed"]),
    "late": ([[(24, 40)], [], []], [[], [(32, 32)], [(16, 48), (32, 32)]]),
    "first": (None, KINDS["padded"]),
}


def turns_of(family: str, turns: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = TURNS[turns]
    with of_kind("first", first), of_kind("second", second):
        start = inputs_of(family, "first") if first else words_alone(family)
        return start, negated(inputs_of(family, "second"))


def both_turns(family: str, model: Any, turns: str, pruning: Any) -> tuple[Any, dict[str, Tensor], list[Any]]:
    """What is said in the second turn, the whole conversation as one prompt, and the reports of both turns."""
    from transformers import DynamicCache

    first, second = turns_of(family, turns)
    cache = DynamicCache(config=model.config.get_text_config())
    more: dict[str, Any] = {"past_key_values": cache, **NEVER}
    said = model.generate(**first, max_new_tokens=3, do_sample=False, **more)
    reports = list(pruning.last or []) if pruning else []
    whole = conversation(family, first, said, second)
    out = model.generate(
        **new_turn(family, model, whole, second),
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    assert cache.get_seq_length() == out.sequences.shape[1] - 1  # the last word said was never fed
    return out, whole, [*reports, *(list(pruning.last or []) if pruning else [])]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("family", LATER)
def test_a_second_turn_brings_pictures(family: str, turns: str) -> None:
    model = made(family)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned, whole, reports = both_turns(family, model, turns, pruning)
    pictured = {row for turn in TURNS[turns] for row, sizes in enumerate(turn or ()) if sizes}
    assert {report.sample for report in reports} == pictured
    with masked(model, whole["input_ids"], whole["attention_mask"], reports, False, line_breaks(model, whole)):
        agree(pruned.logits, stepped(model, whole, pruned.sequences))
    full = stepped(model, whole, pruned.sequences)
    assert all(float((pruned.logits[0] - full[0])[one.sample].abs().max()) > 1e-2 for one in reports)


@pytest.mark.parametrize("family", LATER)
def test_two_turns_that_keep_all_are_those_of_the_unhooked_model(family: str) -> None:
    model = made(family)
    plain, whole, _ = both_turns(family, model, "mixed", None)
    with vprune.prune(model, "attention", keep=1.0) as pruning:
        kept, _, _ = both_turns(family, model, "mixed", pruning)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, kept.logits, strict=True))
    agree(plain.logits, stepped(model, whole, plain.sequences))  # two turns are one conversation, hooks or not


@families
def test_copies_and_crops_of_a_cache_go_on_alone(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed")
    first, other = torch.tensor([[5, 6, 7], [8, 9, 13], [16, 17, 18]]), torch.tensor([[30, 31], [32, 33], [34, 35]])
    end = torch.tensor([[36]] * 3)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        told = Told(family, model, inputs)
        reports, length = list(pruning.last or []), inputs["input_ids"].shape[1]
        twin = copy.copy(told)
        twin.cache = copy.deepcopy(told.cache)
        mine, theirs = told.feed(first), twin.feed(other)  # one does not see what the other was told
        assert (told.cache.get_seq_length(), twin.cache.get_seq_length()) == (length + 3, length + 2)
        told.cache.crop(-2)
        told.forget(2)
        again = told.feed(other)
        told.cache.crop(length)
        told.forget(3)
        anew = told.feed(other)
    with oracle(model, inputs, reports):
        agree(mine.unbind(1), after(model, inputs, torch.cat([first, end], 1))[1:])
        agree(again.unbind(1), after(model, inputs, torch.cat([first[:, :1], other, end], 1))[2:])
        agree(theirs.unbind(1), after(model, inputs, torch.cat([other, end], 1))[1:])
    agree(anew.unbind(1), theirs.unbind(1))
    differ([mine[:, 0]], [theirs[:, 0]], {0, 1, 2})


@families
def test_words_of_a_later_turn_may_be_padded(family: str) -> None:
    """What was padding is hidden from all that follows, and forgotten with what is cropped."""
    model, inputs = made(family), inputs_of(family, "mixed")
    turn, more = torch.tensor([[0, 0, 5], [0, 6, 7], [8, 9, 13]]), torch.tensor([[16, 17], [18, 19], [40, 41]])
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        told = Told(family, model, inputs)
        reports = list(pruning.last or [])
        mine = [told.feed(turn)[:, -1], *told.feed(more).unbind(1)]
        told.cache.crop(-5)
        told.forget(5)
        anew = [told.feed(one)[:, 0] for one in more.split(1, 1)]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], turn], 1)}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], (turn != 0).long()], 1)
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        whole[name] = pad(inputs[name], (0, 3))
    breaks = line_breaks(model, whole)
    with masked(model, whole["input_ids"], whole["attention_mask"], reports, False, breaks):
        agree(mine, after(model, whole, torch.cat([more, more[:, :1]], 1)))
    with oracle(model, inputs, reports):
        agree(anew, after(model, inputs, torch.cat([more, more[:, :1]], 1))[1:])


class Kernels:
    """Stands in for the flash kernels, whose callers are the library's own: unpadding and packing are what they are."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """[B, Q, H, D] over [B, N, G, D], the last query over all of them."""
        self.calls.append("dense")
        return torch.stack([self._one(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def ragged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """The same for sequences of unequal lengths, one behind the other."""
        self.calls.append("ragged")
        mine, theirs = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        parts = zip(q.split(mine), k.split(theirs), v.split(theirs), strict=True)
        return torch.cat([self._one(*part, softmax_scale, causal) for part in parts])

    @staticmethod
    def _one(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        shared, queries, length = q.shape[1] // k.shape[1], q.shape[0], k.shape[0]
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(shared, 1)) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(queries, length, dtype=torch.bool).triu(length - queries + 1) & causal
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(shared, 1))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Flash attention for decoders, without its kernels: everything above them is the library's."""
    import transformers.modeling_flash_attention_utils as library

    kernels, unpad = Kernels(), library._upad_input

    def unpadded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any) -> Any:
        assert mask.ndim == 2 and mask.shape == key.shape[:2], "a column of the mask for every row stored"
        return unpad(query, key, value, mask, *rest)

    for name in ("_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(library, name, None)
    monkeypatch.setattr(library, "_loaded_implementation", None)
    functions = (kernels.dense, kernels.ragged, None, library._pad_input, library._unpad_input)
    monkeypatch.setattr(library, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(library, "_upad_input", unpadded)
    return kernels


def flashing(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model whose decoder, for the length of a test, runs on flash attention."""
    model = made(family)
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flash_attention_2")
    return model


@pytest.mark.parametrize("kind", ["single", "padded", "mixed"])
@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": 1.0}, {"stages": [[0, 0.6], [2, 0.3]]}], ids=str)
@pytest.mark.parametrize("family", FLASHING)
def test_flash_attention_agrees(
    family: str, options: dict[str, Any], kind: str, flash: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(family, kind)
    with vprune.prune(made(family), "attention", **options):
        expected = generated(made(family), inputs)
    assert not flash.calls
    model = flashing(family, monkeypatch)
    plain = generated(model, inputs)
    with vprune.prune(model, "attention", **options):
        pruned = generated(model, inputs)
    assert set(flash.calls) == {"dense"} if kind == "single" else "ragged" in flash.calls
    agree(pruned.logits, expected.logits)
    if options.get("keep") == 1.0:
        assert all(torch.equal(one, other) for one, other in zip(plain.logits, pruned.logits, strict=True))
    else:
        assert float((plain.logits[0] - pruned.logits[0])[-1].abs().max()) > 1e-2


@pytest.mark.parametrize("turns", ["padded", "late"])
@pytest.mark.parametrize("family", FLASHING)
def test_flash_attention_agrees_in_a_second_turn_with_pictures(
    family: str, turns: str, flash: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vprune.prune(made(family), "attention", keep=0.3) as pruning:
        expected, _, _ = both_turns(family, made(family), turns, pruning)
    model = flashing(family, monkeypatch)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned, _, _ = both_turns(family, model, turns, pruning)
    assert flash.calls
    agree(pruned.logits, expected.logits)


@pytest.mark.parametrize("kind", ["single", "padded"])
def test_masks_that_flash_attention_cannot_take_are_refused(
    kind: str, flash: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flashing("gemma3", monkeypatch)
    with pytest.raises(vprune.VPruneError, match="sliding-window layers with attention implementation 'flash"):
        vprune.prune(model, "attention", keep=0.3).attach()
