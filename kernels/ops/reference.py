"""The operations in plain torch: what every kernel must equal."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512  # bounds the score matrix of `column_mass` to heads x 512 x keys, whatever the number of rows


def column_mass(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    key_bias: Tensor | None = None,
    window: int | None = None,
    pool: str = "mean",
) -> Tensor:
    """Attention that every key receives from some query rows, pooled over heads and rows, without an N x N map.

    mass_j = pool over heads h and rows i of softmax_j(scale * q_hi . k_hj + bias_j).

    Args:
        query: [B, H, R, D].
        key: [B, G, N, D] with H a multiple of G (grouped queries).
        scale: of the logits, 1 / sqrt(D) as a rule.
        rows: LongTensor [B, R], the column of every query row, which sees the columns up to its own; None = all
            columns.
        row_valid: bool [B, R], rows that count.
        key_valid: bool [B, N], keys that may be seen.
        key_bias: [B, N], added to the logits.
        window: with `rows`, only the last `window` columns are seen.
        pool: "mean" or "max".

    Returns:
        [B, N] in float32 (float64 for float64 inputs); 0 where nothing may be seen.
    """
    batch, heads, count, _ = query.shape
    groups, length = key.shape[1], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(dtype).transpose(-1, -2).unsqueeze(2)  # [B, G, 1, D, N]
    allowed = torch.ones((batch, 1, length), dtype=torch.bool, device=query.device)
    if key_valid is not None:
        allowed = allowed & key_valid[:, None]
    columns = torch.arange(length, device=query.device)
    total = torch.zeros((batch, length), dtype=dtype, device=query.device)
    for start in range(0, count, _ROWS_AT_ONCE):
        part = slice(start, min(count, start + _ROWS_AT_ONCE))
        queries = query[:, :, part].to(dtype).reshape(batch, groups, heads // groups, -1, query.shape[-1])
        logits = (queries @ keys).reshape(batch, heads, -1, length) * scale
        if key_bias is not None:
            logits = logits + key_bias[:, None, None].to(dtype)
        seen = allowed
        if rows is not None:
            own = rows[:, part, None]
            seen = seen & (columns <= own)
            if window is not None:
                seen = seen & (columns > own - window)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        peak = logits.amax(-1, keepdim=True)
        weights = (logits - torch.where(peak.isinf(), 0.0, peak)).exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        if row_valid is not None:
            weights = weights * row_valid[:, None, part, None]
        total = torch.maximum(total, weights.amax((1, 2))) if pool == "max" else total + weights.sum((1, 2))
    if pool == "max":
        return total
    counted = row_valid.sum(-1, keepdim=True).clamp(min=1) if row_valid is not None else count
    return total / (counted * heads)


def compact(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather rows into a shorter, left-padded batch.

    Args:
        tokens: [B, L, D].
        index: LongTensor [B, K], the row to stand at each place, -1 = padding.

    Returns:
        [B, K, D], zeros where the index is -1.
    """
    gathered = tokens.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1]))
    return gathered.masked_fill((index < 0)[..., None], 0)


def recycle(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of groups of rows: out_m = sum over the m-th group of weight_s * token_s.

    Accumulates in float32 (float64 for float64 tokens), group by group, so that the result does not depend on the
    batch.

    Args:
        tokens: [T, D].
        source: LongTensor [S], rows of `tokens`, group after group.
        lengths: LongTensor [M], all at least 1, sum S.
        weights: [S].

    Returns:
        [M, D] in the dtype of `tokens`.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    shares = tokens[source].to(dtype) * weights.to(dtype)[:, None]
    return torch.segment_reduce(shares, "sum", lengths=lengths, axis=0).to(tokens.dtype)
