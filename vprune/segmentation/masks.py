"""The result of a segmentation: masks with boxes, names and scores, and what people do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from vprune.errors import VPruneError

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = (
    (230, 60, 60), (60, 140, 230), (70, 190, 90), (240, 180, 40), (170, 90, 220), (40, 200, 200), (240, 120, 180)
)  # fmt: skip


@dataclass(frozen=True)
class Spent:
    """What the masks of one picture took.

    `tokens_before`, `tokens_after`: visual tokens of all its views (the picture and its crops), and those that the
    layers read after pruning; `seconds`; `peak_bytes`: see `vprune.segmentation.memory`, None where nobody knows;
    `stages`: the seconds of each stage that there was, see `vprune.segmentation.stages`.
    """

    tokens_before: int
    tokens_after: int
    seconds: float
    peak_bytes: int | None
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Masks:
    """M masks in one image, best first; M may be 0.

    `size` is (height, width) of the image. `rles` hold the masks in COCO's compressed run lengths, `boxes` float32 [M,
    4] as (x0, y0, x1, y1) in pixels, `names` what they are called, `scores` float32 [M] in 0..1. `points` [K, 2] and
    `signs` [K] (1 on it, 0 beside it) prompted each mask; `heat` float32 [h, w] is the mean map that they come from;
    `spent` is what they took.

    Example:
        >>> empty = Masks.none((4, 6))
        >>> len(empty), empty.array.shape, empty.to_coco()
        (0, (0, 4, 6), [])
    """

    size: tuple[int, int]
    rles: tuple[Mapping[str, Any], ...]
    boxes: NDArray[np.float32]
    names: tuple[str, ...]
    scores: NDArray[np.float32]
    points: tuple[NDArray[np.float32], ...] = ()
    signs: tuple[NDArray[np.float32], ...] = ()
    heat: NDArray[np.float32] | None = field(default=None, repr=False)
    spent: Spent | None = None

    @classmethod
    def none(cls, size: tuple[int, int]) -> Masks:
        """Nothing found in an image of this (height, width)."""
        return cls(size, (), np.zeros((0, 4), np.float32), (), np.zeros(0, np.float32))

    @classmethod
    def of(
        cls,
        array: NDArray[np.bool_],
        names: Sequence[str],
        scores: Sequence[float] | NDArray[np.float32],
        points: Sequence[NDArray[np.float32]] = (),
        signs: Sequence[NDArray[np.float32]] = (),
    ) -> Masks:
        """Masks from bool [M, H, W]."""
        rles = tuple(coco_mask.encode(np.asfortranarray(one.astype(np.uint8))) for one in array)
        boxes = coco_mask.toBbox(list(rles)).reshape(-1, 4).astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        return cls(
            (int(array.shape[1]), int(array.shape[2])),
            rles,
            boxes,
            tuple(names),
            np.asarray(scores, np.float32),
            tuple(points),
            tuple(signs),
        )

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def array(self) -> NDArray[np.bool_]:
        """The masks themselves, bool [M, H, W]."""
        if not self.rles:
            return np.zeros((0, *self.size), dtype=bool)
        return np.ascontiguousarray(coco_mask.decode(list(self.rles)).transpose(2, 0, 1).astype(bool))

    def take(self, index: Sequence[int]) -> Masks:
        """Some of the masks, in this order."""
        rows = [int(one) for one in index]
        return replace(
            self,
            rles=tuple(self.rles[i] for i in rows),
            boxes=self.boxes[rows],
            names=tuple(self.names[i] for i in rows),
            scores=self.scores[rows],
            points=tuple(self.points[i] for i in rows) if self.points else (),
            signs=tuple(self.signs[i] for i in rows) if self.signs else (),
        )

    def resized(self, size: tuple[int, int]) -> Masks:
        """The masks over their image at another size (height, width), enlarged one after the other; points stay."""
        from PIL import Image

        if size == self.size:
            return self
        larger = Masks.none(size)
        rles = []
        for rle in self.rles:
            picture = Image.fromarray(np.ascontiguousarray(coco_mask.decode(rle)) * np.uint8(255))
            over = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)) > 127
            rles.append(coco_mask.encode(np.asfortranarray(over.astype(np.uint8))))
        boxes = coco_mask.toBbox(rles).reshape(-1, 4).astype(np.float32) if rles else larger.boxes
        boxes[:, 2:] += boxes[:, :2]
        return replace(self, size=size, rles=tuple(rles), boxes=boxes)

    def without_doubles(self, threshold: float = 0.7) -> Masks:
        """Best first, and none that overlaps a better one by an IoU of more than `threshold`, whatever its name."""
        order = np.argsort(-self.scores, kind="stable")
        if not len(order):
            return self
        ordered = [self.rles[i] for i in order]
        iou = np.asarray(coco_mask.iou(ordered, ordered, [0] * len(ordered)))
        kept: list[int] = []
        for row in range(len(order)):
            if all(iou[row, other] <= threshold for other in kept):
                kept.append(row)
        return self.take([int(order[row]) for row in kept])

    def to_coco(
        self, image: int = 1, categories: Mapping[str, int] | None = None, first: int = 1
    ) -> list[dict[str, Any]]:
        """COCO annotations, ids from `first`; `categories` gives each name its id, None = 1 for all."""
        return [
            {
                "id": first + row,
                "image_id": image,
                "category_id": 1 if categories is None else categories[self.names[row]],
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                "area": int(coco_mask.area(rle)),
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                "iscrowd": 0,
                "score": round(float(self.scores[row]), 5),
                "name": self.names[row],
            }
            for row, (rle, (x0, y0, x1, y1)) in enumerate(zip(self.rles, self.boxes, strict=True))
        ]

    def to_supervision(self) -> Any:
        """`supervision.Detections` with boxes, masks, scores and class names.

        Raises:
            VPruneError: the package is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise VPruneError("to_supervision needs the package supervision: pip install supervision") from error
        known = {name: number for number, name in enumerate(dict.fromkeys(self.names))}
        return Detections(
            xyxy=self.boxes,
            mask=self.array,
            confidence=self.scores,
            class_id=np.array([known[name] for name in self.names], dtype=int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def save_png(self, path: str | Path) -> Path:
        """Write an index image: 0 where there is nothing, m + 1 on mask m, better ones on top.

        8 bits a pixel with a palette for up to 255 masks, else 16 bits.
        """
        from PIL import Image

        index = np.zeros(self.size, dtype=np.uint16)
        for row, mask in reversed(list(enumerate(self.array))):
            index[mask] = row + 1
        path = Path(path)
        if len(self) > 255:
            Image.fromarray(index).save(path, format="PNG")
            return path
        picture = Image.fromarray(index.astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, *(c for row in range(255) for c in _COLOURS[row % len(_COLOURS)])])
        picture.save(path, format="PNG")
        return path

    def overlay(self, image: Image.Image, points: bool = True) -> Image.Image:
        """The image with masks, names, scores and prompt points; the heat map beside it where there is one."""
        from vprune.segmentation.overlay import draw_masks

        return draw_masks(self, image, points)


def colour_of(row: int) -> tuple[int, int, int]:
    """The colour that mask `row` is drawn in."""
    return _COLOURS[row % len(_COLOURS)]
