"""What becomes of the rest: pruned tokens dropped, or merged into a few rows of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.records import Grid, Selection
from vprune.selection import budget_cells, cell_of_token

RECYCLERS = ("none", "grid")


def keep_only(order: Tensor, budget: int) -> Selection:
    """Keep the first `budget` of `order` (LongTensor [N]) and drop the rest."""
    return Selection.pure(order[:budget].sort().values, order.numel())


def reserved_cells(grid: Grid, budget: int, cells: int) -> Grid | None:
    """The cells whose means are paid from the budget: at most `cells` and half of it; None = no room."""
    room = min(cells, budget // 2)
    if room < 1:
        return None
    # Rounded down to a square, 16 -> 9 -> 4 -> 1: with few rows to spend, coarser cells leave more of them to
    # selection.
    t, h, w = budget_cells(grid, max(1, math.isqrt(room) ** 2))
    return t, h, w


def merge_cells(order: Tensor, cell: Tensor, budget: int, count: int, sizes: Tensor | None = None) -> Selection:
    """Keep the first tokens of `order` pure; the others become the mean of their cell, where its median one stood.

    `cell` LongTensor [N]: which of `count` cells each token lies in; `sizes` as in `Selection.grouped`. The rows are
    `budget` in all: a cell without a pruned token gives its row back to selection.
    """
    tokens = order.numel()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(tokens)
    # A cell still needs a row after m tokens were kept if its last token ranks at m or later.
    last = torch.full((count,), -1, dtype=torch.long).scatter_reduce(0, cell, rank, "amax")
    kept_pure = budget - count
    while kept_pure < budget and kept_pure + int((last >= kept_pure).sum()) < budget:
        kept_pure += 1
    pure = order[:kept_pure]
    group = torch.full((tokens,), -1, dtype=torch.long)
    rest = order[kept_pure:].sort().values
    group[rest] = cell[rest]
    standing = [rest[cell[rest] == number] for number in range(count)]
    medians = torch.stack([members[(members.numel() - 1) // 2] for members in standing if members.numel()])
    kept, place = torch.cat([pure, medians]).sort()
    row = torch.empty_like(place)
    row[place] = torch.arange(place.numel())
    source = torch.full((tokens,), -1, dtype=torch.long)
    source[pure] = row[:kept_pure]
    filled = [number for number in range(count) if standing[number].numel()]
    row_of_cell = torch.full((count,), -1, dtype=torch.long)
    row_of_cell[torch.tensor(filled, dtype=torch.long)] = row[kept_pure:]
    source[rest] = row_of_cell[cell[rest]]
    assert kept.numel() == budget
    return Selection.grouped(kept, source, sizes)


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
    members = cell.argsort(stable=True)
    lengths = torch.bincount(cell, minlength=count)
    first = lengths.cumsum(0) - lengths
    medians = members[first + (lengths - 1) // 2]
    kept, place = medians.sort()
    row = torch.empty_like(place)
    row[place] = torch.arange(count)
    return Selection.grouped(kept, row[cell], sizes)


def recycle(
    kind: str, order: Tensor, grid: Grid, budget: int, cells: int, standing: Selection | None = None
) -> Selection:
    """Turn an order of keeping into a selection of `budget` rows.

    `standing`: what an earlier stage left of the grid; `order` is then one of its rows.

    Raises:
        VPruneError: `kind` is unknown.
    """
    if kind not in RECYCLERS:
        raise VPruneError(f"recycle={kind!r}: choose one of {', '.join(RECYCLERS)}")
    room = reserved_cells(grid, budget, cells) if kind == "grid" and budget < order.numel() else None
    if room is None:
        kept = keep_only(order, budget)
        return kept if standing is None else Selection(kept.kept, kept.source, kept.weights, standing.sizes[kept.kept])
    cell = cell_of_token(grid, room)
    if standing is None:
        return merge_cells(order, cell, budget, math.prod(room))
    return merge_cells(order, cell[standing.kept], budget, math.prod(room), standing.sizes)


def representatives(cell: Tensor) -> Selection:
    """One row per cell (LongTensor [N], of each token): its middle token, untouched, standing for all."""
    merged = means_in_place(cell)
    weights = torch.zeros_like(merged.weights)
    weights[merged.kept] = 1.0
    return Selection(merged.kept, merged.source, weights, merged.sizes)
