"""What becomes of the rest: pruned tokens dropped, or merged into a few rows of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vprune.amounts import RECYCLERS
from vprune.errors import VPruneError
from vprune.records import Grid, Selection
from vprune.recycling.absorb import Absorption, settle, spread_anchors
from vprune.recycling.cells import means_in_place, merge_cells, pool_cells, representatives, reserved_cells
from vprune.recycling.rows import numbers_like
from vprune.selection import Ranking, cell_of_token

__all__ = [
    "Absorption",
    "Recycler",
    "means_in_place",
    "merge_cells",
    "pool_cells",
    "representatives",
    "settle",
]


@dataclass(frozen=True)
class Recycler:
    """How the tokens beyond the budget are recycled, and what of the budget that costs.

    Args:
        kind: "none" drops them. "grid": the mean of those in each grid cell, where their median stood. "weighted":
            their importance-weighted mean sum I_i x_i / sum I_i, where the most important of them stood (VFlowOpt,
            arXiv 2508.05211). "nearest": each joins the most similar token that was kept (ToMe, arXiv 2210.09461;
            VisionZip, arXiv 2412.04467). "anchors": each joins the most similar of some tokens that lie evenly over the
            grid, while the important ones stay pure.
        cells: at most so many cells; 9, 4 or 1 where they would take more than half of the budget.
        share: of the budget that goes to anchors, rounded down, at least one. On the embedded model 0.15 is the best of
            0.05 to 0.5 at 10% and 5% of the tokens, with a good map and with a bad one (docs/LOG.md).
        distance: subtracted from the cosine similarity, times the distance as a share of the grid's sides.

    Raises:
        VPruneError: a value is out of its range.

    Example:
        >>> import torch
        >>> Recycler("grid", cells=4).plan(torch.arange(36), (1, 6, 6), 9).sizes.sum()
        tensor(36)
    """

    kind: str = "none"
    cells: int = 16
    share: float = 0.15
    distance: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in RECYCLERS:
            raise VPruneError(f"recycle={self.kind!r}: choose one of {', '.join(RECYCLERS)}")
        if isinstance(self.cells, bool) or not isinstance(self.cells, int) or self.cells < 1:
            raise VPruneError(f"cells={self.cells!r}: give a number of grid cells, at least 1")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share < 1:
            raise VPruneError(
                f"share={self.share!r}: give the part of the budget that anchors get, above 0 (none left for the rest) "
                "and below 1 (none left for what was selected)"
            )
        number = isinstance(self.distance, (int, float)) and not isinstance(self.distance, bool)
        if not number or not 0 <= self.distance < math.inf:
            raise VPruneError(f"distance={self.distance!r}: give a factor, 0 or above")

    def plan(
        self,
        order: Tensor | Ranking,
        grid: Grid,
        budget: int,
        importance: Tensor | None = None,
        standing: Selection | None = None,
        by_frame: bool = False,
    ) -> Selection | Absorption:
        """Turn an order of keeping into `budget` rows: at once, or but for what `settled` looks up in the hidden rows.

        Args:
            order: LongTensor [N], the tokens that stand, best first; or a ranking of them, of I images alike, too.
            grid: (t, h, w) of the image.
            budget: rows in all. With room for one only, the rest is dropped unless it joins what is kept.
            importance: float32 [N], None = all alike.
            standing: what an earlier stage left of the grid.
            by_frame: every frame gets as many anchors.
        """
        ranking = order if isinstance(order, Ranking) else Ranking.of(order)
        tokens, sizes = ranking.shape[-1], None if standing is None else standing.sizes
        if self.kind == "none" or budget >= tokens:
            return Selection.pure(ranking.first(min(budget, tokens)), tokens, sizes)
        places = numbers_like(ranking.ties.expand(ranking.shape)) if standing is None else standing.kept
        if self.kind == "nearest":
            kept = ranking.first(budget)
            return Absorption(grid, kept[..., :0], kept, places, self.distance, sizes)
        cells = reserved_cells(grid, budget, self.cells)
        if self.kind in ("grid", "weighted") and cells is not None:
            cell = cell_of_token(grid, cells, places.device)[places]
            weighted = importance.to(places.device) if importance is not None and self.kind == "weighted" else None
            return merge_cells(ranking, cell, budget, math.prod(cells), sizes, weighted)
        anchors = self.anchors_of(budget, grid[0] if by_frame else 1)
        if self.kind == "anchors" and anchors:
            pure = ranking.first(budget - anchors)
            chosen = spread_anchors(pure, anchors, places, grid, by_frame)
            return Absorption(grid, pure, chosen, places, self.distance, sizes)
        return Selection.pure(ranking.first(budget), tokens, sizes)

    def anchors_of(self, budget: int, frames: int = 1) -> int:
        """How many rows of a budget are anchors, the same number in each of so many frames; 0 = no room."""
        each = budget // frames
        return 0 if each < 2 else frames * max(1, math.floor(each * self.share + 1e-9))
