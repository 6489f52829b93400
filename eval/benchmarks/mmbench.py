"""MMBench (Liu et al., 2023): multiple choice, asked once for every rotation of the options."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vprune.eval.benchmarks.images import ImageSource
from vprune.eval.benchmarks.letters import ALPHABET, chosen, lettered
from vprune.eval.benchmarks.published import Published, mean
from vprune.eval.benchmarks.rows import Row, read_rows, shown
from vprune.eval.benchmarks.sample import Sample

ROTATION = 1_000_000  # index of a rotation = index of the question + n times this
_LETTERS = "ABCDEFGH"
_LONGEST_INDEX = 64  # a rotation's image may be the index of the row that has it


@dataclass(frozen=True, eq=False)
class CellImage:
    """An image in base64, as a table holds it."""

    text: str
    where: str

    def __str__(self) -> str:
        return f"({self.where}, field 'image')"

    def read(self) -> bytes:
        """The encoded image; bytes that are no image where the text is no base64."""
        try:
            return base64.b64decode(self.text, validate=True)
        except binascii.Error:
            return b""


@dataclass(kw_only=True, eq=False)
class MmBench(Published):
    """MMBench as its TSV has it (`index, question, hint, A, B, C, D, answer, category, image` in base64).

    With `circular`, a question counts in `circular_accuracy` if it is answered rightly under every rotation of its
    options; rotations are those of the file (indices from 1,000,000 on), or made where it holds none. Without, each
    question is asked once.
    """

    name: str = "mmbench"
    split: str = "dev"
    circular: bool = True

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction chooses the right letter."""
        return float(chosen(prediction, sample.options) == sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy of the unrotated questions and under circular evaluation.

        Questions with some of their rotations left out of the rows (`limit=`) do not take part in the latter.
        """
        rotations = Counter(_question(sample.id) for sample in self.samples)
        answered: dict[str, list[float]] = {}
        for row in rows:
            answered.setdefault(_question(str(row["id"])), []).append(float(row["correct"]))
        whole = [min(values) for question, values in answered.items() if len(values) == rotations[question]]
        vanilla = mean(float(row["correct"]) for row in rows if int(row["id"]) < ROTATION)
        circular = mean(whole) if self.circular else None
        named = ("circular_accuracy", circular) if self.circular else ("vanilla_accuracy", vanilla)
        figures = {"vanilla_accuracy": vanilla, "circular_accuracy": circular, "circular_questions": len(whole)}
        return figures | ({"score": named[1], "score_name": named[0]} if named[1] is not None else {})

    def _local(self, path: Path) -> Iterable[Row]:
        return read_rows(self._published(path, f"*[mM][mM][bB]ench*{self.split}*.tsv", f"*{self.split.upper()}*.tsv"))

    def _gather(self) -> list[Sample]:
        self._image_of: dict[str, Path | ImageSource] = {}
        samples = super()._gather()
        rotated = any(int(sample.id) >= ROTATION for sample in samples)
        if not self.circular:
            return [sample for sample in samples if int(sample.id) < ROTATION]
        return samples if rotated else [one for sample in samples for one in _rotations(sample)]

    def _sample(self, row: Row) -> Sample:
        row.integer("index")
        options = _options(row)
        answer = row.one_of("answer", ALPHABET[: len(options)])
        hint = row.optional("hint")
        image = self._image(row)
        self._image_of[row.text("index")] = image
        return Sample(
            id=row.text("index"),
            image=image,
            kind=row.text("l2-category", "L2-category", "category"),
            question=_asked(hint, row.text("question"), options),
            answer=answer,
            options=options,
        )

    def _image(self, row: Row, field: str = "image", name: str | None = None) -> Path | ImageSource:
        value = row.values.get(field)
        if not isinstance(value, str) or "://" in value or Path(value).suffix:
            return super()._image(row, field, name)
        text = row.text(field)
        if len(text) > _LONGEST_INDEX:
            return CellImage(text, str(row))
        if text not in self._image_of:
            raise row.error(field, f"should be an image in base64 or the index of an earlier row, got {shown(text)}")
        return self._image_of[text]


def _options(row: Row) -> tuple[str, ...]:
    options = []
    for letter in _LETTERS:
        if not row.has(letter):
            break
        options.append(row.text(letter))
    if len(options) < 2:
        raise row.missing("A" if not options else "B")
    return tuple(options)


def _asked(hint: str, question: str, options: Sequence[str]) -> str:
    return "\n".join([*([hint] if hint else []), question, lettered(options)])


def _question(index: str) -> str:
    return str(int(index) % ROTATION)


def _rotations(sample: Sample) -> Iterable[Sample]:
    """The sample with its options turned by 0, 1, ... places; the answer's letter goes with its text."""
    told = sample.question.removesuffix(lettered(sample.options))
    right = sample.options[ALPHABET.index(sample.answer)]
    place = ALPHABET.index(sample.answer)
    for turn in range(len(sample.options)):
        options = sample.options[turn:] + sample.options[:turn]
        where = (place - turn) % len(options)
        assert options[where] == right
        yield replace(
            sample,
            id=str(int(sample.id) + turn * ROTATION),
            question=told + lettered(options),
            options=options,
            answer=ALPHABET[where],
        )
