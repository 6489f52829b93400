"""Maps of attention: from the layers of a model, as they go by, to what the rows of a phrase look at."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.segmentation.reading import LayerAttention


def span(first: float, last: float, layers: int) -> range:
    """The layers between two shares of the depth, at least one; of 8, from 0.25 to 0.5 are layers 2 and 3."""
    begin = min(layers - 1, int(first * layers))
    return range(begin, max(begin + 1, round(last * layers)))


def _checked(first: float, last: float) -> None:
    if not 0 <= first < last <= 1:
        raise VPruneError(f"first={first}, last={last}: give two shares of the depth, 0 <= first < last <= 1")


@dataclass
class MeanAttention:
    """What the rows attend to, averaged over heads and over the layers from `first` to `last` (shares of the depth).

    With `weighted`, head h of a layer counts W_h = mean over queries of max over keys of its attention (VL-SAM, arXiv
    2410.05963): S' = mean_h(S_h W_h). Needs no N x N matrix without it, one a head with it.

    Raises:
        VPruneError: the shares are not in order.

    Example:
        >>> MeanAttention(first=0.25, last=0.5).weighted
        False
    """

    first: float = 0.0
    last: float = 1.0
    weighted: bool = False

    def __post_init__(self) -> None:
        _checked(self.first, self.last)

    def begin(self, layers: int, visual: Tensor, rows: Tensor) -> _Mean:
        """See `Extractor`."""
        return _Mean(span(self.first, self.last, layers), self.weighted, rows)


class _Mean:
    def __init__(self, layers: range, weighted: bool, rows: Tensor) -> None:
        self.layers, self.weighted, self.rows = layers, weighted, rows
        self.total: Tensor | None = None

    def layer(self, number: int, attention: LayerAttention) -> None:
        rows = attention.rows(self.rows)
        if self.weighted:
            rows = rows * mean_max(attention)[:, None, None]
        mean = rows.mean(0)
        self.total = mean if self.total is None else self.total + mean

    def finish(self) -> Tensor:
        assert self.total is not None
        return self.total / len(self.layers)


def mean_max(attention: LayerAttention) -> Tensor:
    """VL-SAM's weight of every head: the mean over queries of the largest attention, [H]."""
    return torch.stack([attention.head(h).amax(-1).mean() for h in range(attention.heads)])


@dataclass
class Flow:
    """Attention flow of VL-SAM (arXiv 2410.05963): F^l = (I + S'^l)(I + F^(l-1)), rows of the last layer.

    S'^l = mean_h(S_h W_h), W_h = mean over queries of max over keys (`weighted`; else the plain mean). `regularised`:
    column j is scaled by 1 - (L_j - 1) / N, with L_j = N - j the rows that may see it (a reconstruction), without which
    the flow piles up at the front. Three N x N matrices at a time, whatever the number of layers.

    Raises:
        VPruneError: the shares are not in order.
    """

    first: float = 0.0
    last: float = 1.0
    weighted: bool = True
    regularised: bool = True

    def __post_init__(self) -> None:
        _checked(self.first, self.last)

    def begin(self, layers: int, visual: Tensor, rows: Tensor) -> _Flow:
        """See `Extractor`."""
        return _Flow(self, span(self.first, self.last, layers), rows)


class _Flow:
    def __init__(self, flow: Flow, layers: range, rows: Tensor) -> None:
        self.flow, self.layers, self.rows = flow, layers, rows
        self.total: Tensor | None = None

    def layer(self, number: int, attention: LayerAttention) -> None:
        mean = _weighted_mean(attention, self.flow.weighted)
        tokens = mean.shape[0]
        mean.diagonal().add_(1)
        if self.total is not None:
            self.total.diagonal().add_(1)
        through = mean if self.total is None else mean @ self.total
        if self.flow.regularised:
            through = through * (torch.arange(1, tokens + 1, device=mean.device) / tokens)
        self.total = through

    def finish(self) -> Tensor:
        assert self.total is not None
        return self.total[self.rows]


def _weighted_mean(attention: LayerAttention, weighted: bool) -> Tensor:
    total: Tensor | None = None
    for number in range(attention.heads):
        head = attention.head(number)
        head = head * head.amax(-1).mean() if weighted else head
        total = head if total is None else total.add_(head)
    assert total is not None
    return total / attention.heads


@dataclass
class Rollout:
    """Rollout from the middle layers up, as DecAF does it (arXiv 2510.19592): R <- (I + S') / 2 R.

    S' = sum_h w_h S_h / sum_h w_h, w_h = the largest attention of the head to a visual token, over that of all heads.

    Raises:
        VPruneError: the shares are not in order.
    """

    first: float = 0.5
    last: float = 1.0

    def __post_init__(self) -> None:
        _checked(self.first, self.last)

    def begin(self, layers: int, visual: Tensor, rows: Tensor) -> _Rollout:
        """See `Extractor`."""
        return _Rollout(span(self.first, self.last, layers), visual, rows)


class _Rollout:
    def __init__(self, layers: range, visual: Tensor, rows: Tensor) -> None:
        self.layers, self.visual, self.rows = layers, visual, rows
        self.total: Tensor | None = None

    def layer(self, number: int, attention: LayerAttention) -> None:
        mixed: Tensor | None = None
        weights = 0.0
        largest = max(float(attention.head(h)[:, self.visual].max()) for h in range(attention.heads))
        for h in range(attention.heads):
            head = attention.head(h)
            weight = float(head[:, self.visual].max()) / largest
            weights += weight
            mixed = head * weight if mixed is None else mixed.add_(head, alpha=weight)
        assert mixed is not None
        mixed = mixed / weights
        half = (mixed + torch.eye(mixed.shape[0], device=mixed.device)) / 2
        self.total = half if self.total is None else half @ self.total

    def finish(self) -> Tensor:
        assert self.total is not None
        return self.total[self.rows]


@dataclass
class LocalisationHeads:
    """The few heads whose attention from the phrase lies on one place of the image (arXiv 2503.06287).

    Heads of all layers that give the image more than the mean share of their attention are ranked by the spatial
    entropy of the connected parts above the mean of their map; the `top` with the least are averaged. Only rows are
    computed, no N x N matrix. (That the elbow of the shares is their mean is a reconstruction.)

    Raises:
        VPruneError: top is no positive number.
    """

    top: int = 3

    def __post_init__(self) -> None:
        if self.top < 1:
            raise VPruneError(f"top={self.top}: give a number of heads, at least 1")

    def begin(self, layers: int, visual: Tensor, rows: Tensor) -> _Heads:
        """See `Extractor`."""
        return _Heads(self.top, range(layers), visual, rows)


@dataclass
class _Heads:
    top: int
    layers: range
    visual: Tensor
    rows: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def layer(self, number: int, attention: LayerAttention) -> None:
        self.seen.append(attention.rows(self.rows))

    def finish(self) -> Tensor:
        heads = torch.cat(self.seen)  # [layers * H, R, N]
        share = heads[..., self.visual].sum(-1).mean(1)
        maps = heads.mean(1)[:, self.visual]
        spread = torch.stack([entropy_of_parts(one) for one in maps]).to(share.device)
        spread = torch.where(share >= share.mean(), spread, torch.inf)
        best = spread.argsort()[: self.top]
        return heads[best].mean(0)


def entropy_of_parts(row: Tensor) -> Tensor:
    """Entropy of the mass of the connected parts of a map [N] (as near a square as N allows) above its mean."""
    from scipy.ndimage import label

    values = row.float().cpu()
    side = max(1, int(values.numel() ** 0.5))
    square = values[: side * (values.numel() // side)].reshape(-1, side)
    above = torch.where(square > square.mean(), square, 0.0)
    parts, count = label(above.numpy() > 0)
    mass = torch.tensor([float(above[torch.from_numpy(parts == n)].sum()) for n in range(1, count + 1)])
    mass = mass / mass.sum().clamp(min=1e-12)
    return -(mass * mass.clamp(min=1e-12).log()).sum() if count else torch.tensor(torch.inf)
