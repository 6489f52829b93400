"""Rows laid out: pure tokens and merged ones, in the order of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from vprune.records import Selection


def numbers_like(tokens: Tensor) -> Tensor:
    """The numbers 0..N-1 of tokens [..., N], LongTensor of that shape."""
    return torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)


def lay_out(leader: Tensor, rows: int, sizes: Tensor | None = None, shares: Tensor | None = None) -> Selection:
    """Rows that are the mean of a group of tokens, or a token alone; nothing is dropped.

    Args:
        leader: LongTensor [N], for every token the one at which its row stands, itself where it leads.
        rows: how many tokens lead.
        sizes: LongTensor [N], how many tokens each stands for already, None = itself.
        shares: [N], what each counts in its mean, None = the same; see `Selection.grouped`.
    """
    token = numbers_like(leader)
    leads = leader == token
    row = leads.cumsum(-1) - 1
    # Tokens that lead no row go to a place of their own behind the last one, which is cut off again.
    kept = torch.empty_like(leader).scatter_(-1, torch.where(leads, row, rows), token)[..., :rows]
    return Selection.grouped(kept, row.gather(-1, leader), sizes, shares, whole=True)


def medians(group: Tensor, count: int) -> Tensor:
    """The middle token of each of `count` groups, LongTensor [count]; that of an empty group is any.

    `group` LongTensor [N]: the number of the group that each token belongs to, `count` = none.
    """
    members = group.argsort(dim=-1, stable=True)
    lengths = _counts(group, count)
    first = lengths.cumsum(-1) - lengths
    middle = (first + (lengths - 1).clamp(min=0) // 2).clamp(max=group.shape[-1] - 1)
    return members.gather(-1, middle)


def foremost(group: Tensor, count: int, rank: Tensor) -> Tensor:
    """The token of each of `count` groups of the lowest `rank` (LongTensor [N], a permutation); as in `medians`."""
    tokens = group.shape[-1]
    best = rank.new_full((*group.shape[:-1], count + 1), tokens - 1).scatter_reduce_(-1, group, rank, "amin")
    return rank.argsort(dim=-1).gather(-1, best[..., :count])


def _counts(group: Tensor, count: int) -> Tensor:
    empty = group.new_zeros((*group.shape[:-1], count + 1))
    return empty.scatter_add_(-1, group, torch.ones_like(group))[..., :count]
