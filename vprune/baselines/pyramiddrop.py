"""PyramidDrop: fewer visual tokens from stage to stage of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from vprune.baselines.attention import LastTokenAttention
from vprune.baselines.staged import Staged, falling
from vprune.errors import VPruneError


@dataclass
class PyramidDrop(Staged):
    """Keep `ratio` of the visual tokens after each quarter of the layers (arXiv 2410.17247).

    I_j = mean over heads h of softmax_j(q_h,last . k_hj / sqrt(d)), q and k those of the layer that comes next, last
    the last token of the instruction. Sees the question. The published setting, after layers 8, 16 and 24 of 32 half
    each, is keep=0.469 (1, 1/2, 1/4, 1/8 in the mean). For other budgets the pyramid is scaled, share_s = min(1, x
    ratio^s): below it a stage before the first layer keeps x, above it the first stages keep all. A token count holds
    at every layer: pruned once, before the first.

    Args:
        ratio: what a stage keeps of what the one before kept, in (0, 1).

    Raises:
        VPruneError: `ratio` is out of its range.

    Example:
        >>> PyramidDrop(keep=0.46875).fitted(32).schedule
        ((8, 0.5), (16, 0.25), (24, 0.125))
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        self.scorer = self.scorer or LastTokenAttention()
        super().__post_init__()
        self.ratio = checked_ratio(self.ratio)

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """Up to four stages, a quarter of the layers each."""
        starts = sorted({round(quarter * layers / 4) for quarter in range(4)})
        return falling(keep, starts, self.ratio, layers)


def checked_ratio(ratio: float) -> float:
    """The ratio as a float.

    Raises:
        VPruneError: it is not between 0 and 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise VPruneError(
            f"ratio={ratio!r}: give the part that every stage keeps of the one before, above 0 and below 1"
        )
    return float(ratio)
