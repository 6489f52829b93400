"""Pruning in three steps: before the decoder, after a third and after two thirds of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vprune.errors import VPruneError
from vprune.pruner import Pruner

_LEAST = 1e-6  # a share for the last third when the others spend it all; one token of every image stays anyway


@dataclass
class Progressive(Pruner):
    """Prune before the first layer, after a third and after two thirds of the layers (VFlowOpt, arXiv 2508.05211).

    `keep` is the mean over all layers of what is left of an image: with L_s layers in third s, (K_1 L_1 + K_2 L_2 + K_3
    L_3) / L = keep, where K_1 = R_1, K_2 = R_1 R_2, K_3 = R_1 R_2 R_3 in the paper's ratios. K_1 = first * keep (at
    most 1), K_2 = second * keep (no more than K_1, no less than an even share of what is left), K_3 is what the budget
    leaves. The importance measured before the first layer serves all three. A token count holds at every layer, so it
    prunes once.

    Args:
        first: K_1 in units of keep, 1 or above.
        second: K_2 in units of keep, no more than `first`; together at most 3.

    Raises:
        VPruneError: a value is out of its range.

    Example:
        >>> Progressive(keep=0.1, first=1.5, second=1.0).fitted(24).schedule  # doctest: +ELLIPSIS
        ((0, 0.15...), (8, 0.1), (16, 0.05...))
    """

    first: float = 1.0
    second: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("first", self.first), ("second", self.second)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise VPruneError(f"{name}={value!r}: give a number")
        if not (self.first >= 1 and 0 < self.second <= self.first and self.first + self.second <= 3):
            raise VPruneError(
                f"first={self.first} second={self.second}: the thirds keep so many times the mean, less and less, "
                "and 3 in all; give first >= 1, second <= first, first + second <= 3"
            )

    def scoring_layer(self, stage: int) -> int:
        """The layer before the first: one map serves all stages."""
        return 0

    def fitted(self, layers: int) -> Pruner:
        """The method with its stages laid out for a decoder of so many layers."""
        if self.stages is not None or isinstance(self.keep, int) or self.keep == 1:
            return self
        starts = [round(third * layers / 3) for third in range(3)]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], layers], strict=True)]
        shares = thirds(self.keep, self.first, self.second, lengths)
        stages = {start: share for start, share, length in zip(starts, shares, lengths, strict=True) if length}
        return replace(self, stages=[[start, share] for start, share in stages.items()])


def thirds(keep: float, first: float, second: float, lengths: Sequence[int]) -> tuple[float, float, float]:
    """What each third keeps, never more than the one before it, `keep` in the mean over `lengths` layers."""
    total = keep * sum(lengths)
    one = min(1.0, first * keep, total / max(lengths[0], 1))
    one = max(one, keep)
    left = total - one * lengths[0]
    behind = lengths[1] + lengths[2]
    even = left / behind if behind else one
    two = min(one, max(even, second * keep), left / lengths[1] if lengths[1] else one)
    three = (left - two * lengths[1]) / lengths[2] if lengths[2] else two
    return one, max(two, _LEAST), min(max(three, _LEAST), max(two, _LEAST))
