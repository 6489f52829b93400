"""How right an answer is, and what a run's answers amount to."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

GRID_PIXELS = 16  # a point answer names a cell of this many pixels: the 24 x 24 grid of a 384 px image
_POINT = re.compile(r"x\s*(\d+)\W*y\s*(\d+)")


def normalise(text: str) -> str:
    """Text as it is compared: lower case, single spaces, no punctuation at the end.

    >>> normalise(" Top  Left. ")
    'top left'
    """
    return " ".join(text.lower().split()).rstrip(" .,;:!?")


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both normalise to the same text, else 0.0."""
    return float(normalise(prediction) == normalise(answer))


def list_f1(prediction: str, answer: str) -> float:
    """F1 between two comma-separated lists of names, in any order; a name given twice counts twice.

    `F1 = 2 |P & A| / (|P| + |A|)` over multisets; two empty lists agree fully.

    >>> list_f1("red circle, red circle", "red circle, blue star")
    0.5
    """
    predicted, expected = _names(prediction), _names(answer)
    total = predicted.total() + expected.total()
    return 2 * (predicted & expected).total() / total if total else 1.0


def point_in_box(prediction: str, box: tuple[float, float, float, float]) -> float:
    """1.0 if the centre of the grid cell `xNN yNN` lies in `box` (pixels, edges included), else 0.0.

    >>> point_in_box("x00 y01", (0, 16, 16, 32))
    1.0
    """
    found = _POINT.search(prediction.lower())
    if found is None:
        return 0.0
    x, y = (GRID_PIXELS * (int(group) + 0.5) for group in found.groups())
    x0, y0, x1, y1 = box
    return float(x0 <= x <= x1 and y0 <= y <= y1)


def summarise(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy, its standard error and the token counts of a run's predictions, in all and by kind.

    `accuracy` is the mean of `correct`; its error is the sample standard deviation over sqrt(n). Token counts are means
    over the samples that were answered; samples that failed count as wrong.
    """
    correct = [float(row["correct"]) for row in predictions]
    by_kind: dict[str, list[float]] = {}
    for row in predictions:
        by_kind.setdefault(str(row["kind"]), []).append(float(row["correct"]))
    answered = [row for row in predictions if row["tokens_after"] is not None]
    return {
        "samples": len(predictions),
        "failed": sum("error" in row for row in predictions),
        "accuracy": _mean(correct),
        "accuracy_stderr": standard_error(correct),
        "accuracy_by_kind": {kind: _mean(values) for kind, values in by_kind.items()},
        "accuracy_stderr_by_kind": {kind: standard_error(values) for kind, values in by_kind.items()},
        "samples_by_kind": {kind: len(values) for kind, values in by_kind.items()},
        "list_f1": _mean(by_kind["list"]) if "list" in by_kind else None,
        "tokens_before": _mean([row["tokens_before"] for row in answered]),
        "tokens_after": _mean([row["tokens_after"] for row in answered]),
    }


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, `sqrt(sum (x - mean)^2 / (n - 1) / n)`; 0.0 for fewer than two values."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _names(text: str) -> Counter[str]:
    return Counter(name for part in text.split(",") if (name := normalise(part)))
