"""How the patches of a vision tower become visual tokens: squares of them are merged, by a side that configs name."""

from __future__ import annotations

import math
from typing import Any

_SIDES = (
    ("vision_config", "spatial_merge_size"),  # Qwen-VL
    (None, "spatial_merge_size"),  # Mistral 3
    (None, "downsample_factor"),  # Aya Vision, Cohere 2 Vision
    (None, "scale_factor"),  # Idefics3, SmolVLM
    ("vision_config", "hidden_stride"),  # Ovis 2
)


def known_side(model_config: Any, patches: int) -> int | None:
    """The side s of the squares of s x s patches that become one visual token, in a tower of `patches` per image.

    None if the config names none.
    """
    for part, name in _SIDES:
        side = getattr(getattr(model_config, part, None) if part else model_config, name, None)
        if isinstance(side, int):
            return side
    if isinstance(ratio := getattr(model_config, "downsample_ratio", None), float):  # InternVL
        return round(1 / ratio)
    if isinstance(tokens := getattr(model_config, "mm_tokens_per_image", None), int):  # Gemma 3
        return round(math.sqrt(patches / tokens))
    return None


def merge_side(model_config: Any, patches: int) -> int:
    """The same, 1 where the config names none."""
    return known_side(model_config, patches) or 1


def merged_grid(model_config: Any, height: int, width: int) -> tuple[int, int]:
    """The grid of visual tokens that a grid of height x width patches becomes."""
    side = merge_side(model_config, height * width)
    if isinstance(getattr(getattr(model_config, "vision_config", None), "hidden_stride", None), int):
        return -(-height // side), -(-width // side)  # Ovis 2 fills the last squares up; the others leave them out
    return height // side, width // side
