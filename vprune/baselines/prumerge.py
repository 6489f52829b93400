"""LLaVA-PruMerge and PruMerge+: tokens that stand out, enriched by those with similar keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, count_outliers, joined, unit
from vprune.baselines.trim import fewest
from vprune.errors import VPruneError
from vprune.records import Prefill, Selection
from vprune.scoring.vision import TowerAttention


@dataclass
class PruMerge(FeaturePruner):
    """Keep what the class token attends to, each token enriched by its nearest keys (arXiv 2403.15388).

    Blind to the question.

    a_j = mean over heads h of softmax_j(q_h,cls . k_hj / sqrt(d)) at the tower's last layer but one (from all patches,
    if the tower has no class token). Kept: the tokens of the largest a. Row i is (x_i + sum_j a_j x_j) / (1 + sum_j
    a_j) over the pruned tokens j among the `neighbours` tokens whose keys, of all heads, are the most similar to i's.

    PruMerge+ (`outliers`=0.25, arXiv 2403.15388 too): only the outliers, a > Q3 + 1.5 (Q3 - Q1), and no more than that
    part of the budget, are kept for their attention; the other kept tokens are spread evenly over the picture, the
    published three to one.

    Deviations: the paper keeps as many as there are outliers; here `keep` says how many, and `adaptive` keeps no more
    than stand out. A token enriches the most similar of its kept neighbours only, as it can stand in one row only,
    where the paper lets it enrich all. The sum is divided by its weights, so that rows keep a token's length.

    Args:
        neighbours: how many of the nearest keys a kept token looks at.
        outliers: the part of the budget that goes to outliers, None = all of it.
        adaptive: keep no more than the outliers (PruMerge+: four times as many), `keep` at most.

    Raises:
        VPruneError: a value is out of its range; the tower's attention cannot be watched in this family (packed
            patches, tiles); budget="frame".

    Example:
        >>> PruMerge(keep=0.25, outliers=0.25).neighbours
        32
    """

    neighbours: int = 32
    outliers: float | None = None
    adaptive: bool = False

    merges: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TowerAttention()
        super().__post_init__()
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise VPruneError(f"neighbours={self.neighbours!r}: give a number of tokens, at least 1")
        if self.outliers is not None and (isinstance(self.outliers, bool) or not 0 < self.outliers <= 1):
            raise VPruneError(f"outliers={self.outliers!r}: give the part of the budget for outliers, in (0, 1]")
        if not isinstance(self.adaptive, bool):
            raise VPruneError(f"adaptive={self.adaptive!r}: give true or false")

    def rows(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[int]:
        """The budget, or fewer where fewer stand out."""
        rows = super().rows(prefill, maps, keep)
        if not self.adaptive or keep == 1.0:
            return rows
        found = fewest([len(image) for image in prefill.images], maps, more=0)
        times = 1.0 if self.outliers is None else 1 / self.outliers
        return [min(budget, max(1, round(times * count))) for budget, count in zip(rows, found, strict=True)]

    def order(self, look: Look, budget: int) -> Tensor:
        """Outliers first, then the others of most attention, or (PruMerge+) evenly spread ones."""
        ranked = look.ranked()
        if self.outliers is None:
            return ranked
        assert look.importance is not None
        count = min(count_outliers(look.importance), int(self.outliers * budget))
        # The i-th of the M evenly spaced tokens that the outliers leave room for stands at (i + 1/2) N / M.
        chosen = torch.zeros(len(look), dtype=torch.bool)
        chosen[ranked[:count]] = True
        free = (~chosen).nonzero().squeeze(-1)
        even = free[(2 * torch.arange(budget - count) + 1) * free.numel() // (2 * max(1, budget - count))]
        return look.completed(torch.cat([ranked[:count], even]))

    def merged(self, look: Look, budget: int) -> Selection:
        """The kept tokens, each with the pruned ones that join it."""
        kept = self.order(look, budget)[:budget]
        keys = unit(look.keys.flatten(1))
        likeness = keys[kept] @ keys.T
        places = torch.arange(budget)
        likeness[places, kept] = -torch.inf  # no token is its own neighbour
        near = likeness.topk(min(self.neighbours, len(look) - 1), -1)
        among = torch.full_like(likeness, -torch.inf).scatter(-1, near.indices, near.values)
        best, joins = among.max(0)
        joins = torch.where(best.isinf(), -1, joins)
        assert look.importance is not None
        shares = look.importance.double().clone()
        shares[kept] = 1.0
        return joined(kept, joins.cpu(), look, shares)
