"""What a task of lmms-eval wishes for, as Hugging Face generation knows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_DEFAULT_NEW_TOKENS = 1024
_KNOWN = (
    *("until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"),
    "repetition_penalty",
)


def without_effect(wishes: Mapping[str, Any]) -> list[str]:
    """The wishes that mean nothing here, such as those that tasks have for one model family."""
    return [key for key in wishes if key not in _KNOWN and wishes[key] is not None]


def generation_of(model: Any, wishes: Mapping[str, Any], pad_token_id: int | None) -> Any:
    """The model's generation configuration with the task's wishes: greedy, unless a temperature above 0 is asked."""
    warm = float(wishes.get("temperature") or 0) > 0
    sample = warm and wishes.get("do_sample", True) is not False
    generation = copy.deepcopy(model.generation_config)
    generation.update(
        do_sample=sample,
        temperature=wishes["temperature"] if sample else None,
        top_p=wishes.get("top_p") if sample else None,
        top_k=wishes.get("top_k") if sample else None,
        num_beams=int(wishes.get("num_beams") or 1),
        repetition_penalty=wishes.get("repetition_penalty"),
        max_length=None,
        max_new_tokens=int(wishes.get("max_new_tokens") or wishes.get("max_gen_toks") or _DEFAULT_NEW_TOKENS),
        pad_token_id=pad_token_id,
    )
    return generation


def cut(text: str, wishes: Mapping[str, Any]) -> str:
    """An answer up to the first of the task's stopping texts, without blanks at its ends.

    >>> cut(" yes. Question: next?", {"until": ["Question:"]})
    'yes.'
    """
    until = wishes.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text.strip()
