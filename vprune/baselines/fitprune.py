"""FitPrune: how many tokens each layer can do without, from statistics of its attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vprune.baselines.attention import CrossAndSelfAttention, VisualAttention
from vprune.baselines.staged import Staged, spent
from vprune.errors import VPruneError
from vprune.pruner import Pruner
from vprune.records import Prefill
from vprune.scoring.text_attention import TextAttention

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Of the tokens, the best ones: the columns of the statistics."""
_HALVINGS = 60


@dataclass
class FitPrune(Staged):
    """Prune before every layer, as many as its attention can do without (FitPrune, arXiv 2409.10197).

    Offline: c_l(f) is the part of the attention to visual tokens in layer l, that from the instruction or that from the
    visual tokens, whichever is less, that falls on the best fraction f of them, in the mean over some prompts. Layer l
    needs f_l(alpha) = min {f : c_l(f) >= 1 - alpha}; what stays before it is the least of f_0 .. f_l; alpha, the same
    for all layers, is the one whose mean over the layers is `keep`. Online: the tokens of the largest cross_j * self_j
    stay, each the mean over heads and rows of layer l's attention. Sees the question.

    [R] the paper fits the layers one after the other on prompts already pruned, takes the maximum over heads, and
    removes the tokens that both kinds of attention can do without. A token count holds at every layer: pruned once.

    Args:
        statistics: c_l at `FRACTIONS`, a row for each layer of the model that they were measured on; another depth
            takes those of the same relative depth. Those in the YAML are of the embedded model: see `measured` for
            others.

    Raises:
        VPruneError: `statistics` are missing, or no rising fractions.

    Example:
        >>> flat, sharp = FRACTIONS, (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
        >>> [round(share, 2) for _, share in FitPrune(keep=0.4, statistics=[flat, sharp]).fitted(2).schedule]
        [0.75, 0.05]
    """

    statistics: Sequence[Sequence[float]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        self.scorer = self.scorer or CrossAndSelfAttention()
        super().__post_init__()
        for row in self.statistics:
            rises = all(0 <= a <= b <= 1 for a, b in zip([0.0, *row], [*row, 1.0], strict=True))
            if len(row) != len(FRACTIONS) or not rises:
                raise VPruneError(
                    f"statistics: {list(row)} are not {len(FRACTIONS)} rising parts of the attention, from 0 to 1, "
                    f"that fall on the best {', '.join(map(str, FRACTIONS))} of the tokens"
                )
        if not len(self.statistics):
            raise VPruneError(
                "method=fitprune needs the statistics of a model's attention, a row for each layer: measure them with "
                "vprune.baselines.fitprune.measured(model, prompts) and pass statistics=..."
            )

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """A stage before every layer that can do with less than the one before it."""
        depths = len(self.statistics)
        curves = [self.statistics[int((layer + 0.5) * depths / layers)] for layer in range(layers)]

        def stages(alpha: float) -> list[tuple[int, float]]:
            least, found = 1.0, []
            for layer, curve in enumerate(curves):
                least = min(least, needed(curve, 1 - alpha))
                found.append((layer, least))
            return found

        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(stages(middle), layers) > keep else (low, middle)
        return stages(high)


def needed(curve: Sequence[float], mass: float) -> float:
    """The least fraction of the tokens that holds `mass` of the attention, by straight lines between `FRACTIONS`."""
    points = list(zip([0.0, *FRACTIONS, 1.0], [0.0, *curve, 1.0], strict=True))
    for (before, less), (after, more) in pairwise(points):
        if more >= mass:
            return before if more == less else before + (after - before) * (mass - less) / (more - less)
    return 1.0


@dataclass
class _Recorded(TextAttention):
    """Attention whose concentration is noted, layer by layer."""

    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        kinds = (TextAttention()(prefill), VisualAttention()(prefill))
        for both in zip(*kinds, strict=True):
            least = torch.stack([concentration(one) for one in both]).amin(0)
            self.seen.setdefault(prefill.layer, []).append(least)
        return kinds[0]


def concentration(attention: Tensor) -> Tensor:
    """The part of the attention [N] that falls on the best `FRACTIONS` of the tokens, [7], between tokens by halves."""
    falling = attention.double().sort(descending=True).values
    held = torch.cat([falling.new_zeros(1), falling.cumsum(0) / falling.sum().clamp(min=1e-300)])
    places = torch.tensor(FRACTIONS, dtype=torch.float64) * attention.numel()
    below = places.floor().long().clamp(max=attention.numel() - 1)
    return held[below] + (places - below) * (held[below + 1] - held[below])


def measured(model: Any, prompts: Iterable[Mapping[str, Tensor]]) -> list[list[float]]:
    """The statistics of a model's attention over some prompts, a row for each layer, to be passed as `statistics`.

    Args:
        model: a vision-language model.
        prompts: what its processor makes of pictures and questions, batch by batch.

    Example:
        >>> vprune.prune(model, "fitprune", statistics=measured(model, prompts))  # doctest: +SKIP
    """
    from vprune.attach import prune
    from vprune.models.anatomy import dissect

    recorded = _Recorded()
    layers = len(dissect(model).layers)
    everything = [[layer, 1.0] for layer in range(layers)]
    with torch.no_grad(), prune(model, Pruner(keep=1.0, scorer=recorded, stages=everything)):
        for prompt in prompts:
            model(**prompt)
    return [torch.stack(recorded.seen[layer]).mean(0).clamp(0, 1).tolist() for layer in range(layers)]
