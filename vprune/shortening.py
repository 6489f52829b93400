"""From selections to a shorter batch: which columns stay, which are merged, and back to the caller's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vprune import kernels
from vprune.records import Prefill, Selection, VisualTokens


@dataclass(frozen=True)
class Merges:
    """Rows that become weighted sums: the m-th, at `targets[m]`, of `lengths[m]` of the `sources`.

    Places are those in the flat batch [B * L].

    """

    targets: Tensor
    sources: Tensor
    lengths: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Shortening:
    """How a batch [B, L] becomes [B, K].

    `index` LongTensor [B, K]: the columns that stay, ascending, left-padded with -1; `tail`: how many of the last
    columns are the last ones of the unpruned batch too, in every row; `bias` float32 [B, K]: log sizes, None when
    nothing is merged or sizes are not to count; all on the device of the batch. `images` are those of the batch,
    in their new columns.
    """

    index: Tensor
    length: int
    tail: int
    padded: bool
    merges: Sequence[Merges]
    bias: Tensor | None
    images: Sequence[VisualTokens]

    @property
    def valid(self) -> Tensor:
        """Bool [B, K], False where padded."""
        return self.index >= 0

    def shorten(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, K, D], merged rows put in."""
        if self.merges:
            flat = hidden.flatten(0, 1)
            # One image after the other: a row's value must not depend on what else is in the batch.
            rows = [kernels.recycle(flat, one.sources, one.lengths, one.weights) for one in self.merges]
            targets = torch.cat([one.targets for one in self.merges])
            hidden = flat.index_copy(0, targets, torch.cat(rows)).view_as(hidden)
        return kernels.compact(hidden, self.index)


def gather_columns(per_column: Tensor, index: Tensor) -> Tensor:
    """What belongs to columns (position ids, marks), [..., B or 1, L], for the columns `index` [B, K] -> [..., B, K].

    -1, which is padding, gets what belongs to column 0.
    """
    places = index.clamp(min=0).expand(*per_column.shape[:-2], *index.shape)
    return per_column.expand(*places.shape[:-1], per_column.shape[-1]).gather(-1, places)


def restore_columns(hidden: Tensor, index: Tensor, length: int) -> Tensor:
    """[B, K, D] -> [B, L, D], every row at its original column, zeros where tokens were dropped."""
    batch, _, width = hidden.shape
    # Padding goes to a column of its own behind the last one, which is cut off again.
    places = torch.where(index >= 0, index, length)[..., None].expand(-1, -1, width).to(hidden.device)
    return hidden.new_zeros((batch, length + 1, width)).scatter(1, places, hidden)[:, :length]


def shorten_batch(prefill: Prefill, selections: Sequence[Selection], size_aware: bool) -> Shortening:
    """Lay out the shorter batch: text untouched, of every image the rows that remain, padding only on the left."""
    device = prefill.hidden.device
    stays = prefill.valid.cpu().clone()
    followed: list[VisualTokens] = []
    batch, length = stays.shape
    sizes = torch.ones((batch, length))
    merges, tail = [], length
    for image, selection in zip(prefill.images, selections, strict=True):
        row, columns = image.sample, image.columns
        stays[row, columns] = False
        stays[row, columns[selection.kept]] = True
        sizes[row, columns[selection.kept]] = (selection.sizes if selection.mass is None else selection.mass).float()
        standing = selection if image.standing is None else image.standing.then(selection)
        followed.append(replace(image, columns=columns[selection.kept], standing=standing))
        if not selection.is_identity:
            tail = min(tail, length - 1 - int(columns[-1]))
        merged = _merges(selection, row * length + columns)
        if merged is not None:
            merges.append(Merges(*(part.to(device) for part in merged)))
    counts = stays.sum(-1)
    width = int(counts.max())
    index = torch.full((batch, width), -1, dtype=torch.long)
    for row in range(batch):
        index[row, width - int(counts[row]) :] = stays[row].nonzero().squeeze(-1)
    column = torch.full((batch, length + 1), -1, dtype=torch.long)
    column.scatter_(1, torch.where(index >= 0, index, length), torch.arange(width).expand(batch, -1))
    images = [replace(image, columns=column[image.sample, image.columns]) for image in followed]
    bias = None
    if size_aware and bool((sizes > 1).any()):
        bias = sizes.gather(1, index.clamp(min=0)).log().masked_fill(index < 0, 0.0).to(device)
    return Shortening(index.to(device), length, tail, bool((counts < width).any()), merges, bias, images)


def _merges(selection: Selection, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The rows of an image that are no single token, as (targets, sources, lengths, weights)."""
    # A row whose own token holds the whole weight is that token: it is gathered, never summed.
    mixed = selection.weights[selection.kept] != 1.0
    if not bool(mixed.any()):
        return None
    rows = mixed.nonzero().squeeze(-1)
    members = ((selection.source >= 0) & mixed[selection.source.clamp(min=0)]).nonzero().squeeze(-1)
    members = members[selection.source[members].argsort(stable=True)]
    lengths = torch.bincount(selection.source[members], minlength=mixed.numel())[rows]
    return places[selection.kept[rows]], places[members], lengths, selection.weights[members]
