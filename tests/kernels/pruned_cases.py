"""A prompt that the kernels shorten is the one that their references shorten: in the interpreter, on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.exactness.families import batch, build
from vprune import kernels
from vprune.amounts import RECYCLERS


def shortened(patched: pytest.MonkeyPatch, by_kernels: bool, model: Any, inputs: Any, options: Any) -> tuple[Any, Any]:
    patched.setattr(kernels, "_all_on_cuda", lambda inputs: by_kernels)
    with torch.no_grad(), vprune.prune(model, "attention_max", keep=0.25, **options) as pruning:
        logits = model(**inputs).logits
    return list(pruning.last or []), logits


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("stages", [None, [[0, 0.6], [2, 0.25]]], ids=["one", "two"])
@pytest.mark.parametrize("recycle", RECYCLERS)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_pruned_prompt(monkeypatch: pytest.MonkeyPatch, family: str, recycle: str, stages: Any) -> None:
    model, inputs = build(family, torch.float32), batch(family, "mixed", torch.float32)
    options = {"recycle": recycle, "size_aware": recycle != "none", "stages": stages}
    mine, logits = shortened(monkeypatch, True, model, inputs, options)
    theirs, wanted = shortened(monkeypatch, False, model, inputs, options)
    assert len(mine) == len(theirs) > 1
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.kept, other.kept) and torch.equal(one.source, other.source)
        assert torch.equal(one.sizes, other.sizes)
        same(one.importance, other.importance)
    same(logits, wanted)
