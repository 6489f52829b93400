"""GQA (Hudson and Manning, 2019): compositional questions, one right answer each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vprune.errors import VPruneError
from vprune.eval.benchmarks import hub
from vprune.eval.benchmarks.published import Published, mean
from vprune.eval.benchmarks.rows import Row, keyed_rows
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.metrics import exact_match


@dataclass(kw_only=True, eq=False)
class Gqa(Published):
    """GQA's balanced questions; the structural type (choose, compare, logical, query, verify) is a sample's kind.

    A local copy is `SPLIT_balanced_questions.json` with `images/ID.jpg`. On the hub the images are a configuration of
    their own, `images_config`, joined by `imageId`.
    """

    name: str = "gqa"
    split: str = "testdev"
    images_config: str | None = None

    image_folders: ClassVar[tuple[str, ...]] = ("images",)

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 for the right answer, in any case and with or without a full stop."""
        return exact_match(prediction, sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy of open questions (those of type query) and of binary ones (all others)."""
        return {
            "accuracy_open": mean(row["correct"] for row in rows if row["kind"] == "query"),
            "accuracy_binary": mean(row["correct"] for row in rows if row["kind"] not in ("query", "any")),
        }

    def _rows(self) -> Iterable[Row]:
        rows = super()._rows()
        images = self._image_rows()
        return rows if images is None else self._joined(rows, images)

    def _image_rows(self) -> Iterable[Row] | None:
        if self.images_config is None or self.images is not None:
            return None
        if self.path is None:
            assert self.repo is not None
            return hub.load_split(self.repo, self.images_config, self.split, self.revision)
        found = hub.parquet_files(self._root() / self.images_config, None, self.split) if self._root().is_dir() else []
        return hub.load_parquet(found) if found else None

    def _joined(self, questions: Iterable[Row], images: Iterable[Row]) -> Iterable[Row]:
        image_of = {row.text("id"): row.values.get("image") for row in images}
        for row in questions:
            image = row.text("imageId")
            if image_of.get(image) is None:
                raise row.error("imageId", f"names {image!r}, which {self.images_config} does not hold")
            yield Row({**row.values, "image": image_of[image]}, row.number, row.source)

    def _local(self, path: Path) -> Iterable[Row]:
        return keyed_rows(self._published(path, f"{self.split}_balanced_questions.json"), "id")

    def _sample(self, row: Row) -> Sample:
        types = row.values.get("types")
        if types is not None and not isinstance(types, Mapping):
            raise row.error("types", f"should be an object with 'structural', got {types!r}")
        return Sample(
            id=row.text("id", "question_id"),
            image=self._image(row, name=None if row.has("image") else f"{row.text('imageId')}.jpg"),
            kind=str((types or {}).get("structural") or "any"),
            question=row.text("question"),
            answer=row.text("answer"),
        )

    def __post_init__(self) -> None:
        if self.images_config is not None and self.images_config == self.config:
            raise VPruneError(f"benchmark.images_config={self.images_config} is that of the questions")
        super().__post_init__()
