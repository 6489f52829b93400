"""From selections to a shorter batch: which columns stay, which are merged, and back to the caller's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vprune import kernels
from vprune.models.aside import numbers_on
from vprune.places import in_order, slice_of, together
from vprune.records import Prefill, Selection, VisualTokens


@dataclass(frozen=True)
class Merges:
    """Rows that become weighted sums: the m-th, at `targets[m]`, of `lengths[m]` of the `sources`.

    Sources are places in the flat batch [B * L], targets in the shorter one [B * K].
    """

    targets: Tensor
    sources: Tensor
    lengths: Tensor
    weights: Tensor

    def rows(self, hidden: Tensor) -> Tensor:
        """The sums, [M, D], of a batch [B, L, D]."""
        return kernels.recycle(hidden.flatten(0, 1), self.sources, self.lengths, self.weights)


@dataclass(frozen=True)
class Shortening:
    """How a batch [B, L] becomes [B, K].

    `index` LongTensor [B, K]: the columns that stay, ascending, left-padded with -1; `counts`: how many of each row;
    `tail`: how many of the last columns are the last ones of the unpruned batch too, in every row; `bias` [B, K],
    float32 (float64 for a batch in float64): log sizes, None when nothing is merged or sizes are not to count; all on
    the device of the batch. `images` are those of the batch, in their new columns. `merged`: the columns that became
    merged rows, all of them, where they are the same in every row of the batch, else None.
    """

    index: Tensor
    counts: tuple[int, ...]
    tail: int
    merges: Sequence[Merges]
    bias: Tensor | None
    images: Sequence[VisualTokens]
    merged: slice | None = None

    @property
    def padded(self) -> bool:
        """True when a row is shorter than the longest."""
        return min(self.counts) < self.index.shape[1]

    @property
    def valid(self) -> Tensor:
        """Bool [B, K], False where padded."""
        return self.index >= 0

    def shorten(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, K, D], merged rows put in."""
        return self._merged(kernels.compact(hidden, self.index, padded=self.padded), hidden)

    def shorten_all(self, hidden: Tensor, positions: Tensor, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`shorten`, and what belongs to columns: position ids [B, L] or [P, B, L], and marks, bool [B, L]."""
        if self.merged is not None and not hidden.is_cuda:  # (where one pass over rows and columns takes as long)
            (one,), part = self.merges, self.merged
            rows = one.rows(hidden).view(hidden.shape[0], -1, hidden.shape[-1])
            short = torch.cat([hidden[:, : part.start], rows, hidden[:, part.stop :]], 1)
            return short, gather_columns(positions, self.index, False), gather_columns(marks, self.index, False)
        short, positions, marked = kernels.compact_batch(hidden, self.index, positions, marks, padded=self.padded)
        assert marked is not None
        return self._merged(short, hidden), positions, marked

    def _merged(self, short: Tensor, hidden: Tensor) -> Tensor:
        for one in self.merges:
            short.flatten(0, 1).index_copy_(0, one.targets, one.rows(hidden))
        return short


def gather_columns(per_column: Tensor, index: Tensor, padded: bool = True) -> Tensor:
    """What belongs to columns (position ids, marks), [..., B or 1, L], for the columns `index` [B, K] -> [..., B, K].

    -1, which is padding, gets what belongs to column 0; `padded`: it may be among them.
    """
    places = (index.clamp(min=0) if padded else index).expand(*per_column.shape[:-2], *index.shape)
    return per_column.expand(*places.shape[:-1], per_column.shape[-1]).gather(-1, places)


def restore_columns(hidden: Tensor, index: Tensor, length: int, padded: bool = True) -> Tensor:
    """[B, K, D] -> [B, L, D], every row at its original column, zeros where tokens were dropped.

    `padded`: -1 may be among the `index` [B, K].
    """
    # Padding goes to a column of its own behind the last one, which is cut off again.
    places = torch.where(index >= 0, index, length) if padded else index
    whole = hidden.new_zeros((len(hidden), length + padded, hidden.shape[-1]))
    return whole.scatter_(1, places.to(hidden.device)[..., None].expand_as(hidden), hidden)[:, :length]


def shorten_batch(prefill: Prefill, selections: Sequence[Selection], size_aware: bool) -> Shortening:
    """Lay out the shorter batch: text untouched, of every image the rows that remain, padding only on the left.

    How many rows that makes is known beforehand: the device is asked for nothing.
    """
    device, (batch, length) = prefill.hidden.device, prefill.valid.shape
    counts = list(prefill.counts)
    groups: dict[tuple[int, int, bool, bool], list[int]] = {}
    for number, (image, selection) in enumerate(zip(prefill.images, selections, strict=True)):
        counts[image.sample] += selection.kept.shape[0] - len(image)
        shape = (len(image), selection.kept.shape[0], selection.shares is None, selection.mass is None)
        groups.setdefault(shape, []).append(number)
    width = max(counts)
    laid: list[tuple[list[int], Selection, Tensor | int, Tensor]] = []
    for numbers in groups.values():
        one = Selection.stacked([selections[number].to(device) for number in numbers])
        columns = together([prefill.images[number].columns.to(device) for number in numbers])
        samples = tuple(prefill.images[number].sample for number in numbers)
        rows = samples[0] if len(samples) == 1 else numbers_on(device, samples)[:, None]
        laid.append((numbers, one, rows, columns))
    part = slice_of(prefill.images, batch) if len(laid) == 1 and min(prefill.counts) == length else None
    if part is not None:
        index, columns_of = _in_one_piece(part, length, laid[0][1])
    else:
        index, columns_of = _laid_out(prefill.valid, width, laid)
    images, merges, bias = list(prefill.images), [], None
    exact = torch.promote_types(prefill.hidden.dtype, torch.float32)
    tail = length
    for (numbers, one, rows, columns), new in zip(laid, columns_of, strict=True):
        held = [image.standing for number in numbers if (image := images[number]).standing is not None]
        if any(known.shares is not None for known in (one, *held)):
            targets = (new + rows * width).flatten()
            if one.shares is not None:
                # A row stands for as many tokens as it is made of, unless these stand for others themselves.
                lengths = None if held else one.counted
                merges.append(_merges(one, one.shares, columns + rows * length, targets, lengths))
            if size_aware:
                bias = torch.zeros(batch * width, device=device, dtype=exact) if bias is None else bias
                counted = one.sizes if one.mass is None else one.mass
                bias.scatter_(0, targets, counted.flatten().to(exact).log())
        for number, own in zip(numbers, new.unbind(), strict=True):
            image, selection = images[number], selections[number]
            standing = selection if image.standing is None else image.standing.then(selection)
            images[number] = replace(image, columns=own, standing=standing, start=-1)
            tail = tail if one.is_identity else min(tail, image.after)
    bias = None if bias is None else bias.view(batch, width)
    return Shortening(index, tuple(counts), tail, merges, bias, images, part if merges else None)


def _laid_out(
    valid: Tensor, width: int, laid: Sequence[tuple[Any, Selection, Tensor | int, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """The columns that stay, [B, K], and those of them that each group of images alike has then, [I, K_i]."""
    (batch, length), stays, chosen = valid.shape, valid.flatten().clone(), []
    for _, one, rows, columns in laid:
        places = columns + rows * length
        chosen.append(places.gather(1, one.kept))
        if not one.is_identity:
            stays.scatter_(0, places.flatten(), False).scatter_(0, chosen[-1].flatten(), True)
    stays = stays.view(batch, length)
    seen = stays.cumsum(-1)
    column = torch.where(stays, seen - seen[:, -1:] + (width - 1), width)
    # Columns that do not stay go to one of their own behind the last, which is cut off again.
    index = torch.full((batch, width + 1), -1, device=valid.device)
    index = index.scatter_(1, column, torch.arange(length, device=valid.device).expand(batch, -1))[:, :width]
    return index, [column.flatten()[places] for places in chosen]


def _in_one_piece(part: slice, length: int, selection: Selection) -> tuple[Tensor, list[Tensor]]:
    """`_laid_out` of a batch without padding, whose images all stand in one `part` of the columns."""
    every = torch.arange(length, device=selection.kept.device).expand(len(selection.kept), -1)
    index = torch.cat([every[:, : part.start], selection.kept + part.start, every[:, part.stop :]], 1)
    return index, [every[:, part.start : part.start + selection.kept.shape[1]]]


def _merges(
    selection: Selection, shares: Tensor, places: Tensor, targets: Tensor, lengths: Tensor | None = None
) -> Merges:
    """The rows of images alike, [I, K], as sums of the tokens that they stand for; a row of one token is that token.

    `lengths` LongTensor [I, K]: of how many tokens each is made, but for those that are dropped, None = not known yet.
    """
    row = selection.source
    if not selection.whole:
        lengths = None
        # What is dropped joins the sum that is last, with no weight and in the guise of the token that stands there.
        dropped = row < 0
        row = torch.where(dropped, selection.kept.shape[1] - 1, row)
        places = torch.where(dropped, places.gather(1, selection.kept[:, -1:]), places)
        shares = torch.where(dropped, 0.0, shares)
    order = in_order(row, selection.kept.shape[1])
    if lengths is None:
        lengths = torch.zeros_like(selection.kept).scatter_add_(1, row, torch.ones_like(row))
    sources, weights = places.gather(1, order), shares.gather(1, order)
    return Merges(targets, sources.flatten(), lengths.flatten(), weights.flatten())
