"""DivPrune: the most diverse subset of the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, unit


@dataclass
class DivPrune(FeaturePruner):
    """Greedy max-min diversity among the projected visual tokens (arXiv 2503.02175). Blind to the question.

    With d_ij = 1 - cos(x_i, x_j): first the token that is farthest from its nearest other one, argmax_i min_j d_ij,
    then again and again the one that is farthest from the nearest already chosen, argmax_i min_{j chosen} d_ij.

    Example:
        >>> diverse(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), 2)
        tensor([0, 2])
    """

    def order(self, look: Look, budget: int) -> Tensor:
        """The most diverse ones first."""
        return look.completed(diverse(look.tokens, budget))


def diverse(tokens: Tensor, count: int) -> Tensor:
    """The numbers of the `count` most diverse of the `tokens` [N, D], in the order of choice; ties go to the first."""
    rows = unit(tokens)
    distance = 1 - rows @ rows.T
    distance.fill_diagonal_(torch.inf)  # no token is its own neighbour
    chosen = [distance.amin(-1).nan_to_num(posinf=0.0).argmax()]
    nearest = distance[chosen[0]].clone()
    while len(chosen) < count:
        nearest = nearest.index_fill(0, chosen[-1][None], -torch.inf)
        chosen.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.stack(chosen)
