"""VizWiz-VQA-Grounding (Chen et al., 2022): photographs by blind people, answers, and where the answer is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vprune.errors import VPruneError
from vprune.eval.benchmarks.boxes import SCALES, box_mask, mask_iou, read_box
from vprune.eval.benchmarks.hub import StoredImage
from vprune.eval.benchmarks.images import ImageSource, load_image
from vprune.eval.benchmarks.published import Published, mean
from vprune.eval.benchmarks.rows import Row, keyed_rows, shown
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.benchmarks.vqa import most_common
from vprune.eval.benchmarks.vqa_accuracy import textvqa_accuracy

Polygon = tuple[tuple[float, float], ...]
ASKS = ("answer", "box")


@dataclass(kw_only=True, eq=False)
class VizWizGrounding(Published):
    """VizWiz grounding: `ask=answer` scores the answer by VQA accuracy, `ask=box` a box by its IoU with the mask.

    A local copy is `SPLIT_grounding.json` (image name -> `question`, `answers`, `answer_grounding` with a polygon of
    `x` and `y` in pixels) with `SPLIT/NAME.jpg`, and `binary_masks_png/SPLIT/NAME.png` where there are masks. `scale`
    says how the model writes a box: unit (0 to 1), thousand, or pixels. The masks are the evidence of method=oracle.
    """

    name: str = "vizwiz_grounding"
    split: str = "val"
    ask: str = "answer"
    scale: str = "unit"
    _grounding: dict[str, Path | ImageSource | Polygon] = field(default_factory=dict, init=False, repr=False)

    image_folders: ClassVar[tuple[str, ...]] = ("images", "train", "val", "test")

    def __post_init__(self) -> None:
        for key, value, known in (("ask", self.ask, ASKS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise VPruneError(f"benchmark.{key}={value} is unknown; there is {', '.join(known)}")
        super().__post_init__()

    @property
    def has_evidence(self) -> bool:
        """Whether the answers are grounded, by masks or polygons."""
        return bool(self._grounding)

    def evidence_mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """Where the answer is seen, bool `[H, W]`; None where it is not annotated."""
        grounding = self._grounding.get(sample.id)
        if grounding is None:
            return None
        size = self.load_image(sample).size
        if isinstance(grounding, tuple):
            canvas = Image.new("1", size)
            ImageDraw.Draw(canvas).polygon(grounding, fill=1, outline=1)
            return np.asarray(canvas, dtype=bool)
        mask = load_image(grounding)
        if mask.size != size:
            raise VPruneError(f"mask {grounding} is {mask.size[0]} x {mask.size[1]}, its image {size[0]} x {size[1]}")
        return np.asarray(mask.convert("L")) > 127

    def score(self, sample: Sample, prediction: str) -> float:
        """VQA accuracy of the answer, or IoU of the box with the mask; a prediction without a box has IoU 0."""
        if self.ask == "answer":
            return textvqa_accuracy(prediction, sample.answers)
        mask = self.evidence_mask(sample)
        assert mask is not None
        height, width = mask.shape
        box = read_box(prediction, self.scale, width, height)
        return mask_iou(box_mask(box, width, height), mask) if box is not None else 0.0

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """For boxes: the mean IoU, and the share of them with an IoU of at least a half."""
        if self.ask == "answer":
            return {}
        iou = mean(float(row["correct"]) for row in rows)
        return {"iou": iou, "accuracy_at_50": mean(float(row["correct"] >= 0.5) for row in rows)}

    def _local(self, path: Path) -> Iterable[Row]:
        return keyed_rows(
            self._published(path, f"{self.split}_grounding.json", f"*{self.split}*grounding*.json"), "image"
        )

    def _sample(self, row: Row) -> Sample:
        answers = row.texts("answers")
        image = self._image(row)
        name = image.stem if isinstance(image, Path) else (row.optional("question_id") or str(row.number))
        grounding = self._grounded(row, name)
        if grounding is not None:
            self._grounding[name] = grounding
        elif self.ask == "box":
            raise row.missing("mask", "answer_grounding")
        return Sample(
            id=name,
            image=image,
            kind=self.ask,
            question=row.text("question"),
            answer=row.optional("most_common_answer") or most_common(answers),
            answers=answers,
        )

    def _grounded(self, row: Row, name: str) -> Path | ImageSource | Polygon | None:
        for column in ("mask", "binary_mask"):
            if isinstance(row.values.get(column), StoredImage):
                stored: ImageSource = row.values[column]
                return stored
        if name in self._masks:
            return self._masks[name]
        return _polygon(row)

    @cached_property
    def _masks(self) -> dict[str, Path]:
        if self.path is None:
            return {}
        root = self._root() if self._root().is_dir() else self._root().parent
        return {mask.stem: mask for mask in sorted((root / "binary_masks_png" / self.split).glob("*.png"))}


def _polygon(row: Row) -> Polygon | None:
    value = row.values.get("answer_grounding")
    if value is None:
        return None
    try:
        points = tuple((float(point["x"]), float(point["y"])) for point in value)
    except (TypeError, KeyError, ValueError) as error:
        problem = f"should be a polygon, a list of points with x and y, got {shown(value)}"
        raise row.error("answer_grounding", problem) from error
    if len(points) < 3:
        raise row.error("answer_grounding", f"should be a polygon of 3 points or more, got {len(points)}")
    return points
