"""Law 2: pruned = the full model with the dropped tokens masked out of every layer, recycled = with the merged rows put
in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging import version

import vprune
from tests.conftest import picture
from tests.exactness.agreement import agree, generate
from tests.exactness.oracle import full_sight, oracle_generate, seeing, without_pruned
from tests.exactness.prompts import KINDS, batch, chat

METHODS = [
    name
    for name in vprune.method_names()
    if name not in ("full", "resize", "vflowopt", "restore")
    and not name.startswith(("fastv", "pyramid", "sparsevlm", "vtw", "dart", "fitprune", "visionzip", "prumerge"))
]  # resize: an oracle of its own, below; vflowopt prunes in stages: test_vflow.py; stages, weighted sums: tests/methods
GREEDY: dict[str, Any] = {"do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "beam": {"do_sample": False, "num_beams": 3},
    "sample": {"do_sample": True, "temperature": 0.7},
    "returns": {"do_sample": True, "num_return_sequences": 2},
}
RECYCLE: dict[str, Any] = {"recycle": "grid", "cells": 4, "size_aware": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"recycle": "none", "size_aware": False},
    "recycle": RECYCLE,
    "sizes": {**RECYCLE, "size_aware": True},
    "weighted": {"recycle": "weighted", "cells": 4, "size_aware": True},
    "nearest": {"recycle": "nearest", "distance": 0.5, "size_aware": True},
    "anchors": {"recycle": "anchors", "size_aware": True},
}
# The oracle attends over all columns with zeros in between and recomputes every step: sums run in another order, so
# float64 agrees to rounding rather than to the bit. Norms in float32 are part of the model and absorb most of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def compare(
    model: Any, inputs: dict[str, torch.Tensor], method: str, options: dict[str, Any], steps: int = 8, **mode: Any
) -> None:
    torch.manual_seed(7)
    with vprune.prune(model, method, keep=0.3, **options) as pruning:
        pruned = generate(model, **inputs, max_new_tokens=steps, **mode)
    assert pruning.last is not None
    copies = mode.get("num_beams", 1) * mode.get("num_return_sequences", 1)
    firsts = [report for report in pruning.last if report.sample % copies == 0]
    for report in firsts:
        object.__setattr__(report, "sample", report.sample // copies)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sight = full_sight(model, ids, mask, inputs["pixel_values"])
    weighted = options.get("recycle") == "weighted"
    sight = without_pruned(sight, ids, firsts, bool(options.get("size_aware")), weighted)
    torch.manual_seed(7)
    oracle = oracle_generate(model, sight, ids, mask, max_new_tokens=steps, **mode)
    assert torch.equal(pruned.sequences, oracle.sequences)
    agree(pruned.logits, oracle.logits, TOLERANCE[model.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_masked_model(
    tiny_vlm: Any, tiny_processor: Any, method: str, options: dict[str, Any], kind: str
) -> None:
    model = tiny_vlm(dtype=torch.float64)
    compare(model, batch(tiny_processor, kind, torch.float64), method, options, **GREEDY)


# (Eager attention takes its softmax in float32 whatever the model's dtype: nothing finer than the float32 case to see.)
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)],
    ids=["sdpa-fp64", "sdpa-fp32", "eager-fp32"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {**RECYCLE, "size_aware": True}], ids=["plain", "sizes"])
def test_every_way_of_decoding(
    tiny_vlm: Any, tiny_processor: Any, options: dict[str, Any], mode: str, attention: str, dtype: torch.dtype
) -> None:
    model = tiny_vlm(attention=attention, dtype=dtype)
    compare(model, batch(tiny_processor, "padded", dtype), "attention", options, **MODES[mode])


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_resize_equals_a_tower_that_sees_the_small_image(
    tiny_vlm: Any, tiny_processor: Any, kind: str, tower: str
) -> None:
    model = tiny_vlm(tower=tower, dtype=torch.float64)
    inputs = batch(tiny_processor, kind, torch.float64)
    with vprune.prune(model, "resize", keep=0.3) as pruning:
        pruned = generate(model, **inputs, max_new_tokens=4, do_sample=False)
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"].float(), (24, 24), mode="bilinear", antialias=True, align_corners=False
    ).double()
    with torch.no_grad():
        seen = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        hidden = seen.hidden_states[model.config.vision_feature_layer][:, -9:]
        rows = model.model.multi_modal_projector(hidden)
    sight = full_sight(model, inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    lone = without_pruned(sight, inputs["input_ids"], list(pruning.last or []))
    columns = lone.seen & (inputs["input_ids"] == 4)
    assert int(columns.sum()) == 9 * len(small)
    lone.embeds[columns] = rows.flatten(0, 1)
    oracle = oracle_generate(
        model, lone, inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4, do_sample=False
    )
    assert torch.equal(pruned.sequences, oracle.sequences)
    agree(pruned.logits, oracle.logits)


def second_turn(
    processor: Any, sequences: torch.Tensor, mask: torch.Tensor, texts: list[str], images: int
) -> dict[str, torch.Tensor]:
    """The inputs of another turn after `sequences`: new text (left-padded in between) and `images` new pictures."""
    pictures = [picture(40 + seed) for seed in range(images)] or None
    new = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    done = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    inputs = {
        "input_ids": torch.cat([sequences, new["input_ids"]], 1),
        "attention_mask": torch.cat([done, new["attention_mask"]], 1),
    }
    if images:
        inputs["pixel_values"] = new["pixel_values"].double()
    return inputs


@pytest.mark.parametrize("images", [0, 1], ids=["text", "image"])
@pytest.mark.parametrize("kind", ["single", "padded", "several"])
@pytest.mark.parametrize("options", [{}, {**RECYCLE, "size_aware": True}], ids=["plain", "sizes"])
@pytest.mark.parametrize("method", ["attention", "random"])
def test_a_second_turn_on_the_same_cache(
    tiny_vlm: Any, tiny_processor: Any, method: str, options: dict[str, Any], kind: str, images: int
) -> None:
    from transformers import DynamicCache

    model = tiny_vlm(dtype=torch.float64)
    first = batch(tiny_processor, kind, torch.float64)
    rows = first["input_ids"].shape[0]
    cache = DynamicCache(config=model.config.get_text_config())
    texts = [chat(tiny_processor, question, images, first=False) for question in ("two blue square ?", "no")[:rows]]
    with vprune.prune(model, method, keep=0.3, **options) as pruning:
        # (a random model may say `<image>`, which no later turn could tell from a picture's)
        said = model.generate(**first, past_key_values=cache, max_new_tokens=3, do_sample=False, suppress_tokens=[4])
        reports = list(pruning.last or [])
        second = second_turn(tiny_processor, said, first["attention_mask"], texts, images * rows)
        pruned = generate(
            model,
            **second,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
        )
        if images:
            reports += list(pruning.last or [])
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]]) if images else first["pixel_values"]
    ids, mask = second["input_ids"], second["attention_mask"]
    if images and rows > 1:  # features are merged row by row: order the pictures so
        counts = [int(n) // 36 for n in (first["input_ids"] == 4).sum(-1)]
        old, new = first["pixel_values"].split(counts), second["pixel_values"].split([1] * rows)
        pixels = torch.cat([part for pair in zip(old, new, strict=True) for part in pair])
    sight = without_pruned(full_sight(model, ids, mask, pixels), ids, reports, bool(options.get("size_aware")))
    oracle = oracle_generate(model, sight, ids, mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(pruned.sequences, oracle.sequences)
    agree(pruned.logits, oracle.logits)


@pytest.mark.parametrize("kind", ["single", "padded"])
@pytest.mark.parametrize("options", [{}, {**RECYCLE, "size_aware": True}], ids=["plain", "sizes"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_map_of_a_second_image_sees_what_is_left_of_the_first(
    tiny_vlm: Any, tiny_processor: Any, layer: int, options: dict[str, Any], kind: str
) -> None:
    """Instruction rows share their attention with earlier turns: dropped tokens get none of it, merged rows more."""
    model, eager = tiny_vlm(dtype=torch.float64), tiny_vlm(attention="eager", dtype=torch.float64)
    first = batch(tiny_processor, kind, torch.float64)
    rows, mask = first["input_ids"].shape[0], first["attention_mask"]
    texts = [chat(tiny_processor, question, 1, first=False) for question in ("two blue square ?", "no")[:rows]]
    second = second_turn(tiny_processor, first["input_ids"], mask, texts, rows)
    ids, length = second["input_ids"], first["input_ids"].shape[1]
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.3, layer=layer, **options) as pruning:
        cache = model(**first).past_key_values
        reports = list(pruning.last or [])
        rest = {"input_ids": ids[:, length:], "position_ids": (second["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
        rest["position_ids"] = rest["position_ids"][:, length:]
        model(
            **rest, attention_mask=second["attention_mask"], pixel_values=second["pixel_values"], past_key_values=cache
        )
    # The first forward ran without position ids, as the library counts them for itself: padding included.
    positions = torch.cat([torch.arange(length).expand(rows, -1), rest["position_ids"]], 1)
    pictures = zip(first["pixel_values"].split([1] * rows), second["pixel_values"].split([1] * rows), strict=True)
    pixels = torch.cat([part for pair in pictures for part in pair])
    sight = full_sight(model, ids, second["attention_mask"], pixels)
    with torch.no_grad(), seeing(eager, without_pruned(sight, ids, reports, bool(options))):
        full = eager(input_ids=ids, position_ids=positions, use_cache=False, output_attentions=True)
    assert pruning.last is not None
    for report in pruning.last:
        columns = (ids[report.sample] == 4).nonzero().squeeze(-1)[-report.tokens_before :]
        expected = full.attentions[layer][report.sample, :, int(columns[-1]) + 1 :, columns].mean((0, 1)).float()
        torch.testing.assert_close(report.importance.flatten(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["beam", "returns"])
def test_copies_of_several_images(tiny_vlm: Any, tiny_processor: Any, mode: str) -> None:
    if version.parse(transformers.__version__) < version.parse("5.18"):
        pytest.skip(
            "transformers < 5.18 repeats every image before the next: copies of a sample get wrong images, hooks or not"
        )
    model = tiny_vlm(dtype=torch.float64)
    compare(
        model,
        batch(tiny_processor, "several", torch.float64),
        "attention",
        {**RECYCLE, "size_aware": True},
        **MODES[mode],
    )


@pytest.mark.parametrize("kind", ["single", "padded", "mixed"])
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_masks_over_tokens_seen_serve_the_other_backends(
    tiny_vlm: Any, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch, mode: str, kind: str
) -> None:
    """Flash and flex take the 2-D mask and the cache's offset; here the dense backend is made to take them too."""
    monkeypatch.setattr("vprune.models.masks.DENSE_BACKENDS", ())
    model = tiny_vlm(dtype=torch.float64)
    compare(model, batch(tiny_processor, kind, torch.float64), "attention", {"recycle": "grid"}, **MODES[mode])


@pytest.mark.parametrize("method", METHODS)
def test_pruning_does_change_the_logits(tiny_vlm: Any, tiny_processor: Any, method: str) -> None:
    """The control: were nothing pruned at all, every comparison above would pass as well."""
    model = tiny_vlm()
    inputs = batch(tiny_processor, "padded")
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
        with vprune.prune(model, method, keep=0.3):
            pruned = model(**inputs).logits[:, -1]
    assert float((full - pruned).abs().max()) > 0.1
