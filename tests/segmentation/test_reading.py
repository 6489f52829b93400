"""Maps of attention: streamed ones against the model's own attention weights, and lifted to the full grid."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.exactness.prompts import batch
from vprune import VPruneError
from vprune.models.anatomy import dissect
from vprune.pruner import load_method
from vprune.segmentation.maps import Flow, LocalisationHeads, MeanAttention, Rollout, entropy_of_parts, span
from vprune.segmentation.reading import read


def one_prompt(processor: Any) -> dict[str, Any]:
    return dict(batch(processor, "single", torch.float32))


def true_attention(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[layers, H, N, N], from the library's eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**inputs, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return torch.stack([one[0] for one in out.attentions])


@pytest.fixture
def prompt(tiny_vlm: Any, tiny_processor: Any) -> tuple[Any, dict[str, Any], Tensor, list[int]]:
    model = tiny_vlm(dtype=torch.float32)
    inputs = one_prompt(tiny_processor)
    length = inputs["input_ids"].shape[1]
    return model, inputs, true_attention(model, inputs), [length - 1, length - 2]


def test_means_are_those_of_the_models_own_weights(prompt: Any) -> None:
    model, inputs, true, rows = prompt
    reading = read(model, inputs, rows, MeanAttention())
    torch.testing.assert_close(reading.maps, true[:, :, rows].mean((0, 1)), atol=2e-5, rtol=1e-4)
    weights = true.amax(-1).mean(-1)  # [layers, H]
    weighted = (true[:, :, rows] * weights[..., None, None]).mean((0, 1))
    maps = read(model, inputs, rows, MeanAttention(weighted=True)).maps
    torch.testing.assert_close(maps, weighted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("regularised", [True, False])
def test_flow_is_the_formula(prompt: Any, regularised: bool) -> None:
    model, inputs, true, rows = prompt
    tokens = true.shape[-1]
    eye, flow = torch.eye(tokens), torch.zeros(tokens, tokens)
    for layer in true:
        mean = (layer * layer.amax(-1).mean(-1)[:, None, None]).mean(0)
        flow = (eye + mean) @ (eye + flow)
        seen_by = tokens - torch.arange(tokens)  # rows that may see a column
        flow = flow * (1 - (seen_by - 1) / tokens) if regularised else flow
    maps = read(model, inputs, rows, Flow(regularised=regularised)).maps
    torch.testing.assert_close(maps[:, :-2], flow[rows][:, :-2], atol=1e-4, rtol=1e-3)


def test_rollout_is_the_formula(prompt: Any) -> None:
    model, inputs, true, rows = prompt
    reading = read(model, inputs, rows, Rollout())
    visual = reading.images[0].columns
    total = torch.eye(true.shape[-1])
    for number in span(0.5, 1.0, len(true)):
        layer = true[number]
        largest = layer[:, :, visual].amax((1, 2))
        weights = largest / largest.max()
        mixed = (layer * weights[:, None, None]).sum(0) / weights.sum()
        total = (mixed + torch.eye(len(mixed))) / 2 @ total
    torch.testing.assert_close(reading.maps, total[rows], atol=2e-5, rtol=1e-4)


def test_localisation_heads_are_some_of_the_heads(prompt: Any) -> None:
    model, inputs, true, rows = prompt
    maps = read(model, inputs, rows, LocalisationHeads(top=1)).maps
    flat = true[:, :, rows].flatten(0, 1)
    assert any(torch.allclose(maps, head, atol=2e-5) for head in flat)
    one, two = torch.zeros(36), torch.zeros(36)
    one[7] = two[7] = two[28] = 1.0
    assert float(entropy_of_parts(one)) < float(entropy_of_parts(two))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "extractor", [MeanAttention(), MeanAttention(weighted=True), Flow(), Rollout(), LocalisationHeads()]
)
def test_a_gpu_reads_the_same_maps(prompt: Any, extractor: Any) -> None:
    model, inputs, _, rows = prompt
    wanted = read(model, inputs, rows, extractor).maps
    there = {name: part.to("cuda") for name, part in inputs.items()}
    maps = read(deepcopy(model).to("cuda"), there, rows, extractor).maps  # (others use the model, too)
    torch.testing.assert_close(maps.cpu(), wanted, atol=1e-4, rtol=1e-3)


def test_a_pass_ends_with_the_last_layer_that_is_looked_at(prompt: Any) -> None:
    model, inputs, true, rows = prompt
    ran: list[int] = []
    layers = dissect(model).layers
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, layer in enumerate(layers)
    ]
    half = MeanAttention(last=0.5)
    maps = read(model, inputs, rows, half).maps
    for handle in handles:
        handle.remove()
    looked_at = range(max(1, round(len(layers) / 2)))
    assert ran == [*looked_at[:-1]]
    torch.testing.assert_close(maps, true[list(looked_at)][:, :, rows].mean((0, 1)), atol=2e-5, rtol=1e-4)


def test_reading_leaves_the_model_as_it_was(prompt: Any) -> None:
    model, inputs, _, rows = prompt

    def hooks() -> list[int]:
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]

    with torch.no_grad():
        before, hooked = model(**inputs).logits, hooks()
        read(model, inputs, rows, MeanAttention())
        assert torch.equal(model(**inputs).logits, before)
    assert hooks() == hooked


def test_maps_of_a_pruned_image_are_lifted_to_its_full_grid(prompt: Any) -> None:
    model, inputs, _, rows = prompt
    whole = read(model, inputs, rows, MeanAttention()).on_grid()
    method = load_method("random", keep=0.5)
    dropped = read(model, inputs, rows, MeanAttention(), method)
    merged = read(model, inputs, rows, MeanAttention(), load_method("random", keep=0.5, recycle="grid"))
    assert dropped.on_grid().shape == merged.on_grid().shape == whole.shape
    assert dropped.tokens < dropped.images[0].standing.source.numel() + inputs["input_ids"].shape[1]
    lifted = dropped.on_grid().flatten(1)
    assert int((lifted[0] > 0).sum()) == dropped.images[0].columns.numel()
    # What was merged is spread over what it stands for, and no mass is lost.
    assert bool((merged.on_grid().flatten(1)[0] > 0).all())
    mass = merged.maps[:, merged.images[0].columns].sum(1)
    torch.testing.assert_close(merged.on_grid().flatten(1).sum(1), mass)


def test_mistakes(prompt: Any, tiny_processor: Any) -> None:
    model, inputs, _, rows = prompt
    with pytest.raises(VPruneError, match="one prompt at a time"):
        read(model, dict(batch(tiny_processor, "padded", torch.float32)), rows, MeanAttention())
    staged = load_method("random", stages=[0, 1])
    with pytest.raises(VPruneError, match="before the first layer"):
        read(model, inputs, rows, MeanAttention(), staged)
    text = {"input_ids": inputs["input_ids"][:, -3:], "attention_mask": inputs["attention_mask"][:, -3:]}
    with pytest.raises(VPruneError, match="no image"):
        read(model, text, [0], MeanAttention())
    with pytest.raises(VPruneError, match="shares of the depth"):
        Flow(first=0.7, last=0.2)
    with vprune.prune(model, method="random"), pytest.raises(VPruneError, match="being pruned already"):
        read(model, inputs, rows, MeanAttention())
