"""VTW: visual tokens withdraw from the decoder's later layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vprune.baselines.staged import LEAST, Staged
from vprune.selection import Selector, Stride


@dataclass
class VTW(Staged):
    """All visual tokens leave before layer K (Visual Tokens Withdrawal, arXiv 2405.05803). Blind to the question.

    `keep` is the mean over all L layers, K / L; the published K = L / 2 is keep=0.5. Where keep L is no whole number, K
    is the next larger one, and the layers before it read evenly spaced tokens, keep L / K of them all, so that the mean
    is the budget. `minimum` tokens of every image (1) stay behind, where the paper leaves none. With a token count
    nothing withdraws: so many evenly spaced tokens stay at every layer.

    Example:
        >>> VTW(keep=0.5).fitted(32).schedule
        ((16, 1e-06),)
        >>> VTW(keep=0.1).fitted(8).schedule
        ((0, 0.8), (1, 1e-06))
    """

    selector: Selector = field(default_factory=Stride)

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """One stage before layer K, and one before the first where K is no whole number."""
        last = math.ceil(keep * layers - 1e-9)
        whole = keep * layers / last
        stages = [(0, whole)] if whole < 1 - 1e-9 else []
        return stages + ([(last, LEAST)] if last < layers else [])
