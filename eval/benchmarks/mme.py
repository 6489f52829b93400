"""MME (Fu et al., 2023): two yes-or-no questions an image, in fourteen subtasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError
from vprune.eval.benchmarks.images import FORMATS
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row, read_text, shown
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.benchmarks.yes_no import NO, YES, grouped, mme_answer

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ASKED = "Please answer yes or no."
_ROOTS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark")
_SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".jpg"}


@dataclass(kw_only=True, eq=False)
class Mme(Published):
    """MME's subtasks, a sample's kind; the two questions of an image are `SUBTASK/IMAGE#1` and `#2`.

    A local copy is a folder a subtask with texts of two lines, `QUESTION<TAB>Yes`, named like the images beside them
    (or in `questions_answers_YN/`, with `images/`). A template with an instruction of its own replaces the questions'
    closing "Please answer yes or no.".
    """

    name: str = "mme"
    _asked: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction starts with the right one of yes and no."""
        return float(mme_answer(prediction) == sample.answer)

    def prompt(self, sample: Sample) -> str:
        """The question inside the template."""
        if self.template.strip() == "{question}":
            return super().prompt(sample)
        return self.template.replace("{question}", sample.question.removesuffix(_ASKED).strip())

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy and accuracy+ (both questions of an image right) by subtask, in percent, and MME's sums of the two.

        Images with only one of their questions among the rows (`limit=`) have no accuracy+.
        """
        subtasks = {}
        for kind, members in grouped(rows).items():
            pairs: dict[str, list[float]] = {}
            for row in members:
                pairs.setdefault(str(row["id"]).rpartition("#")[0], []).append(float(row["correct"]))
            whole = [pair for pair in pairs.values() if len(pair) == 2]
            acc = 100 * sum(float(row["correct"]) for row in members) / len(members)
            acc_plus = 100 * sum(min(pair) for pair in whole) / len(whole) if whole else 0.0
            subtasks[kind] = {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus, "images": len(whole)}
        sums = {
            "perception": sum(subtasks[kind]["score"] for kind in PERCEPTION if kind in subtasks),
            "cognition": sum(subtasks[kind]["score"] for kind in COGNITION if kind in subtasks),
        }
        total = sums["perception"] + sums["cognition"]
        return {**sums, "subtasks": subtasks, "score": total, "score_name": "perception + cognition"}

    def _local(self, path: Path) -> Iterable[Row]:
        root = next((path / name for name in _ROOTS if any((path / name / kind).is_dir() for kind in PERCEPTION)), None)
        if root is None:
            raise VPruneError(f"benchmark.path={self.path} holds no folder of a subtask ({', '.join(PERCEPTION)}, ...)")
        for kind in (*PERCEPTION, *COGNITION):
            if (root / kind).is_dir():
                yield from self._subtask(root / kind, root)

    def _subtask(self, folder: Path, root: Path) -> Iterable[Row]:
        texts = folder / "questions_answers_YN"
        for text in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            pictures = folder / "images" if texts.is_dir() else folder
            found = [pictures / (text.stem + suffix) for suffix in (*_SUFFIXES, *map(str.upper, _SUFFIXES))]
            image = next((file for file in found if file.is_file()), pictures / f"{text.stem}.jpg")
            for number, line in enumerate(read_text(text).splitlines(), start=1):
                if line.strip():
                    question, tab, answer = line.rpartition("\t")
                    row = Row({"category": folder.name, "question_id": f"{folder.name}/{text.stem}"}, number, str(text))
                    if not tab:
                        raise VPruneError(f"{row}: expected QUESTION<TAB>ANSWER, got {shown(line)}")
                    told = {"question": question, "answer": answer, "image": image}
                    yield Row({**row.values, **told}, number, str(text))

    def _image(self, row: Row, field: str = "image", name: str | None = None) -> Any:
        value = row.values.get(field)
        return value if isinstance(value, Path) else super()._image(row, field, name)

    def _sample(self, row: Row) -> Sample:
        pair = row.text("question_id")
        self._asked[pair] += 1
        if self._asked[pair] > 2:
            raise row.error("question_id", f"names {pair!r} a third time; an image has two questions")
        return Sample(
            id=f"{pair}#{self._asked[pair]}",
            image=self._image(row),
            kind=row.one_of("category", (*PERCEPTION, *COGNITION)),
            question=row.text("question"),
            answer=row.one_of("answer", (YES, NO)),
        )
