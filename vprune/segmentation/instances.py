"""Instance annotations in COCO's file format, which LVIS, CODA and RefCOCO share: read once, every row checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import Row, list_rows, read_json, shown


@dataclass(frozen=True)
class Instances:
    """What a file annotates: rows of images, and annotations and categories as published, by their ids."""

    file: Path
    images: Mapping[int, Row]
    annotations: Mapping[int, Mapping[str, Any]]
    categories: Mapping[int, Mapping[str, Any]]

    @cached_property
    def of_image(self) -> Mapping[int, Sequence[Mapping[str, Any]]]:
        """The annotations of every image."""
        own: dict[int, list[Mapping[str, Any]]] = {image: [] for image in self.images}
        for one in self.annotations.values():
            own[int(one["image_id"])].append(one)
        return own

    @cached_property
    def digest(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]

    def size(self, image: int) -> tuple[int, int]:
        """An image's (height, width)."""
        row = self.images[image]
        return row.integer("height"), row.integer("width")

    def rle(self, annotation: Mapping[str, Any]) -> dict[str, Any]:
        """An annotation's mask in compressed run lengths."""
        return packed(annotation["segmentation"], *self.size(int(annotation["image_id"])))

    def content(self, images: Iterable[int]) -> dict[str, Any]:
        """A copy of the file's content with these images alone, that pycocotools may write into.

        Annotations are numbered from 1: pycocotools takes the id 0 for no match.
        """
        asked = sorted(set(images))
        own = [one for image in asked for one in self.of_image[image]]
        return {
            "images": [{**self.images[image].values, "id": image} for image in asked],
            "annotations": [{"iscrowd": 0, **one, "id": number} for number, one in enumerate(own, start=1)],
            "categories": [{**one, "id": number} for number, one in self.categories.items()],
        }


def read_instances(file: Path, masks: bool = True) -> Instances:
    """The instances of a JSON file with images, annotations and categories.

    Args:
        file: in COCO's format; what other fields its rows have stays.
        masks: whether annotations need a segmentation; else they need a bbox.

    Raises:
        VPruneError: with the list, the row and the field, for whatever is missing, malformed or said twice.
    """
    content = read_json(file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or key not in content:
            raise VPruneError(f"{file} is not in COCO's format: it has no {key!r}")
    images = _by_id(rows_of(content, "images", file))
    categories = _by_id(rows_of(content, "categories", file))
    for row in images.values():
        for field in ("height", "width"):
            if row.integer(field) < 1:
                raise row.error(field, f"should be 1 or more, got {shown(row.values[field])}")
    for row in categories.values():
        row.text("name")
    annotations = _by_id(rows_of(content, "annotations", file))
    for row in annotations.values():
        _check_annotation(row, images, categories, masks)
    return Instances(
        file,
        images,
        {number: row.values for number, row in annotations.items()},
        {number: row.values for number, row in categories.items()},
    )


def rows_of(content: Mapping[str, Any], key: str, file: Path) -> list[Row]:
    """One list of a COCO file as rows, which name it in their errors."""
    return [Row(row.values, row.number, f"{file}, {key}") for row in list_rows(content[key], file)]


def packed(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths, compressed or not, as compressed run lengths."""
    if isinstance(segmentation, list):
        merged: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        return merged
    if isinstance(segmentation["counts"], list):
        plain: dict[str, Any] = coco_mask.frPyObjects(segmentation, height, width)
        return plain
    return compressed(segmentation)


def compressed(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Compressed run lengths as JSON holds them, or as pycocotools does, as the latter."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}


def check_box(row: Row, field: str = "bbox") -> None:
    """Refuse a box that is not [x, y, width, height]."""
    value = row.values.get(field)
    if value is None:
        raise row.missing(field)
    if not _numbers(value) or len(value) != 4 or min(value[2:]) < 0:
        raise row.error(field, f"should be a box [x, y, width, height], got {shown(value)}")


def check_segmentation(row: Row, height: int, width: int, field: str = "segmentation") -> None:
    """Refuse what is neither polygons nor run lengths of the image's size."""
    value = row.values.get(field)
    if value is None:
        raise row.missing(field)
    if isinstance(value, list):
        if not value:
            raise row.error(field, "is an empty list")
        for place, polygon in enumerate(value, start=1):
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                problem = f"should hold polygons [x, y, x, y, x, y, ...], entry {place} is {shown(polygon)}"
                raise row.error(field, problem)
        return
    if not isinstance(value, Mapping) or not {"size", "counts"} <= set(value):
        raise row.error(field, f"should be polygons, or run lengths with size and counts, got {shown(value)}")
    if value["size"] not in ([height, width], (height, width)):
        raise row.error(field, f"has the size {shown(value['size'])}, its image is [{height}, {width}] (height, width)")
    counts = value["counts"]
    if isinstance(counts, list):
        if not _numbers(counts) or any(one < 0 or one != int(one) for one in counts) or sum(counts) != height * width:
            raise row.error(field, f"has run lengths that do not add up to the {height * width} pixels of its image")
        return
    try:
        pixels = _pixels(str(counts))
    except ValueError as error:
        raise row.error(field, f"has counts that are no run lengths: {shown(counts)}") from error
    if pixels != height * width:
        raise row.error(field, f"has run lengths of {pixels} pixels, its image has {height * width}")


def _check_annotation(row: Row, images: Mapping[int, Row], categories: Mapping[int, Row], masks: bool) -> None:
    for field, owner, known in (("image_id", "images", images), ("category_id", "categories", categories)):
        if row.integer(field) not in known:
            raise row.error(field, f"is {row.text(field)}, which no row of {owner} has as its id")
    image = images[row.integer("image_id")]
    if masks:
        check_segmentation(row, image.integer("height"), image.integer("width"))
    if not masks or row.has("bbox"):
        check_box(row)
    value = row.values.get("area")
    if not _numbers([value]) or float(value or 0) < 0:
        raise row.missing("area") if value is None else row.error("area", f"should be a number, got {shown(value)}")


def _by_id(rows: Iterable[Row]) -> dict[int, Row]:
    found: dict[int, Row] = {}
    for row in rows:
        number = row.integer("id")
        if number in found:
            raise row.error("id", f"is {number}, as in row {found[number].number} already")
        found[number] = row
    return found


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value
    )


def _pixels(counts: str) -> int:
    """The pixels that compressed run lengths cover; pycocotools itself writes past the mask where they are too many.

    Each run is a signed integer in groups of five bits, lowest first, 48 added to make a letter, with 32 where more
    groups follow; from the fourth run on it is told as the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        group = ord(letter) - 48
        if not 0 <= group < 64:
            raise ValueError(letter)
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError(counts)
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError(counts)
    return sum(runs)
