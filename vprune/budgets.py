"""How many rows stay: of every image, of a sample's images together, of every frame, and at which layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.records import Grid, VisualTokens
from vprune.selection import spread_order


@dataclass(frozen=True)
class Budget:
    """`keep` of what `per` names, and at least `minimum` tokens of every image (of every frame with per="frame").

    `keep` is a fraction of the tokens or a token count: of every picture with per="image", of every frame with
    per="frame", the mean over a sample's pictures with per="sample", where the images of a sample compete: the most
    important tokens stay, wherever they are. With per="question" it is the mean over questions: `shares` says what
    every image gets of its tokens.
    """

    keep: float | int
    per: str = "image"
    minimum: int = 1

    def rows_of(
        self,
        images: Sequence[VisualTokens],
        maps: Sequence[Tensor | None],
        shares: Callable[[float], Sequence[float]] | None = None,
    ) -> list[int]:
        """The number of rows that stay of each image; `maps` are their importances float32 [N], or None.

        `shares`, for per="question", turns a fraction that stays in the mean into those of the images.

        Raises:
            VPruneError: a token count above what there is, or a later stage that would keep more than is left.
        """
        if self.per == "question":
            assert shares is not None
            sizes = [math.prod(image.grid) for image in images]
            counts = [count_of(self.keep, size, [image.grid]) for size, image in zip(sizes, images, strict=True)]
            mean = self.keep if isinstance(self.keep, float) else sum(counts) / max(1, sum(sizes))
            given = zip(shares(mean), sizes, strict=True)
            rows = [min(size, max(self.minimum, count_of(share, size, []))) for share, size in given]
        elif self.per == "frame":
            rows = [image.grid[0] * self._of(math.prod(image.grid[1:]), [image.grid]) for image in images]
        else:
            rows = [0] * len(images)
            for group in _groups(images, "picture" if self.per == "image" else "sample"):
                for number, share in zip(group, self._shares(images, maps, group), strict=True):
                    rows[number] = share
        for image, count in zip(images, rows, strict=True):
            if count > len(image):
                raise VPruneError(
                    f"keep={self.keep} would leave {count} tokens of an image of which an earlier stage left "
                    f"{len(image)}: stages can only keep less and less"
                )
        return rows

    def _of(self, total: int, grids: Sequence[Grid]) -> int:
        return min(total, max(self.minimum, count_of(self.keep, total, grids)))

    def _shares(self, images: Sequence[VisualTokens], maps: Sequence[Tensor | None], group: Sequence[int]) -> list[int]:
        sizes = [math.prod(images[number].grid) for number in group]
        grids = [images[number].grid for number in group]
        if self.per == "image":
            if isinstance(self.keep, float) or len(group) == 1:
                return [self._of(size, [grid]) for size, grid in zip(sizes, grids, strict=True)]
            return proportional(count_of(self.keep, sum(sizes), grids), sizes, self.minimum)
        if isinstance(self.keep, float):
            total = count_of(self.keep, sum(sizes), grids)
        else:
            total = count_of(self.keep * len({_picture(images, n) for n in group}), sum(sizes), grids)
        given = [maps[number] for number in group]
        if any(one is None for one in given):
            return proportional(total, sizes, self.minimum)
        return contested(total, [one for one in given if one is not None], grids, self.minimum)


def _groups(images: Sequence[VisualTokens], by: str) -> list[list[int]]:
    """The numbers of the images that share a budget."""
    groups: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        whole = _picture(images, number) if by == "picture" else None
        groups.setdefault((image.sample, whole), []).append(number)
    return list(groups.values())


def _picture(images: Sequence[VisualTokens], number: int) -> tuple[str, int]:
    """The picture that an image is (a tile of), within its sample."""
    tile_of = images[number].picture
    return ("tiles", tile_of) if tile_of >= 0 else ("alone", number)


def proportional(total: int, sizes: Sequence[int], minimum: int) -> list[int]:
    """Share out `total` in proportion to `sizes`, at least `minimum` each (or all of it), the rest to the largest."""
    floors = [min(size, minimum) for size in sizes]
    shares = [max(floor, total * size // sum(sizes)) for floor, size in zip(floors, sizes, strict=True)]
    by_size = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    while sum(shares) < total:
        for number in by_size:
            if sum(shares) < total and shares[number] < sizes[number]:
                shares[number] += 1
    while sum(shares) > total and any(share > floor for share, floor in zip(shares, floors, strict=True)):
        largest = max(range(len(shares)), key=lambda number: shares[number] - floors[number])
        shares[largest] -= 1
    return shares


def contested(total: int, maps: Sequence[Tensor], grids: Sequence[Grid], minimum: int) -> list[int]:
    """Give the `total` to the most important tokens of all `maps` (float32 [N] each), at least `minimum` a map."""
    floors = [min(one.numel(), minimum) for one in maps]
    scores, owner, safe = [], [], []
    for number, (one, grid) in enumerate(zip(maps, grids, strict=True)):
        own = one.cpu().flatten().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)[spread_order(grid)]
        ranked = own.sort(descending=True, stable=True).values
        scores.append(ranked)
        owner.append(torch.full((ranked.numel(),), number))
        safe.append(torch.arange(ranked.numel()) < floors[number])
    left = total - sum(floors)
    if left <= 0:
        return floors
    flat, owners, open_ = torch.cat(scores), torch.cat(owner), ~torch.cat(safe)
    best = flat[open_].argsort(descending=True, stable=True)[:left]
    won = torch.bincount(owners[open_][best], minlength=len(maps)).tolist()
    return [floor + int(more) for floor, more in zip(floors, won, strict=True)]


def count_of(keep: float | int, total: int, grids: Sequence[Grid]) -> int:
    """The number of rows that stay of `total` tokens on `grids` (t, h, w).

    Raises:
        VPruneError: a token count above what there is.
    """
    if isinstance(keep, float):
        return max(1, math.floor(keep * total + 1e-9))
    if keep > total:
        shapes = " + ".join(" x ".join(map(str, grid if grid[0] > 1 else grid[1:])) for grid in grids)
        raise VPruneError(
            f"keep={keep} but the image has {total} visual tokens ({shapes}); "
            f"give at most {total}, or a fraction in (0, 1]"
        )
    return keep
