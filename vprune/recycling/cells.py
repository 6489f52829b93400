"""Merging by place: the tokens of a grid cell become one row."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vprune.records import Grid, Selection
from vprune.recycling.rows import foremost, lay_out, medians, numbers_like
from vprune.selection import Ranking, budget_cells, cell_of_token


def reserved_cells(grid: Grid, budget: int, cells: int) -> Grid | None:
    """The cells whose means are paid from the budget: at most `cells` and half of it; None = no room."""
    room = min(cells, budget // 2)
    if room < 1:
        return None
    # Rounded down to a square, 16 -> 9 -> 4 -> 1: with few rows to spend, coarser cells leave more of them to
    # selection.
    t, h, w = budget_cells(grid, max(1, math.isqrt(room) ** 2))
    return t, h, w


def merge_cells(
    ranking: Ranking,
    cell: Tensor,
    budget: int,
    count: int,
    sizes: Tensor | None = None,
    importance: Tensor | None = None,
) -> Selection:
    """Keep the first tokens of a ranking [N] pure; the others become the mean of their cell.

    The row stands where the cell's median pruned token stood, and is the plain mean; with `importance` (float32 [N]) it
    is the importance-weighted mean and stands where the most important of them stood. The rows are `budget` in all: a
    cell without a pruned token gives its row back to selection.

    `cell` LongTensor [N]: which of `count` cells each token lies in; `sizes` as in `Selection.grouped`.
    """
    rank, cell = ranking.ranks, cell.expand(ranking.shape)
    # A cell still needs a row after m tokens were kept if its last token ranks at m or later. With one more kept, at
    # most one cell less needs a row, so the first m that fills the budget fills it exactly.
    last = rank.new_full((*rank.shape[:-1], count), -1).scatter_reduce_(-1, cell, rank, "amax")
    tried = torch.arange(budget - count, budget + 1, device=rank.device)
    rows = tried + (last[..., None, :] >= tried[:, None]).sum(-1)
    kept_pure = budget - count + (rows < budget).sum(-1, keepdim=True)
    pure = rank < kept_pure
    group = torch.where(pure, count, cell)
    places = medians(group, count) if importance is None else foremost(group, count, rank)
    return lay_out(torch.where(pure, numbers_like(rank), places.gather(-1, cell)), budget, sizes, importance)


def pool_cells(grid: Grid, budget: int, standing: Selection | None = None) -> Selection:
    """Every row the mean of a grid cell, standing where the cell's median token stood; at most `budget` rows."""
    cell = cell_of_token(grid, budget_cells(grid, budget))
    if standing is None:
        return means_in_place(cell)
    # Cells of which nothing stands get no row: the others are numbered anew.
    filled = torch.bincount(cell[standing.kept]) > 0
    return means_in_place((filled.cumsum(0) - 1)[cell[standing.kept]], standing.sizes)


def means_in_place(cell: Tensor, sizes: Tensor | None = None) -> Selection:
    """One row per cell (LongTensor [N], the cell of each token), the mean of its tokens, where the middle one stood."""
    count = int(cell.max()) + 1
    return lay_out(medians(cell, count)[cell], count, sizes)


def representatives(cell: Tensor) -> Selection:
    """One row per cell (LongTensor [N], of each token): its middle token, untouched, standing for all."""
    merged = means_in_place(cell)
    weights = torch.zeros_like(merged.weights)
    weights[merged.kept] = 1.0
    return replace(merged, shares=weights)
