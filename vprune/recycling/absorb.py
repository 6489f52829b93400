"""Merging by likeness: every pruned token joins the row that it resembles most."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vprune.kernels.reference import inverse
from vprune.models.aside import sent
from vprune.places import together
from vprune.records import Grid, Prefill, Selection
from vprune.recycling.rows import numbers_like
from vprune.selection import Ranking, frame_by_frame, spread_order

_TABLE = 1024  # tokens of the largest grid whose distances are kept, 4 MB
_ROWS_AT_ONCE = 4096  # bounds the similarities at hand to 4096 x anchors, whatever the length of a video


@dataclass(frozen=True)
class Absorption:
    """An image planned but for one thing, which only its hidden rows can tell: who joins whom.

    `pure` LongTensor [P]: tokens that stay as they are; `anchors` LongTensor [A]: those that absorb the rest; `places`
    LongTensor [N]: where every token that stands lies on the grid (t, h, w). Token i joins the anchor a of the largest
    cos(x_i, x_a) - distance * d(i, a), x its row of the decoder's input, d their distance as a share of the grid's
    sides. `sizes` as in `Selection.grouped`. Images alike may share one, [I, P], [I, A] and [I, N].
    """

    grid: Grid
    pure: Tensor
    anchors: Tensor
    places: Tensor
    distance: float
    sizes: Tensor | None = None

    def to(self, device: torch.device) -> Absorption:
        """The same on another device."""
        sizes = None if self.sizes is None else sent(self.sizes, device)
        pure, anchors, places = (sent(part, device) for part in (self.pure, self.anchors, self.places))
        return replace(self, pure=pure, anchors=anchors, places=places, sizes=sizes)

    def settled(self, rows: Tensor) -> Selection:
        """The selection, looked up in the rows of all tokens that stand, [N, D] or [I, N, D]."""
        anchors = _taken(rows, self.anchors)
        parts = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, rows.shape[-2], _ROWS_AT_ONCE)]
        found = [nearest_anchor(rows[..., part, :], anchors, self._apart(part), self.distance) for part in parts]
        joined = found[0] if len(found) == 1 else torch.cat(found, -1)
        kept, order = torch.cat([self.pure, self.anchors], -1).sort(-1)
        row = inverse(order)  # of each of these, the pure ones first
        source = row[..., self.pure.shape[-1] :].gather(-1, joined).scatter_(-1, kept, numbers_like(kept))
        return Selection.grouped(kept, source, self.sizes, whole=True)

    def _apart(self, part: slice) -> Tensor:
        """How far some of the tokens that stand are from each anchor, [..., R, A]."""
        where = coordinates(self.grid, self.places.device)
        all_stand = self.places.shape[-1] == where.shape[0]
        if all_stand and where.shape[0] <= _TABLE and not where.is_cuda:  # (where what is kept must not be recorded)
            return distance_table(self.grid, self.places.device)[self.anchors].mT[..., part, :]
        where = where.expand(*self.places.shape, -1) if all_stand else where[self.places]
        return distances(where[..., part, :], _taken(where, self.anchors))


def distances(places: Tensor, others: Tensor) -> Tensor:
    """How far each place [..., N, 3] is from each of others [..., A, 3], [..., N, A]."""
    if places.is_cuda:  # (where torch.cdist takes 1.7 ms for 128 images of 576 tokens)
        apart: Tensor = torch.linalg.vector_norm(places[..., :, None, :] - others[..., None, :, :], dim=-1)
        return apart
    return torch.cdist(places, others, compute_mode="donot_use_mm_for_euclid_dist")


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Some of the rows [..., N, D], by LongTensor [..., K]."""
    return rows.gather(-2, index[..., None].expand(*index.shape, rows.shape[-1]))


def nearest_anchor(rows: Tensor, anchors: Tensor, apart: Tensor, distance: float) -> Tensor:
    """The number of the most similar of `anchors` [A, D] for each of `rows` [R, D], LongTensor [R]; or [I, ...].

    argmax_a cos(rows_r, anchors_a) - distance * apart_ra, the first among equals, in float32 (float64 for such rows).
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    tiny = torch.finfo(exact).tiny
    lengths, theirs = (
        torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=exact).clamp(min=tiny) for part in (rows, anchors)
    )
    likeness = _products(rows, anchors, exact) / lengths / theirs.transpose(-1, -2)
    joins: Tensor = torch.sub(likeness, apart.to(exact), alpha=distance).argmax(-1)
    return joins


def _products(rows: Tensor, anchors: Tensor, exact: torch.dtype) -> Tensor:
    """Dot products of rows and anchors, [R, A] or [I, R, A].

    On a CPU image by image: a batch decides to the bit as its images alone do.
    """
    if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
        # Products of half-precision numbers are exact in float32: there is no need to write the rows out in it.
        product = torch.bmm if rows.ndim == 3 else torch.mm
        return product(rows, anchors.mT, out_dtype=torch.float32)
    if rows.ndim == 3 and not rows.is_cuda:
        return together([_products(*one, exact) for one in zip(rows, anchors, strict=True)])
    kind = rows.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return rows.to(exact) @ anchors.to(exact).mT


def spread_anchors(pure: Tensor, count: int, places: Tensor, grid: Grid, by_frame: bool) -> Tensor:
    """`count` tokens (LongTensor) that lie evenly over the grid, none of them among `pure`."""
    order = (framed_order if by_frame else spread_order)(grid, places.device)
    if places.shape[-1] < order.shape[0]:  # an earlier stage has left some tokens only
        order = Ranking.of(order).of_those(places).order
    # Among so many, all but `count` at most are pure.
    first = order[..., : count + pure.shape[-1]].expand(*places.shape[:-1], -1)
    taken = torch.zeros_like(places, dtype=torch.uint8).scatter_(-1, pure, 1).gather(-1, first)
    free = taken.argsort(dim=-1, stable=True)[..., :count]
    return first.gather(-1, free)


@lru_cache(maxsize=64)
def framed_order(grid: Grid, device: torch.device) -> Tensor:
    """`spread_order` with the frames taking turns."""
    return frame_by_frame(spread_order(grid), grid).to(device)


def settle(plans: Sequence[Selection | Absorption], prefill: Prefill) -> list[Selection]:
    """Look up who joins whom in the hidden rows; each selection comes back on the device of its plan."""
    settled = []
    for image, plan in zip(prefill.images, plans, strict=True):
        if isinstance(plan, Absorption):
            hidden = prefill.hidden
            rows = hidden[image.sample, image.columns.to(hidden.device)]
            settled.append(plan.to(hidden.device).settled(rows).to(plan.pure.device))
        else:
            settled.append(plan)
    return settled


@lru_cache(maxsize=8)
def distance_table(grid: Grid, device: torch.device) -> Tensor:
    """How far all tokens of a small grid are from each other, [N, N]."""
    where = coordinates(grid, device)
    return distances(where, where)


@lru_cache(maxsize=64)
def coordinates(grid: Grid, device: torch.device) -> Tensor:
    """Where the tokens lie on the grid, float32 [N, 3], each axis from 0 to 1, on a device once and for all."""
    axes = (torch.arange(size) / max(size - 1, 1) for size in grid)
    return torch.cartesian_prod(*axes).view(-1, 3).to(device)
