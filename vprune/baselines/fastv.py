"""FastV: half of the visual tokens go after the second layer of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from vprune.baselines.attention import LastTokenAttention
from vprune.baselines.staged import Staged, after_whole_layers
from vprune.errors import VPruneError


@dataclass
class FastV(Staged):
    """Keep the visual tokens that the last token of the prompt attends to, from layer K on (arXiv 2403.06764).

    I_j = mean over heads h of softmax_j(q_h,last . k_hj / sqrt(d)) in layer K - 1; before layer K the best (1 - R) N of
    an image's N tokens stay. Sees the question. `keep` is the mean over all L layers, (K + (L - K)(1 - R)) / L, so that
    1 - R = (keep L - K) / (L - K); the published R = 0.5 at K = 2 of 32 layers is keep=0.53.

    Where the first K layers alone would spend more than the budget (keep L <= K), or `keep` is a token count, tokens
    are pruned before layer 0, by the attention of layer K - 1 all the same: the layers before it then run once more,
    over the whole prompt.

    Args:
        layer: K, at least 1.

    Raises:
        VPruneError: `layer` is no number of a layer, or none of this decoder.

    Example:
        >>> FastV(keep=0.53125).fitted(32).schedule
        ((2, 0.5),)
        >>> FastV(keep=0.1).fitted(8).schedule
        ((0, 0.1),)
    """

    layer: int = 2

    def __post_init__(self) -> None:
        self.scorer = self.scorer or LastTokenAttention(layer=layer_before(self.layer))
        super().__post_init__()

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """One stage, before layer K or before the first."""
        return after_whole_layers(keep, [within(self.layer, layers)], 1.0, layers)


def layer_before(layer: int) -> int:
    """K - 1.

    Raises:
        VPruneError: there is none.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
        raise VPruneError(f"layer={layer!r}: give the decoder layer before which tokens are pruned, 1 or above")
    return layer - 1


def within(layer: int, layers: int) -> int:
    """The layer itself.

    Raises:
        VPruneError: the decoder has no such layer.
    """
    if layer >= layers:
        raise VPruneError(f"layer={layer}: the decoder has layers 0 to {layers - 1}")
    return layer
