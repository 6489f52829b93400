"""The operations in plain torch: what every kernel must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import embedding_bag, layer_norm, silu

from vprune.errors import VPruneError

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
    counted = row_valid.sum(-1, keepdim=True).clamp(min=1) if row_valid is not None else max(count, 1)
    return total / (counted * heads)


def compact(tokens: Tensor, index: Tensor, *, padded: bool = True) -> Tensor:
    """Gather rows into a shorter, left-padded batch.

    Args:
        tokens: [B, L, D].
        index: LongTensor [B, K], the row to stand at each place, -1 = padding.
        padded: False where the caller knows that there is none.

    Returns:
        [B, K, D], zeros where the index is -1.
    """
    places = index.clamp(min=0) if padded else index
    if tokens.shape[0] > 1:
        places = places + torch.arange(tokens.shape[0], device=tokens.device)[:, None] * tokens.shape[1]
    gathered = tokens.flatten(0, 1).index_select(0, places.flatten()).view(*index.shape, -1)
    return gathered.masked_fill_((index < 0)[..., None], 0) if padded else gathered


def compact_batch(
    tokens: Tensor, index: Tensor, positions: Tensor, masks: Tensor | None = None, *, padded: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shorten a batch: the same rows of its embeddings, position ids and masks.

    Args:
        tokens: [B, L, D].
        index: LongTensor [B, K], the row to stand at each place, -1 = padding.
        positions: integers [B, L], or [P, B, L] for rotations with P coordinates; one row may serve all samples.
        masks: bool [B, L] or [M, B, L], None when there are none.
        padded: False where the caller knows that there is no padding.

    Returns:
        [B, K, D], [B, K] or [P, B, K], [B, K] or [M, B, K]. Padding has zeros, the position of column 0, and False.

    Example:
        >>> tokens, index = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[-1, 0, 2]])
        >>> compact_batch(tokens, index, torch.tensor([[7, 8, 9]]))[1]
        tensor([[7, 7, 9]])
    """
    places = index.clamp(min=0) if padded else index
    positions = _columns(positions, places)
    if masks is not None:
        masks = _columns(masks, places)
        masks = masks & (index >= 0) if padded else masks
    return compact(tokens, index, padded=padded), positions, masks


def _columns(per_column: Tensor, places: Tensor) -> Tensor:
    places = places.expand(*per_column.shape[:-2], *places.shape)
    return per_column.expand(*places.shape[:-1], per_column.shape[-1]).gather(-1, places)


def compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gather the same rows of the keys and values of many layers into shorter, left-padded ones.

    Args:
        keys: a layer each, [B, G, L, D], all of one shape and dtype.
        values: the same for the values.
        index: LongTensor [B, K], the row to stand at each place, -1 = padding.

    Returns:
        Keys and values, a layer each, [B, G, K, D], zeros where the index is -1; those of one device share storage.

    Example:
        >>> key = torch.arange(3.0).view(1, 1, 3, 1)
        >>> compact_kv([key], [-key], torch.tensor([[0, 2]]))[1][0].flatten()
        tensor([0., -2.])
    """

    def shorter(stored: Tensor) -> Tensor:
        places = index.to(stored.device)[:, None, :, None]
        rows = stored.gather(2, places.clamp(min=0).expand(-1, stored.shape[1], -1, stored.shape[3]))
        return rows.masked_fill(places < 0, 0)

    return [shorter(key) for key in keys], [shorter(value) for value in values]


def modulate(x: Tensor, gain: Tensor, offset: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Frames normed as wholes, scaled and shifted channel by channel, and through a SiLU.

    silu(gain_c (x - mean) / sqrt(variance + eps) + offset_c), mean and variance over all numbers of a frame (a group
    norm of one group, arXiv 1803.08494; modulated as in FiLM, arXiv 1709.07871).

    Args:
        x: [F, ..., C].
        gain: [F or 1, C].
        offset: the same.
        eps: added to the variance.

    Returns:
        The shape and dtype of x.

    Example:
        >>> modulate(torch.tensor([[[1.0], [-1.0]]]), torch.zeros(1, 1), torch.ones(1, 1)).flatten()
        tensor([0.7311, 0.7311])
    """
    gain, offset = (one.view(one.shape[0], *(1,) * (x.ndim - 2), -1) for one in (gain, offset))
    return silu(torch.addcmul(offset, layer_norm(x, x.shape[1:], eps=eps), gain))


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
    starts = lengths.cumsum(0) - lengths
    bags = embedding_bag(source, tokens.to(dtype), starts, mode="sum", per_sample_weights=weights.to(dtype))
    return bags.to(tokens.dtype)


def scaled(rows: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """Factor * rows + bias in the dtype of the rows [B, N, D], with a factor [B, N, 1] and a bias [D] where given."""
    if factor is None:
        return rows if bias is None else rows + bias
    made = rows * factor if bias is None else torch.addcmul(bias, rows, factor)
    return made.to(rows.dtype)


def rotate(
    rows: Tensor, cos: Tensor, sin: Tensor, *, factor: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Projected rows as rotated heads, scaled and shifted before.

    y * cos + (-y_2, y_1) * sin, y = factor * x + bias of a row x, y_1 and y_2 the halves of each head's part of it
    (RoPE, arXiv 2104.09864). y and both products are rounded to the dtype of the rows, as a model's own layers do.

    Args:
        rows: [B, N, H * D].
        cos: [B or 1, N, D].
        sin: the same.
        factor: float32 [B, N, 1], None = 1.
        bias: [H * D], None = 0.

    Returns:
        [B, H, N, D].

    Example:
        >>> rotate(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)).flatten()
        tensor([-2.,  1.])
    """
    rows = scaled(rows, factor, bias)
    x = rows.view(*rows.shape[:2], rows.shape[-1] // cos.shape[-1], cos.shape[-1])
    first, second = x.chunk(2, -1)
    across = torch.cat([-second, first], -1).mul_(sin[:, :, None])
    rotated: Tensor = (x * cos[:, :, None]).add_(across)
    return rotated.transpose(1, 2)


def select(
    scores: Tensor,
    count: int | Tensor,
    *,
    width: int | None = None,
    ties: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The columns of the highest scores, in their own order, without asking the device for anything.

    Args:
        scores: [B, N]; not-a-number counts as the least.
        count: how many to take of every row: an int, or LongTensor [B]; no more are taken than are valid.
        width: K, the columns of the result; needed when `count` is a tensor, which may not exceed it.
        ties: LongTensor [N] or [B, N], distinct ranks 0..N-1: of equal scores the one of the lowest rank is taken
            first, None = the leftmost.
        valid: bool [B, N], columns that may be taken.

    Returns:
        LongTensor [B, K]: the columns taken, ascending, left-padded with -1.

    Example:
        >>> select(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), torch.tensor([2, 1]), width=2)
        tensor([[ 1,  2],
                [-1,  0]])
    """
    batch, length = scores.shape
    width = chosen_width(count, width)
    whole = valid is None and isinstance(count, int) and 0 < width <= min(count, length)
    clear = _clear_choice(scores, width) if whole else None
    if clear is not None:
        return clear
    columns = torch.arange(length, device=scores.device)
    merit = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    by_rank = (columns if ties is None else inverse(ties)).expand(batch, -1)
    order = by_rank.gather(-1, merit.gather(-1, by_rank).argsort(dim=-1, descending=True, stable=True))
    if whole:
        return order[:, :width].sort(-1).values
    if valid is not None:  # the valid ones first, their order unchanged
        order = order.gather(-1, valid.gather(-1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
    available = torch.full((batch, 1), length, device=scores.device) if valid is None else valid.sum(-1, keepdim=True)
    asked = count.to(scores.device)[:, None] if isinstance(count, Tensor) else count
    taken = available.clamp(max=asked).clamp(min=0, max=width)
    kept = torch.zeros((batch, length), dtype=torch.bool, device=scores.device).scatter(-1, order, columns < taken)
    places = torch.where(kept, width - taken + kept.cumsum(-1) - 1, width)
    # Columns that are not taken go to a place of their own behind the last one, which is cut off again.
    index = torch.full((batch, width + 1), -1, dtype=torch.long, device=scores.device)
    return index.scatter(-1, places, columns.expand(batch, -1))[:, :width]


def _clear_choice(scores: Tensor, width: int) -> Tensor | None:
    """`select` where no two scores meet at the border and a look costs no waiting: it needs no order; else None."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64) or is_compiling():
        return None
    taken = scores >= scores.topk(width, sorted=False).values.amin(-1, keepdim=True)
    return taken.nonzero()[:, 1].view(-1, width) if bool((taken.sum(-1) == width).all()) else None


def inverse(ranks: Tensor) -> Tensor:
    """Who has each rank, LongTensor [..., N]: the inverse of a permutation, without sorting it."""
    numbers = torch.arange(ranks.shape[-1], device=ranks.device)
    return torch.empty_like(ranks).scatter_(-1, ranks, numbers.expand_as(ranks))


def chosen_width(count: int | Tensor, width: int | None) -> int:
    """The columns that `select` returns.

    Raises:
        VPruneError: `count` is a tensor and `width` is not given, or a number is negative.
    """
    if width is None:
        if isinstance(count, Tensor):
            raise VPruneError("select: count is a tensor, so width, the most that any row takes, must be given")
        width = count
    if width < 0 or (isinstance(count, int) and count < 0):
        raise VPruneError(f"select: count={count} width={width}: give 0 or above")
    return width
