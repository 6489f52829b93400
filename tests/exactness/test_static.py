"""Caches of a fixed size, and decoding steps compiled into one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import vprune
from tests.conftest import build_model
from tests.exactness.agreement import agree, generate, refused
from tests.exactness.families import FAMILIES, IMAGE, VIDEO, batch, build
from tests.exactness.prompts import batch as prompts
from tests.exactness.test_waits import device_never_waited_for, guarded, unasked
from vprune.attach import Pruning
from vprune.models import masks
from vprune.models.cache import cache_for
from vprune.models.masks import plainly_causal
from vprune.passage import Passage

SIZES: dict[str, Any] = {"recycle": "grid", "cells": 4, "size_aware": True}
STAGES: dict[str, Any] = {"stages": [[0, 0.6], [2, 0.3]]}
WITHOUT_WINDOWS = [family for family in FAMILIES if family != "gemma3"]
ONE_GRAPH: dict[str, Any] = {"backend": "eager", "fullgraph": True, "mode": None}


def said(model: Any, inputs: dict[str, Any], static: bool, **options: Any) -> Any:
    more = {"cache_implementation": "static", "disable_compile": True} if static else {}
    told = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO], **more, **options}
    if "compile_config" in told:  # a hook that notes logits in full would be compiled as well
        return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **told)
    return generate(model, **inputs, **told)


@pytest.mark.parametrize("kind", ["padded", "mixed"])
@pytest.mark.parametrize("options", [{}, SIZES, STAGES, {**SIZES, **STAGES}], ids=["plain", "sizes", "stages", "both"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_a_static_cache_gives_what_a_growing_one_gives(family: str, options: dict[str, Any], kind: str) -> None:
    model, inputs = build(family, torch.float64), batch(family, kind, torch.float64)
    with vprune.prune(model, "attention", **{"keep": 0.3, **options}):
        grown, fixed = said(model, inputs, False), said(model, inputs, True)
    full = said(model, inputs, True)
    assert torch.equal(grown.sequences, fixed.sequences)
    agree(fixed.logits, grown.logits)
    assert float((full.logits[0] - fixed.logits[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_keeping_all_is_the_unhooked_model(family: str) -> None:
    model, inputs = build(family, torch.float32), batch(family, "padded", torch.float32)
    plain = said(model, inputs, True)
    with vprune.prune(model, "attention", keep=1.0):
        kept = said(model, inputs, True)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "internvl"])
def test_a_static_cache_is_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    model, inputs = build(family, torch.float32), batch(family, "padded", torch.float32)
    told = {"max_new_tokens": 1, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    guarded(monkeypatch, lambda: unasked(monkeypatch))
    finish, seen = Passage.finish, []

    def finished(self: Passage) -> None:
        assert self.own_masks is None, "a mask that is plainly causal is taken for the model's own"
        with unasked(monkeypatch):
            finish(self)
        seen.append(self.prefill.cache)

    monkeypatch.setattr(Passage, "finish", finished)
    with vprune.prune(model, "attention", keep=0.3, **options):
        model.generate(**inputs, **told)
        model.generate(**inputs, **told)  # the cache that was kept, reset
    assert len(seen) == 2 and all(one.get_seq_length() == inputs["input_ids"].shape[1] for one in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True], ids=["planned", "replayed"])
@pytest.mark.parametrize("kind", ["single", "padded"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "internvl"])
def test_the_host_never_waits_for_a_static_cache(
    monkeypatch: pytest.MonkeyPatch, family: str, kind: str, graphs: bool
) -> None:
    model = build(family, torch.bfloat16).cuda()
    inputs = {name: one.cuda() for name, one in batch(family, kind, torch.bfloat16).items()}
    told = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with vprune.prune(model, "attention_max", keep=0.3, graphs=graphs) as pruning:
        first = model.generate(**inputs, **told)
        model.generate(**inputs, **told)  # recorded
        begin, finish = Pruning._begin, Passage.finish

        def begun(self: Pruning, *args: Any) -> Any:
            assert self._glance is not None and self._glance.facts.tail is not None
            with device_never_waited_for():
                return begin(self, *args)

        def finished(self: Passage) -> None:
            with device_never_waited_for():
                finish(self)

        monkeypatch.setattr(Pruning, "_begin", begun)
        monkeypatch.setattr(Passage, "finish", finished)
        assert torch.equal(model.generate(**inputs, **told), first)
    assert pruning.last is not None and all(one.tokens_after < one.tokens_before for one in pruning.last)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_finished_mask_is_plain_if_it_says_what_is_causal_and_no_more(
    monkeypatch: pytest.MonkeyPatch, additive: bool
) -> None:
    valid = torch.arange(5) >= torch.tensor([[2], [0]])
    seen = torch.ones(5, 8).tril().bool() & torch.nn.functional.pad(valid, (0, 3))[:, None, None]

    def plain(mask: torch.Tensor) -> bool:
        return bool(plainly_causal(torch.where(mask, 0.0, -1e30) if additive else mask, valid))

    for at_once in (2**27, 33, 1):
        monkeypatch.setattr(masks, "_LOOKED_AT_ONCE", at_once)
        assert plain(seen)
        for place in seen.new_ones(seen.shape).nonzero().tolist():
            other = seen.clone()
            other[tuple(place)] ^= True
            sample, _, row, _ = place
            assert plain(other) == (not valid[sample, row])


def test_a_finished_mask_of_ones_own_is_kept_to() -> None:
    """Handed to the model with a static cache, it may hide anything: the last text row sees nothing of the picture."""
    model, inputs = build("llava_onevision", torch.float64), batch("llava_onevision", "single", torch.float64)
    batch_size, length = inputs["input_ids"].shape
    mask = torch.ones(batch_size, 1, length, length + 2).tril().bool()
    mask[:, :, -1, :length] &= inputs["input_ids"][:, None] != IMAGE

    def last_logits(own: torch.Tensor) -> torch.Tensor:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 2)
        more = {**inputs, "attention_mask": own, **cache_for(model, cache)}
        with torch.no_grad(), vprune.prune(model, "uniform", keep=0.3):
            logits: torch.Tensor = model(**more).logits[:, -1]
        return logits

    plain = last_logits(torch.ones_like(mask).tril())
    hidden = last_logits(mask)
    assert float((plain - hidden).abs().max()) > 1e-3


def test_a_static_cache_with_windows_is_refused() -> None:
    model, inputs = build("gemma3", torch.float32), batch("gemma3", "padded", torch.float32)
    with refused("a static cache with sliding-window layers"), vprune.prune(model, "uniform"):
        said(model, inputs, True)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_a_static_cache_under_masks_that_are_not_dense_is_refused(family: str, attention: str) -> None:
    from transformers import StaticCache

    model, inputs = build(family, torch.float32), batch(family, "padded", torch.float32)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    model.get_decoder().config._attn_implementation = attention  # told, never run
    words = f"a static cache cannot be pruned with attention implementation '{attention}'"
    with torch.no_grad(), refused(words), vprune.prune(model, "uniform"):
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("options", [{}, SIZES, STAGES], ids=["plain", "sizes", "stages"])
@pytest.mark.parametrize("kind", ["single", "padded"])
def test_decoding_steps_are_one_graph_for_every_prompt(tiny_processor: Any, kind: str, options: dict[str, Any]) -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    model = build_model(dtype=torch.float64)
    inputs = prompts(tiny_processor, kind, torch.float64)
    compiled = CompileConfig(**ONE_GRAPH)
    compiled._compile_all_devices = True
    more = {"cache_implementation": "static", "compile_config": compiled, "disable_compile": False}
    with vprune.prune(model, "attention", **{"keep": 0.3, **options}):
        plain = said(model, inputs, False)
        torch._dynamo.utils.counters.clear()
        first = said(model, inputs, False, **more)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        second = said(model, {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}, False, **more)
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(plain.sequences, first.sequences) and not torch.equal(first.logits[0], second.logits[0])
    assert graphs >= 1 and again == graphs and not torch._dynamo.utils.counters["graph_break"]
    assert not hasattr(model, "_cache") or type(model._cache.layers[0]).__name__ == "StaticLayer"


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_decoding_steps_are_one_graph_in_every_family(family: str) -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, inputs = build(family, torch.float64), batch(family, "padded", torch.float64)
    compiled = CompileConfig(**ONE_GRAPH)
    compiled._compile_all_devices = True
    more = {"cache_implementation": "static", "compile_config": compiled, "disable_compile": False}
    with vprune.prune(model, "attention", keep=0.3):
        plain = said(model, inputs, True)
        torch._dynamo.utils.counters.clear()
        first = said(model, inputs, False, **more)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        second = said(model, {**inputs, "pixel_values": -inputs["pixel_values"]}, False, **more)
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1 and again == graphs and not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(plain.sequences, first.sequences) and not torch.equal(first.logits[0], second.logits[0])
    for one, other in zip(plain.logits, first.logits, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=1e-5)


def test_steps_compiled_before_are_compiled_anew(tiny_processor: Any) -> None:
    """A graph made without hooks must not serve a pruned cache, nor one made with them an unpruned cache."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, inputs = build_model(), prompts(tiny_processor, "padded")
    compiled = CompileConfig(**ONE_GRAPH)
    compiled._compile_all_devices = True
    more = {"cache_implementation": "static", "compile_config": compiled, "disable_compile": False}
    plain = said(model, inputs, False, **more)
    with vprune.prune(model, "attention", keep=0.3):
        slow = said(model, inputs, False)
        pruned = said(model, inputs, False, **more)
    after = said(model, inputs, False, **more)
    assert torch.equal(slow.sequences, pruned.sequences)
    torch.testing.assert_close(torch.stack(slow.logits), torch.stack(pruned.logits), rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, after.logits, strict=True))


def test_a_model_compiled_as_a_whole_is_refused() -> None:
    for spoil in (
        lambda model: model.compile(backend="eager"),
        lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
        lambda model: model.get_decoder().compile(backend="eager"),
    ):
        model = build_model()
        spoil(model)
        with pytest.raises(vprune.VPruneError, match="compiled as a whole"):
            vprune.prune(model)
    with pytest.raises(vprune.VPruneError, match="compiled as a whole"):
        vprune.prune(torch.compile(build_model(), backend="eager"))


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
def test_a_second_turn_on_a_static_cache(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any]) -> None:
    from transformers import DynamicCache, StaticCache

    model, inputs = tiny_vlm(dtype=torch.float64), prompts(tiny_processor, "padded", torch.float64)
    config = model.config.get_text_config()
    answers = []
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=160)):
        with torch.no_grad(), vprune.prune(model, "attention", keep=0.3, **options):
            model(**inputs, past_key_values=cache)
            seen = int(cache.get_seq_length())
            assert seen == inputs["input_ids"].shape[1]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
            mask[0, seen] = 0  # padding before the shorter question
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -3:]}
            ids = torch.tensor([[0, 8, 9], [7, 8, 9]])
            answers.append(model(input_ids=ids, past_key_values=cache, **more).logits[:, 1:])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -1:]}
            answers.append(model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache, **more).logits)
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(answers[1], answers[3], rtol=0, atol=1e-10)
