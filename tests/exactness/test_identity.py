"""Law 1: keeping every token without recycling is the unhooked model, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from tests.exactness.prompts import KINDS, batch

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True},
}


def keep_all(method: str, kind: str) -> float | int:
    """Everything, as a fraction or (where every image has 36 tokens) as a number."""
    return 36 if method != "full" and kind == "several" else 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", vprune.method_names())
def test_every_method_keeping_all(tiny_vlm: Any, tiny_processor: Any, method: str, kind: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, kind)
    options: dict[str, Any] = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, do_sample=False, **options)
    with vprune.prune(model, method, keep=keep_all(method, kind)):
        hooked = model.generate(**inputs, do_sample=False, **options)
    assert torch.equal(plain.sequences, hooked.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(hooked.logits, plain.logits, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_way_of_decoding_keeping_all(
    tiny_vlm: Any, tiny_processor: Any, dtype: torch.dtype, mode: str, attention: str
) -> None:
    model = tiny_vlm(attention=attention, dtype=dtype)
    inputs = batch(tiny_processor, "several", dtype)
    torch.manual_seed(3)
    plain = model.generate(**inputs, max_new_tokens=4, **MODES[mode])
    torch.manual_seed(3)
    with vprune.prune(model, "attention", keep=1.0):
        hooked = model.generate(**inputs, max_new_tokens=4, **MODES[mode])
    assert torch.equal(plain, hooked)


def test_a_plain_forward_keeps_its_shapes(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with vprune.prune(model, "attention", keep=5):
            pruned = model(**inputs, output_hidden_states=True)
    assert pruned.logits.shape == plain.logits.shape
    assert [h.shape for h in pruned.hidden_states] == [h.shape for h in plain.hidden_states]
    assert pruned.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert pruned.past_key_values.layers[0].keys.shape[-2] < plain.past_key_values.layers[0].keys.shape[-2]
    text = (inputs["input_ids"] != 4) & inputs["attention_mask"].bool()
    # The text before the image sees nothing of it, and embeddings of the text are untouched everywhere.
    assert torch.equal(pruned.hidden_states[0][text], plain.hidden_states[0][text])


def test_a_loop_of_ones_own(tiny_vlm: Any, tiny_processor: Any) -> None:
    """Forward by forward without position ids or masks: positions continue behind the tokens seen."""
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with torch.no_grad(), vprune.prune(model, "attention", keep=5, recycle="none"):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        out = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        said = []
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            said.append(int(token))
            out = model(input_ids=token, past_key_values=out.past_key_values)
    assert said == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_a_cache_it_is_the_same(tiny_vlm: Any, tiny_processor: Any, use_cache: bool) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "padded", torch.float64)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.3):
        with_cache = model(**inputs).logits[:, -1]
        without = model(**inputs, use_cache=use_cache).logits[:, -1]
    torch.testing.assert_close(with_cache, without, rtol=0, atol=1e-12)
