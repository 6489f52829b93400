"""RefCOCO, RefCOCO+ and RefCOCOg in their published layout: an expression, and the one object it means."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import Row, list_rows, read_json, shown
from vprune.eval.benchmarks.sample import Sample
from vprune.segmentation.coco import Annotated
from vprune.segmentation.evaluation import REFER
from vprune.segmentation.instances import packed, read_instances
from vprune.segmentation.metrics import intersection_and_union, mean_iou, overall_iou
from vprune.segmentation.words import plain

DATASETS = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
_PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(kw_only=True, eq=False)
class RefCoco(Annotated):
    """RefCOCO(+/g) (Yu et al., arXiv 1608.00272): `DATASET/refs(SPLIT_BY).p`, `DATASET/instances.json`, `train2014/`.

    `path` is the folder above the data sets, or one of them. `refs(SPLIT_BY).json` with the same content is read, too;
    pickles are read without running anything that they name. `empty_union` is what an empty union counts: 0 in the
    zero-shot line of work, 1 in LISA's gIoU.
    """

    name: str = "refcoco"
    dataset: str = "refcoco"
    split: str = "val"
    split_by: str | None = None
    empty_union: float = 0.0

    image_folders: ClassVar[tuple[str, ...]] = (
        "images/mscoco/images/train2014",
        "images/train2014",
        "train2014",
        "images",
    )

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise VPruneError(f"benchmark.dataset={self.dataset} is unknown; there is {', '.join(DATASETS)}")
        known = DATASETS[self.dataset]
        self.split_by = self.split_by or known[0]
        if self.split_by not in known:
            raise VPruneError(f"benchmark.split_by={self.split_by}: {self.dataset} is split by {' or '.join(known)}")
        super().__post_init__()

    def truth(self, sample: Sample) -> NDArray[np.bool_]:
        """The mask of the object that an expression means."""
        own = self.instances.annotations[sample.evidence[0]]
        mask: NDArray[np.bool_] = coco_mask.decode(self.instances.rle(own)).astype(bool)
        return mask

    def score(self, sample: Sample, prediction: str) -> float:
        """The IoU of the expression's mask."""
        i, u = self._pair(sample, prediction)
        return i / u if u else self.empty_union

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """oIoU, mIoU and the share of expressions with an IoU of at least .5 to .9; nothing found has IoU 0."""
        by_id = {sample.id: sample for sample in self.samples}
        pairs = [self._pair(by_id[str(row["id"])], row["prediction"] or "") for row in rows]
        return self.figures(pairs)

    def figures(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The figures of (intersection, union) in pixels, one an expression."""
        if not pairs:
            return {}
        each = np.array([i / u if u else self.empty_union for i, u in pairs])
        oiou = overall_iou(pairs, self.empty_union)
        return {
            "oiou": oiou,
            "miou": mean_iou(pairs, self.empty_union),
            **{f"precision_at_{round(100 * least)}": float((each >= least).mean()) for least in _PRECISIONS},
            "empty_union": self.empty_union,
            "score": oiou,
            "score_name": "oiou",
        }

    def _pair(self, sample: Sample, prediction: str) -> tuple[int, int]:
        truth = self.truth(sample)
        found = json.loads(prediction or "[]")
        if not found:
            return intersection_and_union(np.zeros_like(truth), truth)
        mask = coco_mask.decode(packed(found[0]["segmentation"], *truth.shape)).astype(bool)
        return intersection_and_union(mask, truth)

    def _local(self, path: Path) -> Iterable[Row]:
        if path.is_file():
            raise VPruneError(f"benchmark.path={self.path} is a file: name the folder of {self.dataset}")
        folder = path / self.dataset if (path / self.dataset).is_dir() else path
        self.instances = read_instances(self._published(folder, "instances.json"))
        refs = self._published(folder, f"refs({self.split_by}).p", f"refs({self.split_by}).json")
        content = read_json(refs) if refs.suffix == ".json" else _unpickled(refs)
        for row in list_rows(content, refs):
            if row.text("split") == self.split:
                yield from self._sentences(row)

    def _sentences(self, row: Row) -> Iterable[Row]:
        for name, known in (("ann_id", self.instances.annotations), ("image_id", self.instances.images)):
            if row.integer(name) not in known:
                raise row.error(name, f"is {row.text(name)}, which {self.instances.file} does not have")
        image = row.integer("image_id")
        if int(self.instances.annotations[row.integer("ann_id")]["image_id"]) != image:
            raise row.error("ann_id", f"is {row.text('ann_id')}, an object of another image than {image}")
        if not row.has("sentences"):
            raise row.missing("sentences")
        for one in list_rows(row.values["sentences"], Path(f"{row}, sentences")):
            own = {**one.values, "image_id": image, "ann_id": row.integer("ann_id")}
            yield Row(own, one.number, one.source)

    def _sample(self, row: Row) -> Sample:
        said = row.text("sent", "raw")
        if not plain(said):
            raise row.error("sent", f"names nothing: {shown(said)}")
        name, meant = str(row.integer("sent_id")), row.integer("ann_id")
        image = self.instances.images[row.integer("image_id")]
        return Sample(name, self._image(image, "file_name"), REFER, said, "", evidence=(meant,))


class _Plain(pickle.Unpickler):
    """Reads lists, objects, texts and numbers; whatever else a pickle names could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; plain lists, objects, texts and numbers are read")


def _unpickled(path: Path) -> Any:
    try:
        return _Plain(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        KeyError,
    ) as error:
        raise VPruneError(f"{path} cannot be read as a pickle ({str(error) or type(error).__name__})") from error
