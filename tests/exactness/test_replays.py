"""Plans that are replayed are those planned anew; without a GPU a stand-in does the work again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.conftest import build_model
from tests.exactness.families import FAMILIES, build
from tests.exactness.families import batch as family_batch
from tests.exactness.prompts import KINDS, batch
from vprune import replays
from vprune.models.aside import numbers_on

METHODS: dict[str, dict[str, Any]] = {
    "attention_max": {},
    "attention": {"recycle": "grid", "cells": 4, "size_aware": True},
    "learned": {},
    "nearest": {"method": "attention", "recycle": "nearest", "size_aware": True},
    "weighted": {"method": "attention_max", "recycle": "weighted"},
    "layer": {"method": "attention", "layer": 0},
}


def done_again(work: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """What `recorded` does, without a graph: each replay does the work and overwrites what the first has left."""
    first = work()

    def replay() -> None:
        again = work()
        for dtype, flat in first.packed._flat.items():
            flat.copy_(again.packed._flat[dtype])
        if first.shorter is not None:
            first.shorter.copy_(again.shorter)

    return first, replay


@contextmanager
def recording(device: str) -> Iterator[list[Any]]:
    """Where there is no GPU the stand-in; lists what was recorded."""
    made: list[Any] = []
    record = replays.recorded if device == "cuda" else done_again

    def noted(*args: Any) -> Any:
        made.append(args)
        return record(*args)

    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(replays, "recorded", noted)
        if device == "cpu":
            patched.setattr(replays, "recordable", lambda hidden: True)
        yield made


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def seen(model: Any, pruning: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Any]]:
    """Tokens that are generated, and all that is reported."""
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return ids, [
        (one.sample, one.image, one.grid, one.kept, one.source, one.sizes, one.importance, one.tokens_after)
        for one in pruning.last
    ]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_replayed_is_planned(tiny_processor: Any, device: str, name: str, kind: str) -> None:
    model, options = build_model().to(device), dict(METHODS[name])
    method = options.pop("method", name)
    inputs = {key: part.to(device) for key, part in batch(tiny_processor, kind).items()}
    prompts = [{**inputs, "pixel_values": inputs["pixel_values"] * factor} for factor in (1.0, -1.0, 0.5, 2.0)]
    with vprune.prune(model, method, keep=0.3, **options) as pruning:
        wanted = [seen(model, pruning, one) for one in prompts]
    assert not alike(wanted[0], wanted[1])
    with recording(device) as made, vprune.prune(model, method, keep=0.3, graphs=True, **options) as pruning:
        found, reports = [], []
        for one in prompts:
            found.append(model.generate(**one, max_new_tokens=4, do_sample=False))
            reports.append(pruning.last)
    assert len(made) == 1
    for ids, report, (tokens, told) in zip(found, reports, wanted, strict=True):  # (read late: they are their own)
        assert torch.equal(ids, tokens) and report.seconds >= 0
        kept = [(one.sample, one.image, one.grid, one.kept, one.source, one.sizes) for one in report]
        assert alike(kept, [one[:6] for one in told])
        for own, other in zip(report, told, strict=True):
            torch.testing.assert_close(own.importance, other[6], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, device: str) -> None:
    model = build(family, torch.float32).to(device)
    inputs = {key: part.to(device) for key, part in family_batch(family, "mixed", torch.float32).items()}
    with torch.no_grad():
        with vprune.prune(model, "attention_max", keep=0.4):
            wanted = model(**inputs).logits
        with recording(device) as made, vprune.prune(model, "attention_max", keep=0.4, graphs=True):
            for _ in range(3):
                torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)
    assert len(made) <= 1  # (none where pictures see themselves, or features are added behind the first layers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["learned", "nearest"])
def test_what_one_prompt_was_given_outlives_the_next(tiny_processor: Any, device: str, name: str) -> None:
    """Rows, positions and biases lie where the next replay writes: hidden states, caches and reports are copies."""
    model, options = build_model().to(device), dict(METHODS[name])
    method = options.pop("method", name)
    inputs = {key: part.to(device) for key, part in batch(tiny_processor, "mixed").items()}
    prompts = [{**inputs, "pixel_values": inputs["pixel_values"] * factor} for factor in (0.5, 0.5, 1.0, -1.0)]

    def run(graphs: bool) -> list[Any]:
        with torch.no_grad(), vprune.prune(model, method, keep=0.3, graphs=graphs, **options) as pruning:
            outs = [model(**one, output_hidden_states=True) for one in prompts]
            told = [(one.kept, one.sizes) for one in pruning.last]
        for out in outs:  # decoded with what each has stored, after all of them
            cache, ids = out.past_key_values, inputs["input_ids"][:, -1:]
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
            with torch.no_grad(), vprune.prune(model, method, keep=0.3, **options):
                out.next = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        return [told, *((out.logits, *out.hidden_states, out.next) for out in outs)]

    wanted = run(False)
    with recording(device) as made:
        found = run(True)
    assert len(made) == 1 and alike(found[0], wanted[0])
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        for one, exact in zip(mine, other, strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_fails_leaves_nothing_behind(tiny_processor: Any) -> None:
    model, inputs = build_model(), batch(tiny_processor, "single")
    layer = model.model.language_model.layers[1]

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with recording("cpu") as made, torch.no_grad(), vprune.prune(model, "attention", keep=0.3, graphs=True) as pruning:
        wanted = [model(**inputs).logits for _ in range(3)][-1]
        before = pruning.last
        handle = layer.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs)
        handle.remove()
        assert pruning._later is None and pruning._passage is None and pruning.last is before
        assert torch.equal(model(**inputs).logits, wanted) and pruning.last is not before
    assert len(made) == 1


def test_each_layout_is_recorded_by_itself_and_the_oldest_forgotten(tiny_processor: Any) -> None:
    model = build_model()
    prompts = [batch(tiny_processor, kind) for kind in KINDS]
    with pytest.MonkeyPatch.context() as patched, recording("cpu") as made:
        patched.setattr(replays, "MOST", 2)
        with torch.no_grad(), vprune.prune(model, "attention", keep=0.3, graphs=True) as pruning:
            for inputs in (*prompts[:2], *prompts[:2], *prompts[:2]):
                model(**inputs)
            assert len(made) == 2
            model(**prompts[2])
            model(**prompts[0])  # forgotten, and met again for the first time
            assert len(made) == 2 and pruning._replays is not None and len(pruning._replays._known) == 2
            model(**prompts[0])
            assert len(made) == 3
        assert not pruning._replays._known


def test_another_mask_than_the_models_is_read_for_itself(tiny_processor: Any) -> None:
    """The decoder may be given a mask that the model was not: a copy is the same layout, other padding another."""
    model, inputs = build_model(), batch(tiny_processor, "single")
    padding = [0]

    def exchanged(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = inputs["attention_mask"].clone()
        mask[:, : padding[0]] = 0
        return args, {**kwargs, "attention_mask": mask}

    handle = model.model.language_model.register_forward_pre_hook(exchanged, with_kwargs=True)  # before the pruning's
    wanted, found = [], []
    for graphs, logits in ((False, wanted), (True, found)):
        with recording("cpu") as made, torch.no_grad(), vprune.prune(model, "attention", keep=0.3, graphs=graphs):
            for padding[0] in (0, 0, 0, 1, 1, 1):
                logits.append(model(**inputs).logits)
    handle.remove()
    assert len(made) == 2 and not torch.equal(wanted[0], wanted[3])
    assert alike(found, wanted)


def test_weights_that_were_moved_are_not_read_where_they_lay(tiny_processor: Any) -> None:
    model, inputs = build_model(), batch(tiny_processor, "single")
    with recording("cpu") as made, torch.no_grad(), vprune.prune(model, "attention", keep=0.3, graphs=True):
        for _ in range(3):
            model(**inputs)
        for part in model.parameters():
            part.data = part.data.clone()
        model(**inputs)
        model(**inputs)
    assert len(made) == 2


def test_what_learns_is_planned_anew(tiny_processor: Any) -> None:
    model, inputs = build_model().train(), batch(tiny_processor, "single")
    with recording("cpu") as made, vprune.prune(model, "attention", keep=0.3, graphs=True):
        for _ in range(3):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not made


def test_a_capture_that_fails_is_told_and_done_without(tiny_processor: Any) -> None:
    model, inputs = build_model(), batch(tiny_processor, "single")

    def broken(work: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(replays, "recorded", broken)
        patched.setattr(replays, "recordable", lambda hidden: True)
        with vprune.prune(model, "attention", keep=0.3):
            wanted = model(**inputs).logits
        with vprune.prune(model, "attention", keep=0.3, graphs=True):
            model(**inputs)
            with pytest.warns(UserWarning, match="could not be recorded .* not permitted when stream is capturing"):
                assert torch.equal(model(**inputs).logits, wanted)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize(
    ("method", "options"),
    [("random", {}), ("vision", {}), ("pool", {}), ("vflowopt", {}), ("attention", {"stages": [1]}),
     ("attention", {"budget": "sample"}), ("full", {})],
)  # fmt: skip
def test_methods_in_which_the_host_has_a_say_are_refused(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(vprune.VPruneError, match=f"graphs=True: the plans of method={method}"):
        vprune.prune(build_model(), method, graphs=True, **options)


def test_numbers_kept_on_a_device_serve_what_learns(tiny_processor: Any) -> None:
    model, inputs = build_model().train(), batch(tiny_processor, "mixed")
    numbers_on.cache_clear()
    with vprune.prune(model, "attention", keep=0.3):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
