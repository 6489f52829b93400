"""Rotary embeddings of projected rows, scaled and shifted on the way: read once, written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.triton_launch import on_device_of, operation

_TILE = 2048  # numbers of half a head that one program holds


@triton.jit
def _rotate_rows(
    rows: tl.tensor,  # [B, N, H * D]
    cos: tl.tensor,  # [B, N, D]
    sin: tl.tensor,  # [B, N, D]
    factor: tl.tensor,  # [B, N]
    bias: tl.tensor,  # [H * D]
    out: tl.tensor,  # [B, N, H * D], contiguous
    length: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    rows_b: tl.tensor,
    rows_n: tl.tensor,
    rows_d: tl.tensor,
    cos_b: tl.tensor,
    cos_n: tl.tensor,
    cos_d: tl.tensor,
    sin_b: tl.tensor,
    sin_n: tl.tensor,
    sin_d: tl.tensor,
    factor_b: tl.tensor,
    factor_n: tl.tensor,
    bias_d: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    dtype = out.dtype.element_ty
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = row.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < length)[:, None] & (d < half)
    turned = cos + sample * cos_b + place * cos_n + d * cos_d
    cos_first = tl.load(turned, mask=inside, other=0).to(tl.float32)
    cos_second = tl.load(turned + half * cos_d, mask=inside, other=0).to(tl.float32)
    turned = sin + sample * sin_b + place * sin_n + d * sin_d
    sin_first = tl.load(turned, mask=inside, other=0).to(tl.float32)
    sin_second = tl.load(turned + half * sin_d, mask=inside, other=0).to(tl.float32)
    for head in range(heads):
        own = 2 * head * half + d
        source = rows + sample * rows_b + place * rows_n + own * rows_d
        first = tl.load(source, mask=inside, other=0).to(tl.float32)
        second = tl.load(source + half * rows_d, mask=inside, other=0).to(tl.float32)
        if factor is not None:
            scale = tl.load(factor + sample * factor_b + place * factor_n, mask=(row < length)[:, None], other=0)
            first, second = first * scale.to(tl.float32), second * scale.to(tl.float32)
        if bias is not None:
            first += tl.load(bias + own * bias_d, mask=d < half, other=0).to(tl.float32)
            second += tl.load(bias + (own + half) * bias_d, mask=d < half, other=0).to(tl.float32)
        # Rounded wherever the model's own layer rounds, so that both agree to the bit.
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        across = (second * sin_first).to(dtype).to(tl.float32)
        left = (first * cos_first).to(dtype).to(tl.float32) - across
        across = (first * sin_second).to(dtype).to(tl.float32)
        right = (second * cos_second).to(dtype).to(tl.float32) + across
        target = out + (sample * length + place) * (2 * heads * half) + own
        tl.store(target, left.to(dtype), mask=inside)
        tl.store(target + half, right.to(dtype), mask=inside)


@operation("vprune::rotate")
def _rotate(rows: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, length, width = rows.shape
    out = torch.empty((batch, length, width), dtype=rows.dtype, device=rows.device)
    half = cos.shape[-1] // 2
    if out.numel():
        block_d = triton.next_power_of_2(half)
        block_n = max(1, min(_TILE // block_d, triton.next_power_of_2(length)))
        with on_device_of(rows):
            _rotate_rows[(triton.cdiv(length, block_n), batch)](
                rows,
                cos,
                sin,
                factor,
                bias,
                out,
                length,
                width // cos.shape[-1],
                half,
                *rows.stride(),
                *cos.expand(batch, -1, -1).stride(),
                *sin.expand(batch, -1, -1).stride(),
                *((0, 0) if factor is None else factor.stride()[:2]),
                0 if bias is None else bias.stride(0),
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=False,  # a sum of two rounded products would be rounded once
            )
    return out


@_rotate.register_fake
def _(rows: Tensor, cos: Tensor, sin: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape)


def rotation_problem(rows: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel cannot rotate these rows, None if it can."""
    if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"rows are {rows.dtype}, the kernel computes in float32"
    if not rows.dtype == cos.dtype == sin.dtype:
        return f"rows are {rows.dtype}, cosines and sines {cos.dtype} and {sin.dtype}; the kernel takes one dtype"
    return None


def rotate(
    rows: Tensor, cos: Tensor, sin: Tensor, *, factor: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Projected rows as rotated heads; see `reference.rotate`."""
    rotated: Tensor = _rotate(rows, cos, sin, factor, bias)
    heads = rows.shape[-1] // cos.shape[-1]
    return rotated.view(*rows.shape[:2], heads, cos.shape[-1]).transpose(1, 2)
