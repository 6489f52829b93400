"""LVIS in its published layout: over a thousand categories, of which every image is annotated for some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vprune.eval.benchmarks.rows import Row, shown
from vprune.eval.benchmarks.sample import Sample
from vprune.segmentation.coco import Coco
from vprune.segmentation.detection import Result, fixed_figures, lvis_figures
from vprune.segmentation.evaluation import OPEN
from vprune.segmentation.instances import Instances

_FREQUENCIES = ("r", "c", "f")


@dataclass(kw_only=True, eq=False)
class Lvis(Coco):
    """LVIS (Gupta et al., arXiv 1908.03195): `lvis_v1_SPLIT.json` with COCO's images, `val2017/NAME.jpg`.

    AP by LVIS's rules (300 detections an image, federated categories) and, with `fixed`, the fixed AP (Dave et al.,
    arXiv 2102.01066). `lvis_v1_minival.json` is read by split=minival, or by its own path.
    """

    name: str = "lvis"
    split: str = "val"
    fixed: bool = True

    image_folders: ClassVar[tuple[str, ...]] = ("val2017", "train2017", "images")

    def figures(self, images: Sequence[int], found: Sequence[Result]) -> dict[str, Any]:
        """LVIS's figures over these images, and the fixed AP."""
        truth = self.instances.content(images)
        figures = lvis_figures(truth, found, self.iou)
        if self.fixed:
            figures |= fixed_figures(truth, found, self.iou)
        return self._stated(figures)

    def _annotation_file(self, path: Path) -> Path:
        names = (f"lvis_v1_{self.split}.json", f"lvis_v0.5_{self.split}.json")
        return self._published(path, *names, *(f"annotations/{name}" for name in names))

    def _local(self, path: Path) -> Iterable[Row]:
        rows = super()._local(path)
        _check_federation(self.instances)
        return rows

    def _sample(self, row: Row) -> Sample:
        # Version 1 names the images of COCO by their addresses alone.
        name = row.text("file_name") if row.has("file_name") else "/".join(row.text("coco_url").split("/")[-2:])
        return Sample(str(row.integer("id")), self._lvis_file(row, name), OPEN, "", "")

    def _lvis_file(self, row: Row, name: str) -> Path:
        field = "file_name" if row.has("file_name") else "coco_url"
        whole = self._file(row, field, name)
        return whole if whole.is_file() else self._file(row, field, name.split("/")[-1])


def _check_federation(instances: Instances) -> None:
    for row in instances.images.values():
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            value = row.values.get(field)
            if value is None:
                raise row.missing(field)
            known = instances.categories
            if not isinstance(value, list) or any(type(one) is not int or one not in known for one in value):
                raise row.error(field, f"should be a list of ids of categories, got {shown(value)}")
    for number, (category, values) in enumerate(instances.categories.items(), start=1):
        row = Row(values, number, f"{instances.file}, categories")
        if row.one_of("frequency", _FREQUENCIES) != values["frequency"]:
            raise row.error("frequency", f"of category {category} should be one of {', '.join(_FREQUENCIES)}")
