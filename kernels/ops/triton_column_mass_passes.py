"""Column sums of a softmax over rows without a map of it in memory: scores are computed twice, or kept when few.

First pass, a program a block of keys, which stays in place while the query lines go by: of every line the block's
largest score m and the sum z of 2^(score - m). Then a line's blocks are put together: lse = log2 of its whole sum.
Second pass, the same programs: 2^(score - lse), added up over the lines. All sums have a fixed order, whatever the
batch.

Widths and strides come in units of UNIT numbers: that a product is a multiple of 8 is known when the kernel is
compiled, so loads are wide for heads of 72 as well.

A line is one query row of one head; the lines of the heads that share keys stand one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_keys(
    key: tl.tensor,
    column: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    key_n: tl.tensor,
    key_d: tl.tensor,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    d = tl.arange(0, BLOCK_D)
    places = key + column.to(tl.int64)[:, None] * (key_n * UNIT) + d[None, :] * key_d
    keys = tl.load(places, mask=(column < length)[:, None] & (d < width * UNIT)[None, :], other=0.0)
    return keys.to(tl.float32) if UPCAST else keys


@triton.jit
def _load_shift(
    key_bias: tl.tensor, key_valid: tl.tensor, offset: tl.tensor, column: tl.tensor, length: tl.tensor
) -> tl.tensor:
    """What is added to every key's scores: its bias, in powers of two, or -inf where it may not be seen."""
    real = column < length
    shift = tl.where(real, 0.0, float("-inf"))
    if key_bias is not None:
        shift += tl.load(key_bias + offset + column, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
    if key_valid is not None:
        shift = tl.where(tl.load(key_valid + offset + column, mask=real, other=0) != 0, shift, float("-inf"))
    return shift


@triton.jit
def _all_seen(
    rows: tl.tensor,
    row_valid: tl.tensor,
    offset: tl.tensor,
    count: tl.tensor,
    window: tl.tensor,
    first: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """True if every row that counts sees all columns of a block."""
    fewest = tl.full([], 2147483647, tl.int64)
    most = tl.full([], -2147483648, tl.int64)
    for start in range(0, count, 128):
        row = start + tl.arange(0, 128)
        counts = row < count
        if row_valid is not None:
            counts = counts & (tl.load(row_valid + offset + row, mask=counts, other=0) != 0)
        own = tl.load(rows + row, mask=counts, other=0).to(tl.int64)
        fewest = tl.minimum(fewest, tl.min(tl.where(counts, own, 2147483647), 0))
        most = tl.maximum(most, tl.max(tl.where(counts, own, -2147483648), 0))
    seen = fewest >= first + BLOCK_N - 1
    if window is not None:
        seen = seen & (most - window < first)
    return seen


@triton.jit
def _scores(
    query: tl.tensor,
    keys: tl.tensor,
    shift: tl.tensor,
    column: tl.tensor,
    line: tl.tensor,
    lines: tl.tensor,
    rows: tl.tensor,
    free: tl.tensor,
    count: tl.tensor,
    window: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    query_n: tl.tensor,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """The scores of a block of lines against a block of keys, in powers of two."""
    d = tl.arange(0, BLOCK_D)
    places = query + line.to(tl.int64)[:, None] * (query_n * UNIT) + d[None, :]
    queries = tl.load(places, mask=(line < lines)[:, None] & (d < width * UNIT)[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * factor + shift[None, :]
    if rows is not None and not free:
        own = tl.load(rows + line % count, mask=line < lines, other=0)
        seen = column[None, :] <= own[:, None]
        if window is not None:
            seen = seen & (column[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def first_pass(
    query: tl.tensor,  # [B, G, lines, D], without gaps in D
    key: tl.tensor,  # [B, G, N, D]
    rows: tl.tensor,  # [B, count] or None
    row_valid: tl.tensor,  # [B, count] or None
    key_valid: tl.tensor,  # [B, N] or None
    key_bias: tl.tensor,  # [B, N] or None
    peaks: tl.tensor,  # [B, G, blocks, lines]
    sums: tl.tensor,  # [B, G, blocks, lines]
    kept: tl.tensor,  # [B, G, lines, N] or None
    lines: tl.tensor,
    count: tl.tensor,
    rows_b: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    window: tl.tensor,
    query_b: tl.tensor,
    query_g: tl.tensor,
    query_n: tl.tensor,
    key_b: tl.tensor,
    key_g: tl.tensor,
    key_n: tl.tensor,
    key_d: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Of every line and block of keys the largest score and the sum of 2^(score - that)."""
    block = tl.program_id(0)
    group, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = sample * tl.num_programs(1) + group
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query += (sample * query_b + group * query_g) * UNIT
    keys = _load_keys(
        key + (sample * key_b + group * key_g) * UNIT, column, length, width, key_n, key_d, BLOCK_D, UNIT, UPCAST
    )
    shift = _load_shift(key_bias, key_valid, sample * length, column, length)
    free = True
    if rows is not None:
        rows += sample * rows_b
        free = _all_seen(rows, row_valid, sample * rows_b, count, window, block * BLOCK_N, BLOCK_N)
    for start in range(0, lines, BLOCK_R):
        line = start + tl.arange(0, BLOCK_R)
        scores = _scores(
            query,
            keys,
            shift,
            column,
            line,
            lines,
            rows,
            free,
            count,
            window,
            width,
            factor,
            query_n,
            BLOCK_D,
            UNIT,
            UPCAST,
        )
        peak = tl.max(scores, 1)
        total = tl.sum(tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
        place = (slot * tl.num_programs(0) + block) * lines + line
        tl.store(peaks + place, peak, mask=line < lines)
        tl.store(sums + place, total, mask=line < lines)
        if kept is not None:
            places = kept + (slot * lines + line)[:, None] * length + column[None, :]
            tl.store(places, scores, mask=(line < lines)[:, None] & (column < length)[None, :])


@triton.jit
def join_blocks(
    peaks: tl.tensor,  # [B, G, blocks, lines]
    sums: tl.tensor,  # [B, G, blocks, lines]
    row_valid: tl.tensor,  # [B, R] or None
    lse: tl.tensor,  # [B, G, lines]
    blocks: tl.tensor,
    lines: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    all_rows: tl.tensor,
    heads: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """log2 of every line's sum; with the number of lines in it for a mean, infinite for a line that is not to count."""
    sample = tl.program_id(2).to(tl.int64)
    slot = sample * tl.num_programs(1) + tl.program_id(1)
    line = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (line < lines)[None, :]
    best = tl.full([BLOCK_L], float("-inf"), tl.float32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        places = (slot * blocks + block)[:, None] * lines + line[None, :]
        mask = inside & (block < blocks)[:, None]
        best = tl.maximum(best, tl.max(tl.load(peaks + places, mask=mask, other=float("-inf")), 0))
    level = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros([BLOCK_L], dtype=tl.float32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        places = (slot * blocks + block)[:, None] * lines + line[None, :]
        mask = inside & (block < blocks)[:, None]
        peak = tl.load(peaks + places, mask=mask, other=float("-inf"))
        total += tl.sum(tl.load(sums + places, mask=mask, other=0.0) * tl.exp2(peak - level[None, :]), 0)
    level += tl.log2(total)
    counts = best != float("-inf")
    number = tl.full([], 0, tl.int32) + all_rows
    if row_valid is not None:
        row_valid += sample * all_rows
        counts = counts & (tl.load(row_valid + first + line % count, mask=line < lines, other=0) != 0)
        number = tl.full([], 0, tl.int32)
        for start in range(0, all_rows, 128):
            row = start + tl.arange(0, 128)
            number += tl.sum((tl.load(row_valid + row, mask=row < all_rows, other=0) != 0).to(tl.int32), 0)
    if MEAN:
        level += tl.log2((tl.maximum(number, 1) * heads).to(tl.float32))
    tl.store(lse + slot * lines + line, tl.where(counts, level, float("inf")), mask=line < lines)


@triton.jit
def second_pass(
    query: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    row_valid: tl.tensor,
    key_valid: tl.tensor,
    key_bias: tl.tensor,
    kept: tl.tensor,
    lse: tl.tensor,  # [B, G, lines]
    out: tl.tensor,  # [B, slices, N]
    slices: tl.tensor,
    first_slice: tl.tensor,
    lines: tl.tensor,
    count: tl.tensor,
    rows_b: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    window: tl.tensor,
    query_b: tl.tensor,
    query_g: tl.tensor,
    query_n: tl.tensor,
    key_b: tl.tensor,
    key_g: tl.tensor,
    key_n: tl.tensor,
    key_d: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """2^(score - lse) of every key, pooled over the lines of a group."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first pass read last is still in the cache
    group, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = sample * tl.num_programs(1) + group
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    free = True
    if kept is None:
        query += (sample * query_b + group * query_g) * UNIT
        keys = _load_keys(
            key + (sample * key_b + group * key_g) * UNIT, column, length, width, key_n, key_d, BLOCK_D, UNIT, UPCAST
        )
        shift = _load_shift(key_bias, key_valid, sample * length, column, length)
        if rows is not None:
            rows += sample * rows_b
            free = _all_seen(rows, row_valid, sample * rows_b, count, window, block * BLOCK_N, BLOCK_N)
    # One number for each line of a block: adding up across lines in every step would cost more than the exponentials.
    pooled = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for start in range(0, lines, BLOCK_R):
        line = start + tl.arange(0, BLOCK_R)
        if kept is None:
            scores = _scores(
                query,
                keys,
                shift,
                column,
                line,
                lines,
                rows,
                free,
                count,
                window,
                width,
                factor,
                query_n,
                BLOCK_D,
                UNIT,
                UPCAST,
            )
        else:
            places = kept + (slot * lines + line)[:, None] * length + column[None, :]
            inside = (line < lines)[:, None] & (column < length)[None, :]
            scores = tl.load(places, mask=inside, other=float("-inf"))
        level = tl.load(lse + slot * lines + line, mask=line < lines, other=float("inf"))
        weights = tl.exp2(scores - level[:, None])
        if MEAN:
            pooled += weights
        else:
            pooled = tl.maximum(pooled, weights)
    mass = tl.sum(pooled, 0) if MEAN else tl.max(pooled, 0)
    place = (sample * slices + first_slice + group) * length + column
    tl.store(out + place, mass, mask=column < length)


@triton.jit
def join_slices(
    parts: tl.tensor,  # [B, slices, N]
    out: tl.tensor,  # [B, N]
    slices: tl.tensor,
    length: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The groups (and portions of rows) of a sample pooled, one after the other."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(1).to(tl.int64)
    pooled = tl.zeros([BLOCK_N], dtype=tl.float32)
    for one in range(slices):
        part = tl.load(parts + (sample * slices + one) * length + column, mask=column < length, other=0.0)
        if MEAN:
            pooled += part
        else:
            pooled = tl.maximum(pooled, part)
    tl.store(out + sample * length + column, pooled, mask=column < length)
