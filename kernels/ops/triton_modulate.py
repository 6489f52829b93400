"""Frames normed as wholes, scaled, shifted and through a SiLU: two launches, many programs to each frame."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.triton_launch import on_device_of, operation

_BLOCK = 2048  # numbers that one program takes


@triton.jit
def _moments(
    x: tl.tensor,  # [F, S], contiguous
    parts: tl.tensor,  # [F, 2, P]: of each part of a frame the mean, and the squares of what differs from it
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    frame, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    count = tl.num_programs(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    values = tl.load(x + frame * size + place, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(values) / tl.minimum(size - part * BLOCK, BLOCK)
    apart = tl.where(inside, values - mean, 0.0)
    tl.store(parts + frame * 2 * count + part, mean)
    tl.store(parts + (frame * 2 + 1) * count + part, tl.sum(apart * apart))


@triton.jit
def _modulated(
    x: tl.tensor,  # [F, S], contiguous
    parts: tl.tensor,  # [F, 2, P]
    gain: tl.tensor,  # [F, C]
    offset: tl.tensor,  # [F, C]
    out: tl.tensor,  # [F, S], contiguous
    size: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    gain_f: tl.tensor,
    gain_c: tl.tensor,
    offset_f: tl.tensor,
    offset_c: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    frame, count = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    part = tl.arange(0, BLOCK_P)
    here = part < count
    numbers = tl.where(here, tl.minimum(size - part * BLOCK, BLOCK), 0).to(tl.float32)
    means = tl.load(parts + frame * 2 * count + part, mask=here, other=0)
    mean = tl.sum(numbers * means) / size
    squares = tl.load(parts + (frame * 2 + 1) * count + part, mask=here, other=0)
    variance = tl.sum(squares + numbers * (means - mean) * (means - mean)) / size
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, channel = place < size, place % channels
    values = tl.load(x + frame * size + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(gain + frame * gain_f + channel * gain_c, mask=inside, other=0).to(tl.float32)
    shift = tl.load(offset + frame * offset_f + channel * offset_c, mask=inside, other=0).to(tl.float32)
    values = (values - mean) * (1.0 / tl.sqrt(variance + eps)) * scale + shift
    values = values / (1.0 + tl.exp(-values))
    tl.store(out + frame * size + place, values.to(out.dtype.element_ty), mask=inside)


@operation("vprune::modulate")
def _modulate(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        frames, size = len(x), x[0].numel()
        count = triton.cdiv(size, _BLOCK)
        parts = torch.empty((frames, 2, count), dtype=torch.float32, device=x.device)
        with on_device_of(x):
            _moments[(count, frames)](x, parts, size, BLOCK=_BLOCK, num_warps=8)
            _modulated[(count, frames)](
                x,
                parts,
                gain,
                offset,
                out,
                size,
                x.shape[-1],
                eps,
                *gain.expand(frames, -1).stride(),
                *offset.expand(frames, -1).stride(),
                BLOCK=_BLOCK,
                BLOCK_P=triton.next_power_of_2(count),
                num_warps=8,
            )
    return out


@_modulate.register_fake
def _(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def modulation_problem(x: Tensor) -> str | None:
    """Why the kernel cannot norm these frames, None if it can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"frames are {x.dtype}, the kernel computes in float32"
    return None


def modulate(x: Tensor, gain: Tensor, offset: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Frames normed, scaled, shifted and through a SiLU; see `reference.modulate`."""
    modulated: Tensor = _modulate(x, gain, offset, eps)
    return modulated
