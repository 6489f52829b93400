"""A pruned cache under everything that `generate` and its users do to caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vprune
from tests.conftest import picture
from tests.exactness.agreement import refused
from tests.exactness.prompts import batch

SIZES = {"recycle": "grid", "size_aware": True}


def prefilled(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def step(model: Any, cache: Any, tokens: list[list[int]], mask: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor(tokens)
    mask = torch.nn.functional.pad(mask, (0, cache.get_seq_length() + ids.shape[1] - mask.shape[1]), value=1)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
def test_crop_copy_and_go_on(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any]) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "padded", torch.float64)
    mask = inputs["attention_mask"]
    with vprune.prune(model, "attention", keep=0.3, **options):
        cache = prefilled(model, inputs).past_key_values
        seen = cache.get_seq_length()
        assert seen == inputs["input_ids"].shape[1] > cache.layers[0].keys.shape[-2]
        fresh = copy.deepcopy(cache)
        expected = step(model, fresh, [[9], [12]], mask)
        assert fresh.get_seq_length() == seen + 1 and cache.get_seq_length() == seen
        step(model, cache, [[5, 6, 7], [8, 9, 10]], mask)
        cache.crop(-3)
        assert cache.get_seq_length() == seen
        torch.testing.assert_close(step(model, cache, [[9], [12]], mask), expected, rtol=0, atol=1e-12)


def test_cropping_into_a_picture_is_refused(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    with vprune.prune(model, "attention", keep=0.3):
        cache = prefilled(model, inputs).past_key_values
    with refused("pruned image"):
        cache.crop(-cache.get_seq_length() + 2)


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
def test_rows_follow_reorder_repeat_and_select(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any]) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "padded", torch.float64)
    mask = inputs["attention_mask"]
    with vprune.prune(model, "attention", keep=0.3, **options):
        cache = prefilled(model, inputs).past_key_values
        expected = step(model, copy.deepcopy(cache), [[9], [12]], mask)
        swapped = copy.deepcopy(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(
            step(model, swapped, [[12], [9]], mask[[1, 0]]), expected[[1, 0]], rtol=0, atol=1e-12
        )
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        twice = step(model, repeated, [[9], [9], [12], [12]], mask.repeat_interleave(2, 0))
        torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), rtol=0, atol=1e-12)
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(step(model, cache, [[12]], mask[1:]), expected[1:], rtol=0, atol=1e-12)


def test_a_reset_cache_is_empty(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    plain = prefilled(model, inputs).past_key_values
    plain.reset()
    if plain.get_seq_length():
        pytest.skip("this transformers keeps the rows of a dynamic cache on reset and only zeroes them")
    with vprune.prune(model, "attention", keep=0.3):
        first = prefilled(model, inputs)
        cache = first.past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = prefilled(model, inputs, past_key_values=cache)
        torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, SIZES], ids=["plain", "sizes"])
def test_prompt_lookup_gives_the_same_words(tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any]) -> None:
    """Guesses are fed in twos and threes and cropped again, in the prefill too (they are words of the prompt, no
    images)."""
    model = tiny_vlm(dtype=torch.float64)
    text = "<s> <image> the red circle of the blue circle of the"
    inputs = dict(tiny_processor(images=[picture(0)], text=[text], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with vprune.prune(model, "uniform", keep=0.3, **options):
        # (5.12 cannot look up without an end-of-sequence token)
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=2)
        looked_up = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=2, prompt_lookup_num_tokens=3
        )
    assert torch.equal(plain, looked_up)


def test_the_cache_goes_on_without_the_hooks_where_nothing_needs_them(tiny_vlm: Any, tiny_processor: Any) -> None:
    """Unpadded and unmerged rows: the logical length alone is enough for plain decoding."""
    model, inputs = tiny_vlm(dtype=torch.float64), batch(tiny_processor, "single", torch.float64)
    mask = inputs["attention_mask"]
    with vprune.prune(model, "attention", keep=0.3):
        cache = prefilled(model, inputs).past_key_values
        expected = step(model, copy.deepcopy(cache), [[9]], mask)
    torch.testing.assert_close(step(model, cache, [[9]], mask), expected, rtol=0, atol=1e-12)


def test_caches_made_later_are_of_the_librarys_own_classes(tiny_vlm: Any, tiny_processor: Any) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with vprune.prune(model, "random", keep=0.3):
        layers = prefilled(model, inputs).past_key_values.layers
    assert all(isinstance(layer, DynamicLayer) and type(layer) is not DynamicLayer for layer in layers)
    assert all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config.get_text_config()).layers)
