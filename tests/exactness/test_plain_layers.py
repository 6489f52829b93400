"""Layers that only project and rotate are not called to learn their queries and keys; what is learned is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from tests.exactness.families import FAMILIES, batch, build
from vprune.models import probe
from vprune.models.anatomy import dissect
from vprune.models.probe import layer_attention, note_if_plain
from vprune.training.prompts import read_prompt

NORMED = ("qwen3_vl", "gemma3")  # queries and keys are normed head by head, too


def first_attention(model: Any) -> tuple[Any, Any]:
    anatomy = dissect(model)
    return anatomy.decoder, anatomy.layers[0].self_attn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("kind", ["single", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_a_call_tells(family: str, kind: str, dtype: torch.dtype) -> None:
    model, inputs = build(family, dtype), batch(family, kind, dtype)
    decoder, attention = first_attention(model)
    prefill = read_prompt(model, inputs)
    rows, _ = prefill.instruction_on_device
    probe._PLAIN.pop(attention, None)
    called = layer_attention(prefill, 0, rows)
    note_if_plain(decoder, attention, 0)
    told = layer_attention(prefill, 0, rows)
    assert torch.equal(told.query, called.query) and torch.equal(told.key, called.key) and told.scale == called.scale


def test_which_layers_are_plain() -> None:
    found = {}
    for family in FAMILIES:
        model = build(family, torch.float32)
        with vprune.prune(model, "attention_max"):
            found[family] = first_attention(model)[1] in probe._PLAIN
    assert not any(found[family] for family in NORMED if family in found)
    assert all(found[family] for family in ("llava_onevision", "internvl", "llava_next") if family in found)


def test_a_plain_layer_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llava_onevision", torch.float32), batch("llava_onevision", "single", torch.float32)
    with torch.no_grad(), vprune.prune(model, "attention_max", keep=0.3) as pruning:
        model(**inputs)
        kept = [one.kept.tolist() for one in pruning.last or []]
    with torch.no_grad(), vprune.prune(model, "attention_max", keep=0.3) as pruning:
        monkeypatch.setattr(probe, "capture", lambda *_, **__: pytest.fail("a plain layer was called"))
        model(**inputs)
    assert kept and [one.kept.tolist() for one in pruning.last or []] == kept


@pytest.mark.parametrize("change", ["hook on the layer", "other projection", "other class", "no weights yet"])
def test_one_that_was_changed_is_called(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llava_onevision", torch.float32), batch("llava_onevision", "single", torch.float32)
    decoder, attention = first_attention(model)

    class Doubled(torch.nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(rows)

    if change == "other projection":
        attention.q_proj.__class__ = Doubled
    if change == "no weights yet":
        attention.q_proj.to("meta")
    if change == "other class":
        own = type(attention)
        attention.__class__ = type(
            "Scaled", (own,), {"forward": lambda self, rows, *a, **k: own.forward(self, rows * 2)}
        )
    note_if_plain(decoder, attention, 0)
    if change == "hook on the layer":
        assert attention in probe._PLAIN
        attention.register_forward_pre_hook(lambda *_: None)
    if change == "no weights yet":
        assert attention not in probe._PLAIN
        return
    calls: list[Any] = []
    own_capture = probe.capture
    monkeypatch.setattr(probe, "capture", lambda *a, **k: calls.append(1) or own_capture(*a, **k))
    if change != "other class":
        prefill = read_prompt(model, inputs)
        layer_attention(prefill, 0, prefill.instruction_on_device[0])
        assert calls
    else:
        assert attention not in probe._PLAIN
