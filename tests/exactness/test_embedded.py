"""keep=all is the unpruned model, token by token, on the embedded model and real questions of the benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from vprune.eval.batches import draw
from vprune.eval.benchmarks.scenes import Scenes
from vprune.eval.models import ModelChoice, load


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    loaded = load(ModelChoice("embedded", device="cpu"))
    return loaded.model, loaded.processor


def hooks(model: Any) -> list[tuple[int, int]]:
    """How many hooks every module carries: transformers puts some of its own on."""
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("questions", [11, pytest.param(200, marks=pytest.mark.slow)])
def test_keeping_everything_generates_the_same_tokens(embedded: tuple[Any, Any], questions: int) -> None:
    model, processor = embedded
    benchmark = Scenes()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, attention = model.config.to_json_string(), model.config._attn_implementation
    changed = 0
    asked = draw(benchmark.samples, questions, seed=0)
    for batch in (asked[start : start + 20] for start in range(0, questions, 20)):
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}],
                add_generation_prompt=True,
            )
            for sample in batch
        ]
        images = [[benchmark.load_image(sample)] for sample in batch]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        plain = model.generate(**inputs, max_new_tokens=40, output_logits=True, return_dict_in_generate=True)
        before = hooks(model)
        with vprune.prune(model, method="attention", keep=1.0) as pruning:
            kept = model.generate(**inputs, max_new_tokens=40, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(plain.sequences, kept.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))
        assert pruning.last is not None and all(r.tokens_after == r.tokens_before == 576 for r in pruning.last)
        if questions < 100:
            with vprune.prune(model, method="attention", keep=0.05):
                pruned = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            changed += not torch.equal(plain.logits[0], pruned.logits[0])
    assert questions >= 100 or changed  # control: pruning does change what the model says
    assert model.config.to_json_string() == config and model.config._attn_implementation == attention
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks(model) == before
