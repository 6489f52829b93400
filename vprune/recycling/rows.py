"""Rows laid out: pure tokens and merged ones, in the order of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from vprune.records import Selection


def keep_only(order: Tensor, budget: int, standing: Selection | None = None) -> Selection:
    """Keep the first `budget` of `order` (LongTensor [N]) and drop the rest."""
    kept = Selection.pure(order[:budget].sort().values, order.numel())
    if standing is None:
        return kept
    return Selection(kept.kept, kept.source, kept.weights, standing.sizes[kept.kept])


def lay_out(
    pure: Tensor, group: Tensor, places: Tensor, sizes: Tensor | None = None, shares: Tensor | None = None
) -> Selection:
    """Rows that are a token each, and rows that are the mean of a group of tokens.

    Args:
        pure: LongTensor [P], tokens that stay as they are.
        group: LongTensor [N], the number (0..G-1) of the group that each token belongs to, -1 = none.
        places: LongTensor [G], the token where each group's row stands.
        sizes: LongTensor [N], how many tokens each stands for already, None = itself.
        shares: [N], what each counts in its mean, None = the same; see `Selection.grouped`.
    """
    kept, place = torch.cat([pure, places]).sort()
    row = torch.empty_like(place)
    row[place] = torch.arange(place.numel())
    source = torch.full_like(group, -1)
    source[pure] = row[: pure.numel()]
    members = (group >= 0).nonzero().squeeze(-1)
    source[members] = row[pure.numel() :][group[members]]
    return Selection.grouped(kept, source, sizes, shares)


def medians(group: Tensor, count: int) -> Tensor:
    """The middle token of each of `count` groups, LongTensor [count]; `group` as in `lay_out`, none of them empty."""
    members = group.argsort(stable=True)
    lengths = torch.bincount(group + 1, minlength=count + 1)  # the first of them: tokens of no group
    first = lengths.cumsum(0) - lengths
    return members[(first + (lengths - 1) // 2)[1:]]


def foremost(group: Tensor, count: int, order: Tensor) -> Tensor:
    """The token of each of `count` groups that comes first in `order` (LongTensor [N]), LongTensor [count]."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel())
    best = torch.full((count + 1,), order.numel(), dtype=torch.long).scatter_reduce(0, group + 1, rank, "amin")
    return order[best[1:]]
