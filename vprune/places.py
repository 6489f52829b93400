"""The rows of images, found in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vprune.models.aside import numbers_on
from vprune.records import VisualTokens


def together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape [...] as one, [I, ...]; a single one is not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def some_rows(tensor: Tensor, rows: Tensor | int) -> Tensor:
    """Rows LongTensor [B, R], or the last R, of the last dimension but one of a tensor [..., 1 or B, N, D]."""
    if isinstance(rows, int):
        return tensor[..., -rows:, :]
    rows = rows.to(tensor.device)[..., None].expand(-1, -1, tensor.shape[-1])
    whole = tensor.expand(*tensor.shape[:-3], rows.shape[0], -1, -1)
    return whole.gather(-2, rows.expand(*whole.shape[:-2], -1, -1))


def rows_of(hidden: Tensor, images: Sequence[VisualTokens]) -> Tensor:
    """The rows [I, N, D] of images of as many tokens each in hidden [B, L, D], not copied where one slice has them."""
    part = slice_of(images, hidden.shape[0])
    if part is not None:
        return hidden[:, part]
    columns = together([image.columns.to(hidden.device) for image in images])
    samples = numbers_on(hidden.device, tuple(image.sample for image in images))
    places = columns + samples[:, None] * hidden.shape[1]
    return hidden.flatten(0, 1).index_select(0, places.flatten()).view(*columns.shape, -1)


def slice_of(images: Sequence[VisualTokens], batch: int) -> slice | None:
    """The columns of images that are one a sample, in order, each in one piece and all at the same place; else None."""
    start = images[0].start
    if start < 0 or len(images) != batch:
        return None
    alike = all(image.start == start and image.sample == sample for sample, image in enumerate(images))
    return slice(start, start + len(images[0])) if alike else None


def in_order(numbers: Tensor, count: int) -> Tensor:
    """Stable argsort of the last dimension of a LongTensor of numbers below `count`."""
    if numbers.is_cuda:  # (whose sort takes a pass for every few bits; a CPU's takes longer with fewer)
        numbers = numbers.to(next(dtype for dtype in (torch.uint8, torch.int16, torch.long) if _holds(dtype, count)))
    return numbers.argsort(dim=-1, stable=True)


def _holds(dtype: torch.dtype, count: int) -> bool:
    return count - 1 <= torch.iinfo(dtype).max
