"""VQAv2 (Goyal et al., 2017) and TextVQA (Singh et al., 2019): open questions with ten annotators' answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vprune.errors import VPruneError
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.rows import Row, list_rows, read_json
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.benchmarks.vqa_accuracy import textvqa_accuracy, vqa_accuracy

ANSWER_TYPES = ("yes/no", "number", "other")


@dataclass(kw_only=True, eq=False)
class VqaV2(Published):
    """VQAv2's validation questions; the type of the answer (yes/no, number, other) is a sample's kind.

    A local copy is `v2_OpenEnded_mscoco_val2014_questions.json` with `v2_mscoco_val2014_annotations.json` and
    `val2014/COCO_val2014_000000000042.jpg`.
    """

    name: str = "vqav2"
    split: str = "validation"

    image_folders: ClassVar[tuple[str, ...]] = ("val2014", "images/val2014", "images")

    def score(self, sample: Sample, prediction: str) -> float:
        """VQA accuracy, averaged over the annotators left out."""
        return vqa_accuracy(prediction, sample.answers)

    def _local(self, path: Path) -> Iterable[Row]:
        questions = self._published(path, "v2_OpenEnded_*val2014_questions.json", "*OpenEnded*questions.json")
        beside = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
        annotations = self._published(questions.parent, beside)
        annotation_of: dict[str, Row] = {}
        for row in list_rows(_entries(annotations, "annotations"), annotations):
            question = row.text("question_id")
            if question in annotation_of:
                first = annotation_of[question].number
                raise row.error("question_id", f"names {question!r}, which row {first} has already")
            annotation_of[question] = row
        for row in list_rows(_entries(questions, "questions"), questions):
            if row.text("question_id") not in annotation_of:
                raise row.error("question_id", f"names {row.text('question_id')!r}, without an entry in {annotations}")
            # What an annotation lacks is told with its own file and row.
            annotation = annotation_of[row.text("question_id")]
            annotation.texts("answers")
            yield Row({**annotation.values, **row.values}, row.number, row.source)

    def _sample(self, row: Row) -> Sample:
        answers = row.texts("answers")
        coco = None if row.has("image") else f"COCO_val2014_{row.integer('image_id'):012d}.jpg"
        return Sample(
            id=row.text("question_id"),
            image=self._image(row, name=coco),
            kind=row.one_of("answer_type", ANSWER_TYPES),
            question=row.text("question"),
            answer=row.optional("multiple_choice_answer") or most_common(answers),
            answers=answers,
        )


@dataclass(kw_only=True, eq=False)
class TextVqa(Published):
    """TextVQA's validation questions, whose answers are to be read in the image.

    A local copy is `TextVQA_0.5.1_val.json` with `train_images/ID.jpg`.
    """

    name: str = "textvqa"
    split: str = "validation"

    image_folders: ClassVar[tuple[str, ...]] = ("train_images", "images/train_images", "images")

    def score(self, sample: Sample, prediction: str) -> float:
        """VQA accuracy, averaged over the annotators left out."""
        return textvqa_accuracy(prediction, sample.answers)

    def _local(self, path: Path) -> Iterable[Row]:
        file = self._published(path, "TextVQA_*_val.json", "*textvqa*val*.json")
        return list_rows(_entries(file, "data"), file)

    def _sample(self, row: Row) -> Sample:
        answers = row.texts("answers")
        return Sample(
            id=row.text("question_id"),
            image=self._image(row, name=None if row.has("image") else f"{row.text('image_id')}.jpg"),
            kind="text",
            question=row.text("question"),
            answer=most_common(answers),
            answers=answers,
        )


def most_common(answers: Sequence[str]) -> str:
    """The answer given most often, the earliest of several."""
    return Counter(answers).most_common(1)[0][0]


def _entries(file: Path, key: str) -> object:
    content = read_json(file)
    if not isinstance(content, dict) or key not in content:
        raise VPruneError(f"{file}: expected an object with the list {key!r}")
    return content[key]
