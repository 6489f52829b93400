"""POPE (Li et al., 2023): is there such an object in the image? Answers of models that see what is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vprune.errors import VPruneError
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row, read_rows
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.benchmarks.yes_no import NO, YES, grouped, pope_answer, rates

SUBSETS = ("random", "popular", "adversarial")
_MEANS = ("precision", "recall", "f1", "yes_ratio", "yes_ratio_labels")


@dataclass(kw_only=True, eq=False)
class Pope(Published):
    """POPE's three subsets, or the one named by `subset`; the subset is a sample's kind.

    A local copy is `SOURCE_pope_SUBSET.json` with one object a line (`question_id`, `image`, `text`, `label`), the
    images in `images/`, `val2014/` or beside; `source` is coco, gqa or aokvqa. Several subsets are scored apart, and
    precision, recall, F1 and yes-ratio are their means, as tables state them.
    """

    name: str = "pope"
    subset: str | None = None
    source: str = "coco"

    image_folders: ClassVar[tuple[str, ...]] = ("images", "val2014")

    def __post_init__(self) -> None:
        if self.subset is not None and self.subset not in SUBSETS:
            raise VPruneError(f"benchmark.subset={self.subset} is unknown; there is {', '.join(SUBSETS)}, null for all")
        super().__post_init__()

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction reads as the label, by POPE's own reading."""
        return float(pope_answer(prediction) == sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Precision, recall, F1 and the share of yes among the predictions, in all and by subset."""
        by_subset = {subset: rates(members) for subset, members in grouped(rows).items()}
        means = {key: sum(one[key] for one in by_subset.values()) / len(by_subset) for key in _MEANS if by_subset}
        return means | {"by_subset": by_subset, "score": means.get("f1"), "score_name": "f1"}

    def _local(self, path: Path) -> Iterable[Row]:
        names = [f"{self.source}_pope_{subset}.json" for subset in SUBSETS if self.subset in (None, subset)]
        files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
        for file in files or [self._published(path, *names)]:
            subset = next((subset for subset in SUBSETS if subset in file.stem), self.subset or "random")
            for row in read_rows(file):
                yield Row({"category": subset, **row.values}, row.number, row.source)

    def _sample(self, row: Row) -> Sample | None:
        subset = row.one_of("category", SUBSETS)
        if self.subset not in (None, subset):
            return None
        return Sample(
            id=f"{subset}-{row.text('question_id')}",
            image=self._image(row),
            kind=subset,
            question=row.text("text", "question"),
            answer=row.one_of("label" if "label" in row.values else "answer", (YES, NO)),
        )
