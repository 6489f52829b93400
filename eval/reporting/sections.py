"""The nouns of a report: a run as a row, the runs that may be compared, and everything below a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from vprune.eval.metrics import standard_error
from vprune.eval.reporting.variants import method_settings
from vprune.eval.results import ENVIRONMENT_FILE, Run

FULL = "full"
_DIFFERING = 8  # answers in which two runs differ; of fewer, a standard error means little


@dataclass(frozen=True)
class Entry:
    """One finished run as a row of the leaderboard.

    `keep` is the budget that was asked for (a fraction, or tokens per image if an int), `share` the one measured:
    `tokens_after / tokens_before`, means over the samples. `retention` is accuracy / accuracy of the full model on the
    same samples, None without such a run. `variant` names the options that tell it from other runs of its method.
    `overhead`: how many of the seconds went into pruning itself.
    """

    run: Run
    name: str
    method: str
    variant: str
    keep: float | int
    accuracy: float
    stderr: float
    retention: float | None
    tokens_before: float
    tokens_after: float
    seconds: float | None
    by_kind: dict[str, float]
    needs_annotation: bool
    kind_errors: dict[str, float]
    overhead: float | None

    @property
    def is_full(self) -> bool:
        """Whether nothing was pruned."""
        return self.method == FULL

    @property
    def share(self) -> float:
        """Part of the visual tokens that was left, in (0, 1]."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    @property
    def label(self) -> str:
        """Method and variant, as curves and answers are marked with."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def budget(self) -> str:
        """`keep` in words: "10%" or "64 tokens"; 1.0 is everything, 1 a single token."""
        if isinstance(self.keep, float):
            return f"{100 * self.keep:.3g}%"
        return f"{self.keep} token{'' if self.keep == 1 else 's'}"

    @cached_property
    def answers(self) -> dict[str, dict[str, Any]]:
        """The run's predictions by sample id."""
        return {str(row["id"]): row for row in self.run.predictions}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The run's `environment.json`; empty where it is missing or unreadable, since no result rests on it."""
        try:
            content = json.loads((self.run.folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def spans(self) -> list[tuple[float, float]]:
        """From when to when it was run, in seconds since the epoch, one pair for every time that it was resumed."""
        found = []
        for session in self.environment.get("sessions") or []:
            try:
                begun = datetime.strptime(str(session["started"]), "%Y-%m-%dT%H:%M:%S%z").timestamp()
                found.append((begun, begun + float(session["seconds"]["total"])))
            except (KeyError, TypeError, ValueError):
                continue
        return found

    @property
    def commit(self) -> str:
        """The commit of the source that answered, empty where it is not known."""
        return str(self.environment.get("git_commit") or "")[:12]

    def option(self, key: str) -> Any:
        """A setting with which the run's method ran, None if it has no such setting."""
        return method_settings(self.run.config).get(key)


@dataclass(frozen=True)
class Section:
    """Runs of one model on one set of samples: the only ones that are ranked against each other.

    `apart` is what tells the section from others of its title, empty where there are none; `nearest` is what keeps the
    full run that is most like these from being their baseline, empty where they have one or none is in sight; `weights`
    is a checksum of the model's files.
    """

    model: str
    benchmark: str
    blank: bool
    samples: int
    fingerprint: str
    entries: tuple[Entry, ...]
    apart: str = ""
    nearest: str = ""
    weights: str = ""

    @property
    def title(self) -> str:
        """The section's heading, which goes with its `detail`."""
        return f"{self.model} on {self.benchmark}" + (", every image blanked" if self.blank else "")

    @property
    def asked(self) -> str:
        """How many questions."""
        return f"{self.samples:,} question{'s' if self.samples != 1 else ''}"

    @property
    def detail(self) -> str:
        """How many questions, and what tells the section from others of the same title."""
        return f"{self.asked}, {self.apart}" if self.apart else self.asked

    @property
    def full(self) -> Entry | None:
        """The first run of the unpruned model."""
        return next((entry for entry in self.entries if entry.is_full), None)

    @property
    def pruned(self) -> list[Entry]:
        """Everything but the unpruned model."""
        return [entry for entry in self.entries if not entry.is_full]

    def caveat(self, entry: Entry) -> str:
        """Why a run has no retention, or what to know about the one that it has; empty if there is nothing to say."""
        full = self.full
        if entry.retention is None:
            if full is not None:
                return "the full model is never right on these questions, so there is nothing to retain"
            return self.nearest or "there is no full run beside them (method=full with the same out=)"
        if full is not None and entry.commit and full.commit and entry.commit != full.commit:
            return f"the full run is of commit {full.commit}, not of {entry.commit}"
        return ""

    @cached_property
    def at_once(self) -> int:
        """How many of the runs went on at the same time, at most; their starts are known to the second."""
        spans = [(begun, max(begun, ended - 1)) for entry in self.entries for begun, ended in entry.spans]
        return max((sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans), default=1)

    @property
    def timing(self) -> str:
        """Why the seconds of these runs do not compare; empty if nothing speaks against it."""
        if self.at_once > 1:
            return f"Up to {self.at_once} of these runs went on at the same time, so their seconds do not compare."
        return ""

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions, in the order in which the runs met them."""
        return list(dict.fromkeys(kind for entry in self.entries for kind in entry.by_kind))

    @property
    def budgets(self) -> list[str]:
        """The budgets of the pruned runs in words, largest first."""
        shares: dict[str, float] = {}
        for entry in self.pruned:
            shares[entry.budget] = max(entry.share, shares.get(entry.budget, 0.0))
        return sorted(shares, key=lambda budget: -shares[budget])

    def at(self, budget: str) -> list[Entry]:
        """The pruned runs at a budget that need no annotation."""
        return [entry for entry in self.pruned if entry.budget == budget and not entry.needs_annotation]

    def best(self, budget: str) -> Entry | None:
        """The most accurate of them, the first one if several are."""
        return max(self.at(budget), key=lambda entry: entry.accuracy, default=None)

    def stands_out(self, entry: Entry) -> bool:
        """Whether a run beats all others at its budget that need no annotation, beyond two standard errors.

        The error is that of the mean difference over the same samples.
        """
        others = [other for other in self.at(entry.budget) if other is not entry]
        return bool(others) and not entry.needs_annotation and all(_leads(entry, other) for other in others)


@dataclass(frozen=True)
class Gathered:
    """Everything below a folder: sections, and by path the runs that are unfinished or broken, each with its reason."""

    folder: Path
    sections: tuple[Section, ...]
    unfinished: dict[str, str]
    broken: dict[str, str]


def _leads(entry: Entry, other: Entry) -> bool:
    """Whether the mean difference of the answers' scores is more than twice its standard error, and of many answers."""
    lead = [float(row["correct"]) - float(other.answers[id]["correct"]) for id, row in entry.answers.items()]
    return sum(map(bool, lead)) >= _DIFFERING and fmean(lead) > 2 * standard_error(lead)
