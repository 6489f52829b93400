"""ToMe: the most similar pairs of tokens are merged until the budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune.baselines.features import FeaturePruner, Look, joined, unit
from vprune.records import Selection
from vprune.scoring.vision import TowerAttention


@dataclass
class ToMe(FeaturePruner):
    """Bipartite soft matching on keys, size-weighted merging, proportional attention (arXiv 2210.09461).

    Round after round the tokens that stand are split in turn into A and B; every a finds the b of the largest
    cos(k_a, k_b), k the mean over heads of the keys; the r best pairs merge, x_b <- (s_a x_a + s_b x_b) / (s_a + s_b)
    and s_b <- s_a + s_b, for keys alike. r is half of the tokens, or what the budget asks for in the last round. log s
    is added to the attention logits (size_aware: true). Blind to the question.

    The paper merges r tokens in every layer of a vision transformer; here all rounds follow the tower's last layer but
    one, as where ToMe is compared with other methods for vision-language models [R]. The attention that the report
    shows is the tower's, and decides nothing unless `recycle` takes the place of merging.

    Raises:
        VPruneError: the tower's keys cannot be watched in this family (packed patches, tiles); budget="frame".

    Example:
        >>> matched(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]]), torch.ones(4), 3)
        tensor([1, 1, 2, 3])
    """

    merges: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TowerAttention()
        super().__post_init__()

    def merged(self, look: Look, budget: int) -> Selection:
        """The rows that are left when the budget is met."""
        keys = look.keys.mean(1)
        sizes = torch.ones(len(look)) if look.sizes is None else look.sizes
        owner = matched(keys, sizes.to(keys), budget).cpu()
        kept = standing_of(owner)
        return joined(kept, torch.searchsorted(kept, owner), look)


def matched(keys: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The token that stands for each of the tokens, LongTensor [N], when `count` are left; keys [N, d], sizes [N]."""
    keys, sizes = keys.clone(), sizes.clone()
    owner = left = torch.arange(len(keys), device=keys.device)
    while len(left) > count:
        first, second = left[::2], left[1::2]
        likeness, partner = (unit(keys[first]) @ unit(keys[second]).T).max(-1)
        pairs = likeness.argsort(descending=True, stable=True)[: len(left) - count]
        gone, into = first[pairs], second[partner[pairs]]
        sums = (keys * sizes[:, None]).index_add(0, into, keys[gone] * sizes[gone, None])
        sizes = sizes.index_add(0, into, sizes[gone])
        keys = sums / sizes[:, None]
        follow = torch.arange(len(keys), device=keys.device).index_copy(0, gone, into)
        owner = follow[owner]
        left = standing_of(owner)
    return owner


def standing_of(owner: Tensor) -> Tensor:
    """The tokens that stand for any, LongTensor [K], ascending."""
    return torch.bincount(owner, minlength=len(owner)).nonzero().squeeze(-1)
