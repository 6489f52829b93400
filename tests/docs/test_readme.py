"""The README's figures are those of the recorded runs, and its first screen has what a newcomer looks for."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest

import vprune
from tests.docs.pages import ROOT
from tests.docs.scripts import script

FIRST_SCREEN = 40  # lines, most of them one on a screen
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEEPS = (0.5, 0.25, 0.1, 0.05)


def recorded(name: str) -> list[dict[str, Any]]:
    content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return [row for row in (content if isinstance(content, list) else content["runs"]) if not row.get("blank")]


def test_the_first_screen_has_figure_snippet_table_and_two_commands() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN])
    wanted = ("](assets/figures/overview.png)", "```python\nimport vprune", "| **a learned map", "```bash\nmake demo")
    places = [screen.index(one) for one in wanted]
    assert places == sorted(places)
    block = screen[places[-1] :].split("```")[1]
    assert [line.split()[0] for line in block.splitlines()[1:]] == ["make", "vprune"]


def rows() -> list[tuple[str, list[str]]]:
    """The label and the cells of every row of the tables of accuracy that names a method."""
    found = re.findall(r"^\| (?:\*\*)?([^|]*\(`\w+`[^|]*?\)[^|]*?|full model|random)(?:\*\*)? \|(.*)\|$", README, re.M)
    return [(label, [cell.strip(" *") for cell in cells.split("|")]) for label, cells in found]


@pytest.mark.parametrize(("label", "cells"), rows())
def test_the_tables_are_those_of_the_recorded_runs(label: str, cells: list[str]) -> None:
    method = (re.search(r"\(`(\w+)`", label) or ["", label.split()[0]])[1]
    plain = [row for row in recorded("methods-h200") if row["method"] == method and not row["variant"]]
    for keep, cell in zip((1.0, *KEEPS), cells, strict=True):
        told = {f"{100 * row['accuracy']:.1f}" for row in plain if row["keep"] == keep}
        assert cell in told or (not cell and not (told and keep != 1.0))


def test_the_row_of_a_budget_a_question_is_recorded() -> None:
    runs = {row["keep"]: row for row in recorded("methods-h200") if row["variant"] == "budget question"}
    row = r"^\| \*\*the same, `budget=question`\*\* \(in the mean (.*?) tokens\) \|(.*)\|$"
    ((tokens, cells),) = re.findall(row, README, re.M)
    found = [runs[keep] for keep in (0.5, 0.25, 0.1, 0.05)]
    counts = [f"{run['tokens_after']:.1f}".removesuffix(".0") for run in found]
    assert tokens == ", ".join(counts[:-1]) + " and " + counts[-1]
    assert [cell.strip(" *") for cell in cells.split("|")[1:]] == [f"{100 * run['accuracy']:.1f}" for run in found]


def test_there_are_tables() -> None:
    methods = [label for label, _ in rows()]
    assert len(methods) == 6 + 12 and sum("learned" in label for label in methods) == 2


def test_the_accuracy_figure_is_drawn_from_the_recorded_runs() -> None:
    with script("draw_accuracy") as drawing:
        drawn = drawing.drawn()
        assert drawing.FIGURE.read_text(encoding="utf-8") == drawn, "run python assets/draw_accuracy.py"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "learned: 88.0%" in drawn and "full model, 576 tokens: 99.8%" in drawn


def test_pictures_and_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)\)", README):
        assert (ROOT / target).exists(), target
    headings = {one.lower().replace(" ", "-") for one in re.findall(r"^## (.+)$", README, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


def test_methods_of_the_commands_exist() -> None:
    for names in re.findall(r"method=([a-z_,/.]+)", README):
        own = [name for name in names.strip(",.").split(",") if not (ROOT / name).is_file()]
        assert set(own) <= set(vprune.method_names()), names
