"""DART: duplicates go, whatever attention says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vprune.baselines.fastv import layer_before, within
from vprune.baselines.features import Look, exact, unit
from vprune.baselines.staged import Staged, after_whole_layers
from vprune.errors import VPruneError
from vprune.models.probe import layer_attention
from vprune.records import Prefill


@dataclass
class Dart(Staged):
    """Keep the visual tokens that duplicate a few pivots the least (DART, arXiv 2502.11494).

    Pivots are the `image_pivots` visual tokens and the `text_pivots` instruction tokens whose keys in layer K have the
    largest L1 norm, over all heads. Pivot after pivot, the visual tokens with the least cos(x_i, x_pivot) are kept, as
    many for each; x as layer K reads it. Visual pivots stay themselves. Sees the question, by the text pivots. Keys are
    taken before they are rotated, where the released code takes them after, so that the choice does not depend on where
    in a padded batch a prompt begins.

    `keep` is the mean over all layers, as in `FastV`: where the layers before K would spend more than the budget, or
    for a token count, tokens are pruned before layer 0 instead, by layer 0's keys.

    Args:
        layer: K, at least 1.
        image_pivots: how many visual tokens are pivots.
        text_pivots: how many instruction tokens.

    Raises:
        VPruneError: a number is below 1, or the decoder has no such layer.

    Example:
        >>> Dart(keep=0.53125).fitted(32).schedule
        ((2, 0.5),)
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        layer_before(self.layer)
        for name, value in (("image_pivots", self.image_pivots), ("text_pivots", self.text_pivots)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise VPruneError(f"{name}={value!r}: give a number of tokens, at least 1")

    def shares(self, layers: int, keep: float) -> list[tuple[int, float]]:
        """One stage, before layer K or before the first."""
        return after_whole_layers(keep, [within(self.layer, layers)], 1.0, layers)

    def looks(self, prefill: Prefill, maps: Sequence[Tensor | None]) -> list[Look]:
        """With the norms of the keys at this layer, measured once for all images."""
        if not prefill.images:
            return []
        # With everything at position 0 nothing is rotated.
        unmoved = replace(prefill, positions=torch.zeros_like(prefill.positions))
        keys = exact(layer_attention(unmoved, prefill.layer).key)[:, :, -prefill.valid.shape[1] :]
        norms = keys.abs().sum((1, 3))
        return [KeyedLook(prefill, image, None, norms[image.sample]) for image in prefill.images]

    def order(self, look: Look, budget: int) -> Tensor:
        """Pivots first, then what duplicates them the least."""
        assert isinstance(look, KeyedLook)
        columns = look.image.columns.to(look.norms.device)
        seeds = look.norms[columns].topk(min(self.image_pivots, budget)).indices
        asking = look.norms[look.asking]
        text = look.text[asking.topk(min(self.text_pivots, asking.numel())).indices]
        return look.completed(least_duplicated(look.tokens, seeds, text, budget))


@dataclass(frozen=True)
class KeyedLook(Look):
    """A look with the L1 norms of the keys of the sample's columns, [L]."""

    norms: Tensor


def least_duplicated(tokens: Tensor, seeds: Tensor, text: Tensor, count: int) -> Tensor:
    """`seeds` (LongTensor [P], numbers of `tokens` [N, D]), and what is least like them and like `text` [R, D].

    The pivots share what is left of `count` evenly; the first ones take one more where it does not come out even.
    """
    rows = unit(tokens)
    pivots = torch.cat([rows[seeds], unit(text)])
    taken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, seeds, True)
    each, more = divmod(count - len(seeds), len(pivots))
    chosen = [seeds]
    for number, pivot in enumerate(pivots):
        likeness = (rows @ pivot).masked_fill(taken, torch.inf)
        fresh = likeness.argsort(stable=True)[: each + (number < more)]
        taken = taken.index_fill(0, fresh, True)
        chosen.append(fresh)
    return torch.cat(chosen)
