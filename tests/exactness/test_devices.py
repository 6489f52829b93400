"""Models that others have already laid hands on: dispatched over devices, and quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vprune
from tests.conftest import build_model
from tests.exactness.agreement import agree, generate
from tests.exactness.families import batch, build
from tests.exactness.prompts import batch as prompts
from tests.exactness.test_families import generated, line_breaks, masked, stepped

FAMILIES = ("llava", "qwen2_vl", "llava_onevision", "qwen3_vl", "gemma3")
METHODS: dict[str, dict[str, Any]] = {
    "attention": {"method": "attention"},
    "random": {"method": "random"},
    "stage": {"method": "attention", "stages": [2]},
    "two-stages": {"method": "attention", "stages": [[0, 0.6], [2, 0.3]]},
    "probe-below": {"method": "attention", "layer": 1},
    "sizes": {"method": "attention", "recycle": "grid", "cells": 4, "size_aware": True},
}
NOT_HERE = {("gemma3", "probe-below"), ("qwen3_vl", "probe-below")}  # refused: test_stages.py
CASES = [(family, method) for family in FAMILIES for method in METHODS if (family, method) not in NOT_HERE]
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
ACROSS = 1e-5  # rotations and the logits that `generate` hands out are float32 whatever the model's dtype
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def made(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return build_model(dtype=dtype) if family == "llava" else build(family, dtype)


def padded(processor: Any, family: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return prompts(processor, "padded", dtype) if family == "llava" else batch(family, "padded", dtype)


def said(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The logits of the prefill and of four decoding steps."""
    out = generate(model, **inputs, max_new_tokens=5, do_sample=False, **options)
    return [one.cpu() for one in out.logits]


def pruned(model: Any, inputs: dict[str, Tensor], how: dict[str, Any], **options: Any) -> list[Tensor]:
    """The same of the model with a third of its visual tokens."""
    with vprune.prune(model, **{"keep": 0.3, **how}) as pruning:
        logits = said(model, inputs, **options)
    assert pruning.last is not None and all(one.tokens_after < one.tokens_before for one in pruning.last)
    return logits


def pruned_to_all(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with vprune.prune(model, "attention", keep=1.0):
        return said(model, inputs)


def equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def close(mine: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance)


def device_map(model: Any, place: Callable[[str], str | int]) -> dict[str, str | int]:
    """Every block of the model (each decoder layer by itself) at the device that `place` names for it."""
    decoder = model.get_decoder()
    opened = {model, model.model, decoder, decoder.layers}
    blocks: dict[str, str | int] = {}
    for name, module in model.named_modules():
        if module in opened:
            own = (key for key, _ in module.named_parameters(recurse=False))
            blocks |= {key: place(key) for key in (f"{name}.{one}".lstrip(".") for one in own)}
            children = [(f"{name}.{one}".lstrip("."), child) for one, child in module.named_children()]
            blocks |= {key: place(key) for key, child in children if child not in opened}
    return blocks


def late(name: str) -> bool:
    """True for the decoder's layers but the first, and for all that comes after them."""
    return name.endswith(("layers.1", "layers.2", ".norm", "lm_head"))


def accelerate_hooks(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


def accelerate() -> Any:
    return pytest.importorskip("accelerate")


def hooked_on_cpu(model: Any, folder: Path) -> Any:
    return accelerate().dispatch_model(
        model, device_map(model, lambda name: "cpu"), main_device="cpu", force_hooks=True
    )


def layers_on_disk(model: Any, folder: Path) -> Any:
    blocks = device_map(model, lambda name: "disk" if "layers." in name or name.endswith("norm") else "cpu")
    return accelerate().dispatch_model(model, blocks, main_device="cpu", offload_dir=folder)


def all_offloaded(model: Any, folder: Path) -> Any:
    return accelerate().cpu_offload(model, execution_device=torch.device("cpu"))


WAYS = {"hooks": hooked_on_cpu, "disk": layers_on_disk, "offload": all_offloaded}
# Its learned line break is a parameter that `generate` reads outside of the module whose hook would load it.
NOT_ALONE = {("llava_onevision", "offload")}
# accelerate takes such a parameter for an unknown block, yet insists on a device for it.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")


@pytest.mark.parametrize(
    ("family", "method", "way"), [(*case, way) for case in CASES for way in WAYS if (case[0], way) not in NOT_ALONE]
)
def test_a_dispatched_model_is_pruned_alike(
    tiny_processor: Any, tmp_path: Path, family: str, method: str, way: str
) -> None:
    model, inputs, how = made(family), padded(tiny_processor, family), METHODS[method]
    alone, full = pruned(model, inputs, how), said(model, inputs)
    dispatched = WAYS[way](model, tmp_path)
    hooks = accelerate_hooks(dispatched)
    assert len(hooks) > 10 and equal(said(dispatched, inputs), full)
    assert equal(pruned(dispatched, inputs, how), alone)
    assert hooks == accelerate_hooks(dispatched) and equal(said(dispatched, inputs), full)
    if way != "hooks":
        assert {one.device.type for one in dispatched.get_decoder().layers.parameters()} == {"meta"}
    assert float((full[0] - alone[0]).abs().max()) > 1e-2  # the control


@pytest.mark.parametrize(
    ("family", "way"),
    [(one, way) for one in FAMILIES for way in WAYS if one != "gemma3" and (one, way) not in NOT_ALONE],
)
def test_a_dispatched_model_with_a_static_cache(tiny_processor: Any, tmp_path: Path, family: str, way: str) -> None:
    model, inputs, how = made(family), padded(tiny_processor, family), METHODS["attention"]
    alone = pruned(model, inputs, how, **STATIC)
    assert equal(pruned(WAYS[way](model, tmp_path), inputs, how, **STATIC), alone)


# Blocks that stay on the CPU; all others go to the GPU, and each is executed where it lies.
SPLITS: dict[str, Callable[[str], bool]] = {
    "late-layers-away": lambda name: not late(name),
    "early-layers-away": late,
    "decoder-away": lambda name: "language_model" not in name,
    "tower-away": lambda name: "vision" not in name and "visual" not in name,
    "embeddings-apart": lambda name: "embed_tokens" in name,
}


def on_two_devices(model: Any, split: str) -> Any:
    stays = SPLITS[split]
    return accelerate().dispatch_model(
        model, device_map(model, lambda name: "cpu" if stays(name) else 0), main_device="cpu"
    )


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_model_on_two_devices_is_pruned_alike(tiny_processor: Any, family: str, method: str, split: str) -> None:
    if family == "gemma3" and split != "tower-away":
        pytest.skip("its embeddings are tied to its head: they cannot lie on two devices")
    model, inputs, how = made(family), padded(tiny_processor, family), METHODS[method]
    alone, full = pruned(model, inputs, how), said(model, inputs)
    dispatched = on_two_devices(model, split)
    hooks = accelerate_hooks(dispatched)
    assert {one.device.type for one in dispatched.parameters()} == {"cpu", "cuda"}
    close(said(dispatched, inputs), full, ACROSS)
    close(pruned(dispatched, inputs, how), alone, ACROSS)
    assert hooks == accelerate_hooks(dispatched)
    close(said(dispatched, inputs), full, ACROSS)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_wait_on_the_cpu_for_the_gpu(tiny_processor: Any, family: str, split: str) -> None:
    model, inputs, how = made(family), padded(tiny_processor, family), METHODS["stage"]
    alone = pruned(model, inputs, how)
    offloaded = accelerate().dispatch_model(model, device_map(model, lambda name: "cpu" if SPLITS[split](name) else 0))
    close(pruned(offloaded, {name: one.cuda() for name, one in inputs.items()}, how), alone, ACROSS)


class Int8Linear(nn.Module):
    """A linear layer whose `weight` is whole numbers in eight bits, as quantisers store it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        own = linear.weight.detach()
        scale = own.abs().amax(1, keepdim=True) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter((own / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight.to(hidden.dtype) * self.get_buffer("scale")
        return nn.functional.linear(hidden, weight, self.bias)


def with_linears(model: Any, made_of: Callable[[nn.Linear], nn.Module], names: tuple[str, ...] = ()) -> Any:
    """The model with every linear layer (of those `names`) exchanged."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (not names or name in names):
                setattr(parent, name, made_of(child))
    return model


def equals_the_masked_model(called: Any, model: Any, inputs: dict[str, Tensor], how: dict[str, Any]) -> None:
    """Pruning of `called`, which is or wraps `model`, is that model with the dropped tokens masked out."""
    with vprune.prune(called, **{"keep": 0.3, **how}) as pruning:
        out = generated(called, inputs)
    reports = list(pruning.last or [])
    assert reports and all(report.tokens_after < report.tokens_before for report in reports)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with masked(model, ids, mask, reports, "size_aware" in how, line_breaks(model, inputs)):
        oracle = stepped(model, inputs, out.sequences)
    agree(out.logits, oracle, 1e-11)
    assert float((out.logits[0] - stepped(model, inputs, out.sequences)[0]).abs().max()) > 1e-2  # the control


INPUT_STAGE = [case for case in CASES if case[0] != "llava" and "stage" not in case[1]]


@pytest.mark.parametrize(("family", "method"), INPUT_STAGE)
def test_a_quantised_model_equals_its_masked_self(family: str, method: str) -> None:
    model = with_linears(made(family), Int8Linear)
    assert not model.get_decoder().layers[0].self_attn.q_proj.weight.is_floating_point()
    equals_the_masked_model(model, model, batch(family, "padded", torch.float64), METHODS[method])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_tower_of_whole_numbers_is_watched(tiny_processor: Any, family: str) -> None:
    model, inputs = with_linears(made(family), Int8Linear), padded(tiny_processor, family)
    for method in ("pool", "vision") if family == "llava" else ("pool", "uniform"):
        assert all(one.isfinite().all() for one in pruned(model, inputs, {"method": method}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_dynamic_quantisation_runs(tiny_processor: Any, family: str) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("torch was built without an engine for quantised layers")
    model, inputs = made(family, torch.float32), padded(tiny_processor, family, torch.float32)
    model = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    plain = said(model, inputs)
    # Its scales depend on all rows of a batch, so a shorter batch cannot give the masked model's numbers.
    assert pruned(model, inputs, METHODS["attention"])[0].isfinite().all()
    assert equal(pruned_to_all(model, inputs), plain)


@pytest.mark.parametrize(
    ("device", "bits"),  # (for a CPU bitsandbytes packs 4 bits in blocks that are wider than these models)
    [("cpu", 8), *(pytest.param("cuda:0", bits, marks=[pytest.mark.gpu, ON_GPU]) for bits in (8, 4))],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_bitsandbytes(tiny_processor: Any, tmp_path: Path, family: str, bits: int, device: str) -> None:
    pytest.importorskip("bitsandbytes")
    dtype = torch.float32 if device == "cpu" else torch.float16
    made(family, dtype).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=dtype
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": device}, dtype=dtype
    )
    inputs = {name: one.to(device) for name, one in padded(tiny_processor, family, dtype).items()}
    assert not model.get_decoder().layers[0].self_attn.q_proj.weight.is_floating_point()
    assert all(one.isfinite().all() for method in METHODS.values() for one in pruned(model, inputs, method))
    assert equal(pruned_to_all(model, inputs), said(model, inputs))
