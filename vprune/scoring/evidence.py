"""What the answer rests on, told by an annotation: the ceiling of every method, not a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vprune.errors import VPruneError
from vprune.records import Grid, Prefill

_FALLOFF = 0.05  # importance just outside the evidence, below that of any patch that holds some of it
_REACH = 2.0  # patches over which it falls by e


@dataclass
class Evidence:
    """The fraction of each patch that the evidence mask covers, with a faint smooth falloff around it to rank the rest.

    I_j = c_j + 0.05 exp(-d_j / 2), c the covered fraction, d the distance in patches to the nearest patch with c > 0.
    Without evidence, or with an empty mask, the map is flat (and selection spreads evenly).
    """

    needs_evidence: ClassVar[bool] = True
    tower_layer: ClassVar[int | None] = None

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images from `prefill.evidence`: a mask (bool [H, W]) over each as the processor sees it, or None.

        Raises:
            VPruneError: the masks are not one per image, or a mask is not two-dimensional.
        """
        masks = masks_per_image(prefill)
        return [evidence_map(mask, image.grid) for mask, image in zip(masks, prefill.images, strict=True)]


def masks_per_image(prefill: Prefill) -> list[Any]:
    """One mask or None per image; masks given per sample are repeated where beams repeat the samples.

    Raises:
        VPruneError: their number is not the number of images.
    """
    images, masks = prefill.images, prefill.evidence
    if masks is None:
        return [None] * len(images)
    rows = prefill.valid.shape[0]
    repeats = len(images) // len(masks) if masks else 0
    if not repeats or len(images) % len(masks) or rows % repeats:
        raise VPruneError(
            f"pruning.evidence has {len(masks)} masks but the batch has {len(images)} images: give one (or None) each"
        )
    firsts = [number for number, image in enumerate(images) if image.sample % repeats == 0]
    place = {(images[n].sample // repeats, images[n].image): masks[i] for i, n in enumerate(firsts)}
    return [place[image.sample // repeats, image.image] for image in images]


def evidence_map(mask: Any, grid: Grid) -> Tensor:
    """The importance, float32 [N], of one image of `grid` (t, h, w) whose evidence is `mask`."""
    t, h, w = grid
    if mask is None:
        return torch.zeros(t * h * w)
    area = torch.as_tensor(np.asarray(mask)).to(torch.float32)
    if area.ndim != 2 or not area.numel():
        raise VPruneError(
            f"an evidence mask has shape {tuple(area.shape)}: give a two-dimensional mask [height, width]"
        )
    covered = interpolate(upscaled(area, h, w)[None, None], (h, w), mode="area")[0, 0]
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float()
    held = places[covered.flatten() > 0]
    if not held.numel():
        return torch.zeros(t * h * w)
    distance = torch.cdist(places, held).amin(1)
    return (covered.flatten() + _FALLOFF * torch.exp(-distance / _REACH)).repeat(t)


def upscaled(area: Tensor, h: int, w: int) -> Tensor:
    """The mask with sides that are multiples of the grid's, so that every patch averages whole pixels."""
    sides = [max(1, -(-size // cells)) * cells for size, cells in zip(area.shape, (h, w), strict=True)]
    return interpolate(area[None, None], sides, mode="nearest")[0, 0]
