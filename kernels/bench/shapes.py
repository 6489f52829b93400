"""7B shapes with random weights and a picture of 7,000 visual tokens; tiny ones to try a script on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

TEXT_BEFORE, TEXT_AFTER = 16, 48


def onevision(tiny: bool) -> tuple[Any, dict[str, Tensor]]:
    """LLaVA-OneVision-7B's config, and a picture of 3 x 3 tiles: 729 + 81 x 82 visual tokens with its line breaks."""
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
    tower |= {"patch_size": 14, "image_size": 384}
    if tiny:
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        tower |= {"patch_size": 4, "image_size": 32}
    side = tower["image_size"]
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
        text_config={"model_type": "qwen2", **text_shape(tiny, 152000)},
        image_grid_pinpoints=[[side * rows, side * columns] for rows in range(1, 7) for columns in range(1, 7)],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_select_strategy="full",
        image_token_index=90 if tiny else 151646,
        video_token_index=91 if tiny else 151647,
    )
    return config, {
        "pixel_values": torch.randn(1, 10, 3, side, side),
        "image_sizes": torch.tensor([[3 * side, 3 * side]]),
    }


def qwen2vl(tiny: bool) -> tuple[Any, dict[str, Tensor]]:
    """Qwen2-VL-7B's config, and a picture of 168 x 168 patches: 84 x 84 visual tokens."""
    tower = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    if tiny:
        tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    side = 16 if tiny else 168
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3] if tiny else [16, 24, 24]}
    tokens = (90, 91, 92, 93) if tiny else (151655, 151656, 151652, 151653)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen2VLConfig(
        text_config={**text_shape(tiny, 152064), "rope_parameters": rope},
        vision_config=tower,
        **dict(zip(names, tokens, strict=True)),
    )
    return config, {
        "pixel_values": torch.randn(side * side, 3 * 2 * tower["patch_size"] ** 2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def text_shape(tiny: bool, vocabulary: int) -> dict[str, Any]:
    """Qwen2-7B's shape."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = (64, 96, 3, 4, 2) if tiny else (3584, 18944, 28, 28, 4)
    shape = dict(zip(names, sizes, strict=True))
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": 100 if tiny else vocabulary, "max_position_embeddings": 32768, **special, **shape}


FAMILIES: dict[str, Callable[[bool], tuple[Any, dict[str, Tensor]]]] = {"onevision": onevision, "qwen2vl": qwen2vl}


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


def complete(model: Any, brought: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of one row: text, as many placeholders as the model makes features of the picture, text."""
    device = next(model.parameters()).device
    inputs = {name: part.to(device) for name, part in brought.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        visual = sum(map(len, model.get_image_features(**inputs).pooler_output))
    image = model.config.image_token_id
    row = [*range(10, 10 + TEXT_BEFORE), *[image] * visual, *range(10, 10 + TEXT_AFTER)]
    ids = torch.tensor([row], device=device)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == image).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def bytes_by_hand(config: Any, stored: int, dtype: torch.dtype) -> int:
    """What a cache of `stored` tokens takes: a key and a value per token, layer and key-value head."""
    text = config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * width * dtype.itemsize * stored)
