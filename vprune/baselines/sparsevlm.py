"""SparseVLM: the words that matter for the picture rate its tokens; the best of the pruned are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune.baselines.attention import RaterAttention
from vprune.baselines.features import Look, joined
from vprune.baselines.pyramiddrop import checked_ratio
from vprune.baselines.staged import Staged, after_whole_layers
from vprune.errors import VPruneError
from vprune.records import Selection

_STARTS = (2 / 32, 6 / 32, 15 / 32)  # published for decoders of 32 layers
_NEAREST = 5


@dataclass
class SparseVLM(Staged):
    """Prune by the attention of the rating words, in three stages, and recycle the best of the rest (arXiv 2410.04417).

    Raters are the text tokens r with R_r > mean(R), R = mean over visual tokens v of softmax_r(v . t_r), before the
    first layer. Before layers 2, 6 and 15 of 32 (the same parts of other depths) the visual tokens to which the raters
    attend the most, the mean over heads and raters, stay. Of the pruned ones the best `recycled` part, n in number, is
    clustered into n/10 + 1 rows, each the mean of its cluster, by density peaks with the 5 nearest neighbours
    (DPC-kNN); a row stands where the peak stood. These rows are paid from the budget, half of it at most. Sees the
    question.

    `keep` is the mean over all layers. Each stage keeps `ratio` of what the one before kept [R: the paper derives the
    counts from the rank of the attention, and its code ships lists of counts that fall in about this way]. Where the
    layers before the first stage alone would spend more than the budget, it stands before layer 0. A token count holds
    at every layer: pruned once, before the first.

    Args:
        ratio: what a stage keeps of what the one before kept, in (0, 1).
        recycled: the part of the pruned tokens that is clustered, 0 = none.

    Raises:
        VPruneError: a value is out of its range; budget="frame".

    Example:
        >>> [layer for layer, _ in SparseVLM(keep=0.2).fitted(32).schedule]
        [2, 6, 15]
    """

    ratio: float = 0.5
    recycled: float = 0.3

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.scorer = self.scorer or RaterAttention()
        super().__post_init__()
        self.ratio = checked_ratio(self.ratio)
        number = isinstance(self.recycled, (int, float)) and not isinstance(self.recycled, bool)
        if not number or not 0 <= self.recycled <= 1:
            raise VPruneError(f"recycled={self.recycled!r}: give the part of the pruned tokens to cluster, from 0 to 1")

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """Three stages, or fewer in a decoder of few layers."""
        starts = sorted({max(1, round(part * layers)) for part in _STARTS})
        return after_whole_layers(keep, starts, self.ratio, layers)

    def clusters_of(self, tokens: int, budget: int) -> tuple[int, int]:
        """How many tokens are recycled, and into how many rows, when `budget` of so many stay."""
        clusters = 0
        for _ in range(
            budget // 2
        ):  # what is merged is pruned first: the rows of the clusters make room for themselves
            recycled = int(self.recycled * (tokens - budget + clusters))
            needed = min(budget // 2, recycled // 10 + 1) if recycled else 0
            if needed == clusters:
                break
            clusters = needed
        return int(self.recycled * (tokens - budget + clusters)) if clusters else 0, clusters

    def merged(self, look: Look, budget: int) -> Selection:
        """The best tokens, and the clusters of the next best."""
        recycled, clusters = self.clusters_of(len(look), budget)
        ranked = look.ranked()
        kept, best = ranked[: budget - clusters], ranked[budget - clusters :][:recycled].sort().values
        joins = torch.full((len(look),), -1)
        if clusters:
            peaks, nearest = density_peaks(look.tokens[best], clusters)
            joins[best] = nearest.cpu() + kept.numel()
            kept = torch.cat([kept, best[peaks.cpu()]])
        return joined(kept, joins, look)


def density_peaks(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clusters of `rows` [N, D]: their peaks, LongTensor [count], and the number of the peak of every row, [N].

    With d_ij = |x_i - x_j| / sqrt(D): rho_i = exp(-mean of d_ij^2 over the 5 nearest j, i among them), delta_i = the
    distance to the nearest row of a higher density (for the densest: the largest distance of all); peaks have the
    largest rho delta; every row belongs to the nearest peak, a peak to itself (DPC-kNN; ties go to the first).
    """
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[-1] ** 0.5
    near = distance.topk(min(_NEAREST, len(rows)), largest=False).values
    density = (-near.square().mean(-1)).exp()
    denser = density[None] > density[:, None]
    apart = torch.where(denser, distance, torch.inf).amin(-1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    peaks = (density * apart).argsort(descending=True, stable=True)[:count]
    nearest = distance[:, peaks].argmin(-1)
    return peaks, nearest.index_copy(0, peaks, torch.arange(count, device=rows.device))
