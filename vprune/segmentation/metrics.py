"""How good masks are: IoU of referring expressions, and COCO's AP and AR of everything found."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def intersection_and_union(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int]:
    """Pixels in both masks, and in either."""
    return int((one & other).sum()), int((one | other).sum())


def mean_iou(pairs: Sequence[tuple[int, int]], empty_union: float = 0.0) -> float:
    """mIoU: the mean over expressions of intersection / union; an empty union counts `empty_union`."""
    return float(np.mean([i / u if u else empty_union for i, u in pairs])) if pairs else float("nan")


def overall_iou(pairs: Sequence[tuple[int, int]], empty_union: float = 0.0) -> float:
    """The sum of intersections over the sum of unions (oIoU, also called cIoU); `empty_union` if all are empty."""
    unions = sum(u for _, u in pairs)
    return sum(i for i, _ in pairs) / unions if unions else empty_union


def coco_measures(truth: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """AP, AP50 and AR@100 of masks by pycocotools, whatever their category (open-ended: names are free text).

    `truth` is a COCO file's content, `found` are results with image_id, segmentation and score.
    """
    if not truth["annotations"]:
        return dict.fromkeys(("open_ap", "open_ap50", "open_ar100"), float("nan"))
    if not found:
        return dict.fromkeys(("open_ap", "open_ap50", "open_ar100"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        coco = COCO()
        coco.dataset = dict(truth)
        coco.createIndex()
        results = coco.loadRes([dict(one) for one in found])
        evaluation = COCOeval(coco, results, "segm")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ar100 = (float(evaluation.stats[place]) for place in (0, 1, 8))
    return {"open_ap": ap, "open_ap50": ap50, "open_ar100": ar100}
