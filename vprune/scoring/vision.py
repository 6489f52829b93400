"""What the vision tower itself attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vprune.errors import VPruneError
from vprune.records import Prefill


@dataclass
class TowerAttention:
    """Attention that patches receive in the vision tower: from the class token if there is one, else from all patches.

    I_j = mean over heads h of softmax_j(q_h,cls . k_hj / sqrt(d)), or mean over heads and patches i of softmax_j(q_hi .
    k_hj / sqrt(d)). Blind to the question (FasterVLM and VisionZip rank tokens in this way).

    Args:
        tower_layer: the layer of the tower, -2 = the last but one.
    """

    tower_layer: int = -2

    needs_evidence: ClassVar[bool] = False

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Look up what the tower's watch has measured.

        Raises:
            VPruneError: the image features were computed before the hooks were in place.
        """
        maps = []
        for image in prefill.images:
            seen = prefill.tower[image.origin].received if image.origin >= 0 else None
            if seen is None or seen.numel() != math.prod(image.grid):
                raise VPruneError(
                    f"the vision tower was not watched while it read image {image.image} of sample {image.sample}: "
                    "pass pixel_values inside the `with vprune.prune(...)` block"
                )
            maps.append(seen)
        return maps
