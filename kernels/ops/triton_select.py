"""Ordered top-K selection in one launch, a program a row: the K-th score is found bit by bit, nothing is sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.reference import chosen_width
from vprune.kernels.triton_launch import on_device_of, operation

_LONGEST = 65536  # a row stays in one program's registers


@triton.jit
def _select_row(
    scores: tl.tensor,  # [B, N]
    counts: tl.tensor,  # [B] or None
    count: tl.tensor,
    ties: tl.tensor,  # [B, N] or None
    valid: tl.tensor,  # [B, N] or None
    out: tl.tensor,  # [B, K]
    length: tl.tensor,
    width: tl.tensor,
    scores_b: tl.tensor,
    scores_n: tl.tensor,
    ties_b: tl.tensor,
    ties_n: tl.tensor,
    valid_b: tl.tensor,
    valid_n: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < length
    if valid is not None:
        marks = tl.load(valid + row * valid_b + column * valid_n, mask=real, other=0)
        real = real & (marks != 0)
    score = tl.load(scores + row * scores_b + column * scores_n, mask=column < length, other=0.0).to(tl.float32)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)  # minus zero equals zero, their bits do not
    bits = score.to(tl.int32, bitcast=True)
    merit = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    taken = tl.sum(real.to(tl.int32), 0)
    if counts is not None:
        count = tl.load(counts + row).to(tl.int32)
    taken = tl.maximum(0, tl.minimum(tl.minimum(taken, count), width))
    # The largest number that at least `taken` columns reach; over all 32 bits, so in 64.
    reached = tl.full([], 0, tl.int64)
    for step in range(32):
        candidate = reached + (tl.full([], 1, tl.int64) << (31 - step))
        enough = tl.sum((real & (merit >= (candidate - 2147483648).to(tl.int32))).to(tl.int32), 0) >= taken
        reached = tl.where(enough, candidate, reached)
    threshold = (reached - 2147483648).to(tl.int32)
    above = real & (merit > threshold)
    equal = real & (merit == threshold)
    missing = taken - tl.sum(above.to(tl.int32), 0)
    # Among equals the same search over ranks turned round; ranks are distinct, so it ends at exactly as many.
    if ties is not None:
        rank = tl.load(ties + row * ties_b + column * ties_n, mask=column < length, other=0).to(tl.int32)
    else:
        rank = column
    worth = (1 << BITS) - 2 - rank
    reached_rank = tl.full([], 0, tl.int32)
    for step in range(BITS):
        candidate_rank = reached_rank + (tl.full([], 1, tl.int32) << (BITS - 1 - step))
        enough = tl.sum((equal & (worth >= candidate_rank)).to(tl.int32), 0) >= missing
        reached_rank = tl.where(enough, candidate_rank, reached_rank)
    kept = above | (equal & (worth >= reached_rank) & (missing > 0))
    place = width - taken + tl.cumsum(kept.to(tl.int32), 0) - 1
    own = out + row * width
    tl.store(own + place, column.to(tl.int64), mask=kept & (place < width))
    for first in range(0, width - taken, BLOCK):
        tl.store(own + first + column, tl.full([BLOCK], -1, tl.int64), mask=first + column < width - taken)


@operation("vprune::select")
def _select(
    scores: Tensor, counts: Tensor | None, count: int, width: int, ties: Tensor | None, valid: Tensor | None
) -> Tensor:
    batch, length = scores.shape
    out = torch.empty((batch, width), dtype=torch.long, device=scores.device)
    if out.numel():
        block = max(16, triton.next_power_of_2(length))
        with on_device_of(scores):
            _select_row[(batch,)](
                scores,
                None if counts is None else counts.contiguous(),
                count,
                ties,
                None if valid is None else valid.view(torch.int8),
                out,
                length,
                width,
                *scores.stride(),
                *((0, 0) if ties is None else ties.stride()),
                *((0, 0) if valid is None else valid.stride()),
                BITS=max(1, length.bit_length()) + 1,
                BLOCK=block,
                num_warps=max(1, min(32, block // 256)),
            )
    return out


@_select.register_fake
def _(
    scores: Tensor, counts: Tensor | None, count: int, width: int, ties: Tensor | None, valid: Tensor | None
) -> Tensor:
    return scores.new_empty((scores.shape[0], width), dtype=torch.long)


def row_problem(scores: Tensor) -> str | None:
    """Why the kernel cannot search these rows, None if it can."""
    if scores.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"scores are {scores.dtype}, the kernel compares float32"
    if scores.shape[1] > _LONGEST:
        return f"rows have {scores.shape[1]} scores, the kernel takes {_LONGEST} at most"
    return None


def select(
    scores: Tensor,
    count: int | Tensor,
    *,
    width: int | None = None,
    ties: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The columns of the highest scores, ascending, left-padded with -1; see `reference.select`."""
    width = chosen_width(count, width)
    ties = None if ties is None else ties.expand(scores.shape)
    counts, number = (count, 0) if isinstance(count, Tensor) else (None, count)
    index: Tensor = _select(scores, counts, number, width, ties, valid)
    return index
