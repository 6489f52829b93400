"""How alike a visual token and the instruction are, without attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vprune.baselines.features import Look, unit
from vprune.errors import VPruneError
from vprune.records import Prefill


@dataclass
class TextSimilarity:
    """Similarity of visual tokens and instruction in the decoder's space.

    s_j = mean over text tokens r of cos(x_j, t_r), x and t as a decoder layer reads them, and I = softmax_j(s_j) (TRIM,
    arXiv 2409.10994) or softmax_j(-s_j) if negated (as CDPruner's released code, arXiv 2506.10967, negates CLIP's
    similarities). Both papers take the vectors of CLIP's text encoder and of its vision tower, before the projector;
    vision-language models come without that encoder, and what is taken here in its place is the space in which the
    model itself puts text beside patches [R]. Which sign means relevance there is for each model to tell: in the
    embedded one the background is nearest to words, so that the least similar tokens are its objects.

    Args:
        negated: the least similar tokens are the important ones.

    Raises:
        VPruneError: `negated` is neither true nor false.

    Example:
        >>> TextSimilarity(negated=True)
        TextSimilarity(negated=True)
    """

    negated: bool = False

    needs_evidence: ClassVar[bool] = False
    tower_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.negated, bool):
            raise VPruneError(f"negated={self.negated!r}: give true or false")

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images of a prefill."""
        maps = []
        for image in prefill.images:
            look = Look(prefill, image, None)
            alike = unit(look.tokens) @ unit(look.text).mean(0)
            maps.append((-alike if self.negated else alike).softmax(-1).float().cpu())
        return maps
