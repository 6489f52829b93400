"""What is wrong with a copy of LVIS, COCO or RefCOCO, or with masks to be scored, is told with file, row and field."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.json_files import change
from tests.segmentation.made_published import made_coco, made_lvis, made_refs, perfect, segmented
from vprune.errors import VPruneError
from vprune.segmentation.coco import Coco
from vprune.segmentation.finished import score_annotations
from vprune.segmentation.lvis import Lvis
from vprune.segmentation.refcoco import RefCoco


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("images", 0, "file_name"), "other.jpg", r"images, row 1: field 'file_name' is 'other\.jpg', which coco does"),
        (("images",), [], r"leaves 1 of 1 images out, .*000000000000\.jpg the first"),
        (("categories", 1, "name"), "unicorn", r"categories, row 2: field 'name' is 'unicorn', no category of coco"),
        (("annotations", 1, "score"), None, r"annotations, row 2: field 'score' is missing"),
        (("annotations", 1, "score"), "0.5", r"annotations, row 2: field 'score' should be a number, got '0\.5'"),
        (("annotations", 1, "image_id"), 9, r"annotations, row 2: field 'image_id' is 9, which no row of images"),
        (("annotations", 1, "segmentation"), [[1, 2, 3, 4, 5, 6]], r"row 2: field 'segmentation' should be compressed"),
        (("annotations", 1, "segmentation", "size"), [9, 9], r"row 2: field 'segmentation' has the size \[9, 9\]"),
        (("annotations", 1, "segmentation", "size"), 384, r"row 2: field 'segmentation' has the size 384"),
        (("annotations", 1, "segmentation", "counts"), "0", r"row 2: field 'segmentation' has run lengths of 0 pixels"),
        (("annotations", 1, "segmentation", "counts"), "!", r"row 2: field 'segmentation' has counts that are no"),
        (("categories",), None, r"is neither a list of results nor in COCO's format: it has no 'categories'"),
    ],
)
def test_mistakes_in_a_finished_file(path: tuple[str | int, ...], to: Any, message: str, tmp_path: Path) -> None:
    benchmark = Coco(path=made_coco(tmp_path / "coco"))
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(segmented(benchmark)))
    change(file, *path, to=to)
    with pytest.raises(VPruneError, match=message):
        score_annotations(benchmark, file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_id": 99}, r"row 1: field 'image_id' is 99, which .*instances_val2017\.json does not have"),
        ({"category_id": 99}, r"row 1: field 'category_id' is 99"),
        ({"segmentation": None}, r"row 1: field 'segmentation' is empty"),
        ({"bbox": [1, 2, 3]}, r"row 1: field 'bbox' should be a box \[x, y, width, height\]"),
    ],
)
def test_mistakes_in_results(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    benchmark = Coco(path=made_coco(tmp_path / "coco"))
    file = tmp_path / "found.json"
    file.write_text(json.dumps([{**perfect(benchmark)[0], **changed}]))
    with pytest.raises(VPruneError, match=message):
        score_annotations(benchmark, file)


def test_mistakes_in_found_expressions(tmp_path: Path) -> None:
    benchmark = RefCoco(path=made_refs(tmp_path))
    file = tmp_path / "found.json"
    for rows, message in (
        ([], r"leaves 1 of 1 expressions out, sent_id 100 the first"),
        ([{"sent_id": 7, "segmentation": None}], r"row 1: field 'sent_id' is 7, which refcoco, split val, does not"),
        ([{"sent_id": 100}], r"row 1: field 'segmentation' is missing"),
        ([{"sent_id": 100, "segmentation": None}] * 2, r"row 2: field 'sent_id' is 100, which was answered already"),
    ):
        file.write_text(json.dumps(rows))
        with pytest.raises(VPruneError, match=message):
            score_annotations(benchmark, file)


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("images",), None, r"lvis_v1_val\.json is not in COCO's format: it has no 'images'"),
        (("images", 0, "height"), 0, r"images, row 1: field 'height' should be 1 or more, got 0"),
        (("images", 0, "width"), 100, r"images, row 1: field 'width' and height are 100 x 384, but .* is 384 x 384"),
        (("images", 0, "coco_url"), None, r"images, row 1: field 'coco_url' is missing"),
        (("images", 0, "neg_category_ids"), None, r"images, row 1: field 'neg_category_ids' is missing"),
        (("images", 0, "neg_category_ids"), [[3]], r"images, row 1: field 'neg_category_ids' should be a list of ids"),
        (("images", 0, "not_exhaustive_category_ids"), [99], r"row 1: field 'not_exhaustive_category_ids' should be a"),
        (("categories", 1, "frequency"), "x", r"categories, row 2: field 'frequency' should be one of r, c, f"),
        (("categories", 1, "id"), 3, r"categories, row 2: field 'id' is 3, as in row 1 already"),
        (("annotations", 1, "category_id"), 99, r"annotations, row 2: field 'category_id' is 99, which no row"),
        (("annotations", 1, "image_id"), "x", r"annotations, row 2: field 'image_id' should be an integer"),
        (("annotations", 1, "area"), None, r"annotations, row 2: field 'area' is missing"),
        (
            ("annotations", 1, "segmentation"),
            [[1, 2]],
            r"annotations, row 2: field 'segmentation' should hold polygons",
        ),
        (("annotations", 1, "segmentation"), None, r"annotations, row 2: field 'segmentation' is missing"),
        (("annotations", 1, "bbox"), [1, 2, 3, -4], r"annotations, row 2: field 'bbox' should be a box"),
    ],
)
def test_mistakes_in_annotations(path: tuple[str | int, ...], to: Any, message: str, tmp_path: Path) -> None:
    made_lvis(tmp_path)
    file = tmp_path / "lvis_v1_val.json"
    content = json.loads(file.read_text())
    if path[-1] == "width":  # the masks are of this size, too
        content["annotations"] = []
        file.write_text(json.dumps(content))
    change(file, *path, to=to)
    with pytest.raises(VPruneError, match=message):
        Lvis(path=tmp_path)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ((0, "ann_id"), 99, r"refs\(unc\)\.json, row 1: field 'ann_id' is 99, which .*instances\.json does not have"),
        ((0, "sentences"), None, r"row 1: field 'sentences' is missing"),
        ((0, "sentences", 0, "sent_id"), None, r"row 1, sentences, row 1: field 'sent_id' is missing"),
        ((0, "sentences", 0, "sent"), ".", r"row 1, sentences, row 1: field 'sent' names nothing: '\.'"),
        ((1, "split"), None, r"row 2: field 'split' is missing"),
    ],
)
def test_mistakes_in_expressions(path: tuple[str | int, ...], to: Any, message: str, tmp_path: Path) -> None:
    made_refs(tmp_path)
    file = tmp_path / "refcoco/refs(unc).p"
    as_json = file.with_suffix(".json")
    as_json.write_text(json.dumps(pickle.loads(file.read_bytes())))
    file.unlink()
    change(as_json, *path, to=to)
    with pytest.raises(VPruneError, match=message):
        RefCoco(path=tmp_path)


def test_options_that_there_are_not(tmp_path: Path) -> None:
    made_coco(tmp_path)
    with pytest.raises(VPruneError, match=r"benchmark\.iou=box is unknown; there is segm, bbox"):
        Coco(path=tmp_path, iou="box")
    with pytest.raises(VPruneError, match=r"benchmark=coco reads a local copy: .*benchmark\.path=FOLDER"):
        Coco()
    with pytest.raises(VPruneError, match=r"holds none of annotations/instances_train2017\.json"):
        Coco(path=tmp_path, split="train2017")
