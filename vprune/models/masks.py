"""Attention masks over what is stored, built without a glance at the values (no host sync while decoding)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.cache import LogicalStaticLayer, logical, note_newest, stored_length, widened

DENSE_BACKENDS = ("eager", "sdpa")
_ADDITIVE_BACKENDS = (*DENSE_BACKENDS, "flex_attention")


def attention_mask_4d(valid: Tensor, bias: Tensor | None, queries: int, backend: str, dtype: torch.dtype) -> Tensor:
    """The causal mask [B, 1, queries, N] of the last `queries` of N rows: bool for sdpa without a bias, else additive.

    `valid` bool [B, N]; `bias` [B, N] is added where a row may be seen.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    own = index[length - queries :, None]
    # A padding row sees itself, and nobody else sees it: a row that sees nothing would be not-a-number in some kernels.
    allowed = (valid[:, None, None] & (index <= own)) | (index == own)
    if bias is None and backend == "sdpa":
        return allowed
    shift = torch.zeros((), dtype=dtype, device=valid.device) if bias is None else bias[:, None, None].to(dtype)
    return torch.where(allowed, shift, _least(dtype))


def _least(dtype: torch.dtype) -> float:
    # Attention in float64 may take its softmax in float32, where the least float64 would be minus infinity.
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def new_rows_valid(mask: Any, queries: int, device: torch.device) -> Tensor | None:
    """Which of the `queries` newest rows are no padding, bool [B, queries], from whatever mask the caller passed.

    Raises:
        VPruneError: the mask is none of those that `generate` and ordinary callers pass.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -queries:].to(device=device, dtype=torch.bool)
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise VPruneError(f"attention_mask of {shape}: pruning needs the 2-D mask [batch, length] of the prompt, or none")


def padding_mask(mask: Any, seen: int) -> Tensor | None:
    """The 2-D mask [B, `seen`] that a finished mask over a static cache was made of, None if there is none.

    (`generate` finishes masks itself for such caches; the last query sees all that is no padding.)
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask if isinstance(mask, Tensor) else None
    last = mask[:, 0, -1, :seen]
    return last if mask.dtype == torch.bool else last == 0


def stored_mask(cache: Any, mask: Any, inputs: Tensor, backend: str, sliding: bool) -> Tensor | None:
    """The mask for `inputs` [B, Q, D] that are about to follow the rows of a pruned `cache`; `mask` is the caller's.

    None when one query sees every row and none is merged; 4-D for the dense backends; else the 2-D mask over all tokens
    seen, whose last columns are the rows stored (the contract of sliding windows).
    """
    layer = logical(cache)
    assert layer is not None
    batch, queries = inputs.shape[:2]
    # A single new token always sees itself: its own column of the mask carries no news. More of them may hold padding,
    # which the steps after them must go on hiding.
    newest = None if queries == 1 else new_rows_valid(mask, queries, inputs.device)
    if newest is not None:
        note_newest(cache, newest)
    if isinstance(layer, LogicalStaticLayer):
        return layer.static_mask(queries, backend, inputs.dtype)
    rows, stored = layer.rows, stored_length(cache)
    if rows.valid is None and rows.bias is None and queries == 1:
        return None
    valid = widened(rows.valid, batch, stored + queries, True, inputs.device)
    return finished_mask(valid, rows.bias, queries, layer.dropped, inputs, backend, sliding)


def layer_mask(
    valid: Tensor | None, bias: Tensor | None, stored: int, inputs: Tensor, backend: str, fits: int | None = None
) -> Tensor | Any | None:
    """The finished mask of a single layer, for `inputs` [B, Q, D] that follow `stored` rows; None where none is needed.

    `valid` bool and `bias` float32 [B, V] tell of the first V of the `stored` + Q rows; None: all valid, none merged.
    `fits`: the rows of a layer of fixed size, None for one that grows.
    """
    batch, queries = inputs.shape[:2]
    if fits is not None:
        seen = widened(valid, batch, stored + queries, True, inputs.device)
        if bias is not None:
            bias = widened(bias, batch, stored + queries, 0.0, inputs.device)
        dense = attention_mask_4d(seen, bias, queries, backend, inputs.dtype)
        hidden = False if dense.dtype == torch.bool else _least(dense.dtype)
        return torch.nn.functional.pad(dense, (0, fits - dense.shape[-1]), value=hidden)
    if bias is None and valid is None and (queries == 1 or "flash" in backend or (backend == "sdpa" and not stored)):
        return None
    seen = widened(valid, batch, stored + queries, True, inputs.device)
    if bias is not None:
        bias = widened(bias, batch, stored + queries, 0.0, inputs.device)
    elif "flash" in backend:
        return seen
    elif backend == "flex_attention":
        return block_mask(seen, queries)
    return attention_mask_4d(seen, bias, queries, backend, inputs.dtype)


def block_mask(valid: Tensor, queries: int) -> Any:
    """The causal mask of the last `queries` of the rows `valid` bool [B, N], as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = valid.shape

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query + length - queries
        return (valid[row, key] & (key <= own)) | (key == own)

    return create_block_mask(allowed, batch, None, queries, length, device=str(valid.device))


def prefill_mask(
    valid: Tensor, bias: Tensor | None, dropped: int, inputs: Tensor, backend: str, sliding: bool
) -> Tensor:
    """The mask for a shortened prefill `inputs` [B, K, D] over `valid` bool [B, S + K].

    2-D, as callers pass it, which leaves the choice of the fast path to the library; additive where sizes count.
    """
    if bias is None:
        return _over_tokens_seen(valid, dropped)
    return finished_mask(valid, bias, inputs.shape[1], dropped, inputs, backend, sliding)


def finished_mask(
    valid: Tensor, bias: Tensor | None, queries: int, dropped: int, inputs: Tensor, backend: str, sliding: bool
) -> Tensor:
    """The mask over `valid` bool [B, N], in the form that the backend takes.

    Raises:
        VPruneError: sizes of merged rows are to be added where the backend takes no additive mask.
    """
    if bias is not None:
        refuse_bias(backend, sliding)
        bias = widened(bias, valid.shape[0], valid.shape[1], 0.0, inputs.device)
    if bias is not None or (backend in DENSE_BACKENDS and not sliding):
        return attention_mask_4d(valid, bias, queries, backend, inputs.dtype)
    return _over_tokens_seen(valid, dropped)


def _over_tokens_seen(valid: Tensor, dropped: int) -> Tensor:
    return torch.nn.functional.pad(valid, (dropped, 0), value=False)


def refuse_bias(backend: str, sliding: bool) -> None:
    """Refuse `size_aware` where attention takes no additive mask.

    Raises:
        VPruneError: always then, naming the backends that do.
    """
    if backend not in _ADDITIVE_BACKENDS:
        raise VPruneError(
            f"size_aware=true with attention implementation {backend!r}: it takes no additive mask; "
            f"use one of {', '.join(_ADDITIVE_BACKENDS)} (model.set_attn_implementation('sdpa')) or size_aware=false"
        )
    if sliding:
        raise VPruneError(
            "size_aware=true on a decoder with sliding-window layers is not supported; use size_aware=false"
        )


def gathered_masks(masks: dict[str, Any], index: Tensor, inputs: Tensor) -> dict[str, Any]:
    """The finished masks per layer type [B, 1, L, L] that a model hands to its decoder, for a shorter prefill.

    `index` LongTensor [B, K] names the columns that stay (-1 = padding); who sees whom among them is as the model has
    laid it down.

    Raises:
        VPruneError: the masks are no tensors, or a cache holds earlier turns already.
    """
    own = torch.eye(index.shape[1], dtype=torch.bool, device=index.device)[None, None]
    padding = (index < 0)[:, None]
    place = index.clamp(min=0)[:, None]
    shorter: dict[str, Any] = {}
    for kind, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise VPruneError(
                f"attention mask {kind!r} is {type(mask).__name__}: this model's own masks can be shortened "
                "with attention implementations sdpa and eager only (model.set_attn_implementation('sdpa'))"
            )
        if mask.shape[-1] != mask.shape[-2]:
            raise VPruneError(
                f"the cache holds {mask.shape[-1] - mask.shape[-2]} rows already: this family can be pruned in its "
                "first turn only; pass the whole conversation with a new cache"
            )
        mask = mask.expand(index.shape[0], *mask.shape[1:])
        rows = mask.gather(2, place[..., None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        both = rows.gather(3, place[:, :, None].expand(-1, rows.shape[1], rows.shape[2], -1))
        hidden, seen = (False, True) if mask.dtype == torch.bool else (torch.finfo(inputs.dtype).min, 0.0)
        # A padding row sees itself, and nobody else sees it.
        shorter[kind] = both.masked_fill(padding[:, :, None], hidden).masked_fill(own & padding[..., None], seen)
    return shorter
