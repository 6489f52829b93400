"""Retention as papers state it: the mean over benchmarks of score / the full model's score, at one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vprune.eval.reporting.sections import Entry, Gathered, Section


@dataclass(frozen=True)
class Mean:
    """A method at a budget on several benchmarks.

    `by_benchmark`: its retention on each of them, None where it was not run; `share`: what was left of the visual
    tokens, the mean over those where it was.
    """

    label: str
    method: str
    budget: str
    share: float
    needs_annotation: bool
    by_benchmark: dict[str, float | None]

    @property
    def retention(self) -> float | None:
        """The mean over the benchmarks; None where one is missing, since means of other benchmarks do not compare."""
        found = [value for value in self.by_benchmark.values() if value is not None]
        return fmean(found) if len(found) == len(self.by_benchmark) else None

    @property
    def missing(self) -> list[str]:
        """The benchmarks on which it was not run."""
        return [name for name, value in self.by_benchmark.items() if value is None]


@dataclass(frozen=True)
class Comparison:
    """One model on several benchmarks, each with a run of the full model.

    `asked`: how many questions of each benchmark; `passed_over`: other sets of questions of these benchmarks, and
    benchmarks without a full run, in words.
    """

    model: str
    asked: dict[str, str]
    rows: tuple[Mean, ...]
    passed_over: tuple[str, ...]

    @property
    def title(self) -> str:
        """The heading."""
        return f"{self.model}: retention over {len(self.asked)} benchmarks"

    @property
    def told(self) -> str:
        """What the table shows, in a few sentences."""
        of = ", ".join(f"{name} ({asked})" for name, asked in self.asked.items())
        said = [
            f"Score divided by the full model's on the same questions, and the mean over {of}. A method that was not "
            "run on all of them has no mean."
        ]
        said += [f"Not counted: {'; '.join(self.passed_over)}."] if self.passed_over else []
        if any(row.needs_annotation for row in self.rows):
            said.append("* reads the annotation: a ceiling, no method.")
        return " ".join(said)


def comparisons(gathered: Gathered) -> list[Comparison]:
    """One for every model of which there are full and pruned runs on several benchmarks; images blanked are left out.

    Of several sets of questions of a benchmark the one of the most runs counts.
    """
    models: dict[tuple[str, str], list[Section]] = {}
    for section in gathered.sections:
        if not section.blank and section.pruned:
            models.setdefault((section.model, section.weights), []).append(section)
    found = (_comparison(sections) for sections in models.values())
    return [one for one in found if len(one.asked) > 1 and one.rows]


def _comparison(sections: Sequence[Section]) -> Comparison:
    counted: dict[str, Section] = {}
    passed_over = []
    for section in sections:  # those of the most runs come first
        named = f"{section.benchmark} ({section.detail})"
        if not any(entry.retention is not None for entry in section.pruned):
            passed_over.append(f"{named}, without a full run to compare with")
        elif section.benchmark in counted:
            passed_over.append(f"{named}, other questions of a benchmark that is counted already")
        else:
            counted[section.benchmark] = section
    counted = dict(sorted(counted.items()))
    runs = {
        name: {(entry.label, entry.budget): entry for entry in reversed(section.pruned)}
        for name, section in counted.items()
    }
    rows = [
        _mean({name: of_it.get(key) for name, of_it in runs.items()})
        for key in dict.fromkeys(key for of_it in runs.values() for key in of_it)
    ]
    most = {row.budget: max(one.share for one in rows if one.budget == row.budget) for row in rows}
    rows.sort(key=lambda row: (-most[row.budget], row.budget, -(row.retention or 0.0), row.label))
    asked = {name: section.detail for name, section in counted.items()}
    return Comparison(sections[0].model, asked, tuple(rows), tuple(passed_over))


def _mean(entries: dict[str, Entry | None]) -> Mean:
    there = [entry for entry in entries.values() if entry is not None]
    first = there[0]
    return Mean(
        label=first.label,
        method=first.method,
        budget=first.budget,
        share=fmean(entry.share for entry in there),
        needs_annotation=first.needs_annotation,
        by_benchmark={name: None if entry is None else entry.retention for name, entry in entries.items()},
    )


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The column titles, and rows of text: method, budget, a benchmark each, the mean."""
    lines = [
        [
            row.label + (" *" if row.needs_annotation else ""),
            row.budget,
            *(percent(value) for value in row.by_benchmark.values()),
            percent(row.retention),
        ]
        for row in comparison.rows
    ]
    return ["method", "keep", *comparison.asked, "mean"], lines


def percent(value: float | None) -> str:
    """A share in words, one decimal; "none" where there is none."""
    return "none" if value is None else f"{100 * value:.1f}%"


def data(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """`retention.json`: one object for every method and budget of every model."""
    return [
        {
            "model": comparison.model,
            "method": row.method,
            "label": row.label,
            "budget": row.budget,
            "share": row.share,
            "retention": row.retention,
            "retention_by_benchmark": row.by_benchmark,
            "missing": row.missing,
            "needs_annotation": row.needs_annotation,
        }
        for comparison in found
        for row in comparison.rows
    ]
