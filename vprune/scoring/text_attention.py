"""What the instruction attends to: text -> visual attention of one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vprune import kernels
from vprune.errors import VPruneError
from vprune.models.probe import keys_valid, layer_attention, past_bias
from vprune.records import Prefill, instruction_rows

__all__ = ["TextAttention", "instruction_rows"]

_POOLS = ("mean", "max")


@dataclass
class TextAttention:
    """Attention that visual tokens receive from the instruction at one layer of the decoder.

    I_j = pool over heads h and instruction rows i of softmax_j(q_hi . k_hj / sqrt(d)), the softmax over the whole
    causal row; instruction rows are the text tokens after the sample's last visual token (its last token, if there are
    none). Layer 0 costs one norm and two projections; layer l also runs the l layers below it over the unpruned prompt.

    Args:
        layer: the decoder layer, None = the one that the stage stands before. pool: "mean" or "max".
    """

    layer: int | None = None
    pool: str = "mean"

    needs_evidence: ClassVar[bool] = False
    reads_rows_only: ClassVar[bool] = True
    tower_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.pool not in _POOLS:
            raise VPruneError(f"pool={self.pool!r}: choose one of {', '.join(_POOLS)}")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise VPruneError(f"layer={self.layer!r}: give the number of a decoder layer")

    def rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """The columns that attend, (LongTensor [B, R], bool [B, R]), the second False where a row does not count."""
        return prefill.instruction_on_device

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images of a prefill, rows of all samples at once."""
        if not prefill.images:
            return []
        layer = prefill.layer if self.layer is None else self.layer
        rows, row_valid = self.rows(prefill)
        caught = layer_attention(prefill, layer, rows)
        held = caught.key.shape[2]  # a layer with a window stores the last rows only
        stored, bias = held - prefill.valid.shape[1], past_bias(prefill)
        valid = keys_valid(prefill)
        mass = kernels.column_mass(
            caught.query,
            caught.key,
            scale=caught.scale,
            rows=rows + stored if stored else rows,
            row_valid=row_valid,
            key_valid=None if valid is None else valid[:, -held:],
            key_bias=None if bias is None else bias[:, -held:],
            window=prefill.anatomy.window_of(layer),
            pool=self.pool,
        )
        return prefill.of_images(mass[:, stored:].float())
