"""True architectures at full size with random weights, and prompts of any number of visual tokens; tiny ones to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError

TEXT_BEFORE, TEXT_AFTER = 16, 48
KINDS = ("image", "video")
_LARGEST_PICTURE = 7290  # visual tokens; more of them are several pictures, as no processor makes larger ones
_FRAME = 729  # visual tokens of a video frame of the Qwen2-VL shapes, at most
_SEPARATOR = 9  # a token of text between two pictures, which M-RoPE counts as two only then


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts: `inputs` for the model; `pixels`: the part of them that the vision tower reads.

    `tokens`: visual tokens a sample; `others`: the rest of its rows, text and line breaks; `runs`: placeholders of each
    picture of a sample, line breaks included; `layout` says in words what was put in.
    """

    inputs: dict[str, Tensor]
    pixels: dict[str, Tensor]
    kind: str
    tokens: int
    runs: tuple[int, ...]
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, tokens of each)."""
        batch, length = self.inputs["input_ids"].shape
        return batch, length

    @property
    def others(self) -> int:
        """Rows of a sample that are no visual tokens: text and line breaks."""
        return self.shape[1] - self.tokens


@dataclass(frozen=True)
class Vision:
    """What the tower reads for a batch, and what it makes of it; see `Prompt`."""

    pixels: dict[str, Tensor]
    tokens: int
    runs: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class Architecture:
    """A model's config, by whether it is to be a tiny one, and the pixels for (config, kind, visual tokens, batch)."""

    config: Callable[[bool], Any]
    vision: Callable[[Any, str, int, int], Vision]


def onevision_config(tiny: bool) -> Any:
    """LLaVA-OneVision-7B's."""
    import transformers

    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
    tower |= {"patch_size": 14, "image_size": 384}
    if tiny:
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        tower |= {"patch_size": 4, "image_size": 32}
    side = tower["image_size"]
    config: Any = transformers.LlavaOnevisionConfig
    return config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
        text_config={"model_type": "qwen2", **_text(tiny, 152000, 3584, 18944, 28, 28, 4)},
        image_grid_pinpoints=[[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_select_strategy="full",
        image_token_index=90 if tiny else 151646,
        video_token_index=91 if tiny else 151647,
    )


def onevision_vision(config: Any, kind: str, tokens: int, batch: int) -> Vision:
    """Pictures of 3 x 3 tiles and an overview where they come out even, else single crops; a video's frames, pooled.

    A line of the tiles, a crop and a video end with a learned row each, which is no visual token.
    """
    pixels, side = (
        int(config.vision_config.image_size),
        config.vision_config.image_size // config.vision_config.patch_size,
    )
    if kind == "video":
        frame = math.ceil(side / 2) ** 2
        frames = max(1, round(tokens / frame))
        brought = {"pixel_values_videos": torch.randn(batch, frames, 3, pixels, pixels)}
        return Vision(brought, frames * frame, (frames * frame + 1,), f"1 video of {frames} frames")
    crop = side * side
    crops = max(1, round(tokens / crop))
    if crops % 10 == 0:
        count, size, run, layout = crops // 10, 3 * pixels, crop + 3 * side * (3 * side + 1), "of 10 crops"
    else:
        count, size, run, layout = crops, pixels, crop + 1, "of 1 crop"
    brought = {
        "pixel_values": torch.randn(batch * count, crops // count, 3, pixels, pixels),
        "image_sizes": torch.full((batch * count, 2), size),
    }
    if layout == "of 1 crop":
        # Told of several pictures in one sample, the model does not cut them into tiles.
        brought["batch_num_images"] = torch.tensor([max(2, batch * count)])
    return Vision(brought, crops * crop, (run,) * count, f"{count} picture{'s' * (count > 1)} {layout}")


def qwen2vl_config(
    tiny: bool, sizes: Sequence[int] = (3584, 18944, 28, 28, 4), vocabulary: int = 152064, tied: bool = False
) -> Any:
    """Qwen2-VL-7B's, or that of its sibling with these `sizes`."""
    import transformers

    tower = {"depth": 32, "embed_dim": 1280, "hidden_size": sizes[0], "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    if tiny:
        tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3] if tiny else [16, 24, 24]}
    ids = (90, 91, 92, 93) if tiny else (151655, 151656, 151652, 151653)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config: Any = transformers.Qwen2VLConfig
    return config(
        text_config={**_text(tiny, vocabulary, *sizes), "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config=tower,
        tie_word_embeddings=tied,
        **dict(zip(names, ids, strict=True)),
    )


def qwen2vl_2b_config(tiny: bool) -> Any:
    """Qwen2-VL-2B's."""
    return qwen2vl_config(tiny, (1536, 8960, 28, 12, 2), 151936, True)


def qwen2vl_vision(config: Any, kind: str, tokens: int, batch: int) -> Vision:
    """Pictures of at most 7,290 visual tokens, as square as they come out; a video of frames of at most 729."""
    most = _FRAME if kind == "video" else _LARGEST_PICTURE
    count = max(1, math.ceil(tokens / most))
    h, w = _rectangle(round(tokens / count))
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    values = 3 * config.vision_config.temporal_patch_size * patch**2
    frames, pictures = (count, 1) if kind == "video" else (1, count)
    rows = frames * h * w * merge**2
    grids = torch.tensor([[frames, h * merge, w * merge]] * (batch * pictures))
    drawn = torch.randn(batch * pictures * rows, values)
    if kind == "video":
        brought = {"pixel_values_videos": drawn, "video_grid_thw": grids}
        return Vision(brought, frames * h * w, (frames * h * w,), f"1 video of {frames} frames of {h} x {w}")
    brought = {"pixel_values": drawn, "image_grid_thw": grids}
    return Vision(brought, pictures * h * w, (h * w,) * pictures, f"{pictures} of {h} x {w}")


ARCHITECTURES = {
    "onevision-7b": Architecture(onevision_config, onevision_vision),
    "qwen2vl-7b": Architecture(qwen2vl_config, qwen2vl_vision),
    "qwen2vl-2b": Architecture(qwen2vl_2b_config, qwen2vl_vision),
}


def _text(
    tiny: bool, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int
) -> dict[str, Any]:
    """The decoder's shape."""
    sizes = (64, 96, 3, 4, 2) if tiny else (hidden, intermediate, layers, heads, groups)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "vocab_size": 100 if tiny else vocabulary,
        "max_position_embeddings": 32768,
        **special,
        **dict(zip(names, sizes, strict=True)),
    }


def _rectangle(count: int) -> tuple[int, int]:
    """The most square (h, w) of so many."""
    h = next(side for side in range(math.isqrt(count), 0, -1) if count % side == 0)
    return h, count // h


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on the device itself."""
    import transformers

    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


def visual_tokens(architecture: Architecture, config: Any, kind: str, tokens: int) -> int:
    """How many visual tokens a sample has that was asked for `tokens`: those of whole pictures, or whole frames.

    Raises:
        VPruneError: one picture has many more.
    """
    with torch.device("meta"):
        count = architecture.vision(config, kind, tokens, 1).tokens
    if abs(count - tokens) > tokens / 2:
        raise VPruneError(f"tokens={tokens}: the smallest {kind} of this model has {count} visual tokens")
    return count


def make_prompt(model: Any, architecture: Architecture, kind: str, tokens: int, batch: int) -> Prompt:
    """A batch of text, the pictures or video of about `tokens` visual tokens, and text again, on the model's device."""
    weight = next(model.parameters())
    torch.manual_seed(0)
    with weight.device:  # drawn where they are read
        seen = architecture.vision(model.config, kind, tokens, batch)
    pixels = {
        name: part.to(weight.device, weight.dtype if part.is_floating_point() else None)
        for name, part in seen.pixels.items()
    }
    placeholder = model.config.video_token_id if kind == "video" else model.config.image_token_id
    row = [*range(10, 10 + TEXT_BEFORE)]
    for number, run in enumerate(seen.runs):
        row += [_SEPARATOR] * (number > 0) + [placeholder] * run
    row += range(10, 10 + TEXT_AFTER)
    ids = torch.tensor([row] * batch, device=weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels or "video_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (ids == placeholder).int() * (2 if kind == "video" else 1)
    return Prompt(inputs, pixels, kind, seen.tokens, seen.runs, seen.layout)


def visual_rows(model: Any, prompt: Prompt) -> Tensor:
    """What the vision tower and the projector make of a batch's pixels, [samples, placeholders, width]."""
    batch = prompt.shape[0]
    if prompt.kind == "image":
        found = model.get_image_features(**prompt.pixels).pooler_output
    else:
        pixels, *more = prompt.pixels.items()  # (releases differ in what they call the first)
        found = model.get_video_features(pixels[1], **dict(more)).pooler_output
    rows: Tensor = found.flatten(0, -2) if isinstance(found, Tensor) else torch.cat(list(found))
    return rows.reshape(batch, -1, rows.shape[-1])


def as_short(model: Any, prompt: Prompt, length: int) -> dict[str, Tensor]:
    """The same prompts with so few visual rows that `length` are left: the text's embeddings, and the first rows.

    Raises:
        VPruneError: shorter than the text alone.
    """
    rows, ids = visual_rows(model, prompt), prompt.inputs["input_ids"]
    few = length - TEXT_BEFORE - TEXT_AFTER
    if few < 0:
        raise VPruneError(f"a prompt of {length} tokens has no room for {TEXT_BEFORE + TEXT_AFTER} tokens of text")
    text = model.get_input_embeddings()(torch.cat([ids[:, :TEXT_BEFORE], ids[:, -TEXT_AFTER:]], 1))
    embeds = torch.cat([text[:, :TEXT_BEFORE], rows[:, :few], text[:, TEXT_BEFORE:]], 1)
    return {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=ids.device),
    }


def bytes_of_row(config: Any, dtype: torch.dtype) -> int:
    """What a cache takes for one token of one sample: a key and a value per layer and key-value head, in bytes."""
    text = config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * width * dtype.itemsize)
