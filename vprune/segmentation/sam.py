"""The `segment_anything` Sam: built from its parts at any size, saved as a folder, prompted for many views at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vprune.errors import VPruneError

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def build_sam(fields: dict[str, Any]) -> Sam:
    """A Sam with fresh weights from the fields of a `config.json`.

    Args:
        fields: `image_encoder`, the arguments of ImageEncoderViT; `prompt_encoder`, `mask_in_chans`; `mask_decoder`,
            `depth`, `num_heads` and `mlp_dim` of its transformer and `iou_head_hidden_dim`.

    Example:
        >>> encoder = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "out_chans": 32}
        >>> sam = build_sam({"image_encoder": encoder})
        >>> sam.image_encoder(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 32, 8, 8])
    """
    encoder = dict(fields["image_encoder"])
    width, side = int(encoder["out_chans"]), int(encoder["img_size"])
    cells = side // int(encoder["patch_size"])
    decoder = {"depth": 2, "num_heads": 8, "mlp_dim": 4 * width, "iou_head_hidden_dim": width}
    decoder |= fields.get("mask_decoder", {})
    sam = Sam(
        image_encoder=ImageEncoderViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **encoder),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(cells, cells),
            input_image_size=(side, side),
            mask_in_chans=int(fields.get("prompt_encoder", {}).get("mask_in_chans", 16)),
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=width,
            transformer=TwoWayTransformer(
                depth=decoder["depth"],
                embedding_dim=width,
                num_heads=decoder["num_heads"],
                mlp_dim=decoder["mlp_dim"],
            ),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    for block in sam.image_encoder.blocks:
        if not block.attn.use_rel_pos:
            block.attn = FusedAttention(block.attn)
    if sam.image_encoder.pos_embed is not None:
        nn.init.trunc_normal_(sam.image_encoder.pos_embed, std=0.02)
    return sam


class FusedAttention(nn.Module):
    """An image encoder's attention without relative positions, in one kernel and not by way of an N x N matrix."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads = int(attention.num_heads)
        self.qkv: nn.Module = attention.qkv
        self.proj: nn.Module = attention.proj

    def forward(self, x: Tensor) -> Tensor:
        """Attention among the h * w tokens of each of B windows: [B, h, w, C] to the same."""
        query, key, value = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(x.shape))
        return projected


def save_sam(sam: Sam, fields: dict[str, Any], folder: Path, limit: int = 14_000_000) -> None:
    """Write `config.json` and the weights as bfloat16 `model-N.safetensors`, each under `limit` bytes.

    (The frequencies of the positional encoding stay float32: they are multiplied by coordinates.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in sam.state_dict().items():
        stored = tensor.detach().cpu().contiguous()
        stored = stored if "gaussian" in name else stored.bfloat16()
        if sum(t.nbytes for t in shards[-1].values()) + stored.nbytes > limit:
            shards.append({})
        shards[-1][name] = stored
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")


def load_sam(folder: Path) -> Sam:
    """The Sam that `save_sam` wrote, in float32 and in eval mode.

    Raises:
        VPruneError: the folder holds no such model.
    """
    files = sorted(folder.glob("model-*.safetensors"))
    if not files or not (folder / "config.json").exists():
        raise VPruneError(f"{folder} holds no SAM: config.json and model-0.safetensors are expected there")
    sam = build_sam(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    sam.load_state_dict({name: value.float() for file in files for name, value in load_file(file).items()})
    return sam.eval()


@dataclass(frozen=True)
class Prompts:
    """P prompts in the frame of the encoder's input, each about one of V encoded views.

    `view` LongTensor [P]; `points` float32 [P, K, 2] as (x, y) pixels and `labels` [P, K]: 1 positive, 0 negative, -1
    none; `boxes` float32 [P, 4] as (x0, y0, x1, y1) or None; `masks` float32 [P, 1, 4h, 4w], logits of an earlier
    prediction, or None.
    """

    view: Tensor
    points: Tensor
    labels: Tensor
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return int(self.view.numel())

    def rows(self, part: slice) -> Prompts:
        """Some of the prompts."""
        boxes = None if self.boxes is None else self.boxes[part]
        masks = None if self.masks is None else self.masks[part]
        return Prompts(self.view[part], self.points[part], self.labels[part], boxes, masks)


def decode(sam: Sam, embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """All four masks of every prompt, and how good each is said to be; prompts of several views in one batch.

    The decoder adds the dense prompt to the embedding of its one image, so an embedding that is added to the dense
    prompt beforehand reaches it all the same, whichever view it is of.

    `embeddings` [V, C, h, w] are what the image encoder makes of the views.

    Returns:
        logits [P, 4, 4h, 4w] and predicted IoU [P, 4]; the first is the single-mask output, the others the three.
    """
    # Coordinates in bfloat16 would be off by pixels.
    with torch.autocast(embeddings.device.type, enabled=False):
        sparse, dense = sam.prompt_encoder((prompts.points, prompts.labels), prompts.boxes, prompts.masks)
        position = sam.prompt_encoder.get_dense_pe()
        dense = dense + embeddings.float()[prompts.view]
    logits, quality = sam.mask_decoder.predict_masks(torch.zeros_like(dense[:1]), position, sparse, dense)
    return logits, quality
