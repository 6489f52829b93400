"""RESTORE: merged rows where their tokens stood, attended to as much as these were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vprune.baselines.divprune import diverse
from vprune.baselines.features import FeaturePruner, Look, unit
from vprune.errors import VPruneError
from vprune.records import Selection
from vprune.recycling.absorb import coordinates
from vprune.recycling.rows import lay_out, medians


@dataclass
class Restore(FeaturePruner):
    """Merging with calibrated positions and attention (RESTORE, arXiv 2606.01711). Blind to the question.

    Anchors: K tokens far apart from each other, as `DivPrune` chooses them. Every other token joins the anchor of the
    largest cos(x_i, x_a); a row is the mean of its group, stands where the group's median token stood, and gets
    log(sum_j exp(-decay d_j)) added to its attention logits (size_aware: true), d_j the distance of the j-th token of
    the group from there, as a share of the grid's sides: log size for decay=0, less for tokens from far away.

    [R] no code is public, and neither the paper's rule for distinctive anchors nor its distance term were at hand:
    what is taken from the paper is that merging, original positions and attention calibrated for size and distance
    come together.

    Args:
        decay: how fast tokens cease to count, per side of the grid.

    Raises:
        VPruneError: `decay` is below 0; budget="frame"; size_aware on an attention backend without biases.

    Example:
        >>> Restore(keep=64, decay=1.0).size_aware
        True
    """

    size_aware: bool = True
    decay: float = 1.0

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.decay, (int, float)) and not isinstance(self.decay, bool)
        if not number or not 0 <= self.decay < math.inf:
            raise VPruneError(f"decay={self.decay!r}: give a factor, 0 or above")

    def groups(self, looks: Sequence[Look], budgets: Sequence[int]) -> list[Selection]:
        """The groups of the anchors."""
        anchors = diverse([look.tokens for look in looks], budgets)
        return [self.grouped(look, found) for look, found in zip(looks, anchors, strict=True)]

    def grouped(self, look: Look, anchors: Tensor) -> Selection:
        """The rows of one image, given its anchors, LongTensor [K]."""
        rows, budget = unit(look.tokens), len(anchors)
        anchors = anchors.to(rows.device)
        group = (rows @ rows[anchors].T).argmax(-1)
        group = group.index_copy(0, anchors, torch.arange(budget, device=group.device)).cpu()
        places = medians(group, budget)
        where = coordinates(look.image.grid, look.places.device)[look.places]
        apart = (where - where[places[group]]).square().sum(-1).sqrt()
        counted = (-self.decay * apart).exp() * (1 if look.sizes is None else look.sizes)
        made = lay_out(places[group], budget, look.sizes)
        mass = torch.zeros(budget).index_add(0, made.source, counted)
        return replace(made, mass=mass.clamp(min=1.0))
