"""Answers that are yes or no: read from text, and counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

YES, NO = "yes", "no"
_NEGATIONS = {"No", "no", "not"}


def pope_answer(prediction: str) -> str:
    """Yes or no by POPE's rule: no if the first sentence has the word No, no or not, else yes.

    >>> pope_answer("There is not, sorry. Yes?"), pope_answer("Yes"), pope_answer("I cannot tell")
    ('no', 'yes', 'yes')
    """
    words = prediction.strip().split(".")[0].replace(",", "").split()
    return NO if _NEGATIONS.intersection(words) else YES


def mme_answer(prediction: str) -> str | None:
    """Yes or no by MME's rule: whichever of the two the first four letters hold; None for neither.

    >>> mme_answer("Yes, it is."), mme_answer("no"), mme_answer("It is.")
    ('yes', 'no', None)
    """
    start = re.sub(r"^[^a-z]+", "", prediction.lower())[:4]
    return YES if YES in start else NO if NO in start or start == "n" else None


def rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of "yes", and its share of the predictions, from rows of a run.

    A row that failed counts as a wrong answer and not as a prediction. A rate of nothing is 0.0, as published.
    """
    pairs = [(str(row["answer"]), None if "error" in row else pope_answer(row["prediction"])) for row in rows]
    hits = sum(truth == said == YES for truth, said in pairs)
    false_alarms = sum(truth == NO and said != NO for truth, said in pairs)
    misses = sum(truth == YES and said != YES for truth, said in pairs)
    said = [answer for _, answer in pairs if answer is not None]
    return {
        "accuracy": _ratio(len(pairs) - false_alarms - misses, len(pairs)),
        "precision": _ratio(hits, hits + false_alarms),
        "recall": _ratio(hits, hits + misses),
        "f1": _ratio(2 * hits, 2 * hits + false_alarms + misses),
        "yes_ratio": _ratio(said.count(YES), len(said)),
        "yes_ratio_labels": _ratio(sum(truth == YES for truth, _ in pairs), len(pairs)),
    }


def grouped(rows: Sequence[Mapping[str, Any]], key: str = "kind") -> dict[str, list[Mapping[str, Any]]]:
    """Rows by what they have under `key`, in the order in which it first occurs."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return groups


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
