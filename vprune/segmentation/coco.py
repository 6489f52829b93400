"""COCO and CODA in their published layouts: everything in an image, found without a list and scored against one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vprune.errors import VPruneError
from vprune.eval.benchmarks.images import check_image
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row
from vprune.eval.benchmarks.sample import Sample
from vprune.segmentation.detection import Result, coco_figures
from vprune.segmentation.evaluation import OPEN, SegmentPredictor, made_recipe, session_of
from vprune.segmentation.instances import Instances, compressed, read_instances

IOUS = ("segm", "bbox")
_THRESHOLDS = np.linspace(0.5, 0.95, 10)


@dataclass(kw_only=True, eq=False)
class Annotated(Published):
    """A benchmark whose answers are masks, on images that a file of instances annotates.

    `segmenter`, `segmenter_path` and `recipe` (see `made_recipe`) say how images are segmented.
    """

    segmenter: str = "embedded"
    segmenter_path: str | None = None
    recipe: Mapping[str, Any] | str | None = None

    instances: Instances = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            raise VPruneError(f"benchmark={self.name} reads a local copy: name its folder with benchmark.path=FOLDER")
        self._how = made_recipe(self.recipe)
        super().__post_init__()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples, and of the file that annotates them."""
        meant = [sample.evidence for sample in self.samples]
        return hashlib.sha256(f"{super().fingerprint} {self.instances.digest} {meant}".encode()).hexdigest()[:16]

    def load_image(self, sample: Sample) -> Image.Image:
        """The sample's image, RGB, with its pixels where the file has them: annotations know no EXIF orientation."""
        assert isinstance(sample.image, Path)
        check_image(sample.image)
        with Image.open(sample.image) as picture:
            if picture.getexif().get(0x0112, 1) != 1:
                return picture.convert("RGB")
        return super().load_image(sample)

    def predictor(self, loaded: Any, method: Any) -> SegmentPredictor:
        """What answers the samples."""
        session = session_of(loaded, method, self.segmenter, self.segmenter_path, self._how)
        return SegmentPredictor(self, session, self._labels(loaded.device))

    def _labels(self, device: Any) -> Callable[[Sequence[str]], Sequence[int]] | None:
        """What gives names their category ids; None: names stand alone."""
        return None

    def _check(self, image: Path, row: Row) -> None:
        super()._check(image, row)
        sizes = self.instances.images[row.integer("image_id" if row.has("image_id") else "id")]
        annotated, own = (sizes.integer("width"), sizes.integer("height")), check_image(image)
        if own != annotated:
            shown = " x ".join(map(str, own))
            raise sizes.error("width", f"and height are {annotated[0]} x {annotated[1]}, but {image} is {shown} pixels")


@dataclass(kw_only=True, eq=False)
class Coco(Annotated):
    """COCO instances: `instances_SPLIT.json` (in `annotations/` or beside) with `SPLIT/NAME.jpg`.

    `iou` is segm (masks) or bbox (their boxes). With `classes`, names get the nearest category of the file by the CLIP
    model `clip` and have to hit the objects' own; without, any name will do. The accuracy of a run is the recall of an
    image's objects, whatever their category, averaged over IoU .5 to .95.
    """

    name: str = "coco"
    split: str = "val2017"
    iou: str = "segm"
    classes: bool = True
    clip: str = "embedded"

    image_folders: ClassVar[tuple[str, ...]] = ("val2017", "images/val2017", "images")
    score_name: ClassVar[str] = "ap"

    def __post_init__(self) -> None:
        if self.iou not in IOUS:
            raise VPruneError(f"benchmark.iou={self.iou} is unknown; there is {', '.join(IOUS)}")
        super().__post_init__()

    def score(self, sample: Sample, prediction: str) -> float:
        """The recall of the image's objects averaged over IoU .5 to .95; 1.0 where there are none."""
        truth = [one for one in self.instances.of_image[int(sample.id)] if not one.get("iscrowd")]
        if not truth:
            return 1.0
        found = self.results(int(sample.id), json.loads(prediction or "[]"))
        if not found:
            return 0.0
        if self.iou == "bbox":
            ours, theirs = (np.array([one["bbox"] for one in group], dtype=np.float64) for group in (found, truth))
            overlap = coco_mask.iou(ours, theirs, [0] * len(truth))
        else:
            masks = [self.instances.rle(one) for one in truth]
            overlap = coco_mask.iou([compressed(one["segmentation"]) for one in found], masks, [0] * len(truth))
        return float((np.asarray(overlap).max(0)[:, None] >= _THRESHOLDS).mean())

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of the rows of `predictions.jsonl`, over their images."""
        images = [int(row["id"]) for row in rows]
        found = [one for row in rows for one in self.results(int(row["id"]), json.loads(row["prediction"] or "[]"))]
        return self.figures(images, found)

    def results(self, image: int, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """An image's annotations (segmentation, score, category_id) as results with boxes or masks, as `iou` says."""
        results: list[dict[str, Any]] = []
        for one in found:
            result = {"image_id": image, "category_id": one.get("category_id", 1), "score": one["score"]}
            if self.iou == "bbox":
                result["bbox"] = coco_mask.toBbox(compressed(one["segmentation"])).tolist()
            else:
                result["segmentation"] = one["segmentation"]
            results.append(result)
        return results

    def figures(self, images: Sequence[int], found: Sequence[Result]) -> dict[str, Any]:
        """The benchmark's figures over these images of results with image_id, category_id, score and mask or box."""
        truth = self.instances.content(images)
        return self._stated(coco_figures(truth, found, self.iou, self.classes))

    def _stated(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        stated = {**figures, "iou": self.iou, "classes": self.classes}
        score = figures[self.score_name]
        return stated if score is None else {**stated, "score": score, "score_name": self.score_name}

    def _labels(self, device: Any) -> Callable[[Sequence[str]], Sequence[int]] | None:
        if not self.classes:
            return None
        from vprune.segmentation.labels import Labeller

        ids: dict[str, int] = {}
        for number, one in self.instances.categories.items():
            ids.setdefault(spoken(one["name"]), number)
        labeller = Labeller(list(ids), self.clip, device)
        return lambda names: [ids[label] for label in labeller(names)]

    def _local(self, path: Path) -> Iterable[Row]:
        self.instances = read_instances(self._annotation_file(path), masks=self.iou == "segm")
        return self.instances.images.values()

    def _annotation_file(self, path: Path) -> Path:
        name = f"instances_{self.split}.json"
        return self._published(path, f"annotations/{name}", name)

    def _sample(self, row: Row) -> Sample:
        return Sample(str(row.integer("id")), self._image(row, "file_name"), OPEN, "", "")

    @cached_property
    def _folders(self) -> list[Path]:
        own = super()._folders
        if self.images is not None:
            return own
        root = own[-1].parent if own[-1].name == "annotations" else own[-1]
        return [*(root / folder for folder in dict.fromkeys((self.split, *self.image_folders))), *own, root]


@dataclass(kw_only=True, eq=False)
class Coda(Coco):
    """CODA, corner cases on the road (Li et al., arXiv 2203.07724): COCO's format with boxes, beside `images/`.

    `corner_case.json` of the first release has the corner cases alone; `annotations.json` of the later ones has all
    objects, marked by `corner_case`. Figures are those of boxes, whatever their category; `corner_` ones those of the
    corner cases, where they are marked.
    """

    name: str = "coda"
    split: str = "val"
    iou: str = "bbox"
    classes: bool = False

    image_folders: ClassVar[tuple[str, ...]] = ("images",)
    score_name: ClassVar[str] = "ar100"

    def figures(self, images: Sequence[int], found: Sequence[Result]) -> dict[str, Any]:
        """COCO's figures of all objects, and the recall of those marked as corner cases."""
        truth = self.instances.content(images)
        figures = coco_figures(truth, found, self.iou, self.classes)
        marked = [one for one in truth["annotations"] if one.get("corner_case")]
        if marked:
            corner = coco_figures({**truth, "annotations": marked}, found, self.iou, self.classes)
            figures |= {f"corner_{key}": value for key, value in corner.items() if key.startswith("ar")}
        return self._stated(figures)

    def _annotation_file(self, path: Path) -> Path:
        return self._published(path, "annotations.json", "corner_case.json")


def spoken(name: str) -> str:
    """A category's name as it is said: blanks for underscores."""
    return name.replace("_", " ").strip()
