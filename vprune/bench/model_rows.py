"""What `vprune bench model` writes: a row a measure, its three sides beside each other, and the bounds on them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIDES = ("unpruned", "pruned", "oracle")


@dataclass(frozen=True)
class Cell:
    """One prompt and one budget: `tokens` visual tokens a sample, `batch` samples, `keep` of the tokens."""

    kind: str
    tokens: int
    batch: int
    keep: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.batch} x {self.tokens:,} ({self.kind}) at {self.keep:.0%}"


@dataclass(frozen=True)
class Row:
    """A line of bench.csv: one measure of one cell, medians and quartiles of the three sides in `unit`.

    Speed-ups are the unpruned median over another (above 1: less of it); `quotient` is the pruned speed-up over the
    oracle's, its own median and quartiles those of neighbours in time; `share`: the pruned median of the unpruned one,
    of a plan that of the unpruned prefill. Lengths are rows of a sample that the decoder reads (the mean over layers).
    """

    model: str
    method: str
    decode: str
    kind: str
    tokens: int
    layout: str
    batch: int
    keep: float
    measure: str = ""
    new_tokens: int | None = None
    unit: str | None = None
    unpruned: float | None = None
    unpruned_p25: float | None = None
    unpruned_p75: float | None = None
    pruned: float | None = None
    pruned_p25: float | None = None
    pruned_p75: float | None = None
    oracle: float | None = None
    oracle_p25: float | None = None
    oracle_p75: float | None = None
    pruned_speedup: float | None = None
    oracle_speedup: float | None = None
    quotient: float | None = None
    quotient_p25: float | None = None
    quotient_p50: float | None = None
    quotient_p75: float | None = None
    share: float | None = None
    bound: str | None = None
    met: bool | None = None
    unpruned_length: float | None = None
    pruned_length: float | None = None
    oracle_length: float | None = None
    repeats: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Bound:
    """At least (or with `most`: at most) `value` of a column, for the cells and counts of new tokens that are named."""

    measure: str
    column: str
    value: float
    cells: Sequence[tuple[int, int]] | None = None  # (batch, tokens), None = all
    new_tokens: Sequence[int] | None = None
    most: bool = False
    crops: bool = False  # of models only whose pictures are read in crops: others' towers take longer than all else

    def holds_for(self, layout: str, cell: Cell, measure: str, new_tokens: int | None) -> bool:
        """True where this bound is one of the row's."""
        return (
            self.measure == measure
            and (not self.crops or "crop" in layout)
            and abs(cell.keep - BOUND_KEEP) < 1e-9
            and cell.kind == "image"
            and (self.cells is None or (cell.batch, cell.tokens) in self.cells)
            and (self.new_tokens is None or new_tokens in self.new_tokens)
        )

    @property
    def text(self) -> str:
        """For the table."""
        return f"{self.column} {'<=' if self.most else '>='} {self.value:g}"

    def met_by(self, found: dict[str, Any]) -> bool | None:
        """Whether a row's numbers meet it; None where the number is missing."""
        number = found.get(self.column)
        if number is None:
            return None
        return bool(number <= self.value if self.most else number >= self.value)


BOUND_KEEP = 0.1
BOUNDS = (
    Bound("prefill", "quotient", 0.97, [(1, 7290), (1, 29160)]),
    Bound("prefill", "quotient", 0.95, [(8, 729), (32, 729)]),
    Bound("first_token", "pruned_speedup", 4.0, [(1, 7290)], crops=True),
    Bound("first_token", "pruned_speedup", 6.5, [(1, 29160)], crops=True),
    Bound("end_to_end", "quotient", 0.95, new_tokens=[16, 64]),
    Bound("decode_token", "pruned_speedup", 1.0),
    Bound("plan", "share", 0.015, [(1, 7290)], most=True),
    Bound("kv_visual", "share", 0.1, most=True),
)
# The order in which cells are measured, as long as there is time: those with bounds of their own, then the rest.
BOUND_CELLS = ((1, 7290), (1, 29160), (8, 729), (32, 729))


def measured(
    head: dict[str, Any],
    cell: Cell,
    measure: str,
    unit: str,
    values: dict[str, list[float]],
    new_tokens: int | None = None,
    whole: list[float] | None = None,
) -> Row:
    """The row of a measure; `values` by side, neighbours in time at the same place; `whole`: what a share is of."""
    found: dict[str, Any] = {"measure": measure, "unit": unit, "new_tokens": new_tokens}
    middle: dict[str, float] = {}
    for side in SIDES:
        if values.get(side):
            middle[side], found[f"{side}_p25"], found[f"{side}_p75"] = spread(values[side])
            found[side] = middle[side]
    for side in ("pruned", "oracle"):
        if middle.get(side) and middle.get("unpruned"):
            found[f"{side}_speedup"] = middle["unpruned"] / middle[side]
    if middle.get("pruned") and middle.get("oracle"):
        pairs = zip(values["oracle"], values["pruned"], strict=True)
        found["quotient"] = middle["oracle"] / middle["pruned"]
        paired = spread([oracle / pruned for oracle, pruned in pairs])
        found |= dict(zip(("quotient_p50", "quotient_p25", "quotient_p75"), paired, strict=True))
    of = statistics.median(whole) if whole else middle.get("unpruned")
    if of and "pruned" in middle:
        found["share"] = middle["pruned"] / of
    for bound in BOUNDS:
        if bound.holds_for(head["layout"], cell, measure, new_tokens):
            found |= {"bound": bound.text, "met": bound.met_by(found)}
    found["repeats"] = max(map(len, values.values()))
    return Row(**head, **found)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    middle = statistics.median(values)
    if len(values) < 2:
        return middle, middle, middle
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return middle, first, third


def line_of(row: Row) -> str:
    """A line of the printed table."""
    if row.problem is not None and not row.measure:
        return f"    {row.problem}"
    name = row.measure if row.new_tokens is None else f"{row.measure} {row.new_tokens}"
    scale, unit = (2**20, "MiB") if row.unit == "bytes" else (1, row.unit)
    parts = []
    for side in SIDES:
        value = getattr(row, side)
        parts.append(f"{side} {value / scale:.2f}" if value is not None else f"{side} -")
    text = f"    {name:<15} {', '.join(parts)} {unit}"
    if row.pruned_speedup is not None and row.measure != "plan":
        text += f"; {row.pruned_speedup:.2f}x"
        text += f", oracle {row.oracle_speedup:.2f}x" if row.oracle_speedup is not None else ""
    if row.quotient is not None and row.measure != "plan":
        text += f", quotient {row.quotient:.3f} [{row.quotient_p25:.3f} {row.quotient_p50:.3f} {row.quotient_p75:.3f}]"
    if row.measure == "plan" and row.share is not None:
        text += f"; {row.share:.2%} of the unpruned prefill"
    if row.bound is not None:
        text += f"  {row.bound}: {'met' if row.met else 'NOT MET' if row.met is not None else 'not known'}"
    return text
