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
from torch.nn.functional import adaptive_avg_pool2d

from vprune.eval.benchmarks.scenes import shipped
from vprune.segmentation.sam import Prompts
from vprune.segmentation.segmenters import Encoded


class TrueMasks:
    """Gives the mask nearest to a prompt's first positive point, of those that it was told of; none within 8 pixels.

    Told of one picture's masks, or of several pictures with theirs: then it knows each picture, and its parts, by their
    pixels.
    """

    feedback = True

    def __init__(
        self,
        masks: NDArray[np.bool_] | None = None,
        pictures: Sequence[tuple[Image.Image, NDArray[np.bool_]]] = (),
        parts: Sequence[tuple[int, int, int, int]] = (),
    ) -> None:
        self.known = masks
        self.pictures, self.parts = pictures, parts
        self.encoded = 0
        self.calls: list[int] = []

    def encode(self, views: Sequence[Image.Image]) -> Encoded:
        self.encoded += len(views)
        return Encoded([self._masks_of(view) for view in views], tuple(view.size for view in views))

    def predict(self, encoded: Encoded, prompts: Prompts) -> tuple[Tensor, Tensor]:
        self.calls.append(len(prompts))
        side = max(max(size) for size in encoded.sizes)
        logits = torch.full((len(prompts), side, side), -10.0)
        for row, (view, points, labels) in enumerate(
            zip(prompts.view.tolist(), prompts.points, prompts.labels, strict=True)
        ):
            found = torch.from_numpy(self._nearest(encoded.embeddings[view], points[labels == 1][0]))
            logits[row, : found.shape[0], : found.shape[1]][found] = 10
        return logits[:, None].repeat(1, 4, 1, 1), torch.full((len(prompts), 4), 0.9)

    def coverage(self, encoded: Encoded, view: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        sizes = [encoded.sizes[number] for number in view.tolist()]
        whole = [(one[:, :h, :w] > 0).float() for one, (w, h) in zip(logits, sizes, strict=True)]
        return torch.stack([adaptive_avg_pool2d(one, grid) for one in whole])

    def masks(self, encoded: Encoded, view: Tensor, logits: Tensor) -> list[Tensor]:
        sizes = [encoded.sizes[number] for number in view.tolist()]
        return [one[:h, :w] > 0 for one, (w, h) in zip(logits, sizes, strict=True)]

    def _masks_of(self, view: Image.Image) -> NDArray[np.bool_]:
        if self.known is not None:
            return self.known
        for picture, masks in self.pictures:
            for box in [(0, 0, *picture.size), *self.parts]:
                if picture.crop(box).tobytes() == view.tobytes():
                    return masks[:, box[1] : box[3], box[0] : box[2]]
        raise AssertionError("a view of no picture that it was told of")

    def _nearest(self, known: NDArray[np.bool_], point: Tensor) -> NDArray[np.bool_]:
        away = []
        for mask in known:
            ys, xs = np.nonzero(mask)
            away.append(float(np.hypot(xs - float(point[0]), ys - float(point[1])).min(initial=np.inf)))
        best = int(np.argmin(away))
        return known[best] if away[best] < 8 else np.zeros_like(known[0])


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
