"""From a map to points, boxes and masks: threshold, largest part, points, and rounds with the mask fed back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from vprune.errors import VPruneError
from vprune.segmentation.sam import Prompts
from vprune.segmentation.segmenters import Encoded, Segmenter, with_masks

_UP = 8  # maps are read at so many places a cell and direction, so that points lie between the cells' middles, too


@dataclass(frozen=True)
class Prompting:
    """How maps become masks (VL-SAM, arXiv 2410.05963, steps 5 and 6).

    Args:
        threshold: of the map scaled to 0..1, above which a place may belong to the object; "otsu" = Otsu's.
        smooth: standard deviation, in cells, of what the map is smoothed with.
        positive: points on the object, the maximum first. negative: points beside it, the minimum first.
        box: prompt with the box around the part above the threshold too, `margin` cells wider; False: points only.
        rounds: predictions: in the second the mask goes back as a mask prompt, in later ones the points come anew from
            the map within it and beside it.

    Raises:
        VPruneError: a value out of range.
    """

    threshold: float | str = 0.4
    smooth: float = 0.6
    positive: int = 2
    negative: int = 0
    box: bool = False
    margin: float = 0.5
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.threshold != "otsu" and not (isinstance(self.threshold, float) and 0 < self.threshold < 1):
            raise VPruneError(f"threshold={self.threshold!r}: give a number between 0 and 1, or otsu")
        if self.positive < 1 or self.negative < 0 or self.rounds < 1 or self.smooth < 0 or self.margin < 0:
            raise VPruneError("positive >= 1, negative >= 0, rounds >= 1, smooth >= 0 and margin >= 0 are needed")


@dataclass(frozen=True)
class Candidate:
    """An object to be drawn: its view, what it is called and its map, float32 [h, w] over the whole view."""

    view: int
    name: str
    heat: NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """A candidate with its mask, bool [H, W] in pixels of the view, its score, and the points that prompted it."""

    candidate: Candidate
    mask: NDArray[np.bool_]
    score: float
    points: NDArray[np.float32]
    signs: NDArray[np.float32]


@dataclass(frozen=True)
class _Marks:
    points: NDArray[np.float32]  # [K, 2] in shares of the view's sides
    signs: NDArray[np.float32]
    box: NDArray[np.float32]  # [4], the same


def draw(segmenter: Segmenter, encoded: Encoded, candidates: Sequence[Candidate], how: Prompting) -> list[Drawn]:
    """Masks for all candidates of all views, prompted together; score = predicted IoU x attention mass inside the mask.

    A candidate whose map says nothing, or whose mask is empty, is left out.
    """
    fine = [enlarged(one.heat, how.smooth) for one in candidates]
    usable = [row for row, one in enumerate(fine) if float(one.max()) > float(one.min())]
    if not usable:
        return []
    chosen, fine = [candidates[row] for row in usable], [fine[row] for row in usable]
    fine = _twins_apart(chosen, fine, how)
    marks = [marks_of(one, how) for one in fine]
    prompts, masks = _prompts(marks, chosen, encoded, how.box), None
    for turn in range(how.rounds):
        if turn >= 2 and masks is not None:
            shown = segmenter.masks(encoded, prompts.view, masks)
            marks = [_within(*one, how) for one in zip(fine, shown, marks, strict=True)]
            prompts = _prompts(marks, chosen, encoded, how.box)
        given = with_masks(prompts, masks) if masks is not None and segmenter.feedback else prompts
        logits, quality = segmenter.predict(encoded, given)
        agreed = agreement(
            fine, segmenter.coverage(encoded, prompts.view, logits, (fine[0].shape[0], fine[0].shape[1]))
        )
        best = (quality.clamp(0.01, 1) * agreed.to(quality)).argmax(1)
        rows = torch.arange(len(best), device=best.device)
        masks, said = logits[rows, best], quality[rows, best]
    assert masks is not None
    drawn = []
    for row, mask in enumerate(segmenter.masks(encoded, prompts.view, masks)):
        array = mask.numpy()
        if not array.any():
            continue
        share = mass_inside(fine[row], array)
        width, height = encoded.sizes[chosen[row].view]
        points = marks[row].points * np.array([width, height], np.float32)
        score = float(said[row].clamp(0, 1)) * share
        drawn.append(Drawn(chosen[row], array, score, points, marks[row].signs))
    return drawn


def _twins_apart(
    candidates: Sequence[Candidate], fine: Sequence[NDArray[np.float32]], how: Prompting
) -> list[NDArray[np.float32]]:
    """Maps in which a name said again does not find the place again that it found before (in the same view)."""
    taken: dict[tuple[int, str], list[NDArray[np.float32]]] = {}
    apart = []
    for candidate, heat in zip(candidates, fine, strict=True):
        key, left = (candidate.view, candidate.name), heat
        h, w = heat.shape
        for box in taken.get(key, []):
            x0, y0, x1, y1 = (box * np.array([w, h, w, h])).round().astype(int)
            without = left.copy()
            without[y0:y1, x0:x1] = left.min()
            # (What is left may be nothing but haze: then both mean the same place.)
            left = without if without.max() > 0.3 * heat.max() else left
        taken.setdefault(key, []).append(marks_of(left, how).box)
        apart.append(left)
    return apart


def enlarged(heat: NDArray[np.float32], smooth: float) -> NDArray[np.float32]:
    """A map [h, w] smoothed and read at eight times as many places in both directions."""
    values = ndimage.gaussian_filter(heat.astype(np.float32), smooth) if smooth else heat.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return interpolate(tensor, scale_factor=_UP, mode="bilinear", align_corners=False)[0, 0].numpy()


def otsu(values: NDArray[np.float32]) -> float:
    """Otsu's threshold of values in 0..1: the one that parts them with the least variance within."""
    counts, edges = np.histogram(values, bins=128, range=(0.0, 1.0))
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = counts.sum() - below
    mean_below = (counts * middles).cumsum() / np.maximum(below, 1)
    mean_above = ((counts * middles).sum() - (counts * middles).cumsum()) / np.maximum(above, 1)
    return float(edges[1:][int((below * above * (mean_below - mean_above) ** 2).argmax())])


def marks_of(fine: NDArray[np.float32], how: Prompting) -> _Marks:
    """Points and box of a map: the largest connected part above the threshold holds the object."""
    scaled = (fine - fine.min()) / (fine.max() - fine.min())
    level = otsu(scaled) if how.threshold == "otsu" else float(how.threshold)
    parts, count = ndimage.label(scaled >= level)
    # By mass and not by area: a wide faint part is no object.
    mass = ndimage.sum_labels(scaled, parts, range(1, count + 1))
    part = parts == 1 + int(np.argmax(mass))
    ys, xs = np.nonzero(part)
    h, w = fine.shape
    wider = how.margin * _UP
    box = np.array([xs.min() - wider, ys.min() - wider, xs.max() + 1 + wider, ys.max() + 1 + wider], np.float32)
    box = np.clip(box / np.array([w, h, w, h], np.float32), 0, 1)
    return _Marks(*_points(scaled, part, part, how), box)


def _points(
    scaled: NDArray[np.float32], on: NDArray[np.bool_], part: NDArray[np.bool_], how: Prompting
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Maxima on the object and minima beside it, each apart from those before it."""
    h, w = scaled.shape
    places, signs = [], []
    apart = max(1, round(2 * _UP))
    for count, sign, values, where in (
        (how.positive, 1.0, scaled, on),
        (how.negative, 0.0, -scaled, ~ndimage.binary_dilation(part, iterations=_UP)),
    ):
        left = where.copy()
        for _ in range(count):
            if not left.any():
                break
            y, x = np.unravel_index(int(np.where(left, values, -np.inf).argmax()), scaled.shape)
            places.append(((x + 0.5) / w, (y + 0.5) / h))
            signs.append(sign)
            left[max(0, y - apart) : y + apart + 1, max(0, x - apart) : x + apart + 1] = False
    return np.array(places, np.float32), np.array(signs, np.float32)


def _within(fine: NDArray[np.float32], shown: Tensor, before: _Marks, how: Prompting) -> _Marks:
    """New points from the map within a mask [H, W], and beside it; the old ones where the mask misses the map."""
    mask = interpolate(shown[None, None].float(), fine.shape)[0, 0].numpy() > 0
    scaled = (fine - fine.min()) / (fine.max() - fine.min())
    if not (scaled[mask] > 0.05).any():
        return before
    return replace(before, **dict(zip(("points", "signs"), _points(scaled, mask, mask, how), strict=True)))


def _prompts(marks: Sequence[_Marks], candidates: Sequence[Candidate], encoded: Encoded, box: bool) -> Prompts:
    """All prompts in one batch, in pixels of their views; missing points are marked -1."""
    most = max(len(mark.signs) for mark in marks)
    points, labels = np.zeros((len(marks), most, 2), np.float32), np.full((len(marks), most), -1, np.float32)
    boxes = np.zeros((len(marks), 4), np.float32)
    for row, (mark, candidate) in enumerate(zip(marks, candidates, strict=True)):
        width, height = encoded.sizes[candidate.view]
        points[row, : len(mark.signs)] = mark.points * np.array([width, height], np.float32) - 0.5
        labels[row, : len(mark.signs)] = mark.signs
        boxes[row] = mark.box * np.array([width, height, width, height], np.float32) - 0.5
    view = torch.tensor([candidate.view for candidate in candidates])
    return Prompts(view, torch.from_numpy(points), torch.from_numpy(labels), torch.from_numpy(boxes) if box else None)


def agreement(fine: Sequence[NDArray[np.float32]], covers: Tensor) -> Tensor:
    """How well each mask [P, M, h, w] agrees with its map: sum of the lesser over sum of the greater of both, [P, M].

    The map is scaled so that its 99.5th percentile is one. DecAF (arXiv 2510.19592) weighs a like consistency against
    SAM's own score.
    """
    maps = np.stack(fine)
    low = np.median(maps, axis=(1, 2), keepdims=True)
    high = np.quantile(maps, 0.995, axis=(1, 2), keepdims=True)
    scaled = torch.from_numpy(np.clip((maps - low) / np.maximum(high - low, 1e-12), 0, 1)).float()[:, None].to(covers)
    return torch.minimum(scaled, covers).sum((2, 3)) / torch.maximum(scaled, covers).sum((2, 3)).clamp(min=1e-6)


def mass_inside(fine: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Share of a map's mass, less its median, that lies inside a mask [H, W]: the background's haze counts nothing."""
    size = mask.shape
    values = np.clip(fine - np.median(fine), 0, None)
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    over = interpolate(tensor, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    total = float(over.sum())
    return float(over[mask].sum()) / total if total > 0 else 0.0
