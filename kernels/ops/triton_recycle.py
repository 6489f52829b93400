"""Weighted sums of groups of rows, every row read once, in an order that depends on the group alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.triton_launch import on_device_of, operation, row_block

_UNROLL = 8  # rows whose loads are in flight at once
_WARP_BYTES = 512  # 32 threads with loads of 16 bytes


@triton.jit
def _sum_groups(
    tokens: tl.tensor,  # [T, D]
    source: tl.tensor,  # [S]
    ends: tl.tensor,  # [M], one past the last member of every group
    weights: tl.tensor,  # [S]
    out: tl.tensor,  # [M, D]
    width: tl.tensor,
    tokens_t: tl.tensor,
    tokens_d: tl.tensor,
    ACCUMULATOR: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    chunks = tl.cdiv(width, BLOCK_D)
    # Chunks of one group run side by side, so that a row's bytes are asked for together.
    group = (tl.program_id(0) // chunks).to(tl.int64)
    d = (tl.program_id(0) % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = d < width
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros([BLOCK_D], dtype=ACCUMULATOR)
    for first in range(start, end, UNROLL):
        member = first + tl.arange(0, UNROLL)
        row = tl.load(source + member, mask=member < end, other=0).to(tl.int64)
        weight = tl.load(weights + member, mask=member < end, other=0).to(ACCUMULATOR)
        places = tokens + row[:, None] * tokens_t + d[None, :] * tokens_d
        values = tl.load(places, mask=(member < end)[:, None] & within[None, :], other=0, eviction_policy="evict_first")
        total += tl.sum(weight[:, None] * values.to(ACCUMULATOR), 0)
    tl.store(out + group * width + d, total.to(out.dtype.element_ty), mask=within)


@operation("vprune::recycle")
def _recycle(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    groups, width, size = lengths.shape[0], tokens.shape[1], tokens.element_size()
    out = torch.empty((groups, width), dtype=tokens.dtype, device=tokens.device)
    if out.numel():
        # One warp and 16 bytes a thread in any case: another share of the columns could add up in another order.
        block_d = row_block(width, size, _WARP_BYTES)
        with on_device_of(tokens):
            _sum_groups[(groups * triton.cdiv(width, block_d),)](
                tokens,
                source.contiguous(),
                lengths.cumsum(0),
                weights.contiguous(),
                out,
                width,
                *tokens.stride(),
                ACCUMULATOR=tl.float64 if tokens.dtype == torch.float64 else tl.float32,
                UNROLL=_UNROLL,
                BLOCK_D=block_d,
                num_warps=1,
            )
    return out


@_recycle.register_fake
def _(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    return tokens.new_empty((lengths.shape[0], tokens.shape[1]))


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    tokens, source, lengths, weights = ctx.saved_tensors
    group = torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(
        lengths, output_size=source.shape[0]
    )
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    spread = gradient.to(dtype)[group]
    to_tokens = to_weights = None
    if ctx.needs_input_grad[0]:
        to_tokens = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)
        to_tokens = to_tokens.index_add(0, source, spread * weights.to(dtype)[:, None]).to(tokens.dtype)
    if ctx.needs_input_grad[3]:
        to_weights = (tokens[source].to(dtype) * spread).sum(-1).to(weights.dtype)
    return to_tokens, None, None, to_weights


_recycle.register_autograd(_backward, setup_context=_remember)


def number_problem(tokens: Tensor) -> str | None:
    """Why the kernel cannot add up elements of this dtype, None if it can."""
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return None if tokens.dtype in known else f"{tokens.dtype} has no kernel, only {', '.join(map(str, known))} do"


def recycle(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of groups of rows; see `reference.recycle`."""
    result: Tensor = _recycle(tokens, source, lengths, weights)
    return result
