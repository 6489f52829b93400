"""What VFlowOpt ranks tokens by: attention within the picture, calibrated, and how much there is to see in a patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune import kernels
from vprune.errors import VPruneError
from vprune.models.probe import Captured
from vprune.records import Prefill

# What the image processors of the two kinds of towers subtract and divide by, unless they are told otherwise.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BINS = 256
_BESIDE = 0.02  # how far beyond 0..1 resampling may carry a pixel


@dataclass
class VisualFlow:
    """Context relevance with calibration, and patch entropy (VFlowOpt, arXiv 2508.05211).

    I_i = sum over k in K of A_ki + alpha * softmax(H)_i. A [N, N] is the head mean of the attention among the patches
    at one layer of the vision tower; K = {j : sum_i A_ij > threshold * mean(A)} leaves out the votes of patches that
    are hardly looked at themselves (all vote where that leaves none); H is the entropy, in nats, of the 256-bin
    histogram of a patch's grey pixels (mean of red, green and blue, from 0 to 255). Blind to the question. A patch
    here is what becomes one visual token. The tower's class token, if there is one, neither votes nor stands.

    Args:
        tower_layer: the layer of the tower, -2 = the last but one.
        threshold: in units of mean(A), 0 = every patch votes.
        alpha: the weight of the entropies, 0 = they are not measured.
        mean: of red, green and blue, which the image processor subtracts from pixels in 0..1; None = CLIP's for
            towers of that kind, else 0.5.
        std: which it divides by; None as for `mean`.

    Raises:
        VPruneError: a value is out of its range.

    Example:
        >>> VisualFlow(threshold=39.26)
        VisualFlow(tower_layer=-2, threshold=39.26, alpha=0.0, mean=None, std=None)
    """

    tower_layer: int = -2
    threshold: float = 0.0
    alpha: float = 0.0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    needs_evidence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("alpha", self.alpha)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise VPruneError(f"{name}={value!r}: give a number, 0 or above")
        for name, channels in (("mean", self.mean), ("std", self.std)):
            if channels is not None and len(channels) != 3:
                raise VPruneError(f"{name}={channels!r}: give three numbers, for red, green and blue")

    @property
    def looks_at_pixels(self) -> bool:
        """True if entropies are to be measured."""
        return self.alpha > 0

    def attention(self, caught: Captured, patches: int) -> Tensor:
        """The context relevance of every patch, float32 [images, patches], from the queries and keys of a layer."""
        query = caught.query[:, :, -patches:]
        received = kernels.column_mass(query, caught.key, scale=caught.scale)[:, -patches:] * patches
        if not self.threshold:
            return received
        # Rows of A sum to one, so its mean is one over the number of keys.
        votes = received > self.threshold / caught.key.shape[2]
        votes = votes | ~votes.any(-1, keepdim=True)
        mass = kernels.column_mass(query, caught.key, scale=caught.scale, row_valid=votes)[:, -patches:]
        return mass * votes.sum(-1, keepdim=True)

    def entropy(self, pixels: Tensor, side: int, tower: str) -> Tensor:
        """The entropy of every square of `side` pixels, float32 [images, squares]; `pixels` [images, 3, H, W].

        Raises:
            VPruneError: pixels beyond 0..255 come out, so `mean` and `std` are not the image processor's.
        """
        mean, std = _CLIP if "clip" in tower and "siglip" not in tower else _SIGLIP
        shape = (1, 3, 1, 1)
        offset = pixels.new_tensor(mean if self.mean is None else tuple(self.mean), dtype=torch.float32).view(shape)
        factor = pixels.new_tensor(std if self.std is None else tuple(self.std), dtype=torch.float32).view(shape)
        colour = pixels.float() * factor + offset
        low, high = colour.aminmax()
        if float(low) < -_BESIDE or float(high) > 1 + _BESIDE:
            raise VPruneError(
                f"pixels come out as {float(low) * 255:.0f} to {float(high) * 255:.0f}, not within 0 to 255: give the "
                f"image processor's image_mean and image_std as mean= and std= (taken: {offset.flatten().tolist()} and "
                f"{factor.flatten().tolist()})"
            )
        return histogram_entropy(colour.mean(1), side)

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Add up what was watched in the tower.

        Raises:
            VPruneError: the image features were computed before the hooks were in place.
        """
        maps = []
        for image in prefill.images:
            seen = prefill.tower[image.origin] if image.origin >= 0 else None
            if seen is None or seen.received is None or seen.received.numel() != math.prod(image.grid):
                raise VPruneError(
                    f"the vision tower was not watched while it read image {image.image} of sample {image.sample}: "
                    "pass pixel_values inside the `with vprune.prune(...)` block"
                )
            texture = 0.0 if seen.entropy is None else self.alpha * seen.entropy.softmax(-1)
            maps.append(seen.received + texture)
        return maps


def histogram_entropy(grey: Tensor, side: int) -> Tensor:
    """-sum p log p over the 256 bins of every square of `side` pixels: grey [images, H, W] in 0..1 -> [images, N]."""
    count, height, width = grey.shape
    rows, columns = height // side, width // side
    bins = (grey * (_BINS - 1)).round().clamp(0, _BINS - 1).long()[:, : rows * side, : columns * side]
    squares = bins.view(count, rows, side, columns, side).transpose(2, 3).reshape(count, rows * columns, side * side)
    totals = torch.zeros((count, rows * columns, _BINS), device=grey.device)
    share = totals.scatter_add(-1, squares, torch.ones_like(squares, dtype=totals.dtype)) / (side * side)
    entropies: Tensor = torch.special.entr(share).sum(-1)
    return entropies
