"""Draws `assets/figures/accuracy.svg`, accuracy over the tokens kept, from the runs recorded in `docs/results`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "assets" / "figures" / "accuracy.svg"
RECYCLED = {"recycle": "grid", "size_aware": True}
WIDE, TALL, LEFT, TOP = 470, 300, 60, 56
LABELS_APART = 17
SIZE = (LEFT + WIDE + 210, TOP + TALL + 66)


@dataclass(frozen=True)
class Line:
    """One line of the figure: (tokens, accuracy, standard error) by rising tokens."""

    label: str
    colour: str
    points: tuple[tuple[float, float, float], ...]
    dash: str = ""


def recorded(name: str) -> list[dict[str, Any]]:
    """The runs of one file, those with blanked images left out."""
    content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = content if isinstance(content, list) else content["runs"]
    return [row for row in rows if not row.get("blank")]


def line(label: str, colour: str, file: str, method: str, dash: str = "", **options: Any) -> Line:
    """The runs of a method in a file that have these options."""
    rows = [row for row in recorded(file) if row["method"] == method and options.items() <= row.items()]
    points = sorted((row["tokens_after"], row["accuracy"], row["accuracy_stderr"]) for row in rows)
    assert points, f"{file} holds no runs of {method} with {options}"
    return Line(label, colour, tuple(points), dash)


def lines() -> list[Line]:
    """What is drawn."""
    return [
        line("learned, budget=question", "#b8402a", "methods-h200", "learned", "3 3", variant="budget question"),
        line("learned", "#d1495b", "methods-h200", "learned", variant=""),
        line("restore", "#2a9d6f", "methods-h200", "restore"),
        line("attention_max, recycled", "#1b6ca8", "scenes-h200", "attention_max", "6 4", **RECYCLED),
        line("fastv", "#8a5fbf", "methods-h200", "fastv"),
        line("attention_max", "#1b6ca8", "methods-h200", "attention_max"),
        line("random", "#7b8794", "methods-h200", "random"),
    ]


def spread(wanted: Sequence[float]) -> list[float]:
    """Heights as near the wanted ones, rising, as leaves each its distance from the next."""
    placed: list[float] = []
    for height in wanted:
        placed.append(max(height, placed[-1] + LABELS_APART) if placed else height)
    over = max(0.0, placed[-1] - (TOP + TALL))
    return [height - over for height in placed]


def drawn() -> str:
    """The figure."""
    found = lines()
    (full,) = (row for row in recorded("methods-h200") if row["method"] == "full")
    tokens = sorted({point[0] for point in line("", "", "methods-h200", "learned", variant="").points})
    low, high = math.log(tokens[0]) - 0.15, math.log(tokens[-1]) + 0.15

    def at(count: float, accuracy: float) -> tuple[float, float]:
        return LEFT + (high - math.log(count)) / (high - low) * WIDE, TOP + TALL * (1 - accuracy)

    parts = [f'<rect width="{SIZE[0]}" height="{SIZE[1]}" fill="white"/>']

    def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = "#22313f") -> None:
        shape = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
        parts.append(f"<text {shape}>{escape(words)}</text>")

    def stroke(points: Sequence[tuple[float, float]], colour: str, width: float = 1, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    text(16, 26, f"Accuracy on scenes ({full['samples']:,} questions), over the visual tokens kept of 576", 15)
    for percent in range(0, 101, 20):
        y = at(tokens[0], percent / 100)[1]
        stroke([(LEFT, y), (LEFT + WIDE, y)], "#e3e8ee")
        text(LEFT - 8, y + 4, f"{percent}%", 11, "end")
    for count in tokens:
        text(at(count, 0)[0], TOP + TALL + 18, f"{count:.0f} ({count / 576:.0%})", 11, "middle")
    y = at(tokens[0], full["accuracy"])[1]
    stroke([(LEFT, y), (LEFT + WIDE, y)], "#22313f", 1, "2 3")
    text(LEFT + 4, y - 6, f"full model, 576 tokens: {full['accuracy']:.1%}", 11)
    found.sort(key=lambda one: -one.points[0][1])
    ends = spread([at(*one.points[0][:2])[1] for one in found])
    for one, label_y in zip(found, ends, strict=True):
        stroke([at(count, accuracy) for count, accuracy, _ in one.points], one.colour, 2, one.dash)
        for count, accuracy, error in one.points:
            (x, above), (_, below) = at(count, accuracy + error), at(count, accuracy - error)
            stroke([(x, above), (x, below)], one.colour, 1.5)
            parts.append(f'<circle cx="{x:.1f}" cy="{(above + below) / 2:.1f}" r="3.5" fill="{one.colour}"/>')
        end = at(*one.points[0][:2])
        stroke([(end[0] + 6, end[1]), (LEFT + WIDE + 12, label_y)], one.colour, 0.7)
        text(LEFT + WIDE + 16, label_y + 4, f"{one.label}: {one.points[0][1]:.1%}", 12, colour=one.colour)
    source = "From docs/results/*.json; bars: one standard error; logarithmic axis."
    text(16, SIZE[1] - 12, source, 10, colour="#7b8794")
    size = f'viewBox="0 0 {SIZE[0]} {SIZE[1]}" width="{SIZE[0]}" height="{SIZE[1]}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{body}\n</svg>\n'


if __name__ == "__main__":
    FIGURE.write_text(drawn(), encoding="utf-8")
    print(f"wrote {FIGURE}")
