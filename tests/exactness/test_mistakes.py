"""Users' mistakes: each a VPruneError that names the value, the limits and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vprune
from tests.conftest import build_model
from tests.exactness import families
from tests.exactness.agreement import refused
from tests.exactness.prompts import batch
from vprune.models.foreseen import Foreseen, foresee
from vprune.pruner import Pruner, load_method
from vprune.selection import Random


def fails(pattern: str) -> Any:
    return refused(pattern)


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -3, -0.1, True, False, float("nan"), float("inf"), "abc", "0.1", [1]])
def test_a_keep_that_is_none(tiny_vlm: Any, keep: Any) -> None:
    with fails(rf"keep={re.escape(repr(keep))}.*fraction in \(0, 1\]"):
        vprune.prune(tiny_vlm(), "random", keep=keep)


@pytest.mark.parametrize("keep", [np.float32(0.5), np.int64(7), torch.tensor(3).item()])
def test_numbers_of_other_kinds(keep: Any) -> None:
    assert type(load_method("random", keep=keep).keep) in (float, int)


@pytest.mark.parametrize("method", [name for name in vprune.method_names() if name != "full"])
def test_more_tokens_than_the_image_has(tiny_vlm: Any, tiny_processor: Any, method: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with vprune.prune(model, method, keep=2880), fails(r"keep=2880 but the image has 36 visual tokens \(6 x 6\)"):
        model.generate(**inputs, max_new_tokens=2)
    assert torch.is_tensor(model.generate(**inputs, max_new_tokens=2))


def test_unknown_names_list_the_known_ones(tiny_vlm: Any) -> None:
    with fails("method='nonsense' is unknown: choose one of attention, .*vision"):
        vprune.prune(tiny_vlm(), "nonsense")
    with fails("'random' has no option 'colour': it has budget, cells, distance, keep, layer, .*seed"):
        vprune.prune(tiny_vlm(), "random", colour=3)
    with fails("recycle='all': choose one of none, grid"):
        vprune.prune(tiny_vlm(), "attention", recycle="all")
    with fails("size_aware='yes'"):
        vprune.prune(tiny_vlm(), "attention", size_aware="yes")
    with fails("cells=0"):
        vprune.prune(tiny_vlm(), "attention", cells=0)
    with fails("pool='median'"):
        vprune.prune(tiny_vlm(), "attention", pool="median")
    with fails("layer=0.5"):
        vprune.prune(tiny_vlm(), "attention", layer=0.5)
    with fails("with a Pruner object"):
        vprune.prune(tiny_vlm(), Pruner(), layer=1)


def test_full_keeps_everything(tiny_vlm: Any) -> None:
    with fails("full keeps everything: keep=0.5"):
        vprune.prune(tiny_vlm(), "full", keep=0.5)
    assert load_method("full").keep == load_method("full", keep=1).keep == 1.0


def test_a_model_that_is_none() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, **sizes))
    with fails("Qwen2ForCausalLM is no vision-language model"):
        vprune.prune(text, "random")
    with fails("str is no vision-language model"):
        vprune.prune("llava", "random")


def test_a_model_whose_decoder_is_not_found() -> None:
    """BLIP-2 holds a whole language model, not a decoder that would read the merged prompt."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 32, "num_key_value_heads": 2, **sizes}
    tower = {**sizes, "image_size": 8, "patch_size": 4}
    config = Blip2Config(
        vision_config=tower, qformer_config={**sizes, "vocab_size": 32}, text_config=text, image_token_index=5
    )
    with fails("Blip2ForConditionalGeneration: found no text decoder with layers of its own"):
        vprune.prune(Blip2ForConditionalGeneration(config), "random")


@pytest.mark.parametrize("method", vprune.method_names())
def test_a_layer_that_is_not_there(tiny_vlm: Any, method: str) -> None:
    """Methods without a layer take one too, for sweeps, and refuse one that the model does not have all the same."""
    with fails("layer=9: the decoder has layers 0 to 2"):
        vprune.prune(tiny_vlm(), method, layer=9)
    with fails("layer='first': give the"):
        load_method(method, layer="first")
    assert load_method(method, layer=1).layer in (1, None)


@pytest.mark.parametrize(("tower", "side"), [("siglip", 6), ("clip", 6)])
def test_what_is_foreseen_is_what_comes(tmp_path: Path, tiny_processor: Any, tower: str, side: int) -> None:
    model = build_model(tower)
    model.save_pretrained(tmp_path)
    seen = foresee(str(tmp_path))
    assert seen == Foreseen(len(model.model.language_model.layers), side)
    with vprune.prune(model, "random", keep=1.0) as pruning:
        model.generate(**batch(tiny_processor, "single"), max_new_tokens=2)
    assert pruning.last is not None and pruning.last.tokens_before == side**2


def test_what_a_config_does_not_tell_is_not_foreseen(tmp_path: Path) -> None:
    """Of families that cut pictures up, of configs of few words, and of models that are not at hand."""
    assert foresee("owner/name") == foresee(str(tmp_path)) == Foreseen()
    for family in ("llava_next", "qwen2_vl", "gemma3"):
        families.build(family, torch.float32).save_pretrained(tmp_path)
        seen = foresee(str(tmp_path))
        assert seen.side is None and seen.layers is not None
        Foreseen().refuse(load_method("attention", keep=10**6, layer=99))


def test_a_layer_of_the_tower_that_is_not_there(tiny_vlm: Any) -> None:
    model = tiny_vlm()
    with fails("tower_layer=5: the tower has layers 0 to 2"), vprune.prune(model, "vision", tower_layer=5):
        pass
    with vprune.prune(model, "random"):
        pass


def test_evidence_that_does_not_fit(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "several")
    for masks, pattern in (([None] * 2, "2 masks but the batch has 3 images"), ([np.zeros(4)] * 3, r"shape \(4,\)")):
        with vprune.prune(model, "oracle") as pruning, fails(pattern):
            pruning.evidence = masks
            model.generate(**inputs, max_new_tokens=2)


def test_what_cannot_be_done_is_said(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with vprune.prune(model, "attention", keep=4):
        with fails(r"attention_mask of \(1, 1, "):
            length = inputs["input_ids"].shape[1]
            model(**{**inputs, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)})
        with fails("whole images"):
            features = model.model.get_image_features(inputs["pixel_values"])
            half = inputs["input_ids"][:, :20]
            features.pooler_output = [features.pooler_output[0][: int((half == 4).sum())]]
            model(input_ids=half, mm_encoder_outputs={"image": features})
    flash = build_model()
    flash.get_decoder().config._attn_implementation = "flash_attention_2"  # told, never run
    with fails("size_aware=true with attention implementation 'flash_attention_2'.*flex_attention"):
        vprune.prune(flash, "attention", size_aware=True).attach()
    with vprune.prune(flash, "attention"):
        pass


def test_a_report_of_several_images_asks_for_one(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "several")
    with torch.no_grad(), vprune.prune(model, "random") as pruning:
        model(**inputs)
    assert pruning.last is not None and pruning.last.seconds > 0
    with fails(r"kept of a report of 3 images: choose one, as report\[i\].kept"):
        _ = pruning.last.kept
    with pytest.raises(AttributeError):
        _ = pruning.last.colour


def test_options_reach_the_part_that_has_them() -> None:
    assert load_method("random", seed=5).selector == Random(seed=5)
    assert load_method("attention", layer=2, seed=5, keep=None).scorer == load_method("attention", layer=2).scorer
    assert load_method("vision", layer=0).scorer == load_method("vision").scorer  # the decoder's layer, not the tower's
    assert load_method("pool", recycle="grid", cells=4).recycle == "grid"
    assert load_method("oracle").needs_evidence and not load_method("attention").needs_evidence
    assert "TextAttention(layer=None, pool='mean')" in repr(load_method("attention"))


def test_a_method_may_be_an_object(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    with torch.no_grad(), vprune.prune(model, Pruner(selector=Random(seed=2)), keep=3) as pruning:
        model(**inputs)
    assert pruning.last is not None and pruning.last.tokens_after == 3
