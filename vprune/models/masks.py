"""Attention masks over what is stored, built without a glance at the values (no host sync while decoding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.cache import LogicalStaticLayer, StoredRows, logical, note_newest, stored_length, widened

DENSE_BACKENDS = ("eager", "sdpa")
_LOOKED_AT_ONCE = 2**27  # entries of a mask, at a byte each
_ADDITIVE_BACKENDS = (*DENSE_BACKENDS, "flex_attention")


@dataclass(frozen=True)
class Sight:
    """What a layer's queries see beside what is causal.

    `window`: only so many columns back, None = all; `columns` LongTensor [B, N]: where the rows stored and the new ones
    stood among all tokens seen; `among` bool [B, 1, Q, Q]: who sees whom among the new rows where the model has laid it
    down itself (pictures that see themselves both ways), None = causal.
    """

    window: int | None = None
    columns: Tensor | None = None
    among: Tensor | None = None

    @property
    def plain(self) -> bool:
        """True when nothing differs from the causal mask."""
        return self.window is None and self.among is None


PLAIN = Sight()


def attention_mask_4d(
    valid: Tensor, bias: Tensor | None, queries: int, backend: str, dtype: torch.dtype, sight: Sight = PLAIN
) -> Tensor:
    """The mask [B, 1, queries, N] of the last `queries` of N rows: bool for sdpa without a bias, else additive.

    `valid` bool [B, N]; `bias` [B, N] is added where a row may be seen.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    own = index[length - queries :, None]
    allowed = valid[:, None, None] & (index <= own)
    if sight.window is not None:
        assert sight.columns is not None
        since = sight.columns[:, None, length - queries :, None] - sight.window
        allowed = allowed & (sight.columns[:, None, None] > since)
    if sight.among is not None:
        allowed = torch.cat([allowed[..., : length - queries], sight.among], -1)
    # A padding row sees itself, and nobody else sees it: a row that sees nothing would be not-a-number in some kernels.
    allowed = allowed | (index == own)
    if bias is None and backend == "sdpa":
        return allowed
    shift = torch.zeros((), dtype=dtype, device=valid.device) if bias is None else bias[:, None, None].to(dtype)
    return torch.where(allowed, shift, least(dtype))


def least(dtype: torch.dtype) -> float:
    """What is added to the logits of what may not be seen."""
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
    return valid_of_finished(mask, seen)


def valid_of_finished(mask: Tensor, seen: int) -> Tensor:
    """What a finished mask [B, 1, Q, N] shows its last query of the first `seen` rows, bool [B, `seen`]."""
    last = mask[:, 0, -1, :seen]
    return last if mask.dtype == torch.bool else last == 0


def plainly_causal(mask: Tensor, valid: Tensor) -> Tensor:
    """Whether a finished mask [B, 1, L, N] over an empty cache of N rows hides what comes later or is padding, alone.

    bool [], on the mask's device; `valid` bool [B, L]: no padding. What padding sees makes no difference. (`generate`
    finishes such masks for caches of fixed size, and hands on what it was given in place of them.)
    """
    batch, _, length, rows = mask.shape
    seen = torch.nn.functional.pad(valid, (0, rows - length))[:, None, None]
    columns, step = torch.arange(rows, device=mask.device), max(1, _LOOKED_AT_ONCE // (batch * rows))
    found = []
    for first in range(0, length, step):
        part = slice(first, first + step)
        own = mask[:, :, part] if mask.dtype == torch.bool else mask[:, :, part] == 0
        expected = seen & (columns <= columns[part, None][: own.shape[2]])
        found.append(((own == expected) | ~valid[:, None, part, None]).all())
    return torch.stack(found).all()


def stored_mask(cache: Any, mask: Any, inputs: Tensor, backend: str) -> Tensor | None:
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
    return finished_mask(valid, rows.bias, queries, layer.dropped, inputs, backend)


def layer_mask(
    rows: StoredRows, stored: int, inputs: Tensor, backend: str, fits: int | None = None, sight: Sight = PLAIN
) -> Tensor | Any | None:
    """The finished mask of a single layer, for `inputs` [B, Q, D] that follow `stored` rows; None where none is needed.

    `rows` tells of the first of the `stored` + Q rows. `fits`: the rows of a layer of fixed size, None for one that
    grows. A layer with a window stores the last rows only.
    """
    batch, queries = inputs.shape[:2]
    length = stored + queries
    bias = None if rows.bias is None else widened(rows.bias, batch, length, 0.0, inputs.device)
    first_alone = queries == 1 or "flash" in backend or (backend == "sdpa" and not stored)
    if bias is None and rows.valid is None and fits is None and sight.plain and first_alone:
        return None
    seen = widened(rows.valid, batch, length, True, inputs.device)
    if bias is None and sight.plain and fits is None and backend not in DENSE_BACKENDS:
        return seen if "flash" in backend else block_mask(seen, queries)
    dense = attention_mask_4d(seen, bias, queries, backend, inputs.dtype, sight)
    if sight.window is not None:
        dense = dense[..., max(stored - sight.window + 1, 0) :]
    if fits is None:
        return dense
    hidden = False if dense.dtype == torch.bool else least(dense.dtype)
    return torch.nn.functional.pad(dense, (0, fits - dense.shape[-1]), value=hidden)


def block_mask(valid: Tensor, queries: int) -> Any:
    """The causal mask of the last `queries` of the rows `valid` bool [B, N], as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = valid.shape

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query + length - queries
        return (valid[row, key] & (key <= own)) | (key == own)

    return create_block_mask(allowed, batch, None, queries, length, device=str(valid.device))


def prefill_mask(valid: Tensor, bias: Tensor | None, dropped: int, inputs: Tensor, backend: str) -> Tensor:
    """The mask for a shortened prefill `inputs` [B, K, D] over `valid` bool [B, S + K].

    2-D, as callers pass it, which leaves the choice of the fast path to the library; additive where sizes count.
    """
    if bias is None:
        return over_tokens_seen(valid, dropped)
    return finished_mask(valid, bias, inputs.shape[1], dropped, inputs, backend)


def finished_mask(
    valid: Tensor, bias: Tensor | None, queries: int, dropped: int, inputs: Tensor, backend: str
) -> Tensor:
    """The mask over `valid` bool [B, N], in the form that the backend takes.

    Raises:
        VPruneError: sizes of merged rows are to be added where the backend takes no additive mask.
    """
    if bias is not None:
        refuse_bias(backend)
        bias = widened(bias, valid.shape[0], valid.shape[1], 0.0, inputs.device)
    if bias is not None or backend in DENSE_BACKENDS:
        return attention_mask_4d(valid, bias, queries, backend, inputs.dtype)
    return over_tokens_seen(valid, dropped)


def over_tokens_seen(valid: Tensor, dropped: int) -> Tensor:
    """The 2-D mask over all tokens seen, whose last columns are the rows stored."""
    return torch.nn.functional.pad(valid, (dropped, 0), value=False) if dropped else valid


def takes_bias(backend: str) -> bool:
    """True if attention takes an additive mask there, as `size_aware` needs it."""
    return backend in _ADDITIVE_BACKENDS


def refuse_bias(backend: str) -> None:
    """Refuse `size_aware` where attention takes no additive mask.

    Raises:
        VPruneError: always then, naming the backends that do.
    """
    if not takes_bias(backend):
        raise VPruneError(
            f"size_aware=true with attention implementation {backend!r}: it takes no additive mask; "
            f"use one of {', '.join(_ADDITIVE_BACKENDS)} (model.set_attn_implementation('sdpa')) or size_aware=false"
        )


def refuse_windows(backend: str) -> None:
    """Refuse layers that look back a limited way where masks cannot say which rows those are.

    Raises:
        VPruneError: always then, naming the backends that can.
    """
    if backend not in DENSE_BACKENDS:
        raise VPruneError(
            f"sliding-window layers with attention implementation {backend!r}: their masks cannot be pruned; "
            f"use one of {', '.join(DENSE_BACKENDS)} (model.set_attn_implementation('sdpa'))"
        )


def seen_among(mask: Any, index: Tensor | None, length: int, start: int | None) -> Tensor:
    """Who sees whom among the new rows, bool [B, 1, K, K], of a model's own finished mask for `length` of them.

    `index` LongTensor [B, K]: the new rows that stay (-1 = padding), None = all; `start`: the mask's column of the
    first of them, None where they are its last ones.

    Raises:
        VPruneError: the mask is no tensor that could be shortened.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise VPruneError(
            f"this model's own attention mask is {type(mask).__name__}: it can be shortened with attention "
            f"implementations {' and '.join(DENSE_BACKENDS)} only (model.set_attn_implementation('sdpa'))"
        )
    start = mask.shape[-1] - length if start is None else start
    own = (mask if mask.dtype == torch.bool else mask == 0)[..., start : start + length]
    if index is None:
        return own
    own = own.expand(index.shape[0], *own.shape[1:])
    place = index.clamp(min=0)[:, None]
    rows = own.gather(2, place[..., None].expand(-1, own.shape[1], -1, length))
    both = rows.gather(3, place[:, :, None].expand(-1, own.shape[1], place.shape[-1], -1))
    return both & (index >= 0)[:, None, None] & (index >= 0)[:, None, :, None]
