"""Figures of masks: by hand, and against pycocotools on files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vprune.errors import VPruneError
from vprune.segmentation.evaluation import OPEN, REFER, ScenesSegment
from vprune.segmentation.masks import Masks
from vprune.segmentation.metrics import coco_measures, mean_iou, overall_iou


def test_iou_by_hand() -> None:
    pairs = [(1, 4), (3, 4), (0, 0), (0, 12)]
    assert mean_iou(pairs) == pytest.approx((0.25 + 0.75 + 0 + 0) / 4)
    assert mean_iou(pairs, empty_union=1) == pytest.approx((0.25 + 0.75 + 1 + 0) / 4)
    assert overall_iou(pairs) == pytest.approx(4 / 20)
    assert overall_iou([(0, 0)]) == 0 and overall_iou([(0, 0)], empty_union=1) == 1
    assert np.isnan(mean_iou([]))


def test_coco_measures_are_those_of_the_package_on_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    found: list[dict] = []
    for image in (1, 2, 3):
        truth["images"].append({"id": image, "width": 64, "height": 64, "file_name": f"{image}.png"})
        for _ in range(4):
            y, x, h, w = rng.integers((2, 2, 8, 8), (40, 40, 24, 24))
            mask = np.zeros((64, 64), dtype=bool)
            mask[y : y + h, x : x + w] = True
            (one,) = Masks.of(mask[None], ["x"], [1.0]).to_coco(image, first=len(truth["annotations"]) + 1)
            truth["annotations"].append(one)
            shifted = np.roll(mask, tuple(rng.integers(0, 5, 2)), (0, 1))
            (result,) = Masks.of(shifted[None], ["x"], [float(rng.random())]).to_coco(image)
            found.append({key: result[key] for key in ("image_id", "category_id", "segmentation", "score")})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "truth.json")
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    measured = coco_measures(truth, found)
    wanted = {"open_ap": 0, "open_ap50": 1, "open_ar100": 8}
    assert 0 < measured["open_ap"] < 1
    for key, place in wanted.items():
        assert measured[key] == pytest.approx(evaluation.stats[place], abs=1e-6)
    assert coco_measures(truth, [])["open_ap"] == 0
    assert np.isnan(coco_measures({**truth, "annotations": []}, found)["open_ap"])


def test_the_benchmark_scores_perfect_and_empty_answers() -> None:
    benchmark = ScenesSegment()
    some = [next(one for one in benchmark.samples if one.kind == kind) for kind in (OPEN, REFER)]
    rows, empty = [], []
    for sample in some:
        true = Masks.of(
            np.stack(benchmark.truth(sample)),
            ["x"] * len(benchmark.truth(sample)),
            [0.9] * len(benchmark.truth(sample)),
        )
        prediction = json.dumps(true.to_coco())
        assert benchmark.score(sample, prediction) == 1 and benchmark.score(sample, "[]") == 0
        rows.append({"id": sample.id, "prediction": prediction})
        empty.append({"id": sample.id, "prediction": "[]"})
    measured, missed = benchmark.metrics(rows), benchmark.metrics(empty)
    assert measured.pop("peak_memory_bytes") is None and missed.pop("peak_memory_bytes") is None
    assert set(measured.values()) == {1.0} and set(missed.values()) == {0.0}
    assert benchmark.metrics(rows[1:])["open_ap"] is None


def test_an_expression_means_the_object_in_its_box_and_not_the_first_that_it_rests_on() -> None:
    benchmark = ScenesSegment()
    expressions = [one for one in benchmark.samples if one.kind == REFER]
    several = [one for one in expressions if len(one.evidence) > 1]
    assert len(several) > 50 and any("most" in benchmark.prompt(one) for one in several)
    for sample in several:
        (true,) = benchmark.truth(sample)
        ys, xs = np.nonzero(true)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == sample.box
    # The answer in words points into the same mask's box, by the generator's own record of what is meant.
    assert all(benchmark._scenes.score(sample, sample.answer) == 1 for sample in several)
    objects = {one["id"]: one for one in json.loads((benchmark._folder / "objects.json").read_text())["annotations"]}
    # The first of the evidence, where that is another object, is wrong.
    moved = next(one for one in several if objects[one.evidence[0]]["bbox"][:2] != list(one.box[:2]))
    first = objects[moved.evidence[0]]
    wrong = json.dumps([{"segmentation": first["segmentation"], "score": 0.9, "name": "x"}])
    assert benchmark.score(moved, wrong) < 0.5
    measured = benchmark.metrics([{"id": moved.id, "prediction": wrong}])
    assert measured["referring_miou"] < 0.5 and measured["referring_oiou"] < 0.5


@pytest.mark.parametrize("change", [{"box": [0, 0, 5, 5]}, {"evidence": []}])
def test_an_expression_whose_object_is_not_told_is_refused(tmp_path: Path, change: dict) -> None:
    source = ScenesSegment()._folder
    lines = [json.loads(line) for line in (source / "samples.jsonl").read_text().splitlines()]
    one = next(line for line in lines if line["kind"] == REFER)
    (tmp_path / "images").mkdir()
    (tmp_path / one["image"]).write_bytes((source / one["image"]).read_bytes())
    (tmp_path / "objects.json").write_bytes((source / "objects.json").read_bytes())
    (tmp_path / "samples.jsonl").write_text(json.dumps(one | change))
    with pytest.raises(VPruneError, match=rf"sample {one['id']}: none of its evidence"):
        _ = ScenesSegment(tmp_path).samples
