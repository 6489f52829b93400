"""Masks that are there already, of `vprune segment` or of any other program, scored by a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import Row, list_rows, read_json, shown
from vprune.segmentation.coco import Coco, spoken
from vprune.segmentation.instances import check_box, check_segmentation, rows_of
from vprune.segmentation.refcoco import RefCoco


def score_annotations(benchmark: Coco | RefCoco, path: str | Path) -> dict[str, Any]:
    """The figures of a finished file, over all images or expressions of the benchmark.

    For `Coco`, `Coda` and `Lvis` it is a COCO file as `vprune segment` writes it (its images found again by their file
    names, its categories by their names), or COCO's list of results (image_id, category_id, score, and segmentation or
    bbox). For `RefCoco` it is a list with sent_id and segmentation, null where nothing was found.

    Raises:
        VPruneError: with file, row and field, for what is missing or malformed, names nothing of the benchmark, or
            leaves images or expressions out.

    Example:
        >>> score_annotations(Lvis(path="lvis"), "runs/segment/val2017/annotations.json")  # doctest: +SKIP
        {'ap': 0.21, 'ap_r': 0.23, 'fixed_ap': 0.22, ...}
    """
    file = Path(path).expanduser()
    content = read_json(file)
    if isinstance(benchmark, RefCoco):
        return _expressions(benchmark, content, file)
    asked = [int(sample.id) for sample in benchmark.samples]
    if isinstance(content, Mapping):
        found = _segmented(benchmark, content, file)
    else:
        found = [_result(benchmark, row) for row in list_rows(content, file)]
    return benchmark.figures(asked, found)


def _result(benchmark: Coco, row: Row) -> dict[str, Any]:
    """A row of COCO's results, as it is: where it has a box, that gives its area, in pycocotools as well as in lvis."""
    image = row.integer("image_id")
    if image not in benchmark.instances.images:
        raise row.error("image_id", f"is {image}, which {benchmark.instances.file} does not have")
    category = row.integer("category_id") if benchmark.classes else 1
    if benchmark.classes and category not in benchmark.instances.categories:
        raise row.error("category_id", f"is {category}, which {benchmark.instances.file} does not have")
    result = {"image_id": image, "category_id": category, "score": _score(row)}
    if row.has("bbox") or benchmark.iou == "bbox":
        check_box(row)
        result["bbox"] = row.values["bbox"]
    if benchmark.iou == "segm":
        _check_mask(row, *benchmark.instances.size(image))
        result["segmentation"] = row.values["segmentation"]
    return result


def _segmented(benchmark: Coco, content: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise VPruneError(f"{file} is neither a list of results nor in COCO's format: it has no {key!r}")
    image_of = _images(benchmark, content, file)
    category_of = _categories(benchmark, content, file)
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows_of(content, "annotations", file):
        if row.integer("image_id") not in image_of:
            raise row.error("image_id", f"is {row.text('image_id')}, which no row of images has as its id")
        if benchmark.classes and row.integer("category_id") not in category_of:
            raise row.error("category_id", f"is {row.text('category_id')}, which no row of categories has as its id")
        image = image_of[row.integer("image_id")]
        _check_mask(row, *benchmark.instances.size(image))
        category = category_of[row.integer("category_id")] if benchmark.classes else 1
        own = {"segmentation": row.values["segmentation"], "score": _score(row), "category_id": category}
        found.setdefault(image, []).append(own)
    return [one for image, own in found.items() for one in benchmark.results(image, own)]


def _images(benchmark: Coco, content: Mapping[str, Any], file: Path) -> dict[int, int]:
    """The benchmark's image id of each of the file's; both by the whole name or, where that is not known, its end."""
    ids: dict[str, int] = {}
    for sample in benchmark.samples:
        assert isinstance(sample.image, Path)
        ids[sample.image.name] = int(sample.id)
        ids["/".join(sample.image.parts[-2:])] = int(sample.id)
    known: dict[int, int] = {}
    for row in rows_of(content, "images", file):
        parts = Path(row.text("file_name")).parts
        image = ids.get("/".join(parts[-2:]), ids.get(parts[-1]))
        if image is None:
            raise row.error("file_name", f"is {shown(row.text('file_name'))}, which {benchmark.name} does not have")
        known[row.integer("id")] = image
    left = [sample for sample in benchmark.samples if int(sample.id) not in known.values()]
    if left:
        raise VPruneError(
            f"{file} leaves {len(left)} of {len(benchmark.samples)} images out, {left[0].image} the first of them"
        )
    return known


def _categories(benchmark: Coco, content: Mapping[str, Any], file: Path) -> dict[int, int]:
    if not benchmark.classes:
        return {}
    ids: dict[str, int] = {}
    for number, one in benchmark.instances.categories.items():
        ids.setdefault(spoken(one["name"]).lower(), number)
    known: dict[int, int] = {}
    for row in rows_of(content, "categories", file):
        name = spoken(row.text("name")).lower()
        if name not in ids:
            raise row.error(
                "name",
                f"is {shown(row.text('name'))}, no category of {benchmark.name}: segment with categories=FILE of its "
                "names, or score with classes=False",
            )
        known[row.integer("id")] = ids[name]
    return known


def _expressions(benchmark: RefCoco, content: Any, file: Path) -> dict[str, Any]:
    by_id = {sample.id: sample for sample in benchmark.samples}
    said: dict[str, dict[str, str]] = {}
    for row in list_rows(content, file):
        name = str(row.integer("sent_id"))
        if name not in by_id:
            raise row.error("sent_id", f"is {name}, which {benchmark.name}, split {benchmark.split}, does not have")
        if name in said:
            raise row.error("sent_id", f"is {name}, which was answered already")
        if "segmentation" not in row.values:
            raise row.missing("segmentation")
        found = []
        if row.values["segmentation"] is not None:
            _check_mask(row, *benchmark.truth(by_id[name]).shape)
            found = [{"segmentation": row.values["segmentation"]}]
        said[name] = {"id": name, "prediction": json.dumps(found)}
    left = [name for name in by_id if name not in said]
    if left:
        raise VPruneError(f"{file} leaves {len(left)} of {len(by_id)} expressions out, sent_id {left[0]} the first")
    return benchmark.metrics(list(said.values()))


def _check_mask(row: Row, height: int, width: int) -> None:
    value = row.values.get("segmentation")
    if isinstance(value, list) or (isinstance(value, Mapping) and isinstance(value.get("counts"), list)):
        raise row.error("segmentation", "should be compressed run lengths, as results are published")
    check_segmentation(row, height, width)


def _score(row: Row) -> float:
    if not row.has("score"):
        raise row.missing("score")
    value = row.values["score"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise row.error("score", f"should be a number, got {shown(value)}")
    return float(value)
