"""The training-time forward pass of the embedded VLM over packed sequences, and its two auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, pad, scaled_dot_product_attention
from transformers import AttentionInterface, LlavaForConditionalGeneration

from vprune.eval.scenes.render import COLOUR, NUMBER, SHAPE, X, Y
from vprune.eval.scenes.world import CELL, COLOURS, GRID, SHAPES
from vprune.training.architecture import USER
from vprune.training.packing import IGNORE, PREFIX

ATTENTION = "vprune_packed"
GROUNDING_LAYER = 4
"""Decoder layers below the grounding head: the rest of the depth is left to reason with what it found."""
PATCH_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11)
"""Classes of the auxiliary loss: colour, shape, tens and units of the number, each with a class for none."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of the prefix, masked attention of the segments: two fused kernels, not one masked one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    prefix = query.shape[2] - attention_mask.shape[2]
    head = scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
    )
    tail = scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat((head, tail), dim=2).transpose(1, 2), None


def segment_mask(segments: Tensor) -> Tensor:
    """True where a segment token may look: the prefix and its own segment so far. [B, S] -> [B, 1, S, 577 + S]."""
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    own = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :])
    return pad(own, (PREFIX, 0), value=True)[:, None]


class PackedVLM(nn.Module):
    """Answers every segment of a packed batch in one pass through the true model's own modules."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        AttentionInterface.register(ATTENTION, packed_attention)
        self.vlm = model
        width = int(model.lm_head.in_features)
        self.patch_head = nn.Linear(width, sum(PATCH_CLASSES))
        self.grounding_head = nn.Linear(width, 2 * GRID)
        self.attention_before = model.model.language_model.config._attn_implementation
        model.model.language_model.config._attn_implementation = ATTENTION

    def release(self) -> LlavaForConditionalGeneration:
        """Gives the model back with the attention it came with."""
        self.vlm.model.language_model.config._attn_implementation = self.attention_before
        return self.vlm

    def forward(
        self, pixels: Tensor, tokens: Tensor, segments: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the segments [B, S, V], the patches [B, 576, 40] and of where named objects are [B, S, 2, 24].

        `pixels` are [B, 3, 384, 384] in -1..1.
        """
        base = self.vlm.model
        tower = base.vision_tower
        features = base.multi_modal_projector(tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state)
        decoder = base.language_model
        user = decoder.embed_tokens(torch.full_like(tokens[:, :1], USER))
        hidden = torch.cat((user, features.to(user.dtype), decoder.embed_tokens(tokens)), dim=1)
        prefix_positions = torch.arange(PREFIX, device=tokens.device).expand(len(tokens), -1)
        position_ids = torch.cat((prefix_positions, positions), dim=1)
        rotary = decoder.rotary_emb(hidden, position_ids)
        mask = segment_mask(segments)
        for index, layer in enumerate(decoder.layers):
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
            if index + 1 == GROUNDING_LAYER:
                middle = hidden[:, PREFIX:]
        where = self.grounding_head(layer_norm(middle, middle.shape[-1:])).unflatten(-1, (2, GRID))
        return self.vlm.lm_head(decoder.norm(hidden[:, PREFIX:])), self.patch_head(features), where


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens."""
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def grounding_loss(logits: Tensor, grounding: Tensor, objects: Tensor) -> Tensor:
    """Cross entropy of the column and row, on the 24 x 24 grid, of every object that a question names."""
    index = grounding.clamp(min=0)
    cells = torch.stack([objects[:, :, axis].gather(1, index) / CELL for axis in (X, Y)], dim=-1).long()
    cells = torch.where(grounding[..., None] >= 0, cells, IGNORE)
    return cross_entropy(logits.float().flatten(0, 2), cells.flatten(), ignore_index=IGNORE)


def patch_labels(seen: Tensor, objects: Tensor) -> Tensor:
    """Colour, shape, tens and units of the object at the middle of every patch: [B, 576, 4]."""
    middle = seen[:, CELL // 2 :: CELL, CELL // 2 :: CELL].flatten(1).long()
    there = middle >= 0
    index = middle.clamp(min=0)

    def of(column: int) -> Tensor:
        return objects[:, :, column].long().gather(1, index)

    number = of(NUMBER)
    has_number = there & (number >= 0)
    return torch.stack(
        (
            torch.where(there, of(COLOUR), len(COLOURS)),
            torch.where(there, of(SHAPE), len(SHAPES)),
            torch.where(has_number & (number >= 10), number // 10, 10),
            torch.where(has_number, number % 10, 10),
        ),
        dim=-1,
    )


def patch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the four attributes of the cross entropy; patches of the background count a tenth."""
    weight = torch.where(labels[..., 0] < len(COLOURS), 1.0, 0.1).flatten()
    losses = [
        (cross_entropy(part.float().flatten(0, 1), labels[..., i].flatten(), reduction="none") * weight).sum()
        for i, part in enumerate(torch.split(logits, list(PATCH_CLASSES), dim=-1))
    ]
    return torch.stack(losses).mean() / weight.sum()
