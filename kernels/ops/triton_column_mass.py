"""Attention that every key receives: the passes of `triton_column_mass_passes` put together."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vprune.errors import VPruneError
from vprune.kernels import triton_column_mass_passes as passes
from vprune.kernels.triton_launch import INTERPRETED, on_device_of, operation

_MOST_WIDTH = 256
# Scores of so few lines are written and read again for less than the keys weigh: 8 bytes a line and key, against 2 D
# bytes a key for reading it a second time.
_FEW_LINES = 32
_PARTIAL_BYTES = 2**26  # bounds what the first pass leaves of one sample, by taking many rows in portions
_POOLS = ("mean", "max")


class _Blocks(NamedTuple):
    """Sizes of a program's share: the same whatever the batch, so that no sample's bits depend on the others."""

    lines: int
    keys: int
    width: int

    @classmethod
    def fitting(cls, lines: int, length: int, width: int, element_size: int) -> _Blocks:
        columns = max(16, triton.next_power_of_2(width))
        # Keys and two blocks of lines of two programs share a multiprocessor's memory.
        keys = min(128, max(32, 32768 // (columns * element_size)))
        most = 64 if columns * element_size <= 512 else 32
        fits = max(16, triton.next_power_of_2(length))
        return cls(min(most, max(16, triton.next_power_of_2(lines))), min(keys, fits), columns)

    def threads(self, element_size: int) -> dict[str, int]:
        """How a pass is launched: two programs share a multiprocessor, one multiplies while the other exponentiates."""
        if self.lines < 64:
            return {"num_warps": 4, "num_stages": 2}
        fits_twice = self.width * element_size <= 256
        return {"num_warps": 8, "num_stages": 2} | ({"maxnreg": 128} if fits_twice else {})


@operation("vprune::column_mass")
def _column_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    rows: Tensor | None,
    row_valid: Tensor | None,
    key_valid: Tensor | None,
    key_bias: Tensor | None,
    window: int | None,
    pool: str,
) -> Tensor:
    (batch, heads, all_rows, width), (groups, length) = query.shape, key.shape[1:3]
    device, mean = query.device, pool == "mean"
    if not (batch and heads and all_rows and length):
        return torch.zeros((batch, length), device=device)
    together = heads // groups
    blocks = _Blocks.fitting(together * all_rows, length, width, key.element_size())
    threads = blocks.threads(key.element_size())
    tiles = triton.cdiv(length, blocks.keys)
    portion = min(all_rows, max(64, _PARTIAL_BYTES // (tiles * heads * 8)))
    starts = range(0, all_rows, portion)
    slices = len(starts) * groups
    parts = torch.empty((batch, slices, length), dtype=torch.float32, device=device)
    for number, first in enumerate(starts):
        part = slice(first, min(all_rows, first + portion))
        count = part.stop - first
        lines = together * count
        queries = query[:, :, part].reshape(batch, groups, lines, width)
        queries = queries if queries.stride(3) == 1 else queries.contiguous()
        peaks, sums = torch.empty((2, batch, groups, tiles, lines), dtype=torch.float32, device=device)
        lse = torch.empty((batch, groups, lines), dtype=torch.float32, device=device)
        few = lines <= _FEW_LINES
        kept = torch.empty((batch, groups, lines, length), dtype=torch.float32, device=device) if few else None
        own = None if rows is None else rows[:, part]
        counted = None if row_valid is None else row_valid[:, part]
        strides = (*queries.stride()[:3], *key.stride()[:3])
        unit = 8 if all(stride % 8 == 0 for stride in (width, *strides)) else 1
        sizes = (lines, count, all_rows, length, width // unit, scale * math.log2(math.e), window)
        strides = (*(stride // unit for stride in strides), key.stride(3))
        # The interpreter multiplies bfloat16 as the integers that it holds them in.
        upcast = INTERPRETED and query.dtype == torch.bfloat16
        shape = {
            "BLOCK_R": blocks.lines,
            "BLOCK_N": blocks.keys,
            "BLOCK_D": blocks.width,
            "UNIT": unit,
            "UPCAST": upcast,
        }
        inputs = (queries, key, own, counted, key_valid, key_bias)
        grid = (tiles, groups, batch)
        with on_device_of(query):
            passes.first_pass[grid](*inputs, peaks, sums, kept, *sizes, *strides, **shape, **threads)
            passes.join_blocks[(triton.cdiv(lines, 16), groups, batch)](
                *(peaks, sums, row_valid, lse, tiles, lines, first, count, all_rows, heads),
                MEAN=mean,
                BLOCK_L=16,
                BLOCK_B=64,
                num_warps=4,
            )
            passes.second_pass[grid](
                *(*inputs, kept, lse, parts, slices, number * groups, *sizes, *strides),
                **shape,
                MEAN=mean,
                **threads,
            )
    if slices == 1:
        return parts[:, 0]
    out = torch.empty((batch, length), dtype=torch.float32, device=device)
    with on_device_of(query):
        passes.join_slices[(triton.cdiv(length, 256), batch)](
            parts, out, slices, length, MEAN=mean, BLOCK_N=256, num_warps=4
        )
    return out


@_column_mass.register_fake
def _(
    query: Tensor,
    key: Tensor,
    scale: float,
    rows: Tensor | None,
    row_valid: Tensor | None,
    key_valid: Tensor | None,
    key_bias: Tensor | None,
    window: int | None,
    pool: str,
) -> Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


def attention_problem(query: Tensor, key: Tensor) -> str | None:
    """Why the kernel cannot serve these queries and keys, None if it can."""
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}, the kernel needs one dtype"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"queries are {query.dtype}, the kernel takes float16, bfloat16 and float32"
    if query.shape[3] > _MOST_WIDTH:
        return f"heads are {query.shape[3]} wide, the kernel takes {_MOST_WIDTH} at most"
    return None


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
    """Attention that every key receives from some query rows; see `reference.column_mass`.

    Raises:
        VPruneError: `pool` is unknown.
    """
    if pool not in _POOLS:
        raise VPruneError(f"pool={pool!r}: choose one of {', '.join(_POOLS)}")
    batch, count, length = query.shape[0], query.shape[2], key.shape[2]

    def laid_out(part: Tensor | None, columns: int) -> Tensor | None:
        if part is None:
            return None
        # (Converted, not viewed as bytes: inductor has no view of booleans.)
        part = part.to(torch.int8) if part.dtype == torch.bool else part
        return part.expand(batch, columns).contiguous()

    mass: Tensor = _column_mass(
        query,
        key,
        scale,
        laid_out(rows, count),
        laid_out(row_valid, count),
        laid_out(key_valid, length),
        laid_out(key_bias, length),
        None if rows is None else window,
        pool,
    )
    return mass
