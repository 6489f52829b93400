"""Tiny models of the true classes of other families, with random weights, and batches in the shapes their processors
make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    )


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    )


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [32, 32],
        "patch_size": [4, 4],
    }
    text = {"model_type": "qwen2", **TEXT}
    return InternVLForConditionalGeneration(
        InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    )


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration(Idefics3Config(**_idefics("llama")))


def smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration(SmolVLMConfig(**_idefics("llama")))


def _lined() -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    return {"text_config": {"model_type": "qwen2", **TEXT}, "vision_config": vision, "image_grid_pinpoints": pinpoints}


def llava_next() -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration(LlavaNextConfig(**_lined(), image_token_id=IMAGE))


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    shape = {"vision_feature_select_strategy": "default", "vision_aspect_ratio": "anyres_max_9"}
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(**_lined(), **shape, image_token_id=IMAGE, video_token_id=VIDEO)
    )


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {**_lined()["vision_config"], "model_type": "siglip_vision_model", "image_size": 32}
    vision["vision_use_head"] = False
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = {**TEXT, "head_dim": 8, "sliding_window": 256, "layer_types": kinds, "query_pre_attn_scalar": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_id=IMAGE)
    )


def _idefics(text: str) -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    return {
        "text_config": {"model_type": text, **TEXT},
        "vision_config": vision,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    }


QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
}
LINED = ("llava_next", "llava_onevision")
VIDEOS = (*QWEN, "llava_onevision")
# Sizes of the pictures of each row: rows of a batch differ in number and size, and a row may have none.
KINDS: dict[str, list[list[tuple[int, int]]]] = {
    "single": [[(32, 32)]],
    "padded": [[(32, 32)], [(48, 24)]],
    "several": [[(32, 32), (24, 40)]],
    "mixed": [[], [(24, 40)], [(32, 32), (16, 48)]],
}


def build(family: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """A lively random model of a family."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.35)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Layout:
    """What the rows of a batch hold: sizes of their pictures; more words before these and after, row by row; columns of
    padding on the left of all rows; frames of a video (0: as many as the family's tests have)."""

    sizes: Sequence[Sequence[tuple[int, int]]]
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    padding: int = 0
    frames: int = 0

    def padded(self, pictures: Sequence[Sequence[Sequence[int]]]) -> dict[str, Tensor]:
        """Ids and mask of rows whose pictures, one list of ids each, stand between words."""
        rows = []
        for number, parts in enumerate(pictures):
            more = [[*range(40, 40 + given[number])] if given else [] for given in (self.before, self.after)]
            row = [1, 10 + number, 11, *more[0], *(token for part in parts for token in part)]
            rows.append([*row, *more[1], *[20 + number, 21, 22][: None if number else -1]])
        width = max(map(len, rows)) + self.padding
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def batch(family: str, kind: str | Layout, dtype: torch.dtype, video: bool = False) -> dict[str, Tensor]:
    """A left-padded batch; families of fixed size see a picture as one 32 x 32 tile, InternVL large ones as several."""
    draw = torch.Generator().manual_seed(3)
    if family in LINED:
        return lined_batch(kind, dtype, video, build(family, dtype))
    layout = kind if isinstance(kind, Layout) else Layout(KINDS[kind])
    rows: list[list[list[int]]] = []
    pixels, grids = [], []
    visual, frames = (VIDEO, layout.frames or 2) if video else (IMAGE, 1)
    for sizes in layout.sizes:
        rows.append([])
        for h, w in sizes:
            tokens = 16
            if family in QWEN:
                grid = (frames, h // 4, w // 4)
                grids.append(grid)
                patches = grid[0] * grid[1] * grid[2]
                pixels.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=draw))
                tokens = patches // 4
            else:
                tiles = max(1, h // 32) * max(1, w // 32) if family == "internvl" else 1
                pixels += [torch.randn(3, 32, 32, generator=draw) for _ in range(tiles)]
                tokens *= tiles
            if video and family == "qwen3_vl":  # a run of its own for every frame
                run = [START, *[visual] * (tokens // frames), END]
                rows[-1].append([*(token for n in range(frames) for token in (12 + n, *run)), 14])
            else:
                rows[-1].append([START, *[visual] * tokens, END, 15])
    inputs = layout.padded(rows)
    ids = inputs["input_ids"]
    if family in QWEN:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if not pixels:
        return inputs
    if family in QWEN:
        inputs["pixel_values_videos" if video else "pixel_values"] = torch.cat(pixels).to(dtype)
        inputs["video_grid_thw" if video else "image_grid_thw"] = torch.tensor(grids)
    elif family in ("idefics3", "smolvlm"):
        most = max(len(sizes) for sizes in layout.sizes)
        stacked, place = torch.zeros(len(rows), most, 3, 32, 32), iter(pixels)
        for number, sizes in enumerate(layout.sizes):
            for image in range(len(sizes)):
                stacked[number, image] = next(place)
        inputs["pixel_values"] = stacked.to(dtype)
    else:
        inputs["pixel_values"] = torch.stack(pixels).to(dtype)
    return inputs


def lined_batch(kind: str | Layout, dtype: torch.dtype, video: bool, model: Any) -> dict[str, Tensor]:
    """A batch for models with line breaks, whose own code says how many rows a picture of some size becomes."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    draw = torch.Generator().manual_seed(3)
    layout = kind if isinstance(kind, Layout) else Layout(KINDS[kind])
    pictures = [size for sizes in layout.sizes for size in sizes]
    single = (
        [len(sizes) == 1 for sizes in layout.sizes for _ in sizes]
        if "onevision" in type(model).__name__.lower()
        else [True] * len(pictures)
    )
    inputs: dict[str, Tensor] = {}
    lengths: list[int] = []
    if video and pictures:
        frames = layout.frames or 3
        inputs["pixel_values_videos"] = torch.randn(len(pictures), frames, 3, 16, 16, generator=draw).to(dtype)
        lengths = [frames * 2 * 2 + 1] * len(pictures)
    elif pictures:
        points = model.config.image_grid_pinpoints
        tiles = [image_size_to_num_patches(size, points, 16) for size in pictures]
        inputs["pixel_values"] = torch.randn(len(pictures), max(tiles), 3, 16, 16, generator=draw).to(dtype)
        inputs["image_sizes"] = torch.tensor(pictures)
        if not all(single):
            inputs["batch_num_images"] = torch.tensor([len(sizes) for sizes in layout.sizes if sizes])
        with torch.no_grad():
            features = model.model.get_image_features(**inputs).pooler_output
        lengths = [len(rows) for rows in features]
    length = iter(lengths)
    visual = VIDEO if video else IMAGE
    return {**layout.padded([[[*[visual] * next(length), 15] for _ in sizes] for sizes in layout.sizes]), **inputs}


def rope_index(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Qwen's own positions of a prompt, [3, B, L], and how far text is behind its column after it, [B, 1]."""
    names = signature(model.model.get_rope_index).parameters
    found: tuple[Tensor, Tensor] = model.model.get_rope_index(
        **{name: value for name, value in inputs.items() if name in names}
    )
    return found


def positions_behind(model: Any, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Qwen's positions of a prompt and of the text behind it that `mask` [B, L] goes on with, [3, B, L].

    Text goes on from the prompt's last position, as in `generate`. (The model alone would go on from the largest one,
    which is another where a video has more frames than rows and columns.)
    """
    prompt, _ = rope_index(model, inputs)
    behind = mask[:, prompt.shape[-1] :].cumsum(-1)
    return torch.cat([prompt, (prompt[..., -1:] + behind).clamp(min=0)], -1)
