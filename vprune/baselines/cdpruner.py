"""CDPruner: a determinantal point process conditioned on the instruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, unit
from vprune.baselines.similarity import TextSimilarity

_FLOOR = 1e-6  # keeps the least relevant token possible, and logarithms finite


@dataclass
class CDPruner(FeaturePruner):
    """The subset S of the visual tokens that maximises det(L_S), L = diag(r) C diag(r) (arXiv 2506.10967).

    C_ij = cos(x_i, x_j) of the projected tokens; r, the relevance to the instruction, is scaled to 0..1 by its least
    and largest value. Greedy: the token with the largest gain in the determinant comes next, by an incremental Cholesky
    factor, O(N K^2). Sees the question.

    The paper measures r with the text encoder that belongs to the vision tower, and its code negates it, as CLIP's
    similarities ask for; here no such encoder is at hand, and r is the similarity of tokens and text in the decoder's
    own space, as it is, see `TextSimilarity`.

    Example:
        >>> kernel = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]])
        >>> likeliest(kernel, 2)
        tensor([0, 2])
    """

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TextSimilarity()
        super().__post_init__()

    def order(self, look: Look, budget: int) -> Tensor:
        """The subset first, in the order of choice."""
        tokens = unit(look.tokens)
        assert look.importance is not None
        relevance = scaled(look.importance.to(tokens))
        return look.completed(likeliest(relevance[:, None] * (tokens @ tokens.T) * relevance, budget))


def scaled(scores: Tensor) -> Tensor:
    """Scores [N] from 0 (and a little) to 1."""
    low, high = scores.aminmax()
    return (scores - low + _FLOOR) / (high - low + _FLOOR)


def likeliest(kernel: Tensor, count: int) -> Tensor:
    """The greedy maximum of the determinant: `count` numbers, in the order of choice; `kernel` [N, N], positive.

    After each choice j, with c_i the rows of the Cholesky factor so far and d_i the gains:
    e_i = (L_ji - c_j . c_i) / d_j, then d_i^2 falls by e_i^2 (Chen et al., arXiv 1709.05135).
    """
    gains = kernel.diagonal().clone()
    factor = kernel.new_zeros((count, len(kernel)))
    chosen: list[Tensor] = []
    for step in range(count):
        best = gains.argmax()
        chosen.append(best)
        row = (kernel[best] - factor[:step, best] @ factor[:step]) / gains[best].clamp(min=1e-12).sqrt()
        factor[step] = row
        # Gains beyond the rank of the kernel are rounding; what is chosen already must not come again.
        gains = (gains - row.square()).clamp(min=0.0).index_fill(0, torch.stack(chosen), -torch.inf)
    return torch.stack(chosen)
