"""Gathering rows into a shorter batch: embeddings, position ids and masks in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.triton_launch import as_words, on_device_of, operation, row_block

_TILE_BYTES = (
    16384  # a program's share: 128 threads with eight loads of 16 bytes in flight each hide the memory's delay
)
_MOST_ROWS = 64


@triton.jit
def _gather_rows(
    tokens: tl.tensor,  # [B, L, D]
    out: tl.tensor,  # [B, K, D]
    index: tl.tensor,  # [B, K]
    positions: tl.tensor,  # [P, B, L]
    positions_out: tl.tensor,  # [P, B, K]
    masks: tl.tensor,  # [M, B, L]
    masks_out: tl.tensor,  # [M, B, K]
    batch: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    position_rows: tl.tensor,
    mask_rows: tl.tensor,
    tokens_b: tl.tensor,
    tokens_l: tl.tensor,
    tokens_d: tl.tensor,
    index_b: tl.tensor,
    index_k: tl.tensor,
    positions_p: tl.tensor,
    positions_b: tl.tensor,
    positions_l: tl.tensor,
    masks_m: tl.tensor,
    masks_b: tl.tensor,
    masks_l: tl.tensor,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    chunks = tl.cdiv(width, BLOCK_D)
    # Chunks of one row run side by side, so that its bytes are asked for together.
    chunk = tl.program_id(0) % chunks
    place = (tl.program_id(0) // chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
    sample = tl.program_id(1).to(tl.int64)
    inside = place < places
    column = tl.load(index + sample * index_b + place.to(tl.int64) * index_k, mask=inside, other=-1).to(tl.int64)
    kept = column >= 0
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tokens + sample * tokens_b + column[:, None] * tokens_l
    values = tl.load(
        rows + d[None, :] * tokens_d,
        mask=kept[:, None] & (d < width)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    targets = out + (sample * places + place)[:, None] * width + d[None, :]
    tl.store(targets, values, mask=inside[:, None] & (d < width)[None, :])
    if chunk == 0:
        column = tl.maximum(column, 0)
        if positions is not None:
            for row in range(position_rows):
                own = positions + row * positions_p + sample * positions_b + column * positions_l
                found = tl.load(own, mask=inside, other=0)
                tl.store(positions_out + (row * batch + sample) * places + place, found, mask=inside)
        if masks is not None:
            for row in range(mask_rows):
                own = masks + row * masks_m + sample * masks_b + column * masks_l
                found = tl.load(own, mask=inside & kept, other=0)
                tl.store(masks_out + (row * batch + sample) * places + place, found, mask=inside)


def _launch(
    tokens: Tensor, index: Tensor, positions: Tensor | None = None, masks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, places), width, device = index.shape, tokens.shape[2], tokens.device
    position_rows = 0 if positions is None else positions.shape[0]
    mask_rows = 0 if masks is None else masks.shape[0]
    dtype = torch.long if positions is None else positions.dtype
    out = torch.empty((batch, places, width), dtype=tokens.dtype, device=device)
    positions_out = torch.empty((position_rows, batch, places), dtype=dtype, device=device)
    masks_out = torch.empty((mask_rows, batch, places), dtype=torch.bool, device=device)
    if index.numel() and (width or position_rows or mask_rows):
        block_d = row_block(width, tokens.element_size())
        most = max(1, min(_MOST_ROWS, _TILE_BYTES // (block_d * tokens.element_size())))
        block_k = min(most, triton.next_power_of_2(places))
        grid = (triton.cdiv(places, block_k) * max(1, triton.cdiv(width, block_d)), batch)
        with on_device_of(tokens):
            _gather_rows[grid](
                as_words(tokens),
                as_words(out),
                index,
                None if positions is None else as_words(positions),
                None if positions is None else as_words(positions_out),
                None if masks is None else as_words(masks),
                None if masks is None else as_words(masks_out),
                batch,
                places,
                width,
                position_rows,
                mask_rows,
                *tokens.stride(),
                *index.stride(),
                *((0, 0, 0) if positions is None else positions.stride()),
                *((0, 0, 0) if masks is None else masks.stride()),
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return out, positions_out, masks_out


@operation("vprune::compact")
def _compact(tokens: Tensor, index: Tensor) -> Tensor:
    return _launch(tokens, index)[0]


@_compact.register_fake
def _(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.new_empty((*index.shape, tokens.shape[2]))


@operation("vprune::compact_batch")
def _compact_batch(
    tokens: Tensor, index: Tensor, positions: Tensor, masks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(tokens, index, positions, masks)


@_compact_batch.register_fake
def _(tokens: Tensor, index: Tensor, positions: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    marks = 0 if masks is None else masks.shape[0]
    return (
        tokens.new_empty((*index.shape, tokens.shape[2])),
        positions.new_empty((positions.shape[0], *index.shape)),
        tokens.new_empty((marks, *index.shape), dtype=torch.bool),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[1]


def _gradient(index: Tensor, length: int, gradient: Tensor) -> Tensor:
    places = index.clamp(min=0)[..., None].expand_as(gradient)
    kept = gradient.masked_fill((index < 0)[..., None], 0)
    return gradient.new_zeros((index.shape[0], length, gradient.shape[2])).scatter_add(1, places, kept)


def _compact_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _gradient(ctx.saved_tensors[0], ctx.length, gradient), None


def _compact_batch_backward(ctx: Any, gradient: Tensor, *rest: Tensor) -> tuple[Tensor, None, None, None]:
    return _gradient(ctx.saved_tensors[0], ctx.length, gradient), None, None, None


_compact.register_autograd(_compact_backward, setup_context=_remember)
_compact_batch.register_autograd(_compact_batch_backward, setup_context=_remember)


def compact(tokens: Tensor, index: Tensor, *, padded: bool = True) -> Tensor:
    """Gather rows into a shorter, left-padded batch; see `reference.compact`; to look for padding costs nothing."""
    result: Tensor = _compact(tokens, index)
    return result


def compact_batch(
    tokens: Tensor, index: Tensor, positions: Tensor, masks: Tensor | None = None, *, padded: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather rows, their position ids and their masks in one launch; see `reference.compact_batch`."""
    batch = index.shape[0]

    def layers(per_column: Tensor) -> Tensor:
        stacked = per_column if per_column.ndim == 3 else per_column[None]
        return stacked.expand(-1, batch, -1)

    short, places, marks = _compact_batch(tokens, index, layers(positions), None if masks is None else layers(masks))
    places = places if positions.ndim == 3 else places[0]
    if masks is None:
        return short, places, None
    return short, places, marks if masks.ndim == 3 else marks[0]
