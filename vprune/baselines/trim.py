"""TRIM: tokens that stand out by their similarity to the text, and one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vprune.baselines.features import FeaturePruner, count_outliers
from vprune.baselines.similarity import TextSimilarity
from vprune.errors import VPruneError
from vprune.records import Prefill


@dataclass
class Trim(FeaturePruner):
    """Keep the tokens most similar to the text, and the mean of all others as one more (arXiv 2409.10994).

    I = softmax_j of the similarities, see `TextSimilarity` for what stands in for CLIP's and why it is negated. The
    paper keeps as many as lie above Q3 + 1.5 (Q3 - Q1); here `keep` says how many, and `adaptive` keeps no more than
    stand out. The mean is one of the rows of the budget (recycle=grid with a single cell) and stands where the middle
    one of the others stood, where the paper appends it. Sees the question.

    Args:
        adaptive: keep the outliers only, `keep` at most.

    Raises:
        VPruneError: `adaptive` is neither true nor false.

    Example:
        >>> Trim(keep=64).recycle, Trim(keep=64).cells
        ('grid', 1)
    """

    recycle: str = "grid"
    cells: int = 1
    adaptive: bool = False

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TextSimilarity(negated=True)
        super().__post_init__()
        if not isinstance(self.adaptive, bool):
            raise VPruneError(f"adaptive={self.adaptive!r}: give true or false")

    def rows(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[int]:
        """The budget, or fewer where fewer stand out."""
        rows = super().rows(prefill, maps, keep)
        return fewest(rows, maps, more=1) if self.adaptive and keep != 1.0 else rows


def fewest(rows: Sequence[int], maps: Sequence[Tensor | None], more: int) -> list[int]:
    """The lesser of each of `rows` and how many of its map stand out, and `more` (at least one row)."""
    return [
        budget if scores is None else max(1, min(budget, count_outliers(scores[~scores.isnan()]) + more))
        for budget, scores in zip(rows, maps, strict=True)
    ]
