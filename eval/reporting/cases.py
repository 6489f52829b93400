"""Which samples a gallery shows: the ones that tell methods apart, not the first ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vprune.eval.reporting.sections import Entry, Section

RIGHT = 0.5  # an answer counts as right from here on; lists are scored between 0 and 1


@dataclass(frozen=True)
class Case:
    """One sample, the pruned run whose pictures are shown, and why it was chosen.

    `others` are the answers of the other methods at the same budget.
    """

    sample_id: str
    entry: Entry
    reason: str
    others: tuple[Entry, ...]


# What a case can show, with its share of the gallery.
_QUOTA = {"disagree": 4, "lost": 3, "gained": 3, "held": 2}


def choose(section: Section, count: int, has_map: Callable[[Entry], bool]) -> list[Case]:
    """Up to `count` cases, each sample once, spread over reasons, runs and kinds of questions.

    Runs that score tokens come first, since they have a heat map to show, and among those the ones that read no
    annotation; where there are none, the others are shown.
    """
    full = section.full
    if full is None or not section.pruned or count < 1:
        return []
    scored = [entry for entry in section.pruned if has_map(entry)]
    shown = [entry for entry in scored if not entry.needs_annotation] or scored or section.pruned
    pools: dict[str, list[tuple[str, Entry]]] = {reason: [] for reason in _QUOTA}
    for entry in shown:
        rivals = [other for other in section.pruned if other.budget == entry.budget and other is not entry]
        for sample_id, row in entry.answers.items():
            reason = _reason(full, entry, rivals, sample_id)
            if reason is not None and "error" not in row:
                pools[reason].append((sample_id, entry))
    cases: list[Case] = []
    wanted = _quotas(count)
    for reason in _QUOTA:
        _take(cases, pools[reason], reason, wanted[reason], section)
    for reason in _QUOTA:  # what one reason could not fill goes to the others
        _take(cases, pools[reason], reason, count - len(cases), section)
    return cases


def _quotas(count: int) -> dict[str, int]:
    total = sum(_QUOTA.values())
    quotas = {reason: count * share // total for reason, share in _QUOTA.items()}
    quotas["disagree"] += count - sum(quotas.values())
    return quotas


def _reason(full: Entry, entry: Entry, rivals: list[Entry], sample_id: str) -> str | None:
    full_right, right = _right(full, sample_id), _right(entry, sample_id)
    rivals_right = [_right(rival, sample_id) for rival in rivals]
    if full_right and not right:
        return "disagree" if any(rivals_right) else "lost"
    if right and not full_right:
        return "gained"
    if right and full_right and rivals_right and not all(rivals_right):
        return "held"
    return None


def _take(cases: list[Case], pool: list[tuple[str, Entry]], reason: str, count: int, section: Section) -> None:
    """Move up to `count` cases from the pool: always of the kind, then of the method and the run, shown least so far.

    Of equals that of the most accurate run: what the best methods lose tells more than what any method loses.
    """
    taken = {case.sample_id for case in cases}
    for _ in range(count):
        methods: dict[str, int] = {}
        runs: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for case in cases:
            methods[case.entry.method] = methods.get(case.entry.method, 0) + 1
            runs[case.entry.name] = runs.get(case.entry.name, 0) + 1
            kind = str(case.entry.answers[case.sample_id]["kind"])
            kinds[kind] = kinds.get(kind, 0) + 1
        left = [(sample_id, entry) for sample_id, entry in pool if sample_id not in taken]
        if not left:
            return
        sample_id, entry = min(
            left,
            key=lambda one: (
                kinds.get(str(one[1].answers[one[0]]["kind"]), 0),
                methods.get(one[1].method, 0),
                runs.get(one[1].name, 0),
                -one[1].accuracy,
                one[0],
                one[1].name,
            ),
        )
        taken.add(sample_id)
        others = tuple(other for other in section.pruned if other.budget == entry.budget and other is not entry)
        cases.append(Case(sample_id, entry, reason, others))


def _right(entry: Entry, sample_id: str) -> bool:
    return float(entry.answers[sample_id]["correct"]) >= RIGHT
