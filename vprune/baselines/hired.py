"""HiRED: every crop of a picture has a budget of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vprune.baselines.features import FeaturePruner
from vprune.records import Prefill
from vprune.scoring.vision import TowerAttention


@dataclass
class HiRED(FeaturePruner):
    """Quotas for the crops of a picture, and the best tokens of each, by class attention (arXiv 2408.10945).

    a_j = mean over heads h of softmax_j(q_h,cls . k_hj / sqrt(d)) at the tower's last layer but one (from all patches,
    if the tower has no class token). A picture's budget is shared among its crops in proportion to sum_j a_j over the
    crop's patches, what its class token has not kept for itself; without a class token the crops' shares are equal.
    Within a crop the tokens of the largest a stay. A picture of one crop: the tokens of the largest a. Blind to the
    question.

    The paper measures a crop's content in an early layer, as the overview's attention to the crop's region [R: where
    tiles lie in the picture is not told to the decoder], and gives the overview a part of its own.

    Raises:
        VPruneError: the tower's attention cannot be watched in this family (packed patches, tiles of LLaVA-NeXT).

    Example:
        >>> quotas(10, [3.0, 1.0], [16, 16], 1)
        [7, 3]
    """

    def __post_init__(self) -> None:
        self.scorer = self.scorer or TowerAttention()
        super().__post_init__()

    def rows(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[int]:
        """The quota of every crop."""
        rows = super().rows(prefill, maps, keep)
        if self.budget != "image":
            return rows
        for crops in crops_of(prefill):
            content = [float(torch.as_tensor(maps[crop]).nansum()) for crop in crops]
            sizes = [len(prefill.images[crop]) for crop in crops]
            shared = quotas(sum(rows[crop] for crop in crops), content, sizes, self.minimum)
            for crop, share in zip(crops, shared, strict=True):
                rows[crop] = share
        return rows


def crops_of(prefill: Prefill) -> list[list[int]]:
    """The numbers of the images that are crops of one picture, for every picture that was cut into several."""
    crops: dict[tuple[int, int], list[int]] = {}
    for number, image in enumerate(prefill.images):
        if image.picture >= 0:
            crops.setdefault((image.sample, image.picture), []).append(number)
    return [numbers for numbers in crops.values() if len(numbers) > 1]


def quotas(total: int, content: Sequence[float], sizes: Sequence[int], minimum: int) -> list[int]:
    """Share out `total` in proportion to `content`, at least `minimum` each and at most all of it; largest rests first.

    What a full crop cannot take goes to the others.
    """
    shares = [min(size, minimum) for size in sizes]
    while (left := total - sum(shares)) > 0:
        open_ = [n for n, size in enumerate(sizes) if shares[n] < size]
        weight = sum(content[n] for n in open_)
        wanted = {n: left * (content[n] / weight if weight > 0 else 1 / len(open_)) for n in open_}
        rounded = {n: int(wanted[n]) for n in open_}
        for n in sorted(open_, key=lambda n: rounded[n] - wanted[n])[: left - sum(rounded.values())]:
            rounded[n] += 1
        for n, more in rounded.items():
            shares[n] += min(more, sizes[n] - shares[n])
    return shares
