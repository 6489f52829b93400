"""Gathering the same rows of the keys and values of many layers: one launch for a whole cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vprune.kernels.triton_launch import as_words, on_device_of, operation, row_block

_TILE_BYTES = 8192
_MOST_ROWS = 64
_WIDE = 16  # bytes: the widest load of a thread


@triton.jit
def _gather_cache(
    keys: tl.tensor,  # a tuple of [B, G, L, D], a layer each
    values: tl.tensor,
    out: tl.tensor,  # [2, layers, B, G, K, D]
    index: tl.tensor,  # [B, K]
    groups: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    keys_b: tl.tensor,
    keys_g: tl.tensor,
    keys_l: tl.tensor,
    values_b: tl.tensor,
    values_g: tl.tensor,
    values_l: tl.tensor,
    index_b: tl.tensor,
    index_k: tl.tensor,
    LAYERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
) -> None:
    part = tl.program_id(2)  # the keys of every layer, then the values
    sample = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    # The addresses come as arguments of the launch: a table in device memory would have to be copied there first, which
    # makes the host wait and does not survive in a CUDA graph.
    address = keys[0].to(tl.int64)
    for layer in tl.static_range(LAYERS):
        address = tl.where(part == layer, keys[layer].to(tl.int64), address)
        address = tl.where(part == layer + LAYERS, values[layer].to(tl.int64), address)
    stored = tl.multiple_of(address.to(tl.pointer_type(out.dtype.element_ty)), ALIGNMENT)
    of_keys = part < LAYERS
    stride_b = tl.where(of_keys, keys_b, values_b)
    stride_g = tl.where(of_keys, keys_g, values_g)
    stride_l = tl.where(of_keys, keys_l, values_l)
    chunks = tl.cdiv(width, BLOCK_D)
    chunk = tl.program_id(0) % chunks
    place = (tl.program_id(0) // chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = place < places
    column = tl.load(index + sample * index_b + place.to(tl.int64) * index_k, mask=inside, other=-1).to(tl.int64)
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = stored + sample * stride_b + group * stride_g + column[:, None] * stride_l
    found = tl.load(rows + d[None, :], mask=(column >= 0)[:, None] & (d < width)[None, :], other=0)
    first = (part.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * places
    targets = out + (first + place)[:, None] * width + d[None, :]
    tl.store(targets, found, mask=inside[:, None] & (d < width)[None, :])


@operation("vprune::compact_kv")
def _compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor) -> Tensor:
    keys, values = _alike(keys), _alike(values)
    (batch, groups, _, width), places, layers = keys[0].shape, index.shape[1], len(keys)
    out = torch.empty((2, layers, batch, groups, places, width), dtype=keys[0].dtype, device=index.device)
    if out.numel():
        size = out.element_size()
        block_d = row_block(width, size)
        block_k = min(_MOST_ROWS, _TILE_BYTES // (block_d * size), triton.next_power_of_2(places))
        grid = (triton.cdiv(places, block_k) * triton.cdiv(width, block_d), batch * groups, 2 * layers)
        wide = all(one.data_ptr() % _WIDE == 0 for one in (*keys, *values))
        with on_device_of(index):
            _gather_cache[grid](
                tuple(as_words(key) for key in keys),
                tuple(as_words(value) for value in values),
                as_words(out),
                index,
                groups,
                places,
                width,
                *keys[0].stride()[:3],
                *values[0].stride()[:3],
                *index.stride(),
                LAYERS=layers,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                ALIGNMENT=_WIDE if wide else size,
                num_warps=4,
            )
    return out


@_compact_kv.register_fake
def _(keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor) -> Tensor:
    batch, groups, _, width = keys[0].shape
    return keys[0].new_empty((2, len(keys), batch, groups, index.shape[1], width))


def _alike(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers in one layout, rows without gaps: a launch has one set of strides for the keys, one for the values."""

    def layout(stored: Tensor) -> list[tuple[int, int]]:
        return [(size, stride) for size, stride in zip(stored.shape, stored.stride(), strict=True) if size > 1]

    first = layout(layers[0])
    if (layers[0].stride(3) == 1 or layers[0].shape[3] == 1) and all(layout(one) == first for one in layers):
        return list(layers)
    return [one.contiguous() for one in layers]


def cache_problem(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot serve these layers, None if it can."""
    kinds = {(tuple(one.shape), one.dtype) for one in tensors}
    if len(kinds) > 1:
        shapes = ", ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in kinds))
        return f"the layers differ ({shapes}), one launch needs them alike"
    return None


def compact_kv(keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gather rows of the keys and values of many layers in one launch; see `reference.compact_kv`."""
    if not keys:
        return [], []
    out = _compact_kv(list(keys), list(values), index)
    return list(out[0].unbind(0)), list(out[1].unbind(0))
