"""The oracle: the unpruned model over the whole prompt, where dropped tokens are masked out at every layer.

It shares no code with what it judges: embeddings are merged here, masks are built here, and no cache is used, so that
every step runs the whole sequence at its original positions. Merged rows are put in where they stand, log sizes added
to the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.exactness.agreement import generate

IMAGE_TOKEN = 4


@dataclass
class Sight:
    """What the full model is given: embeddings [B, L, D], columns that may be seen [B, L], and a bias on them [B,
    L]."""

    embeds: Tensor
    seen: Tensor
    bias: Tensor


def full_sight(model: Any, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None) -> Sight:
    """Everything, merged as the model itself merges it."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = torch.cat(list(model.model.get_image_features(pixel_values.to(embeds.dtype)).pooler_output))
            embeds = embeds.masked_scatter((input_ids == IMAGE_TOKEN)[..., None], features)
    return Sight(embeds, attention_mask.bool().clone(), torch.zeros_like(attention_mask, dtype=torch.float64))


def mean_of(rows: Tensor, importance: Tensor | None) -> Tensor:
    """The plain mean of rows [M, D], or the one weighted by their importance [M], if any of them has some."""
    if importance is None or not bool((importance > 0).any()):
        return rows.mean(0)
    share = importance.double().clamp(min=0) / importance.double().clamp(min=0).sum()
    return (share.to(rows.dtype)[:, None] * rows).sum(0)


def without_pruned(
    sight: Sight, input_ids: Tensor, reports: Sequence[Any], size_aware: bool = False, weighted: bool = False
) -> Sight:
    """Mask out what the reports say was dropped; rows that stand for several tokens become their mean."""
    embeds, seen, bias = sight.embeds.clone(), sight.seen.clone(), sight.bias.clone()
    starts: dict[int, int] = {}
    for report in reports:
        places = (input_ids[report.sample] == IMAGE_TOKEN).nonzero().squeeze(-1)
        begin = starts.get(report.sample, 0)
        columns = places[begin : begin + report.tokens_before]
        starts[report.sample] = begin + report.tokens_before
        seen[report.sample, columns] = False
        for row, place in enumerate(report.kept.tolist()):
            column = columns[place]
            members = columns[report.source == row]
            seen[report.sample, column] = True
            if len(members) > 1:
                told = report.importance is not None and weighted
                importance = report.importance.flatten()[report.source == row] if told else None
                embeds[report.sample, column] = mean_of(sight.embeds[report.sample, members], importance)
            if size_aware:
                bias[report.sample, column] = math.log(len(members))
    return Sight(embeds, seen, bias)


@contextmanager
def seeing(model: Any, sight: Sight) -> Iterator[None]:
    """Within the block the model (called without cache and pixels) sees only `sight` of its prompt."""
    batch, prompt, _ = sight.embeds.shape

    def before(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["inputs_embeds"]
        copies, total = given.shape[0] // batch, given.shape[1]
        embeds = torch.cat([sight.embeds.repeat_interleave(copies, 0), given[:, prompt:]], 1)
        seen = torch.nn.functional.pad(sight.seen.repeat_interleave(copies, 0), (0, total - prompt), value=True)
        bias = torch.nn.functional.pad(sight.bias.repeat_interleave(copies, 0), (0, total - prompt))
        allowed = seen[:, None, None] & torch.ones(total, total, dtype=torch.bool, device=seen.device).tril()
        mask = torch.where(allowed, bias[:, None, None].to(given.dtype), torch.finfo(torch.float32).min)
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}

    handle = model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def oracle_generate(model: Any, sight: Sight, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
    """`generate` of the full model that sees only `sight`."""
    with seeing(model, sight):
        return generate(
            model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **options,
        )
