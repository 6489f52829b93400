"""A segmenter that knows the true masks, and scenes with theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from vprune.eval.benchmarks.scenes import shipped
from vprune.segmentation.sam import Prompts
from vprune.segmentation.segmenters import Encoded, covered


class TrueMasks:
    """Gives the mask nearest to a prompt's first positive point, of those that it was told of; none within 8 pixels."""

    feedback = True

    def __init__(self, masks: NDArray[np.bool_]) -> None:
        self.known = masks
        self.encoded = 0
        self.calls: list[int] = []

    def encode(self, views: Sequence[Image.Image]) -> Encoded:
        self.encoded += len(views)
        return Encoded(None, tuple(view.size for view in views))

    def predict(self, encoded: Encoded, prompts: Prompts) -> tuple[Tensor, Tensor]:
        self.calls.append(len(prompts))
        found = [
            self._nearest(points[labels == 1][0]) for points, labels in zip(prompts.points, prompts.labels, strict=True)
        ]
        logits = torch.from_numpy(np.stack(found)).float() * 20 - 10
        return logits[:, None].repeat(1, 4, 1, 1), torch.full((len(found), 4), 0.9)

    def coverage(self, encoded: Encoded, view: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        return covered(logits, (1, 1), grid)

    def masks(self, encoded: Encoded, view: Tensor, logits: Tensor) -> list[Tensor]:
        return [one > 0 for one in logits]

    def _nearest(self, point: Tensor) -> NDArray[np.bool_]:
        away = []
        for mask in self.known:
            ys, xs = np.nonzero(mask)
            away.append(float(np.hypot(xs - float(point[0]), ys - float(point[1])).min()))
        best = int(np.argmin(away))
        return self.known[best] if away[best] < 8 else np.zeros_like(self.known[0])


def scene(number: int) -> tuple[Image.Image, NDArray[np.bool_], list[str], list[dict[str, Any]]]:
    """An image of the shipped split, its masks, their names, and the questions about it."""
    folder = shipped()
    content = json.loads((folder / "objects.json").read_text())
    own = [one for one in content["annotations"] if one["image_id"] == number]
    rles = [{"size": one["segmentation"]["size"], "counts": one["segmentation"]["counts"].encode()} for one in own]
    masks = coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["image"] == f"images/{number:06d}.webp"]
    picture = Image.open(folder / f"images/{number:06d}.webp").convert("RGB")
    return picture, masks, [one["name"] for one in own], asked
