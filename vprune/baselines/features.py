"""Methods that look at the tokens themselves, not only at a number for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.pruner import Pruner
from vprune.records import Prefill, Selection, VisualTokens, instruction_rows
from vprune.recycling import Absorption, settle
from vprune.selection import frame_by_frame, spread_order


@dataclass(frozen=True)
class Look:
    """What a method may look at of one image: the N tokens of it that stand, and the text that asks about it.

    `importance` float32 [N] on the CPU, None for methods without a scorer.
    """

    prefill: Prefill
    image: VisualTokens
    importance: Tensor | None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def places(self) -> Tensor:
        """Where the tokens lie on the grid, LongTensor [N], ascending."""
        standing = self.image.standing
        return torch.arange(len(self)) if standing is None else standing.kept.cpu()

    @property
    def sizes(self) -> Tensor | None:
        """How many tokens each stands for already, LongTensor [N]; None = itself."""
        return None if self.image.standing is None else self.image.standing.sizes.cpu()

    @property
    def tokens(self) -> Tensor:
        """The tokens as the decoder's layer reads them, [N, D], at least float32, on the model's device."""
        hidden = self.prefill.hidden
        return exact(hidden[self.image.sample, self.image.columns.to(hidden.device)])

    @property
    def asking(self) -> Tensor:
        """The columns of the instruction, the text after the sample's last visual token, LongTensor [R]."""
        rows, valid = self.prefill.instruction or instruction_rows(self.prefill.valid, self.prefill.visual)
        return rows[self.image.sample][valid[self.image.sample]].to(self.prefill.hidden.device)

    @property
    def text(self) -> Tensor:
        """The instruction as the layer reads it, [R, D]."""
        return exact(self.prefill.hidden[self.image.sample, self.asking])

    @property
    def keys(self) -> Tensor:
        """The keys of the tokens' patches in the vision tower's watched layer, [N, heads, d], at least float32.

        Raises:
            VPruneError: the image features were computed before the hooks were in place.
        """
        seen = self.prefill.tower[self.image.origin] if self.image.origin >= 0 else None
        if seen is None or seen.keys is None or seen.keys.shape[0] != math.prod(self.image.grid):
            raise VPruneError(
                f"the vision tower was not watched while it read image {self.image.image} of sample "
                f"{self.image.sample}: pass pixel_values inside the `with vprune.prune(...)` block"
            )
        return exact(seen.keys[self.places.to(seen.keys.device)])

    @property
    def spread(self) -> Tensor:
        """The numbers of the tokens in an order that spreads evenly over the grid, LongTensor [N]."""
        number = torch.full((math.prod(self.image.grid),), -1, dtype=torch.long)
        number[self.places] = torch.arange(len(self))
        spread = number[spread_order(self.image.grid)]
        return spread[spread >= 0]

    def ranked(self, scores: Tensor | None = None) -> Tensor:
        """The numbers of the tokens by falling `scores` [N] (None: by importance), equal ones spread over the grid."""
        scores = self.importance if scores is None else scores
        if scores is None:
            return self.spread
        falling = scores.detach().cpu().nan_to_num(-math.inf, math.inf, -math.inf)[self.spread]
        return self.spread[falling.argsort(descending=True, stable=True)]

    def completed(self, chosen: Tensor) -> Tensor:
        """`chosen` (LongTensor [K], on any device), and after them all others, by importance."""
        chosen = chosen.cpu()
        left = torch.ones(len(self), dtype=torch.bool)
        left[chosen] = False
        ranked = self.ranked()
        return torch.cat([chosen, ranked[left[ranked]]])


@dataclass
class FeaturePruner(Pruner):
    """A method that orders or merges the tokens of an image by what they are.

    Subclasses say how many rows stay of every image (`rows`), in which order tokens are kept (`order`, or `orders` for
    all images at once), and what becomes of the others where that is a part of the method (`merged`, `groups`).
    `recycle` other than "none" takes the place of the method's own merging.

    Raises:
        VPruneError: budget="frame" with a merging that does not know frames.
    """

    merges: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False  # the keys of the vision tower's layer `scorer.tower_layer`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merges and self.recycle == "none" and self.budget == "frame":
            raise VPruneError(
                f"budget='frame': {type(self).__name__} merges tokens of all frames of a video; give budget='image', "
                "or recycle=nearest, grid, weighted or anchors in place of its own merging"
            )

    def order(self, look: Look, budget: int) -> Tensor:
        """The numbers of all N tokens, LongTensor [N]: the first `budget` are the choice."""
        return look.ranked()

    def orders(self, looks: Sequence[Look], budgets: Sequence[int]) -> list[Tensor]:
        """The same for several images."""
        return [self.order(look, budget) for look, budget in zip(looks, budgets, strict=True)]

    def merged(self, look: Look, budget: int) -> Selection:
        """The rows that the method itself makes of an image, for methods that merge."""
        raise NotImplementedError

    def groups(self, looks: Sequence[Look], budgets: Sequence[int]) -> list[Selection]:
        """The same for several images."""
        return [self.merged(look, budget) for look, budget in zip(looks, budgets, strict=True)]

    def plan(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[Selection]:
        """Decide for every image of a prefill whose importance maps are `maps`.

        Raises:
            VPruneError: the budget is more than an image has.
        """
        rows, looks = self.rows(prefill, maps, keep), self.looks(prefill, maps)
        plans: dict[int, Selection | Absorption] = {}
        pruned = [number for number, look in enumerate(looks) if rows[number] < len(look)]
        some, budgets = [looks[number] for number in pruned], [rows[number] for number in pruned]
        if self.merges and self.recycle == "none":
            plans |= zip(pruned, self.groups(some, budgets), strict=True)
        else:
            # With frames that take turns, tokens far down the order may be needed.
            far = [len(look) for look in some] if self.budget == "frame" else budgets
            orders = dict(zip(pruned, self.orders(some, far), strict=True))
            plans |= {number: self.laid_out(looks[number], orders[number], rows[number]) for number in pruned}
        for number, look in enumerate(looks):
            if number not in plans:
                plans[number] = self.laid_out(look, torch.arange(len(look)), rows[number])
        return settle([plans[number] for number in range(len(looks))], prefill)

    def looks(self, prefill: Prefill, maps: Sequence[Tensor | None]) -> list[Look]:
        """What may be looked at of every image."""
        return [
            Look(prefill, image, standing_part(one, image)) for image, one in zip(prefill.images, maps, strict=True)
        ]

    def laid_out(self, look: Look, order: Tensor, budget: int) -> Selection | Absorption:
        """The rows that an order of keeping, LongTensor [N], makes of one image."""
        image, by_frame = look.image, self.budget == "frame"
        if by_frame:
            number = torch.empty(math.prod(image.grid), dtype=torch.long)
            number[look.places] = torch.arange(len(look))
            order = number[frame_by_frame(look.places[order], image.grid)]
        standing = None if image.standing is None else image.standing.to(order.device)
        return self._recycler.plan(order, image.grid, budget, look.importance, standing, by_frame)


def standing_part(importance: Tensor | None, image: VisualTokens) -> Tensor | None:
    """Importance of all of an image as that of what stands of it, [N]."""
    if importance is None:
        return None
    here = importance.flatten().cpu()
    return here if image.standing is None else here[image.standing.kept.cpu()]


def joined(kept: Tensor, joins: Tensor, look: Look, shares: Tensor | None = None) -> Selection:
    """The selection that keeps `kept` (LongTensor [K], any order) and merges other tokens into them.

    `joins` LongTensor [N]: the place in `kept` of the token that each joins, -1 = dropped (`kept` join themselves);
    `shares` [N]: what each counts in its row's weighted mean, None = the same.
    """
    standing, place = kept.cpu().sort()
    row = torch.empty_like(place)
    row[place] = torch.arange(place.numel())
    joins = joins.cpu()
    source = torch.where(joins >= 0, row[joins.clamp(min=0)], -1)
    source[standing] = torch.arange(standing.numel())
    return Selection.grouped(standing, source, look.sizes, None if shares is None else shares.cpu())


def exact(rows: Tensor) -> Tensor:
    """In float32, or float64 where they are that."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def unit(rows: Tensor) -> Tensor:
    """Rows [..., D] of length one."""
    length: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / length.clamp(min=torch.finfo(rows.dtype).tiny)


def count_outliers(scores: Tensor) -> int:
    """How many of `scores` [N] lie above Q3 + 1.5 (Q3 - Q1), Q1 and Q3 their quartiles."""
    first, third = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device)).tolist()
    return int((scores > third + 1.5 * (third - first)).sum())
