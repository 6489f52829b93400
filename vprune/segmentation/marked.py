"""A mask-aware budget: within what stays of an image, a minimum of tokens that the words looked for attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vprune import kernels
from vprune.errors import VPruneError
from vprune.models.probe import keys_valid, layer_attention
from vprune.pruner import Pruner
from vprune.records import Prefill
from vprune.scoring import Scorer
from vprune.selection import TopK

_DEPTH = 0.25  # where maps of words are read from by default, too: below it attention knows little of places


def with_marked(method: Pruner, groups: Sequence[Sequence[int]], minimum: int) -> Pruner:
    """The method with `minimum` tokens of every image set aside, within the same budget, for each group of rows.

    Those are the tokens that the rows attend to most, at the layer that the method's own scorer names, else at a
    quarter of the depth (the first layer where a decoder adds features later). All else stays as the method has it.
    Where the budget cannot hold all of them, the best ones of every group come first.

    Args:
        method: chooses by importance, the most important tokens first.
        groups: for every name, the places in the prompt of its tokens.
        minimum: tokens a group.

    Raises:
        VPruneError: a method that goes by no importance.
    """
    # (Methods with a class of their own need not keep what is most important.)
    if type(method) is not Pruner or method.scorer is None or not isinstance(method.selector, TopK):
        raise VPruneError(
            f"marked={minimum} needs a method that keeps the most important tokens, such as attention or learned; "
            f"method={method.name or type(method).__name__} chooses otherwise: leave marked at 0"
        )
    own = {one.name: getattr(method, one.name) for one in fields(Pruner)}
    return _Marked(**own, groups=groups, marks=minimum)


@dataclass
class _Marked(Pruner):
    """A method whose importance is highest where the rows of `groups` look; for one prompt."""

    groups: Sequence[Sequence[int]] = ()
    marks: int = 0

    def score(self, prefill: Prefill) -> list[Tensor | None]:
        """The method's own importance, with the marked tokens above all else."""
        told = zip(super().score(prefill), _attended(self.scorer, prefill, self.groups), strict=True)
        return [_above(own, marked.to(own.device), self.marks) for own, marked in told if own is not None]


def _attended(scorer: Scorer | None, prefill: Prefill, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """What each group attends to of every image, [groups, N] an image; one prompt only."""
    layer = getattr(scorer, "layer", None)
    if layer is None:
        layer = 0 if prefill.deepstack else int(_DEPTH * len(prefill.anatomy.layers))
    device = prefill.hidden.device
    flat = torch.tensor([[row for group in groups for row in group]], device=device)
    caught, valid = layer_attention(prefill, layer, flat), keys_valid(prefill)
    masses, start = [], 0
    for group in groups:
        part = slice(start, start + len(group))
        start += len(group)
        rows = flat[:, part]
        masses.append(
            kernels.column_mass(
                caught.query[:, :, part],
                caught.key,
                scale=caught.scale,
                rows=rows,
                row_valid=torch.ones_like(rows, dtype=torch.bool),
                key_valid=valid,
                window=prefill.anatomy.window_of(layer),
            )
        )
    return [
        torch.cat(one) for one in zip(*([part[None] for part in prefill.of_images(m)] for m in masses), strict=True)
    ]


def _above(importance: Tensor, attended: Tensor, minimum: int) -> Tensor:
    """The importance with the first `minimum` tokens of every row of `attended` [G, N] above all else, best first."""
    rank = attended.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    lead = (minimum - rank.amin(0)).clamp(min=0).to(importance.dtype)
    known = importance.nan_to_num(nan=0.0)
    span = (known.max() - known.min()).clamp(min=1e-6)
    return torch.where(lead > 0, known.max() + lead * span, importance.flatten()).reshape(importance.shape)
