"""Law 5: leaving restores everything; nesting is refused. Law 8: importing changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch

import vprune
from tests.exactness.agreement import refused
from tests.exactness.prompts import batch


def footprint(model: Any) -> dict[str, Any]:
    """All that hooks could have changed: weights, config, hooks, forwards, attributes, the registered attention
    functions."""
    from transformers.modeling_utils import AttentionInterface

    parts = dict(model.named_modules())
    return {
        "weights": {
            name: (value.data_ptr(), value.double().sum().item()) for name, value in model.state_dict().items()
        },
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "attention": {
            name: part.config._attn_implementation for name, part in parts.items() if hasattr(part, "config")
        },
        "hooks": {
            name: [len(getattr(part, kind)) for kind in vars(part) if kind.endswith("_hooks") or "hooks_with" in kind]
            for name, part in parts.items()
        },
        "attributes": {name: sorted(vars(part)) for name, part in parts.items()},
        "forwards": {name: part.forward for name, part in parts.items()},
        "classes": {name: type(part) for name, part in parts.items()},
        "registered": sorted(AttentionInterface._global_mapping),
    }


@pytest.mark.parametrize("method", vprune.method_names())
def test_leaving_restores_everything(tiny_vlm: Any, tiny_processor: Any, method: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    # The library installs hooks of its own for hidden states on the first call: let it.
    before_out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    before = footprint(model)
    with vprune.prune(model, method, keep=1.0 if method == "full" else 0.2) as pruning:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        hooked = footprint(model)["hooks"]
    assert footprint(model) == before
    assert (hooked == before["hooks"]) == (method == "full")
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), before_out)
    assert (pruning.last is None) == (method == "full")


@pytest.mark.parametrize("method", ["attention", "vision", "resize"])
def test_an_exception_inside_the_block_restores_too(tiny_vlm: Any, tiny_processor: Any, method: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    plain = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    before = footprint(model)
    with pytest.raises(RuntimeError, match="inside"), vprune.prune(model, method, keep=0.2):
        model.generate(**inputs, max_new_tokens=2)
        raise RuntimeError("inside")
    assert footprint(model) == before
    # One that breaks the forward half-way leaves no state behind either.
    with vprune.prune(model, method, keep=0.2) as pruning:
        handle = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**inputs, max_new_tokens=2)
        handle.remove()
        once = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(once, again) and len(pruning.last or []) == 1
    assert footprint(model) == before
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=2, do_sample=False))


def test_nesting_is_refused(tiny_vlm: Any) -> None:
    model = tiny_vlm()
    for outer, inner in (("attention", "random"), ("full", "full"), ("random", "full")):
        with vprune.prune(model, outer), refused("already"):
            vprune.prune(model, inner).attach()
    with vprune.prune(model, "random"):
        pass


def test_attach_and_detach_without_a_block(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    pruning = vprune.prune(model, "random", keep=4)
    assert pruning.attach() is pruning
    model.generate(**inputs, max_new_tokens=2)
    pruning.detach()
    pruning.detach()
    assert pruning.last is not None and pruning.last.tokens_after == 4
    with vprune.prune(model, "random", keep=4):
        pass


def test_importing_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import vprune; spent = time.perf_counter() - start;"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules), 'imported'; assert spent < 0.3, spent;"
        "assert 'prune' in dir(vprune)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = vprune.nonsense  # type: ignore[attr-defined]
