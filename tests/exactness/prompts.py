"""Prompts of every kind that a batch may hold."""

from __future__ import annotations

from typing import Any

import torch

from tests.conftest import picture

KINDS = ("single", "padded", "several", "mixed")


def chat(processor: Any, question: str, images: int = 1, first: bool = True) -> str:
    """One user turn with `images` pictures before the question."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text if first else text.removeprefix("<s>")


def batch(processor: Any, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of one kind: a single sample; a left-padded batch; several images in a sample; one with a text-only row
    (the longest)."""
    texts = {
        "single": [chat(processor, "what is the red circle ?")],
        "padded": [chat(processor, "what is the red circle ?"), chat(processor, "where ?")],
        "several": [chat(processor, "count the square of blue ?", 2), chat(processor, "where ?", 1)],
        "mixed": [chat(processor, "where ?"), chat(processor, "no " * 60, 0)],
    }[kind]
    images = [picture(seed) for seed in range(sum(text.count("<image>") for text in texts))]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return dict(inputs)
