"""Where another run is ahead of the default method: over all questions, and in every kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vprune.eval.metrics import standard_error
from vprune.eval.reporting.sections import Entry, Section

DEFAULT = "learned"
ALL = "all"
_NAMED = 3  # leads that a sentence names; more of them it counts


@dataclass(frozen=True)
class Lead:
    """A run that is ahead of one of the default method at the same budget, in one kind of question or in all.

    `points` is the mean difference over the same questions, `error` its standard error, both in [0, 1].
    """

    ahead: Entry
    behind: Entry
    kind: str
    points: float
    error: float

    @property
    def beyond(self) -> bool:
        """Whether it is ahead by more than the standard error."""
        return self.points > self.error

    @property
    def told(self) -> str:
        """By how much, in words."""
        return f"{100 * self.points:.1f} ± {100 * self.error:.1f}"


def leads(section: Section) -> list[Lead]:
    """All of them, larger budgets first.

    What they are ahead of is the plain run of the default method at their budget, and its best run with other options;
    such a run is a rival, too.
    """
    found = []
    for behind in _measured(section):
        for ahead in section.pruned:
            if ahead is not behind and ahead.budget == behind.budget:
                found += [lead for kind in (ALL, *section.kinds) if (lead := _lead(ahead, behind, kind)) is not None]
    return found


def _measured(section: Section) -> list[Entry]:
    own = [entry for entry in section.pruned if entry.method == DEFAULT]
    best = {
        entry.budget: max((one for one in own if one.budget == entry.budget), key=lambda one: one.accuracy)
        for entry in own
    }
    return [entry for entry in own if not entry.variant or entry is best[entry.budget]]


def verdict(section: Section) -> str:
    """In a sentence, which methods that read no annotation are ahead; empty where there is nothing to compare."""
    measured = _measured(section)
    if not measured or len(measured) == len(section.pruned):
        return ""
    others = [one for one in leads(section) if one.ahead.method != DEFAULT and not one.ahead.needs_annotation]
    overall, kinds = ([one for one in others if (one.kind == ALL) == whole] for whole in (True, False))
    return (
        f"Of the methods that read no annotation, {_named(overall)} ahead of {DEFAULT} over all questions; "
        f"in a kind of question, {_named(kinds)}."
    )


def _named(found: Sequence[Lead]) -> str:
    """Who, where and by how much; of more than a few, how many."""
    words = [
        f"{one.ahead.label} at {one.ahead.budget} ({'' if one.kind == ALL else f'{one.kind}, '}{one.told} points)"
        for one in found
    ]
    if len(words) > _NAMED:
        return f"{len(words)} runs (listed below) are"
    return f"{' and '.join(words)} {'is' if len(words) == 1 else 'are'}" if words else "none is"


def table(section: Section) -> tuple[list[str], list[list[str]]]:
    """The column titles, and rows of text: who is ahead of whom, at which budget, where, by how many points."""
    lines = [
        [
            one.ahead.label + (" *" if one.ahead.needs_annotation else ""),
            one.behind.label,
            one.ahead.budget,
            one.kind,
            one.told,
            "yes" if one.beyond else "no",
        ]
        for one in leads(section)
    ]
    return ["ahead", "of", "keep", "questions", "points", "beyond the standard error"], lines


def _lead(ahead: Entry, behind: Entry, kind: str) -> Lead | None:
    differences = [
        float(ahead.answers[id]["correct"]) - float(row["correct"])
        for id, row in behind.answers.items()
        if kind in (ALL, str(row["kind"]))
    ]
    points = fmean(differences) if differences else 0.0
    return Lead(ahead, behind, kind, points, standard_error(differences)) if points > 1e-9 else None
