"""What the instruction attends to: text -> visual attention of one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vprune import kernels
from vprune.errors import VPruneError
from vprune.models.probe import layer_attention, past_bias, stored_and_new_valid
from vprune.records import Prefill

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
    tower_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.pool not in _POOLS:
            raise VPruneError(f"pool={self.pool!r}: choose one of {', '.join(_POOLS)}")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise VPruneError(f"layer={self.layer!r}: give the number of a decoder layer")

    def rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """The columns that attend, (LongTensor [B, R], bool [B, R]), the second False where a row does not count."""
        return instruction_rows(prefill.valid, prefill.visual)

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images of a prefill, rows of all samples at once."""
        if not prefill.images:
            return []
        layer = prefill.layer if self.layer is None else self.layer
        caught = layer_attention(prefill, layer)
        rows, row_valid = self.rows(prefill)
        query = caught.query.gather(
            2, rows[:, None, :, None].expand(-1, caught.query.shape[1], -1, caught.query.shape[3])
        )
        held = caught.key.shape[2]  # a layer with a window stores the last rows only
        stored, bias = held - prefill.valid.shape[1], past_bias(prefill)
        mass = kernels.column_mass(
            query,
            caught.key,
            scale=caught.scale,
            rows=rows + stored,
            row_valid=row_valid,
            key_valid=stored_and_new_valid(prefill)[:, -held:],
            key_bias=None if bias is None else bias[:, -held:],
            window=prefill.anatomy.window_of(layer),
            pool=self.pool,
        )
        on_host = mass[:, stored:].float().cpu()
        return [on_host[image.sample, image.columns] for image in prefill.images]


def instruction_rows(valid: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the text after the last visual token of each row of a batch, up to the end of the prompt.

    `valid`, `visual` bool [B, L]. Returns (LongTensor [B, R], bool [B, R]), the second False beyond a row's own number.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    last_visual = torch.where(visual, columns, -1).amax(-1, keepdim=True)
    last_valid = torch.where(valid, columns, -1).amax(-1, keepdim=True)
    text = valid & (columns > last_visual)
    text = text | ((columns == last_valid) & ~text.any(-1, keepdim=True))
    counts = text.sum(-1)
    order = text.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    return order, columns[: order.shape[1]] < counts[:, None]
