"""Merging by likeness: every pruned token joins the row that it resembles most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vprune.records import Grid, Prefill, Selection
from vprune.recycling.rows import lay_out
from vprune.selection import frame_by_frame, spread_order

_ROWS_AT_ONCE = 4096  # bounds the similarities at hand to 4096 x anchors, whatever the length of a video


@dataclass(frozen=True)
class Absorption:
    """An image planned but for one thing, which only its hidden rows can tell: who joins whom.

    `pure` LongTensor [P]: tokens that stay as they are; `anchors` LongTensor [A]: those that absorb the rest; `places`
    LongTensor [N]: where every token that stands lies on the grid (t, h, w). Token i joins the anchor a of the largest
    cos(x_i, x_a) - distance * d(i, a), x its row of the decoder's input, d their distance as a share of the grid's
    sides. `sizes` as in `Selection.grouped`.
    """

    grid: Grid
    pure: Tensor
    anchors: Tensor
    places: Tensor
    distance: float
    sizes: Tensor | None = None

    @property
    def rest(self) -> Tensor:
        """The tokens that are neither pure nor anchors, ascending."""
        left = torch.ones(self.places.numel(), dtype=torch.bool)
        left[self.pure] = False
        left[self.anchors] = False
        return left.nonzero().squeeze(-1)

    def settled(self, joins: Tensor) -> Selection:
        """The selection, once the number of the anchor that each of `rest` joins is known."""
        group = torch.full_like(self.places, -1)
        group[self.anchors] = torch.arange(self.anchors.numel())
        group[self.rest] = joins
        return lay_out(self.pure, group, self.anchors, self.sizes)


def nearest_anchor(rows: Tensor, anchors: Tensor, apart: Tensor) -> Tensor:
    """The number of the most similar of `anchors` [A, D] for each of `rows` [R, D], LongTensor [R].

    argmax_a cos(rows_r, anchors_a) - apart_ra, the first among equals, in float32 (float64 for float64 rows).
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        likeness = _unit(rows.to(exact)) @ _unit(anchors.to(exact)).T
        joins: Tensor = (likeness - apart.to(exact)).argmax(-1)
    return joins


def _unit(rows: Tensor) -> Tensor:
    length: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / length.clamp(min=torch.finfo(rows.dtype).tiny)


def spread_anchors(order: Tensor, pure: int, count: int, places: Tensor, grid: Grid, by_frame: bool) -> Tensor:
    """`count` tokens (LongTensor, ascending) that lie evenly over the grid, none of the first `pure` of `order`."""
    spread = spread_order(grid)
    if by_frame:
        spread = frame_by_frame(spread, grid)
    token = torch.full_like(spread, -1)
    token[places] = torch.arange(places.numel())
    token[places[order[:pure]]] = -1
    left = token[spread]
    return left[left >= 0][:count].sort().values


def settle(plans: Sequence[Selection | Absorption], prefill: Prefill) -> list[Selection]:
    """Look up who joins whom in the hidden rows; one transfer to the device and one back, for all images together."""
    waiting = [(number, plan) for number, plan in enumerate(plans) if isinstance(plan, Absorption)]
    if not waiting:
        return [plan for plan in plans if isinstance(plan, Selection)]
    columns, places, counts = [], [], []
    for number, plan in waiting:
        members = torch.cat([plan.rest, plan.anchors])
        columns.append(prefill.images[number].columns[members])
        places.append(plan.places[members])
        counts.append(members.numel())
    sent = torch.stack([torch.cat(columns), torch.cat(places)]).to(prefill.hidden.device)
    found = []
    for (number, plan), part in zip(waiting, torch.split(sent, counts, 1), strict=True):
        found.append(_joins(plan, prefill.hidden[prefill.images[number].sample], part))
    told = torch.split(torch.cat(found).cpu(), [one.numel() for one in found])
    settled = {number: plan.settled(joins) for (number, plan), joins in zip(waiting, told, strict=True)}
    return [settled[number] if isinstance(plan, Absorption) else plan for number, plan in enumerate(plans)]


def _joins(plan: Absorption, hidden: Tensor, sent: Tensor) -> Tensor:
    """The anchor that each of `plan.rest` joins; `sent` [2, R + A]: columns in `hidden` [L, D] and places on the grid.

    One image at a time, in blocks that depend on nothing else, so that a batch decides as its images alone do.
    """
    rows, count = hidden[sent[0]], plan.anchors.numel()
    where = coordinates(sent[1], plan.grid)
    rest, anchors = rows[:-count], rows[-count:]
    found = []
    for start in range(0, rest.shape[0], _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, rest.shape[0]))
        apart = (where[:-count][part, None] - where[-count:]).square().sum(-1).sqrt()
        found.append(nearest_anchor(rest[part], anchors, plan.distance * apart))
    return torch.cat(found)


def coordinates(places: Tensor, grid: Grid) -> Tensor:
    """Places on the grid [N] -> float32 [N, 3], each axis from 0 to 1."""
    _, h, w = grid
    parts = (places // (h * w), places // w % h, places % w)
    return torch.stack([part / max(size - 1, 1) for part, size in zip(parts, grid, strict=True)], -1)
