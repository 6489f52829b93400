"""Who stays: orders in which an image's tokens are kept, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vprune import kernels
from vprune.models.aside import sent
from vprune.records import Grid


@dataclass(frozen=True)
class Ranking:
    """The N tokens of an image (or of I images alike, [I, N]) in the order in which they are kept, best first.

    By falling `scores` [N], not-a-number the least and equal ones by rising `ties`, LongTensor [N], distinct ranks 0..N
    - 1; without scores by `ties` alone.
    """

    ties: Tensor
    scores: Tensor | None = None

    @classmethod
    def of(cls, order: Tensor) -> Ranking:
        """The ranking that an order, LongTensor [N], lays down."""
        return cls(order.argsort())

    @property
    def shape(self) -> torch.Size:
        """[N] or [I, N]."""
        return self.ties.shape if self.scores is None else self.scores.shape

    def first(self, count: int, among: Tensor | None = None) -> Tensor:
        """The first `count` tokens, LongTensor [count], ascending; `among` bool [N]: those that may be taken."""
        flat = (-1, self.shape[-1])
        ties = self.ties.expand(self.shape).reshape(flat)
        scores = torch.zeros(ties.shape, device=ties.device) if self.scores is None else self.scores.reshape(flat)
        valid = None if among is None else among.reshape(flat)
        return kernels.select(scores, count, ties=ties, valid=valid).view(*self.shape[:-1], count)

    @cached_property
    def order(self) -> Tensor:
        """All tokens, LongTensor [N], best first."""
        by_tie = self.ties.argsort().expand(self.shape)
        if self.scores is None:
            return by_tie
        falling = torch.where(self.scores.isnan(), -math.inf, self.scores).gather(-1, by_tie)
        return by_tie.gather(-1, falling.argsort(dim=-1, descending=True, stable=True))

    @cached_property
    def ranks(self) -> Tensor:
        """The place of every token in the order, LongTensor [N]."""
        return self.ties if self.scores is None else self.order.argsort()

    def to(self, device: torch.device) -> Ranking:
        """The same on another device."""
        return Ranking(sent(self.ties, device), None if self.scores is None else sent(self.scores, device))

    def of_those(self, tokens: Tensor) -> Ranking:
        """The same among some of the tokens, LongTensor [K] or [I, K], numbered anew."""
        ties = self.ties.expand(*tokens.shape[:-1], -1).gather(-1, tokens)
        return Ranking(ties.argsort().argsort(), None if self.scores is None else self.scores.gather(-1, tokens))


class Selector(Protocol):
    """Puts the tokens of images in the order in which they are kept.

    `fingerprints` says whether it needs a checksum of the image's pixels.
    """

    @property
    def fingerprints(self) -> bool:
        """True if it needs a checksum of the image's pixels."""
        ...

    def rank(self, importance: Tensor | None, grid: Grid, budget: int, fingerprints: Sequence[int]) -> Ranking:
        """The ranking of I images of one grid, of which the first `budget` are the choice; `importance` [I, N]."""
        ...


@dataclass
class TopK:
    """The most important tokens first; equal ones in an order that spreads evenly over the grid."""

    fingerprints: ClassVar[bool] = False
    reads_rows_only: ClassVar[bool] = True

    def rank(self, importance: Tensor | None, grid: Grid, budget: int, fingerprints: Sequence[int]) -> Ranking:
        """Rank by falling importance [I, N]; not-a-number counts as the least."""
        if importance is None:
            return Ranking(spread_ranks(grid, _CPU).expand(len(fingerprints), -1))
        return Ranking(spread_ranks(grid, importance.device), importance)


@dataclass
class Random:
    """A random order, drawn from the seed and the image's own pixels: the same whatever the batch."""

    seed: int = 0

    fingerprints: ClassVar[bool] = True

    def rank(self, importance: Tensor | None, grid: Grid, budget: int, fingerprints: Sequence[int]) -> Ranking:
        """Permute the tokens."""
        return Ranking.of(torch.stack([self._drawn(math.prod(grid), one) for one in fingerprints]))

    def _drawn(self, tokens: int, fingerprint: int) -> Tensor:
        # Weyl steps and a modulus mix seed and image into one of 2^63 streams.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + fingerprint * 0xBF58476D1CE4E5B9) % (2**63 - 1)
        return torch.randperm(tokens, generator=torch.Generator().manual_seed(mixed), device=_CPU)


@dataclass
class Stride:
    """Evenly spaced tokens in raster order: the i-th of K stands at floor((i + 1/2) N / K)."""

    fingerprints: ClassVar[bool] = False

    def rank(self, importance: Tensor | None, grid: Grid, budget: int, fingerprints: Sequence[int]) -> Ranking:
        """The evenly spaced ones first, the others after them."""
        return Ranking(strided_ranks(grid, budget).expand(len(fingerprints), -1))


_CPU = torch.device("cpu")


@lru_cache(maxsize=64)
def strided_ranks(grid: Grid, budget: int) -> Tensor:
    """The place of every token, LongTensor [N], where `budget` evenly spaced ones come first."""
    first = torch.arange(budget, device=_CPU)
    chosen = (2 * first + 1) * math.prod(grid) // (2 * max(budget, 1))
    ranks = spread_ranks(grid, _CPU) + budget
    ranks[chosen] = first
    return ranks.argsort().argsort()


@lru_cache(maxsize=64)
def spread_order(grid: Grid, device: torch.device = _CPU) -> Tensor:
    """All tokens, LongTensor [N], so that every prefix spreads evenly over the grid (a dither matrix).

    On a device once and for all.
    """
    t, h, w = grid
    bits = max(1, math.ceil(math.log2(max(t, h, w, 2))))
    frame, row, column = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    rank = torch.zeros((t, h, w), dtype=torch.long)
    for bit in range(bits):
        # The lowest bits of the place become the highest of the rank; x xor y breaks up rows, as in Bayer's matrix.
        for part in ((row ^ column) >> bit & 1, row >> bit & 1, frame >> bit & 1):
            rank = 2 * rank + part
    return rank.flatten().argsort(stable=True).to(device)


@lru_cache(maxsize=64)
def spread_ranks(grid: Grid, device: torch.device) -> Tensor:
    """The place of every token in `spread_order`, LongTensor [N], on a device once and for all."""
    return spread_order(grid).argsort().to(device)


def frame_by_frame(order: Tensor, grid: Grid) -> Tensor:
    """The same order (LongTensor [N]) within every frame, the frames taking turns."""
    frame = order // (grid[1] * grid[2])
    turns = torch.stack([(frame == number).cumsum(-1) for number in range(grid[0])])
    turn = turns.gather(0, frame[None]).squeeze(0)
    return order.gather(-1, (turn * grid[0] + frame).argsort(stable=True))


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
def cell_of_token(grid: Grid, cells: Grid, device: torch.device = _CPU) -> Tensor:
    """The cell that each token lies in, LongTensor [N], raster order of cells, on a device once and for all."""
    places = [torch.arange(size) * count // size for size, count in zip(grid, cells, strict=True)]
    frame, row, column = torch.meshgrid(*places, indexing="ij")
    return ((frame * cells[1] + row) * cells[2] + column).flatten().to(device)
