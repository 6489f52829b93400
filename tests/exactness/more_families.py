"""Tiny models of further families, and what tests of all of them share: models made once, batches, second turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.exactness.families import (
    END,
    FAMILIES,
    IMAGE,
    KINDS,
    LINED,
    QWEN,
    START,
    TEXT,
    VIDEO,
    batch,
    build,
    lined_batch,
    positions_behind,
    rope_index,
)
from tests.exactness.test_families import text_positions, visual_columns

BREAK = 94  # between the lines of a picture, as Pixtral's processor puts it
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "patch_size": 8}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_LLAMA = {"model_type": "llama", **TEXT}


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(LlavaConfig(text_config=_LLAMA, vision_config=_CLIP, image_token_id=IMAGE))


def vipllava() -> Any:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    return VipLlavaForConditionalGeneration(
        VipLlavaConfig(text_config=_LLAMA, vision_config=_CLIP, image_token_id=IMAGE, vision_feature_layers=[-1, -2])
    )


def llava_next_video() -> Any:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    vision = {**_CLIP, "image_size": 16, "patch_size": 4}
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config=vision,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
    )


def aya_vision() -> Any:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(text_config=_LLAMA, vision_config=_SIGLIP, image_token_id=IMAGE, downsample_factor=2)
    )


def cohere2_vision() -> Any:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    return Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(
            text_config={"model_type": "cohere2", **TEXT},
            vision_config=_SIGLIP,
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
        )
    )


def ovis2() -> Any:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    return Ovis2ForConditionalGeneration(
        Ovis2Config(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={**_TOWER, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
            image_token_id=IMAGE,
            visual_indicator_token_ids=[95, 96, 97, 98, 99],
            vocab_size=TEXT["vocab_size"],
            hidden_size=TEXT["hidden_size"],
        )
    )


def pixtral() -> Any:
    """LLaVA around a tower that reads pictures of unequal sizes in one row."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = {**_TOWER, "model_type": "pixtral", "head_dim": 8, "image_size": 64, "patch_size": 8}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=_LLAMA,
            vision_config=tower,
            image_token_id=IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def got_ocr2() -> Any:
    """Its convolutions merge 4 x 4 patches, which no config says."""
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

    tower = {
        **_TOWER,
        "output_channels": 16,
        "image_size": 64,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    }
    return GotOcr2ForConditionalGeneration(
        GotOcr2Config(text_config={"model_type": "qwen2", **TEXT}, vision_config=tower, image_token_id=IMAGE)
    )


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None},
            vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 8, "image_size": 64},
            image_token_id=IMAGE,
            spatial_merge_size=2,
        )
    )


def paligemma() -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    width = TEXT["hidden_size"]
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
            vision_config={**_SIGLIP, "patch_size": 8, "projection_dim": width},
            image_token_id=IMAGE,
            projection_dim=width,
            hidden_size=width,
        )
    )


MORE: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "vipllava": vipllava,
    "llava_next_video": llava_next_video,
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "ovis2": ovis2,
    "mistral3": mistral3,
    "pixtral": pixtral,
    "got_ocr2": got_ocr2,
    "paligemma": paligemma,
}
TEN = (*FAMILIES, "llava")  # those that the README names
MERGING = ("aya_vision", "cohere2_vision", "ovis2", "mistral3")  # fewer tokens than patches, as their configs say
# Said by a model, these would be read as its own marks of pictures where the whole text is read at once.
MARKS = [BREAK, 95, 96, 97, 98, 99]


@cache
def made(family: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    """A model of any family, the same object for the same arguments."""
    with patch.dict(FAMILIES, MORE):
        return build(family, dtype, attention)


def inputs_of(family: str, kind: str, dtype: torch.dtype = torch.float64, video: bool = False) -> dict[str, Tensor]:
    """A batch in the shape that the family's processor makes."""
    if video and family == "llava_next_video":
        return _without_line_breaks(kind, dtype)
    if family in (*LINED, "llava_next_video"):
        return lined_batch(kind, dtype, video, made(family, dtype))
    inputs = batch(family, kind, dtype, video)
    if family in ("mistral3", "pixtral"):
        inputs = _in_lines(kind, dtype)
    if family == "got_ocr2":
        inputs["pixel_values"] = inputs["pixel_values"].repeat(1, 1, 2, 2)  # its pictures are 64 x 64
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # all of it is prefix
    return inputs


def _without_line_breaks(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """LLaVA-NeXT-Video's videos: three frames pooled to 2 x 2 tokens, one after the other."""
    draw = torch.Generator().manual_seed(3)
    frames = torch.randn(sum(map(len, KINDS[kind])), 3, 3, 16, 16, generator=draw).to(dtype)
    ids = _padded([[[VIDEO] * 12] * len(sizes) for sizes in KINDS[kind]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values_videos": frames}


def _in_lines(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mistral 3 and Pixtral: pictures padded to one size, a token at the end of every line."""
    sizes = [size for row in KINDS[kind] for size in row]
    draw = torch.Generator().manual_seed(3)
    high, wide = (max(size[n] for size in sizes) for n in (0, 1))
    ids = _padded([[[*[IMAGE] * (w // 8), BREAK] * (h // 8) for h, w in row] for row in KINDS[kind]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(len(sizes), 3, high, wide, generator=draw).to(dtype),
        "image_sizes": torch.tensor(sizes),
    }


def _padded(pictures: Sequence[Sequence[list[int]]]) -> Tensor:
    """Ids of rows that hold these pictures between words, left-padded."""
    rows = []
    for number, parts in enumerate(pictures):
        row = [1, 10 + number, 11]
        for part in parts:
            row += [START, *part, END, 15]
        rows.append([*row, 20 + number, 21, 22][: None if number else -1])
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


def positions_of(family: str, model: Any, inputs: dict[str, Tensor], mask: Tensor, newest: int) -> Tensor:
    """The position ids of the `newest` columns of `mask` [B, L], text all of them, after the prompt `inputs`."""
    if family in QWEN:
        return positions_behind(model, inputs, mask)[..., -newest:]
    return text_positions(mask)[:, -newest:]


def prefill_positions(family: str, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The position ids of a prompt, for callers that do not let `generate` count them."""
    if family in QWEN:
        return {"position_ids": rope_index(model, inputs)[0]}
    return {"position_ids": text_positions(inputs["attention_mask"])}


def seen_columns(model: Any, inputs: dict[str, Tensor], reports: Sequence[Any], structure: Tensor | None) -> Tensor:
    """The columns of a prompt that are left: bool [B, L]."""
    seen = inputs["attention_mask"].bool().clone()
    starts: dict[int, int] = {}
    for report in reports:
        places = visual_columns(model, inputs["input_ids"], structure)[report.sample].nonzero().squeeze(-1)
        begin = starts.get(report.sample, 0)
        columns = places[begin : begin + report.tokens_before]
        starts[report.sample] = begin + report.tokens_before
        seen[report.sample, columns] = False
        seen[report.sample, columns[report.kept]] = True
    return seen


def negated(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompt about other pictures."""
    return {name: -value if name.startswith("pixel_values") else value for name, value in inputs.items()}


def conversation(family: str, first: dict[str, Tensor], said: Tensor, second: dict[str, Tensor]) -> dict[str, Tensor]:
    """A first prompt, what was `said` [B, L] up to the answer's end, and a second prompt, as one prompt: pictures row
    by row."""
    ids = torch.cat([said, second["input_ids"]], 1)
    answer = said.shape[1] - first["input_ids"].shape[1]
    masks = [torch.nn.functional.pad(first["attention_mask"], (0, answer), value=1), second["attention_mask"]]
    whole = {"input_ids": ids, "attention_mask": torch.cat(masks, 1)}
    for name in {"mm_token_type_ids", "token_type_ids"} & set(second):
        whole[name] = torch.cat([torch.nn.functional.pad(first[name], (0, answer)), second[name]], 1)
    turns = [turn for turn in (first, second) if "pixel_values" in turn]
    if family in ("idefics3", "smolvlm"):  # [rows, pictures, ...]
        return {**whole, "pixel_values": torch.cat([turn["pixel_values"] for turn in turns], 1)}
    counts = [(turn["input_ids"] == 15).sum(-1).tolist() for turn in turns]  # a word of its own behind each
    for name in {"pixel_values", "image_grid_thw", "image_sizes"} & set(second):
        parts = [iter(_each(name, turn)) for turn in turns]
        rows = zip(*counts, strict=True)
        ordered = [next(part) for row in rows for part, count in zip(parts, row, strict=True) for _ in range(count)]
        whole[name] = torch.cat(ordered) if name == "pixel_values" else torch.stack(ordered)
    if any("batch_num_images" in turn for turn in turns):  # by turns: a picture among others is not cut into tiles
        whole["batch_num_images"] = torch.tensor(
            [number for row in zip(*counts, strict=True) for number in row if number]
        )
    return whole


def _each(name: str, turn: dict[str, Tensor]) -> Sequence[Tensor]:
    """What belongs to every picture of a turn."""
    value = turn[name]
    if name == "pixel_values":
        grids = turn.get("image_grid_thw")
        return torch.split(value, 1 if grids is None else grids.prod(-1).tolist())
    return torch.unbind(value)


def new_turn(family: str, model: Any, whole: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `generate` is given for a second turn on the cache of the first: all ids, the new pictures only."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    given = {name: value for name, value in whole.items() if name not in names}
    given |= {name: second[name] for name in names if name in second}
    if family in QWEN:  # `generate` cannot count positions of pictures whose grids it is not given
        text = text_positions(whole["attention_mask"])[None]
        given["position_ids"] = torch.cat([text, rope_index(model, whole)[0]])
    return given


def words_alone(family: str) -> dict[str, Tensor]:
    """A prompt of two rows without a picture."""
    ids = torch.tensor([[0, 0, 1, 40, 41], [1, 50, 51, 52, 53]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs_of(family, "padded")):
        inputs[name] = torch.zeros_like(ids)
    return inputs


@contextmanager
def of_kind(name: str, sizes: list[list[tuple[int, int]]]) -> Iterator[str]:
    """A kind of batch for the length of the block."""
    with patch.dict(KINDS, {name: sizes}):
        yield name
