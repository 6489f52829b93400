"""CDPruner: a determinantal point process conditioned on the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, unit
from vprune.baselines.greedy import chosen, likeliest
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
        >>> CDPruner(keep=64).scorer
        TextSimilarity(negated=False)
    """

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TextSimilarity()
        super().__post_init__()

    def orders(self, looks: Sequence[Look], budgets: Sequence[int]) -> list[Tensor]:
        """The subset first, in the order of choice."""

        def kernel(number: int) -> Tensor:
            look = looks[number]
            assert look.importance is not None
            tokens = unit(look.tokens)
            relevance = scaled(look.importance.to(tokens))
            return relevance[:, None] * (tokens @ tokens.T) * relevance

        device = looks[0].prefill.hidden.device if looks else None
        found = chosen(likeliest, kernel, [len(look) for look in looks], budgets, device)
        return [look.completed(first) for look, first in zip(looks, found, strict=True)]


def scaled(scores: Tensor) -> Tensor:
    """Scores [N] from 0 (and a little) to 1."""
    low, high = scores.aminmax()
    return (scores - low + _FLOOR) / (high - low + _FLOOR)
