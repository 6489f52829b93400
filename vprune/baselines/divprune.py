"""DivPrune: the most diverse subset of the visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, unit
from vprune.baselines.greedy import chosen, farthest


@dataclass
class DivPrune(FeaturePruner):
    """Greedy max-min diversity among the projected visual tokens (arXiv 2503.02175). Blind to the question.

    With d_ij = 1 - cos(x_i, x_j): first the token that is farthest from its nearest other one, argmax_i min_j d_ij,
    then again and again the one that is farthest from the nearest already chosen, argmax_i min_{j chosen} d_ij.

    Example:
        >>> diverse([torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])], [2])
        [tensor([0, 2])]
    """

    def orders(self, looks: Sequence[Look], budgets: Sequence[int]) -> list[Tensor]:
        """The most diverse ones first."""
        found = diverse([look.tokens for look in looks], budgets)
        return [look.completed(first) for look, first in zip(looks, found, strict=True)]


def diverse(tokens: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The numbers of the most diverse of the tokens [N, D] of each image, so many of each, in the order of choice."""

    def distance(image: int) -> Tensor:
        rows = unit(tokens[image])
        return 1 - rows @ rows.T

    device = tokens[0].device if tokens else None
    return chosen(farthest, distance, [len(one) for one in tokens], counts, device)
