"""AP and AR by COCO's and LVIS's rules: the figures of the packages that define them, and cases by hand."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.segmentation.made_published import rle_of
from vprune.segmentation.detection import coco_figures, fixed_figures, lvis_figures
from vprune.segmentation.instances import _pixels

COCO_NAMES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar1", "ar10", "ar100", "ar_s", "ar_m", "ar_l")
LVIS_NAMES = {
    "AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_s", "APm": "ap_m", "APl": "ap_l", "APr": "ap_r",
    "APc": "ap_c", "APf": "ap_f", "AR@300": "ar", "ARs@300": "ar_s", "ARm@300": "ar_m", "ARl@300": "ar_l",
}  # fmt: skip
# Of lvis 0.5.3, with np.float = float, on `drawn()`: the limit an image -> AP, AP50, ... in the order of LVIS_NAMES.
RECORDED: dict[tuple[str, int | None], tuple[float, ...]] = {
    ("segm", 300): (
        0.45641444, 0.65941773, 0.48594522, 0.47832783, 0.54137873, 0.00000000, 0.34128713,
        0.47980987, 0.54814631, 0.61759259, 0.58888889, 0.62010204, 0.00000000,
    ),
    ("segm", 5): (
        0.30370737, 0.44818482, 0.33707371, 0.25099010, 0.33420556, 0.00000000, 0.35511551,
        0.22795380, 0.32805281, 0.37962963, 0.28888889, 0.34129252, 0.00000000,
    ),
    ("segm", None): (
        0.45641444, 0.65941773, 0.48594522, 0.47832783, 0.54137873, 0.00000000, 0.34128713,
        0.47980987, 0.54814631, 0.61759259, 0.58888889, 0.62010204, 0.00000000,
    ),
    ("bbox", 300): (
        0.48525828, 0.67440018, 0.56524482, 0.53107811, 0.56386408, 0.00000000, 0.37181518,
        0.52454823, 0.55941144, 0.64675926, 0.63888889, 0.64846939, 0.00000000,
    ),
    ("bbox", 5): (
        0.32013201, 0.44818482, 0.36512651, 0.26771177, 0.34523810, 0.00000000, 0.38003300,
        0.25231023, 0.32805281, 0.39305556, 0.30555556, 0.35176871, 0.00000000,
    ),
    ("bbox", None): (
        0.48525828, 0.67440018, 0.56524482, 0.53107811, 0.56386408, 0.00000000, 0.37181518,
        0.52454823, 0.55941144, 0.64675926, 0.63888889, 0.64846939, 0.00000000,
    ),
}  # fmt: skip


def drawn(seed: int = 0, images: int = 6, categories: int = 9) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An LVIS file of ellipses, and results beside them: many of equal scores, some of other categories."""
    chance = random.Random(seed)  # the same numbers everywhere, as the recorded figures need

    def between(low: float, high: float) -> int:
        return int(low + chance.random() * (high - low))

    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number in range(1, categories + 1):
        truth["categories"].append({"id": number, "name": f"thing_{number}", "frequency": "rcf"[number % 3]})
    found = []
    for image in range(1, images + 1):
        h, w = between(90, 300), between(90, 300)
        order = sorted(range(1, categories + 1), key=lambda _: chance.random())
        there, absent = order[:4], order[4:6]
        address = f"http://images.cocodataset.org/val2017/{image:012d}.jpg"
        told = {"neg_category_ids": absent, "not_exhaustive_category_ids": there[:1], "coco_url": address}
        truth["images"].append({"id": 7 * image, "height": h, "width": w, **told})
        for category in there:
            for _ in range(between(1, 4)):
                size, centre = (between(5, w / 3), between(5, h / 3)), (between(0, w), between(0, h))
                mask = ellipse((h, w), centre, size)
                own = {"id": len(truth["annotations"]) + 1, "image_id": 7 * image, "category_id": category}
                box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
                whole = {**own, "segmentation": rle_of(mask), "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
                truth["annotations"].append(whole)
                for _ in range(between(0, 4)):
                    near = (centre[0] + between(-5, 6), centre[1] + between(-5, 6))
                    said = category if chance.random() < 0.7 else between(1, categories + 1)
                    result = {"image_id": 7 * image, "category_id": said, "score": round(chance.random(), 1)}
                    found.append({**result, "segmentation": rle_of(ellipse((h, w), near, size))})
    return truth, found


def ellipse(shape: tuple[int, int], centre: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    inside: np.ndarray = ((xs - centre[0]) / size[0]) ** 2 + ((ys - centre[1]) / size[1]) ** 2 <= 1
    return inside


def boxed(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for one in found:
        rle = {**one["segmentation"], "counts": one["segmentation"]["counts"].encode()}
        rest = {key: value for key, value in one.items() if key != "segmentation"}
        rows.append({**rest, "bbox": coco_mask.toBbox(rle).tolist()})
    return rows


def agree(figures: dict[str, float | None], wanted: dict[str, float]) -> None:
    assert all(np.isfinite(value) for value in wanted.values())
    told = {key: -1 if figures[key] is None else figures[key] for key in wanted}
    assert told == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("iou", ["segm", "bbox"])
@pytest.mark.parametrize("classes", [True, False])
def test_coco_figures_are_those_of_pycocotools(iou: str, classes: bool, tmp_path: Path) -> None:
    truth, found = drawn()
    for one in truth["annotations"][::7]:
        one["iscrowd"] = 1
    found = found if iou == "segm" else boxed(found)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), iou)
        evaluation.params.useCats = int(classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = coco_figures(truth, found, iou, classes)
    agree(figures, dict(zip(COCO_NAMES, evaluation.stats.tolist(), strict=True)))
    recall = evaluation.eval["recall"][0, :, 0, -1]
    agree(figures, {"ar50": float(recall[recall > -1].mean())})
    nothing = coco_figures(truth, [], iou, classes)
    assert nothing["ap"] == nothing["ar100"] == 0
    assert coco_figures({**truth, "annotations": []}, found, iou, classes)["ap"] is None


@pytest.mark.parametrize(("iou", "limit"), RECORDED)
def test_lvis_figures_are_those_recorded_from_the_package(iou: str, limit: int | None) -> None:
    truth, found = drawn()
    results = found if iou == "segm" else boxed(found)
    wanted = dict(zip(LVIS_NAMES.values(), RECORDED[iou, limit], strict=True))
    agree(lvis_figures(truth, results, iou, limit), wanted)
    if limit is None:
        fixed = {f"fixed_{key}": wanted[key] for key in ("ap", "ap_r", "ap_c", "ap_f")}
        agree(fixed_figures(truth, results, iou), fixed)


@pytest.mark.parametrize("seed", range(3))
def test_lvis_figures_are_those_of_the_package(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvis = pytest.importorskip("lvis", reason="needs lvis", exc_type=ImportError)
    monkeypatch.setattr(np, "float", float, raising=False)  # 0.5.3 asks for the alias that numpy has dropped
    logging.getLogger("lvis").setLevel(logging.ERROR)
    truth, found = drawn(seed)
    for iou, results in (("segm", found), ("bbox", boxed(found))):
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        for limit in (300, 5, None):
            annotated = lvis.LVIS(str(tmp_path / "truth.json"))
            copied = json.loads(json.dumps(results))
            evaluation = lvis.LVISEval(annotated, lvis.LVISResults(annotated, copied, limit if limit else -1), iou)
            evaluation.run()
            wanted = {LVIS_NAMES[key]: float(value) for key, value in evaluation.get_results().items()}
            agree(lvis_figures(truth, results, iou, limit), wanted)
            if limit is None:
                agree(fixed_figures(truth, results, iou), {"fixed_ap": wanted["ap"], "fixed_ap_r": wanted["ap_r"]})


def lvis_of_one(**told: list[int]) -> dict[str, Any]:
    """One image of 40 x 40 with a square of category 1; `told` are its lists of categories."""
    mask = np.zeros((40, 40), dtype=bool)
    mask[:20, :20] = True
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": [], **told}
    kinds = [{"id": n, "name": f"n{n}", "frequency": "f"} for n in (1, 2)]
    own = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": rle_of(mask), "area": 400}
    return {
        "images": [{"id": 1, "height": 40, "width": 40, **lists}],
        "annotations": [own],
        "categories": kinds,
    }


def square(corner: int, category: int, score: float) -> dict[str, Any]:
    mask = np.zeros((40, 40), dtype=bool)
    mask[corner : corner + 20, corner : corner + 20] = True
    return {"image_id": 1, "category_id": category, "score": score, "segmentation": rle_of(mask)}


def test_federated_categories_by_hand() -> None:
    right, wrong, other = square(0, 1, 0.5), square(20, 1, 0.9), square(0, 2, 0.9)
    assert lvis_figures(lvis_of_one(), [right, wrong])["ap"] == pytest.approx(0.5)  # the better one is wrong
    assert lvis_figures(lvis_of_one(not_exhaustive_category_ids=[1]), [right, wrong])["ap"] == pytest.approx(1)
    # A second image, where 1 is there or not, is what makes detections of it there count.
    absent = {"id": 2, "height": 40, "width": 40, "neg_category_ids": [1], "not_exhaustive_category_ids": []}
    for lists, ap in (([1], 0.5), ([], 1.0)):
        truth = lvis_of_one()
        truth["images"].append({**absent, "neg_category_ids": lists})
        assert lvis_figures(truth, [right, {**wrong, "image_id": 2}])["ap"] == pytest.approx(ap)
    # Category 2 takes the only place of the image; without a limit an image it takes none from category 1.
    crowded = lvis_of_one(neg_category_ids=[2])
    assert lvis_figures(crowded, [right, other], max_dets=1)["ap"] == 0
    assert fixed_figures(crowded, [right, other])["fixed_ap"] == pytest.approx(1)
    assert fixed_figures(crowded, [right, wrong], per_category=1)["fixed_ap"] == 0


def test_lvis_counts_the_300_best_of_an_image() -> None:
    wrong = [square(20, 1, 0.9) for _ in range(300)]
    assert lvis_figures(lvis_of_one(), [*wrong[1:], square(0, 1, 0.5)])["ar"] == 1
    assert lvis_figures(lvis_of_one(), [*wrong, square(0, 1, 0.5)])["ar"] == 0


def test_run_lengths_are_measured() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 501)) < share
        assert _pixels(rle_of(mask)["counts"]) == mask.size
