"""Models that others have wrapped: adapters, whatever hides them, and the compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vprune
from tests.exactness.agreement import refused
from tests.exactness.families import batch
from tests.exactness.test_devices import (
    INPUT_STAGE,
    METHODS,
    STATIC,
    equal,
    equals_the_masked_model,
    made,
    padded,
    pruned,
    said,
    with_linears,
)


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        dtype = linear.weight.dtype
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False).to(dtype)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))
        return result


class Tuner(nn.Module):
    """Holds the model as `.model`, as an adapter's tuner does, and passes all else on to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Adapted(nn.Module):
    """The model at `.base_model.model`; `generate`, `forward` and (if `open_`) all other names reach it."""

    def __init__(self, model: nn.Module, open_: bool = True) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.open_ = open_

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "open_" or not self.open_:
                raise
            return getattr(self.base_model, name)


@pytest.mark.parametrize(("family", "method"), INPUT_STAGE)
def test_pruning_through_an_adapter(family: str, method: str) -> None:
    model = with_linears(made(family), LowRank, ("q_proj", "v_proj"))
    equals_the_masked_model(Adapted(model), model, batch(family, "padded", torch.float64), METHODS[method])


def test_an_adapter_is_the_model_that_it_wraps(tiny_processor: Any) -> None:
    model, inputs = made("llava"), padded(tiny_processor, "llava")
    wrapped, how = Adapted(model), METHODS["stage"]
    assert equal(pruned(wrapped, inputs, how), pruned(model, inputs, how))
    with (
        vprune.prune(wrapped, "random"),
        pytest.raises(vprune.VPruneError, match="already"),
        vprune.prune(model, "random"),
    ):
        pass


def test_an_adapter_with_a_static_cache(tiny_processor: Any) -> None:
    model, inputs, how = made("llava"), padded(tiny_processor, "llava"), METHODS["attention"]
    alone, full = pruned(model, inputs, how, **STATIC), said(model, inputs, **STATIC)
    assert equal(pruned(Adapted(model), inputs, how, **STATIC), alone)
    assert equal(said(model, inputs, **STATIC), full)


def test_peft(tiny_processor: Any) -> None:
    peft = pytest.importorskip("peft")
    for family in ("qwen2_vl", "llava_onevision"):
        model, inputs = made(family, torch.float64), batch(family, "padded", torch.float64)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).to(torch.float64).eval()
        equals_the_masked_model(tuned, model, inputs, METHODS["attention"])
        assert not equal(said(tuned, inputs), said(made(family), inputs))  # the adapter is at work
        pruned(tuned, inputs, METHODS["stage"])


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [(nn.DataParallel, r"\.module"), (lambda model: Adapted(model, open_=False), r"base_model\.model|inside it|wraps")],
    ids=["data-parallel", "closed"],
)
def test_a_wrapper_that_hides_the_model_is_refused(tiny_vlm: Any, wrap: Any, remedy: str) -> None:
    with refused(remedy):
        vprune.prune(wrap(tiny_vlm()), "attention")


def test_a_model_compiled_as_a_whole_is_refused(tiny_vlm: Any) -> None:
    with refused("prune the model as it was"):
        vprune.prune(torch.compile(tiny_vlm()), "attention")
    parts: list[Callable[[Any], Any]] = [lambda one: one, lambda one: one.model, lambda one: one.get_decoder()]
    for part in parts:
        compiled = copy.deepcopy(tiny_vlm())
        part(compiled).compile()
        with refused("prune the model as it was"):
            vprune.prune(compiled, "attention")
