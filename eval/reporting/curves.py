"""Accuracy over budget or over time as one SVG: a line per method, labelled at its end, readable without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vprune.eval.reporting.sections import Entry, Section

WIDTH, LEFT, TOP, BOTTOM = 900.0, 54.0, 18.0, 52.0
LABEL_HEIGHT, LETTER, LABEL_GAP = 17.0, 9.0, 21.0
COLOURS, DASHES, MARKERS = 8, 4, ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Point:
    """One run in the picture's coordinates: its centre, the ends of its error bar, and what it says."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """One method over its budgets: colour, marker and dash, the label's height and the text for screen readers."""

    label: str
    colour: str
    marker: str
    dash: int
    points: tuple[Point, ...]
    label_y: float
    text: str

    @property
    def path(self) -> str:
        """The polyline's points."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Line:
    """A horizontal line of reference."""

    y: float
    label: str
    style: str
    label_y: float


@dataclass(frozen=True)
class Curves:
    """Everything the template draws, in pixels of a WIDTH x `height` picture."""

    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    series: tuple[Series, ...]
    lines: tuple[Line, ...]
    title: str
    x_title: str
    width: float = WIDTH


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour class for every method, the same in all sections; random, the floor, is grey.

    Neighbours in `methods` get colours of their own: give the strongest first, and their lines are told apart best.
    """
    coloured = [method for method in dict.fromkeys(methods) if method not in ("full", "random")]
    return {method: f"c{index % COLOURS}" for index, method in enumerate(coloured)} | {"random": "floor", "full": "ink"}


@dataclass(frozen=True)
class _Axis:
    """What lies along the picture: a value of every run, its name and how ticks say it."""

    of: Callable[[Entry], float]
    title: str
    x_title: str
    tick: Callable[[float], str]


_AXES = {
    "share": _Axis(
        lambda entry: entry.share,
        "Accuracy of every method over the part of the visual tokens that is kept",
        "visual tokens left",
        lambda share: f"{100 * share:.0f}%" if share >= 0.015 else f"{100 * share:.1g}%",
    ),
    "seconds": _Axis(
        lambda entry: entry.seconds or 0.0,
        "Accuracy of every method over the seconds that its run took",
        "seconds of the whole run",
        lambda seconds: f"{seconds:.3g}",
    ),
}


def curves(
    section: Section, colour: Mapping[str, str], blank_accuracy: float | None = None, over: str = "share"
) -> Curves | None:
    """The section's picture: budget or time (`over`) shrinks to the right on a logarithmic axis.

    None if nothing can be drawn, since nothing was pruned or the time of a run is not known. `blank_accuracy` is the
    full model's with every image blanked: what the language alone knows.
    """
    axis = _AXES[over]
    groups: dict[str, list[Entry]] = {}
    for entry in section.pruned:
        groups.setdefault(entry.label, []).append(entry)
    if not groups or not all(axis.of(entry) > 0 for entry in section.entries):
        return None
    references = [(section.full.accuracy, "full model, all tokens", "full")] if section.full else []
    references += [(blank_accuracy, "full model, image blanked", "blank")] if blank_accuracy is not None else []
    texts = [f"{name}: {100 * value:.1f}%" for value, name, _ in references]
    frame = _Frame.around(section, axis, [value for value, _, _ in references], [*groups, *texts])
    ends = [min(group, key=axis.of).accuracy for group in groups.values()]
    label_ys = _spread(
        [frame.y(value) for value in [*ends, *(value for value, _, _ in references)]], TOP + 4, frame.bottom
    )

    # The plain method has the solid line; a variant is dashed alike in all methods.
    variants = sorted({entry.variant for entry in section.pruned})
    methods = [method for method in colour if method not in ("full", "random")]
    series = []
    for (label, group), label_y in zip(groups.items(), label_ys, strict=False):
        method = group[0].method
        ordered = sorted(group, key=lambda entry: -axis.of(entry))
        time = {entry.name: f" in {entry.seconds:.3g} s" if over == "seconds" else "" for entry in ordered}
        spoken = "; ".join(
            f"{entry.budget} kept, {100 * entry.accuracy:.1f}% right{time[entry.name]}" for entry in ordered
        )
        series.append(
            Series(
                label,
                colour.get(method, "ink"),
                MARKERS[methods.index(method) // COLOURS % len(MARKERS) if method in methods else 0],
                variants.index(group[0].variant) % DASHES,
                tuple(map(frame.point, ordered)),
                label_y,
                f"{label}: {spoken}",
            )
        )
    lines = [
        Line(frame.y(value), text, style, label_y)
        for (value, _, style), text, label_y in zip(references, texts, label_ys[len(groups) :], strict=True)
    ]
    return Curves(
        height=frame.bottom + BOTTOM,
        left=LEFT,
        right=frame.right,
        top=TOP,
        bottom=frame.bottom,
        x_ticks=_x_ticks(section, frame),
        y_ticks=tuple((frame.y(value), f"{100 * value:.0f}%") for value in _steps(frame.low, frame.high, frame.step)),
        series=tuple(series),
        lines=tuple(lines),
        title=axis.title,
        x_title=axis.x_title,
    )


@dataclass(frozen=True)
class _Frame:
    """Where budgets (or times) and accuracies lie in the picture."""

    axis: _Axis

    right: float
    bottom: float
    low: float
    high: float
    step: float
    widest: float
    narrowest: float

    @classmethod
    def around(cls, section: Section, axis: _Axis, accuracies: Sequence[float], labels: Sequence[str]) -> _Frame:
        """The frame that holds the section's runs with their error bars, and has room for the labels beside it."""
        right = WIDTH - min(0.42 * WIDTH, LABEL_GAP + LETTER * max(map(len, labels)))
        bottom = max(400.0, TOP + LABEL_HEIGHT * len(labels) + 12)
        ends = [entry.accuracy + sign * entry.stderr for entry in section.pruned for sign in (-1, 1)]
        values = [axis.of(entry) for entry in section.entries]
        widest, narrowest = max(values), min(values)
        if widest / narrowest < 1.01:
            widest, narrowest = min(1.0, 2 * widest) if widest <= 1 else 2 * widest, narrowest / 2
        return cls(axis, right, bottom, *_range([*ends, *accuracies]), widest, narrowest)

    def x(self, value: float) -> float:
        along = math.log(self.widest / value) / math.log(self.widest / self.narrowest)
        return LEFT + 14 + (self.right - LEFT - 28) * along

    def y(self, accuracy: float) -> float:
        return self.bottom - (self.bottom - TOP) * (accuracy - self.low) / (self.high - self.low)

    def point(self, entry: Entry) -> Point:
        text = f"{entry.label}, {entry.budget} kept: {100 * entry.accuracy:.1f}% right"
        low, high = self.y(entry.accuracy - entry.stderr), self.y(entry.accuracy + entry.stderr)
        return Point(self.x(self.axis.of(entry)), self.y(entry.accuracy), low, high, text)


def _x_ticks(section: Section, frame: _Frame) -> tuple[tuple[float, str], ...]:
    ticks: list[tuple[float, str]] = []
    for value in sorted({frame.axis.of(entry) for entry in section.entries}, reverse=True):
        x = frame.x(value)
        if not ticks or x - ticks[-1][0] > 34:
            ticks.append((x, frame.axis.tick(value)))
    return tuple(ticks)


def _steps(low: float, high: float, step: float) -> list[float]:
    return [low + number * step for number in range(round((high - low) / step) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """A calm axis around accuracies: low, high and the step between ticks, all multiples of the step."""
    least, most = max(0.0, min(values)), min(1.0, max(values))
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (most - least) / step <= 7 or step == 0.2)
    low, high = math.floor(least / step + 1e-9) * step, math.ceil(most / step - 1e-9) * step
    if high - low < step / 2:
        high = low + step
    return low, high, step


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights as close to the wanted ones as labels of LABEL_HEIGHT allow, in the same order from the top.

    >>> _spread([10.0, 12.0], 0.0, 100.0)
    [2.5, 19.5]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    clusters: list[tuple[float, list[int]]] = []  # mean of the wanted heights and members, top to bottom
    for index in order:
        clusters.append((wanted[index], [index]))
        while len(clusters) > 1:
            (upper, above), (lower, below) = clusters[-2:]
            if lower - upper >= LABEL_HEIGHT * (len(above) + len(below)) / 2:
                break
            members = above + below
            clusters[-2:] = [(sum(wanted[i] for i in members) / len(members), members)]
    heights = [0.0] * len(wanted)
    for middle, members in clusters:
        for place, index in enumerate(members):
            heights[index] = middle + LABEL_HEIGHT * (place - (len(members) - 1) / 2)
    for index in order:
        heights[index] = max(top, min(bottom, heights[index]))
    for earlier, later in pairwise(order):  # the edges may have pushed labels together
        heights[later] = max(heights[later], heights[earlier] + LABEL_HEIGHT)
    overflow = heights[order[-1]] - bottom if order else 0.0
    if overflow > 0:
        limit = bottom
        for index in reversed(order):
            heights[index] = min(heights[index], limit)
            limit = heights[index] - LABEL_HEIGHT
    return heights
