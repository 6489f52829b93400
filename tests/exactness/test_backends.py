"""Attention that takes no dense masks: flash kernels and flex attention, without their kernels on a CPU.

What is replaced is the innermost function alone; what is unpadded, packed or made into blocks is the library's doing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.exactness.agreement import agree, refused
from tests.exactness.more_families import TEN, inputs_of, made
from tests.exactness.test_families import SIZES, generated
from tests.exactness.test_family_turns import both_turns

WITHOUT_WINDOWS = [one for one in TEN if one != "gemma3"]  # whose masks neither can take: refused, see below
WAYS: dict[str, dict[str, Any]] = {
    "input": {"keep": 0.3},
    "all": {"keep": 1.0},
    "stages": {"stages": [[0, 0.6], [2, 0.3]]},
}
SIZED: dict[str, dict[str, Any]] = {
    **WAYS,
    "sizes": {"keep": 0.3, **SIZES},
    "sizes-stages": {**WAYS["stages"], **SIZES},
}
# (Not compiled, it takes a second a case: every way, and every kind of batch, but not each with each.)
FLEXED = [("input", "single"), ("input", "padded"), *((way, "mixed") for way in SIZED), ("sizes", "padded")]


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


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flex attention as it is defined, not compiled, and the kind of mask of every call."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as library

    calls: list[str] = []
    make = masking_utils.create_block_mask

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        block = kwargs.get("block_mask")
        if block is not None:
            assert isinstance(block, BlockMask) and block.seq_lengths == (query.shape[2], key.shape[2])
        calls.append("blocks" if block is not None else "dense")
        return flex_attention(query, key, value, **kwargs)

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "_compile": False})

    monkeypatch.setattr(library, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)
    return calls


def running(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model whose decoder, for the length of a test, runs on another attention."""
    model = made(family)
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", attention)
    return model


def compare(
    family: str, attention: str, options: dict[str, Any], kind: str, calls: list[str], patch: pytest.MonkeyPatch
) -> None:
    """Pruned on another attention is pruned on sdpa (which other files compare with the masked model)."""
    inputs = inputs_of(family, kind)
    with vprune.prune(made(family), "attention", **options):
        expected = generated(made(family), inputs)
    assert not calls
    model = running(family, attention, patch)
    plain = generated(model, inputs)
    with vprune.prune(model, "attention", **options):
        pruned = generated(model, inputs)
    assert calls
    agree(pruned.logits, expected.logits)
    if options.get("keep") == 1.0:
        assert all(torch.equal(one, other) for one, other in zip(plain.logits, pruned.logits, strict=True))
    else:
        assert float((plain.logits[0] - pruned.logits[0])[-1].abs().max()) > 1e-2


def compare_turns(family: str, attention: str, turns: str, patch: pytest.MonkeyPatch) -> None:
    """The same in a second turn, which brings pictures."""
    with vprune.prune(made(family), "attention", keep=0.3) as pruning:
        expected, _, _ = both_turns(family, made(family), turns, pruning)
    model = running(family, attention, patch)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned, _, _ = both_turns(family, model, turns, pruning)
    agree(pruned.logits, expected.logits)


@pytest.mark.parametrize("kind", ["single", "padded", "mixed"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_flash_attention_agrees(
    family: str, options: dict[str, Any], kind: str, flash: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(family, "flash_attention_2", options, kind, flash.calls, monkeypatch)
    assert set(flash.calls) == {"dense"} if kind == "single" else "ragged" in flash.calls


@pytest.mark.parametrize(("way", "kind"), FLEXED, ids=[f"{way}-{kind}" for way, kind in FLEXED])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_flex_attention_agrees(
    family: str, way: str, kind: str, flex: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SIZED[way]
    compare(family, "flex_attention", options, kind, flex, monkeypatch)
    assert "blocks" in flex and ("dense" in flex) >= ("size_aware" in options)


@pytest.mark.parametrize("turns", ["padded", "late"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_flash_attention_agrees_in_a_second_turn_with_pictures(
    family: str, turns: str, flash: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_turns(family, "flash_attention_2", turns, monkeypatch)
    assert flash.calls


@pytest.mark.parametrize("turns", ["padded", "late"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_flex_attention_agrees_in_a_second_turn_with_pictures(
    family: str, turns: str, flex: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_turns(family, "flex_attention", turns, monkeypatch)
    assert flex


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_windows_are_refused(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = running("gemma3", attention, monkeypatch)
    with refused(f"sliding-window layers with attention implementation '{attention}'"):
        vprune.prune(model, "attention", keep=0.3).attach()


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_sizes_are_refused_on_flash_attention(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = running(family, attention, monkeypatch)
    with refused(f"size_aware=true with attention implementation '{attention}'"):
        vprune.prune(model, "attention", keep=0.3, **SIZES).attach()
