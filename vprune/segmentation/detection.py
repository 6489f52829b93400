"""AP and AR of detections by COCO's and by LVIS's rules, on pycocotools' matching."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vprune.segmentation.instances import compressed

Result = Mapping[str, Any]
LVIS_MAX_DETS = 300  # an image
FIXED_MAX_DETS = 10_000  # a category, over all images
_AREAS = ("", "s", "m", "l")
_FREQUENCIES = ("r", "c", "f")


def coco_figures(
    truth: Mapping[str, Any], found: Sequence[Result], iou: str = "segm", classes: bool = True
) -> dict[str, float | None]:
    """COCO's twelve figures, with AR50 and AR75; None where nothing is annotated.

    Args:
        truth: a COCO file's content.
        found: results with image_id, category_id, score and segmentation or bbox.
        iou: segm | bbox.
        classes: whether a detection has to have the object's category.

    Returns:
        ap, ap50, ap75, ap_s, ap_m, ap_l, ar1, ar10, ar100, ar_s, ar_m, ar_l, and ar50 and ar75 (at 100 detections).
    """
    if not classes:
        truth, found = _of_one_class(truth, found)
    evaluation = _evaluation(truth, found, iou, (1, 10, 100), classes)
    _accumulate(evaluation)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    figures = _precisions(precision)
    figures |= {f"ar{count}": _mean(recall[:, :, 0, place]) for place, count in enumerate((1, 10, 100))}
    figures |= {f"ar_{size}": _mean(recall[:, :, area, -1]) for area, size in enumerate(_AREAS) if size}
    return figures | {"ar50": _mean(recall[0, :, 0, -1]), "ar75": _mean(recall[5, :, 0, -1])}


def lvis_figures(
    truth: Mapping[str, Any], found: Sequence[Result], iou: str = "segm", max_dets: int | None = LVIS_MAX_DETS
) -> dict[str, float | None]:
    """LVIS's figures (Gupta et al., arXiv 1908.03195); None where nothing is annotated.

    Of each image the `max_dets` best detections count, of whatever category (None: all). Detections of a category that
    the image is verified neither to have nor to lack are left out; in images where a category's instances are not all
    annotated, its unmatched detections count for nothing.

    Returns:
        ap, ap50, ap75, ap_s, ap_m, ap_l, ar, ar_s, ar_m, ar_l, and ap_r, ap_c, ap_f of rare, common and frequent
        categories.
    """
    truth = {**truth, "annotations": [{**one, "iscrowd": 0} for one in truth["annotations"] if one["area"] > 0]}
    there = {(one["image_id"], one["category_id"]) for one in truth["annotations"]}
    there |= {(one["id"], category) for one in truth["images"] for category in one["neg_category_ids"]}
    best = found if max_dets is None else _best(found, "image_id", max_dets)
    judged = [one for one in best if (one["image_id"], one["category_id"]) in there]
    # Any count that no category of an image exceeds: the limit of an image has been drawn above.
    evaluation = _evaluation(truth, judged, iou, (max(1, len(judged)),), classes=True, positive=True)
    partly = {one["id"]: set(one["not_exhaustive_category_ids"]) for one in truth["images"]}
    for one in evaluation.evalImgs:
        if one is not None and one["category_id"] in partly[one["image_id"]]:
            one["dtIgnore"] = np.logical_or(one["dtIgnore"], one["dtMatches"] == 0)
    _accumulate(evaluation)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    figures = _precisions(precision)
    figures |= {f"ar_{size}" if size else "ar": _mean(recall[:, :, area, -1]) for area, size in enumerate(_AREAS)}
    kind = {one["id"]: one["frequency"] for one in truth["categories"]}
    for frequency in _FREQUENCIES:
        own = [place for place, category in enumerate(evaluation.params.catIds) if kind[category] == frequency]
        figures[f"ap_{frequency}"] = _mean(precision[:, :, own, 0, -1])
    return figures


def fixed_figures(
    truth: Mapping[str, Any], found: Sequence[Result], iou: str = "segm", per_category: int = FIXED_MAX_DETS
) -> dict[str, float | None]:
    """LVIS's fixed AP (Dave et al., arXiv 2102.01066): the best 10,000 of each category, whatever the image.

    Under a limit an image the categories compete for places, so that scores of one change the AP of another; not here.

    Returns:
        fixed_ap, and fixed_ap_r, fixed_ap_c and fixed_ap_f.
    """
    figures = lvis_figures(truth, _best(found, "category_id", per_category), iou, max_dets=None)
    return {f"fixed_{key}": figures[key] for key in ("ap", *(f"ap_{one}" for one in _FREQUENCIES))}


def _best(found: Iterable[Result], key: str, count: int) -> list[Result]:
    """The `count` best of those that have the same `key`, the earlier of equals first."""
    groups: dict[Any, list[Result]] = defaultdict(list)
    for one in found:
        groups[one[key]].append(one)
    chosen: list[Result] = []
    for group in groups.values():
        short = len(group) <= count
        chosen += group if short else sorted(group, key=lambda one: one["score"], reverse=True)[:count]
    return chosen


def _of_one_class(truth: Mapping[str, Any], found: Sequence[Result]) -> tuple[Mapping[str, Any], Sequence[Result]]:
    """The same with one category for all; pycocotools itself drops detections of categories that the file lacks.

    In the order of their categories, in which pycocotools takes them: it tells which of equals comes first.
    """
    own, others = (
        [{**one, "category_id": 1} for one in sorted(group, key=lambda one: one["category_id"])]
        for group in (truth["annotations"], found)
    )
    return {**truth, "annotations": own, "categories": [{"id": 1, "name": "object"}]}, others


def _evaluation(
    truth: Mapping[str, Any],
    found: Sequence[Result],
    iou: str,
    max_dets: Sequence[int],
    classes: bool,
    positive: bool = False,
) -> Any:
    """The matching, done by pycocotools; `positive` leaves detections without area out."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        results = [one for one in _with_area(found) if not positive or one["area"] > 0]
        annotated = _indexed(truth, [dict(one) for one in truth["annotations"]])
        evaluation = COCOeval(annotated, _indexed(truth, results), iou)
        evaluation.params.useCats = int(classes)
        evaluation.params.maxDets = list(max_dets)
        evaluation.evaluate()
    return evaluation


def _accumulate(evaluation: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()


def _indexed(truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    coco = COCO()
    coco.dataset = {**truth, "annotations": annotations}
    coco.createIndex()
    return coco


def _with_area(found: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as both packages complete them: the area is the box's where there are boxes, else the mask's."""
    if not found:
        return []
    boxed = "bbox" in found[0]
    completed = []
    for number, one in enumerate(found, start=1):
        area = one["bbox"][2] * one["bbox"][3] if boxed else int(coco_mask.area(compressed(one["segmentation"])))
        completed.append({**one, "area": area, "id": number, "iscrowd": 0})
    return completed


def _precisions(precision: NDArray[np.float64]) -> dict[str, float | None]:
    figures = {"ap": _mean(precision[..., 0, -1])}
    figures |= {"ap50": _mean(precision[0, :, :, 0, -1]), "ap75": _mean(precision[5, :, :, 0, -1])}
    return figures | {f"ap_{size}": _mean(precision[..., area, -1]) for area, size in enumerate(_AREAS) if size}


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
