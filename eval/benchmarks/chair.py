"""Captions of COCO's validation images, searched for objects that are not there (CHAIR)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vprune.errors import VPruneError
from vprune.eval.benchmarks.hallucination import ObjectWords, chair
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row, list_rows, read_json
from vprune.eval.benchmarks.sample import Sample


@dataclass(kw_only=True, eq=False)
class Chair(Published):
    """CHAIR on COCO: `instances_SPLIT.json` and `captions_SPLIT.json` (in `annotations/` or beside), `SPLIT/NAME.jpg`.

    An image has the objects that are annotated on it or that its published captions mention. `synonyms` is the
    metric's `synonyms.txt`; null: the one in the folder. A caption's score is the share of its mentions that are right.
    """

    name: str = "chair"
    split: str = "val2014"
    synonyms: str | Path | None = None
    question: str = "Please describe this image in detail."

    image_folders: ClassVar[tuple[str, ...]] = ("val2014", "images/val2014", "images")

    def __post_init__(self) -> None:
        if self.path is None:
            raise VPruneError("benchmark=chair reads COCO's annotations: name their folder with benchmark.path=FOLDER")
        beside = self._root() / "synonyms.txt"
        file = Path(self.synonyms).expanduser() if self.synonyms is not None else beside
        if not file.is_file():
            raise VPruneError(f"{file} does not exist: name the metric's word list with benchmark.synonyms=FILE")
        self._words = ObjectWords(file)
        super().__post_init__()

    def score(self, sample: Sample, prediction: str) -> float:
        """The share of the mentioned objects that are there; 1.0 for a caption that mentions none."""
        return 1.0 - chair([(self._words.mentioned(prediction), _objects(sample.answer))])["chair_i"]

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """CHAIR-i, CHAIR-s and the recall of objects, over the captions that were written."""
        written = [row for row in rows if "error" not in row]
        return chair((self._words.mentioned(row["prediction"]), _objects(str(row["answer"]))) for row in written)

    def _local(self, path: Path) -> Iterable[Row]:
        name = f"instances_{self.split}.json"
        instances = self._published(path, f"annotations/{name}", name)
        captions = instances.with_name(f"captions_{self.split}.json")
        content = _coco(instances, "images", "annotations", "categories")
        there: dict[str, set[str]] = {}
        named = {row.text("id"): row.text("name") for row in list_rows(content["categories"], instances)}
        for row in list_rows(content["annotations"], instances):
            name = named.get(row.text("category_id"), "")
            if not name:
                raise row.error("category_id", f"names {row.text('category_id')!r}, which is no category of the file")
            there.setdefault(row.text("image_id"), set()).add(self._words.object_of(name) or name)
        for row in list_rows(_coco(captions, "annotations")["annotations"], captions):
            there.setdefault(row.text("image_id"), set()).update(self._words.mentioned(row.text("caption")))
        for row in list_rows(content["images"], instances):
            yield Row({**row.values, "objects": there.get(row.text("id"), set())}, row.number, row.source)

    def _sample(self, row: Row) -> Sample | None:
        objects = row.values["objects"]
        if not objects:  # nothing is known about the image
            return None
        return Sample(
            id=row.text("id"),
            image=self._image(row, "file_name"),
            kind="caption",
            question=self.question,
            answer=", ".join(sorted(objects)),
        )


def _objects(answer: str) -> set[str]:
    return {name.strip() for name in answer.split(",") if name.strip()}


def _coco(file: Path, *keys: str) -> dict[str, Any]:
    content = read_json(file)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise VPruneError(f"{file} is not a COCO annotation file: it has no {key!r}")
    return dict(content)
