"""Soak: thousands of calls inside one block leave nothing behind, whatever they are and however they end."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import vprune
from tests.exactness.families import Layout
from tests.exactness.made_batches import made_batch
from tests.exactness.more_families import made
from tests.exactness.test_families import generated
from tests.exactness.test_family_scenarios import NEVER
from tests.exactness.test_restore import footprint

SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "input": ("llava", {"keep": 0.3}),
    "stages": ("qwen2_vl", {"stages": [[0, 0.6], [2, 0.3]], "recycle": "grid", "cells": 4, "size_aware": True}),
}
LAYOUTS = [
    Layout((((32, 32),),)),
    Layout((((32, 32),), ((48, 24),)), after=(0, 6)),
    Layout((((32, 32), (24, 40)),), before=(5,)),
    Layout(((), ((24, 40),), ((32, 32), (16, 48))), padding=2),
    Layout(((), ()), after=(3, 9)),
]
KINDS = ("plain", "plain", "turns", "broken")
MEBIBYTE = 2**20


class BrokenError(RuntimeError):
    """What breaks a forward half-way."""


@dataclass(frozen=True)
class Held:
    """What is alive between two calls: resident bytes, tensors, reports (of the handle, and at all), and every module's
    hooks and attributes."""

    resident: int
    tensors: int
    reports: tuple[int, int]
    hooks: Any
    attributes: Any


@cache
def inputs_of(family: str, number: int) -> dict[str, Tensor]:
    """The prompt of one layout, made once."""
    return made_batch(family, LAYOUTS[number], torch.float32)


def held(model: Any, pruning: Any) -> Held:
    """Count what is alive now."""
    from vprune.records import PruneReport

    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    alive = sum(issubclass(kind, Tensor) for kind in kinds)
    reports = sum(issubclass(kind, PruneReport) for kind in kinds)
    now = footprint(model)
    resident = pytest.importorskip("psutil").Process().memory_info().rss
    return Held(resident, alive, (len(pruning.last or ()), reports), now["hooks"], now["attributes"])


@contextmanager
def breaking(module: Any, after: int) -> Iterator[None]:
    """`module` raises in its call after `after` others."""
    own, left = module.forward, [after]

    def forward(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise BrokenError
        return own(*args, **kwargs)

    with patch.dict(vars(module), {"forward": forward}):
        yield


def turns(model: Any, inputs: dict[str, Tensor], count: int) -> None:
    """A conversation on one cache: the prompt, then words alone."""
    from transformers import DynamicCache

    more = {"do_sample": False, "past_key_values": DynamicCache(config=model.config.get_text_config()), **NEVER}
    spoken = model.generate(**inputs, max_new_tokens=2, **more)
    prompt = inputs["input_ids"].shape[1]
    for _ in range(count):
        spoken = torch.cat([spoken, torch.tensor([[30, 31, 32]]).expand(spoken.shape[0], -1)], 1)
        mask = pad(inputs["attention_mask"], (0, spoken.shape[1] - prompt), value=1)
        spoken = model.generate(input_ids=spoken, attention_mask=mask, max_new_tokens=2, **more)


def call(model: Any, family: str, draw: random.Random) -> int:
    """One call of some kind on some prompt, or a conversation; the number of calls of `generate`."""
    number = draw.randrange(len(LAYOUTS))
    inputs, kind = inputs_of(family, number), draw.choice(KINDS)
    if kind == "turns":
        later = draw.randint(1, 3)
        turns(model, inputs, later)
        return 1 + later
    steps = draw.randint(1, 4)
    if kind == "plain":
        model.generate(**inputs, max_new_tokens=steps, do_sample=False, **NEVER)
        return 1
    layers = model.get_decoder().layers
    places = [layers[0].self_attn, layers[1].mlp, layers[2], model.lm_head]
    if "pixel_values" in inputs:
        places.append(model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual)
    place = draw.choice(places)
    later = draw.randrange(steps) if place in places[:4] else 0  # in the prompt, or while words are said
    with breaking(place, later), pytest.raises(BrokenError):
        model.generate(**inputs, max_new_tokens=steps, do_sample=False, **NEVER)
    return 1


def soaked(setup: str, calls: int, warm: int, every: int) -> list[Held]:
    """What is held after the same call, `warm` calls after the start and after every `every` more; the model is as it
    was when the block is left."""
    family, options = SETUPS[setup]
    model, draw = made(family, torch.float32), random.Random(5)
    plain = generated(model, inputs_of(family, 1))  # transformers puts hooks of its own on in the first call
    before, weights = footprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Held] = []
    done, due = 0, warm
    with vprune.prune(model, "attention", **options) as pruning:
        while done < calls:
            done += call(model, family, draw)
            if done >= due:
                model.generate(**inputs_of(family, 3), max_new_tokens=2, do_sample=False, **NEVER)
                seen.append(held(model, pruning))
                due += every
    assert footprint(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = generated(model, inputs_of(family, 1))
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, again.logits, strict=True))
    return seen


def check(seen: list[Held], growth: int) -> None:
    """Nothing that is counted differs; resident memory grows by `growth` bytes at most."""
    first = seen[0]
    assert len(seen) > 2 and first.reports == (3, 1)
    for later in seen[1:]:
        assert later.reports == first.reports and later.hooks == first.hooks and later.attributes == first.attributes
        assert later.tensors == first.tensors, [one.tensors for one in seen]
    assert seen[-1].resident - first.resident <= growth, [one.resident // MEBIBYTE for one in seen]


@pytest.mark.parametrize("setup", SETUPS)
def test_sixty_calls_leave_nothing_behind(setup: str) -> None:
    check(soaked(setup, calls=60, warm=30, every=10), growth=32 * MEBIBYTE)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_two_thousand_calls_leave_nothing_behind(setup: str) -> None:
    check(soaked(setup, calls=2000, warm=400, every=200), growth=16 * MEBIBYTE)


def test_a_tensor_kept_by_every_call_is_noticed() -> None:
    """The control: something that holds on to what it sees."""
    hoard: list[Tensor] = []
    own = call

    def hoarding(model: Any, family: str, draw: random.Random) -> int:
        hoard.append(torch.zeros(1))
        return own(model, family, draw)

    with patch(f"{__name__}.call", hoarding), pytest.raises(AssertionError):
        check(soaked("input", calls=40, warm=20, every=5), growth=32 * MEBIBYTE)
