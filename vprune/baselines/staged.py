"""Methods inside the decoder: what stays after each stage, so that the mean over the layers is the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vprune.baselines.features import FeaturePruner
from vprune.pruner import Pruner

LEAST = 1e-6  # a share where the budget is spent; `minimum` tokens of every image stay anyway
_HALVINGS = 60


@dataclass
class Staged(FeaturePruner):
    """A method that prunes before later layers of the decoder; `keep` is the mean over all layers of what is left.

    Subclasses say which layers and how much. A token count holds at every layer, so with one the method prunes once,
    before the first layer. `stages` takes the place of the method's own.
    """

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """The stages (layer, share of the image's own tokens) in a decoder of so many layers, layers rising."""
        raise NotImplementedError

    def fitted(self, layers: int) -> Pruner:
        """The method with its stages laid out for a decoder of so many layers."""
        if self.stages is not None or isinstance(self.keep, int) or self.keep == 1:
            return self
        stages = [(layer, max(share, LEAST)) for layer, share in self.shares(layers, self.keep)]
        # (Where no token goes there is no stage: a share that is that of the stage before, or everything.)
        before = [1.0, *(share for _, share in stages)]
        needed = [[layer, share] for (layer, share), last in zip(stages, before, strict=False) if share < last]
        return replace(self, stages=needed or [[0, 1.0]])


def spent(stages: Sequence[tuple[int, float]], layers: int) -> float:
    """The mean over `layers` of what is left of an image, 1 before the first of `stages` (layer, share).

    Example:
        >>> spent([(8, 0.5), (16, 0.25), (24, 0.125)], 32)
        0.46875
    """
    ends = [*(layer for layer, _ in stages[1:]), layers]
    first = stages[0][0] if stages else layers
    return (first + sum(share * (end - layer) for (layer, share), end in zip(stages, ends, strict=True))) / layers


def falling(keep: float, starts: Sequence[int], ratio: float, layers: int) -> list[tuple[int, float]]:
    """Stages that keep `ratio` of what the one before it kept, and `keep` in the mean over the layers.

    The share from `starts[s]` on is min(1, x * ratio^s), with the x that spends the budget.

    Example:
        >>> [(layer, round(share, 3)) for layer, share in falling(0.46875, [0, 8, 16, 24], 0.5, 32)]
        [(0, 1.0), (8, 0.5), (16, 0.25), (24, 0.125)]
    """

    def stages(x: float) -> list[tuple[int, float]]:
        return [(layer, min(1.0, x * ratio**stage)) for stage, layer in enumerate(starts)]

    low, high = 0.0, ratio ** -len(starts)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(stages(middle), layers) < keep else (low, middle)
    return stages(high)


def after_whole_layers(keep: float, starts: Sequence[int], ratio: float, layers: int) -> list[tuple[int, float]]:
    """The same for methods whose first layers read all tokens.

    Where these alone would spend more than the budget, the first stage stands before the first layer instead, and the
    others where they are.

    Example:
        >>> after_whole_layers(0.5, [2], 1.0, 32) == [(2, (0.5 * 32 - 2) / 30)]
        True
        >>> after_whole_layers(0.1, [2], 1.0, 8)
        [(0, 0.1)]
    """
    starts = [layer for layer in starts if layer < layers]
    if len(starts) == 1:  # in closed form, so that the shares are round where the numbers are
        first = starts[0]
        left = (keep * layers - first) / (layers - first)
        return [(first, left)] if left > 0 else [(0, keep)]
    if keep * layers > starts[0]:
        return falling(keep, starts, ratio, layers)
    return falling(keep, [0, *starts[1:]], ratio, layers)
