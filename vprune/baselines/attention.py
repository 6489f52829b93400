"""Text attention of the kinds that published methods rank tokens by: other rows, the same columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vprune.baselines.features import exact
from vprune.records import Prefill, instruction_rows
from vprune.scoring.text_attention import TextAttention


@dataclass
class LastTokenAttention(TextAttention):
    """Attention that visual tokens receive from the last token of the prompt.

    I_j = mean over heads h of softmax_j(q_h,last . k_hj / sqrt(d)) (FastV, arXiv 2403.06764; PyramidDrop, arXiv
    2410.17247).

    Example:
        >>> LastTokenAttention(layer=1)
        LastTokenAttention(layer=1, pool='mean')
    """

    def rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """The last column of every sample."""
        columns = torch.arange(prefill.valid.shape[1], device=prefill.valid.device)
        last = torch.where(prefill.valid, columns, 0).amax(-1, keepdim=True)
        return last, torch.ones_like(last, dtype=torch.bool)


@dataclass
class VisualAttention(TextAttention):
    """Attention that visual tokens receive from the visual tokens of the sample, in the decoder: itself included."""

    def rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """The visual columns of every sample."""
        counts = prefill.visual.sum(-1)
        order = prefill.visual.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        order = order[:, : max(1, int(counts.max()))]
        return order, torch.arange(order.shape[1], device=order.device) < counts[:, None]


@dataclass
class RaterAttention(TextAttention):
    """Attention that visual tokens receive from the instruction's raters (SparseVLM, arXiv 2410.04417).

    The raters are the text tokens r with R_r > mean(R), R = mean over visual tokens v of softmax_r(v . t_r), of the
    tokens as they were before the decoder's first layer.

    Example:
        >>> RaterAttention().layer is None  # of the stage that comes next
        True
    """

    def rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """The raters' columns of every sample."""
        rows, valid = instruction_rows(prefill.valid, prefill.visual)
        chosen = raters(prefill.start or prefill).to(valid.device)  # (the first layer may lie on another one)
        return rows, chosen & valid


def raters(prefill: Prefill) -> Tensor:
    """Which of the instruction's rows rate visual tokens, bool [B, R], as `instruction_rows` has them."""
    rows, valid = instruction_rows(prefill.valid, prefill.visual)
    chosen = valid.clone()
    for sample in range(rows.shape[0]):  # one at a time: a sample's raters must not depend on the batch
        seen = exact(prefill.hidden[sample][prefill.visual[sample]])
        if len(seen):
            text = exact(prefill.hidden[sample, rows[sample][valid[sample]]])
            relevance = (seen @ text.T).softmax(-1).mean(0)
            rating = relevance > relevance.mean()
            chosen[sample, valid[sample]] = rating | ~rating.any()  # (all alike: all rate)
    return chosen


@dataclass
class CrossAndSelfAttention(TextAttention):
    """The attention that visual tokens receive from the instruction, times that from the visual tokens.

    I_j = cross_j * self_j, each the mean over heads and rows (FitPrune, arXiv 2409.10197; there the maximum over
    heads).

    Example:
        >>> CrossAndSelfAttention(layer=2)
        CrossAndSelfAttention(layer=2, pool='mean')
    """

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images of a prefill."""
        parts = (TextAttention(self.layer, self.pool)(prefill), VisualAttention(self.layer, self.pool)(prefill))
        return [cross * own for cross, own in zip(*parts, strict=True)]
