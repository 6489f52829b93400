"""Exported rows and positions, read by the unpruned model, answer as the pruned model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vprune
from tests.exactness.families import Layout, batch, build
from tests.exactness.prompts import batch as prompt_batch
from vprune import VPruneError
from vprune.models.anatomy import dissect
from vprune.serving import ImageEmbeds, export_image_embeds

NEW = 8
EXPORTED = ("qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "smolvlm", "llava_next", "llava_onevision")


def one_prompt(family: str, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> dict[str, Tensor]:
    return batch(family, Layout([sizes]), torch.float64)


def answered(model: Any, exported: ImageEmbeds, positions: Tensor | None = None, first: int | None = None) -> list[int]:
    """What an engine does with the export: the rows in the decoder once, then a token at a time."""
    anatomy = dissect(model)
    table, head = model.get_input_embeddings(), anatomy.head
    positions = exported.positions if positions is None else positions
    at = exported.next_position if first is None else first
    embeds, cache, answer = exported.inputs_embeds(table), DynamicCache(config=anatomy.decoder.config), []
    rows = positions.shape[0]
    place = positions[:, None] if rows == 3 else positions
    seen = embeds.shape[1]
    for _ in range(NEW):
        mask = torch.ones(1, seen, dtype=torch.long)  # without one, gaps would read as several packed sequences
        with torch.no_grad():
            out = anatomy.decoder(
                inputs_embeds=embeds, position_ids=place, attention_mask=mask, past_key_values=cache, use_cache=True
            )
        answer.append(int(head(out.last_hidden_state[:, -1]).argmax()))
        embeds = table(torch.tensor([[answer[-1]]]))
        place = torch.full((3, 1, 1) if rows == 3 else (1, 1), at)
        at, seen = at + 1, seen + 1
    return answer


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[int]:
    with vprune.prune(model, **options):
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def hook_count(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("options", [{"method": "attention", "keep": 0.3}, {"method": "pool", "keep": 4}])
@pytest.mark.parametrize("family", EXPORTED)
def test_the_unpruned_model_answers_alike(family: str, options: dict[str, Any]) -> None:
    model, inputs = build(family, torch.float64), one_prompt(family, ((32, 32), (32, 64)))
    expected, hooks = generated(model, inputs, **options), hook_count(model)
    exported = export_image_embeds(model, inputs, **options)
    assert exported.tokens_after < exported.tokens_before
    assert sum(len(rows) for rows in exported.image_embeds) == exported.tokens_after
    assert answered(model, exported) == expected
    assert hook_count(model) == hooks


def test_llava_answers_alike(tiny_vlm: Callable[..., Any], tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(dtype=torch.float64), prompt_batch(tiny_processor, "single", torch.float64)
    exported = export_image_embeds(model, inputs, method="vision", keep=9)
    assert [tuple(rows.shape) for rows in exported.image_embeds] == [(9, 32)]
    assert answered(model, exported) == generated(model, inputs, method="vision", keep=9)


def test_rows_kept_and_positions_say_where_they_stood() -> None:
    model, inputs = build("qwen2_vl", torch.float64), one_prompt("qwen2_vl", ((32, 32), (32, 64)))
    exported = export_image_embeds(model, inputs, method="random", keep=0.25, recycle="none")
    with vprune.prune(model, method="random", keep=0.25, recycle="none") as pruning:
        model(**inputs)
    assert [rows.tolist() for rows in exported.kept] == [report.kept.tolist() for report in pruning.last]
    assert [len(rows) for rows in exported.image_embeds] == [report.tokens_after for report in pruning.last]
    ids, token = inputs["input_ids"][0], exported.placeholder
    assert exported.prompt_ids[exported.prompt_ids != token].tolist() == ids[ids != token].tolist()
    assert int((exported.unexpanded_ids == token).sum()) == 2
    whole = export_image_embeds(model, inputs, method="full")
    start = int(torch.nonzero(ids == token)[0])
    first = exported.positions[:, start : start + len(exported.kept[0])]
    assert torch.equal(first, whole.positions[:, start:][:, exported.kept[0]])
    assert torch.equal(exported.image_embeds[0], whole.image_embeds[0][exported.kept[0]])
    assert exported.next_position == whole.next_position


def test_positions_without_gaps_are_another_answer() -> None:
    model, inputs = build("llava_onevision", torch.float64), one_prompt("llava_onevision", ((16, 16),))
    exported = export_image_embeds(model, inputs, method="random", keep=0.3)
    length = exported.positions.shape[1]
    assert exported.next_position > length
    assert answered(model, exported, torch.arange(length)[None], length) != answered(model, exported)


def test_an_export_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    model, inputs = build("internvl", torch.float64), one_prompt("internvl", ((64, 32), (32, 32)))
    exported = export_image_embeds(model, inputs, method="uniform", keep=5)
    exported.save(tmp_path / "prompt.safetensors")
    again = ImageEmbeds.load(tmp_path / "prompt.safetensors")
    assert answered(model, again) == answered(model, exported)
    assert [rows.tolist() for rows in again.kept] == [rows.tolist() for rows in exported.kept]
    (tmp_path / "other").write_text("no tensors")
    for name in ("other", "missing"):
        with pytest.raises(VPruneError, match="holds no exported image embeddings"):
            ImageEmbeds.load(tmp_path / name)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3_vl", {"method": "attention"}, "DeepStack"),
        ("gemma3", {"method": "attention"}, "both ways"),
        ("qwen2_vl", {"method": "fastv", "keep": 0.8}, "stages: layer 2"),
        (
            "qwen2_vl",
            {"method": "attention", "recycle": "grid", "size_aware": True, "keep": 0.5},
            "set size_aware=False",
        ),
    ],
)
def test_what_rows_cannot_carry_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    model, inputs = build(family, torch.float64), one_prompt(family)
    with torch.no_grad():
        model(**inputs)  # the library's own hooks come with the first call
    hooks = hook_count(model)
    with pytest.raises(VPruneError, match=message):
        export_image_embeds(model, inputs, **options)
    assert hook_count(model) == hooks


def test_prompts_that_are_no_single_picture_prompt_are_refused() -> None:
    model = build("qwen2_vl", torch.float64)
    both = batch("qwen2_vl", "padded", torch.float64)
    with pytest.raises(VPruneError, match=r"has shape \[2, \d+\]: give one prompt"):
        export_image_embeds(model, both)
    with pytest.raises(VPruneError, match="hides parts of the prompt"):
        export_image_embeds(model, {**one_prompt("qwen2_vl"), "attention_mask": torch.zeros(1, 3)})
    with pytest.raises(VPruneError, match="holds no picture"):
        export_image_embeds(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(VPruneError, match="holds a video"):
        export_image_embeds(model, batch("qwen2_vl", Layout([((32, 32),)]), torch.float64, video=True))
