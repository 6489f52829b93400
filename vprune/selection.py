"""Who stays: orders in which an image's tokens are kept, best first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vprune.records import Grid


class Selector(Protocol):
    """Puts the tokens of one image in the order in which they are kept.

    `fingerprints` says whether it needs a checksum of the image's pixels.
    """

    @property
    def fingerprints(self) -> bool:
        """True if it needs a checksum of the image's pixels."""
        ...

    def order(self, importance: Tensor | None, grid: Grid, budget: int, fingerprint: int) -> Tensor:
        """All tokens, LongTensor [N]: the first `budget` are the choice, the next follow if there is room."""
        ...


@dataclass
class TopK:
    """The most important tokens first; equal ones in an order that spreads evenly over the grid."""

    fingerprints: ClassVar[bool] = False

    def order(self, importance: Tensor | None, grid: Grid, budget: int, fingerprint: int) -> Tensor:
        """Sort by falling importance [N]; not-a-number counts as the least."""
        spread = spread_order(grid)
        if importance is None:
            return spread
        scores = importance.flatten().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)[spread]
        return spread[scores.argsort(descending=True, stable=True)]


@dataclass
class Random:
    """A random order, drawn from the seed and the image's own pixels: the same whatever the batch."""

    seed: int = 0

    fingerprints: ClassVar[bool] = True

    def order(self, importance: Tensor | None, grid: Grid, budget: int, fingerprint: int) -> Tensor:
        """Permute the tokens."""
        # Weyl steps and a modulus mix seed and image into one of 2^63 streams.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + fingerprint * 0xBF58476D1CE4E5B9) % (2**63 - 1)
        return torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(mixed))


@dataclass
class Stride:
    """Evenly spaced tokens in raster order: the i-th of K stands at floor((i + 1/2) N / K)."""

    fingerprints: ClassVar[bool] = False

    def order(self, importance: Tensor | None, grid: Grid, budget: int, fingerprint: int) -> Tensor:
        """The evenly spaced ones first, the others after them."""
        total = math.prod(grid)
        chosen = (2 * torch.arange(budget) + 1) * total // (2 * max(budget, 1))
        left = torch.ones(total, dtype=torch.bool)
        left[chosen] = False
        spread = spread_order(grid)
        return torch.cat([chosen, spread[left[spread]]])


@lru_cache(maxsize=64)
def spread_order(grid: Grid) -> Tensor:
    """All tokens, LongTensor [N], so that every prefix spreads evenly over the grid (a dither matrix)."""
    t, h, w = grid
    bits = max(1, math.ceil(math.log2(max(t, h, w, 2))))
    frame, row, column = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    rank = torch.zeros((t, h, w), dtype=torch.long)
    for bit in range(bits):
        # The lowest bits of the place become the highest of the rank; x xor y breaks up rows, as in Bayer's matrix.
        for part in ((row ^ column) >> bit & 1, row >> bit & 1, frame >> bit & 1):
            rank = 2 * rank + part
    return rank.flatten().argsort(stable=True)


def frame_by_frame(order: Tensor, grid: Grid) -> Tensor:
    """The same order (LongTensor [N]) within every frame, the frames taking turns."""
    frame = order // (grid[1] * grid[2])
    turns = torch.stack([(frame == number).cumsum(0) for number in range(grid[0])])
    turn = turns.gather(0, frame[None]).squeeze(0)
    return order[(turn * grid[0] + frame).argsort(stable=True)]


@lru_cache(maxsize=256)
def cells_within(h: int, w: int, budget: int) -> tuple[int, int]:
    """The grid (h', w') of at most `budget` cells that replaces (h, w).

    As many cells as fit with an aspect ratio within a factor of two of the grid's; among equals the truest one.
    """

    def quality(cells: tuple[int, int]) -> tuple[bool, float, float]:
        distortion = abs(math.log2(cells[0] * w / (cells[1] * h)))
        near = distortion <= 1 + 1e-9
        return near, float(cells[0] * cells[1]) if near else -distortion, -distortion

    options = [(rows, min(w, budget // rows)) for rows in range(1, min(h, budget) + 1)]
    return max(options, key=quality)


def budget_cells(grid: Grid, budget: int) -> Grid:
    """The grid of at most `budget` cells for a whole video: every frame the same, while there are enough."""
    t, h, w = grid
    frames = min(t, budget)
    return (frames, *cells_within(h, w, budget // frames))


@lru_cache(maxsize=256)
def cell_of_token(grid: Grid, cells: Grid) -> Tensor:
    """The cell that each token lies in, LongTensor [N], raster order of cells."""
    places = [torch.arange(size) * count // size for size, count in zip(grid, cells, strict=True)]
    frame, row, column = torch.meshgrid(*places, indexing="ij")
    return ((frame * cells[1] + row) * cells[2] + column).flatten()
