"""VisionZip: dominant tokens by the tower's attention, contextual ones merged from the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vprune.baselines.features import FeaturePruner, Look, joined, unit
from vprune.errors import VPruneError
from vprune.records import Selection
from vprune.scoring.vision import TowerAttention


@dataclass
class VisionZip(FeaturePruner):
    """Keep what the vision tower attends to, and merge the rest by its keys (arXiv 2412.04467). Blind to the question.

    Dominant: the K - c tokens with the most attention from the class token (from all patches, if the tower has none),
    the mean over heads, at the last layer but one. Contextual: of the M others, every (M/c)-th is a target t; each of
    the rest joins the target with the largest cos(k_i, k_t), k the mean over heads of the same layer's keys; the row is
    (x_t + mean of those that joined) / 2 and stands where t stood. The paper adds the two without halving, in the
    tower's space, before the projector; here rows are made of the decoder's input, and keep a token's length.

    Args:
        contextual: c as a part of the budget K, rounded; the published 54 + 10 of 64.

    Raises:
        VPruneError: `contextual` is out of its range; the tower's attention cannot be watched in this family (packed
            patches, tiles); budget="frame".

    Example:
        >>> VisionZip(keep=64).targets_of(64)
        10
    """

    contextual: float = 10 / 64

    merges: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TowerAttention()
        super().__post_init__()
        number = isinstance(self.contextual, (int, float)) and not isinstance(self.contextual, bool)
        if not number or not 0 <= self.contextual < 1:
            raise VPruneError(
                f"contextual={self.contextual!r}: give the part of the budget that is merged, from 0 to 1"
            )

    def targets_of(self, budget: int) -> int:
        """c, for a budget of K rows; one row of it at least stays dominant."""
        return min(budget - 1, round(self.contextual * budget))

    def merged(self, look: Look, budget: int) -> Selection:
        """The dominant tokens and the contextual rows."""
        count = self.targets_of(budget)
        dominant = look.ranked()[: budget - count]
        left = torch.ones(len(look), dtype=torch.bool)
        left[dominant] = False
        rest = left.nonzero().squeeze(-1)
        targets = rest[torch.arange(count) * (rest.numel() // max(count, 1))]
        joins, shares = torch.full((len(look),), -1), torch.ones(len(look), dtype=torch.float64)
        if count:
            keys = unit(look.keys.mean(1))
            joins[rest] = (keys[rest] @ keys[targets].T).argmax(-1).cpu()
            joins[targets] = torch.arange(count)
            shares[targets] = (torch.bincount(joins[rest], minlength=count) - 1).clamp(min=1).double()
        joins = torch.where(joins >= 0, joins + dominant.numel(), -1)
        return joined(torch.cat([dominant, targets]), joins, look, shares)
