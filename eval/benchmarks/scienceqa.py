"""ScienceQA-IMG (Lu et al., 2022): those of its school questions that come with an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vprune.errors import VPruneError
from vprune.eval.benchmarks.letters import ALPHABET, chosen, lettered
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row, keyed_rows, read_json
from vprune.eval.benchmarks.sample import Sample


@dataclass(kw_only=True, eq=False)
class ScienceQa(Published):
    """ScienceQA's questions with an image; the subject is a sample's kind.

    A local copy is `problems.json` with `pid_splits.json` and `images/test/ID/image.png` (or `test/ID/image.png`).
    """

    name: str = "scienceqa"

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction chooses the right letter."""
        return float(chosen(prediction, sample.options) == sample.answer)

    def _local(self, path: Path) -> Iterable[Row]:
        problems = self._published(path, "problems.json", "data/scienceqa/problems.json")
        splits = problems.with_name("pid_splits.json")
        named = read_json(splits).get(self.split) if splits.is_file() else None
        if splits.is_file() and not isinstance(named, list):
            raise VPruneError(f"{splits} names no split {self.split!r}")
        asked = None if named is None else set(map(str, named))
        for row in keyed_rows(problems, "question_id"):
            if row.text("question_id") in asked if asked is not None else row.optional("split") == self.split:
                name = row.optional("image")
                place = f"{self.split}/{row.text('question_id')}/{name}" if name and "://" not in name else name
                yield Row({**row.values, "image": place}, row.number, row.source)

    def _sample(self, row: Row) -> Sample | None:
        if not row.has("image"):
            return None
        choices = row.texts("choices")
        answer = row.integer("answer")
        if not 0 <= answer < len(choices):
            raise row.error("answer", f"should be a place among the {len(choices)} choices, from 0, got {answer}")
        hint = row.optional("hint")
        return Sample(
            id=row.optional("question_id") or str(row.number),
            image=self._image(row),
            kind=row.optional("subject") or "any",
            question="\n".join([*([f"Context: {hint}"] if hint else []), row.text("question"), lettered(choices)]),
            answer=ALPHABET[answer],
            options=choices,
        )
