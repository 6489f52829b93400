"""The leaderboard's and the ablation's pages are those of the recorded runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from tests.docs.pages import DOCS, read
from tests.docs.scripts import script
from tests.report.test_page import Page

BASELINE_KEEPS = 4


def loaded(name: str) -> Any:
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


def test_the_goals_and_the_results_are_those_of_the_leaderboard() -> None:
    rows = loaded("leaderboard.json")
    with script("leaderboard") as board:
        assert board.placed(read("leaderboard"), "goals", board.goals(rows)) == read("leaderboard")
        assert board.recorded(rows) == loaded("results/methods-h200.json")
        variants = Counter(row["variant"] for row in rows if row["method"] == "learned")
        assert variants == {"": 4, board.QUESTION: 4, "no recycling, not size-aware": 4}


def test_every_method_was_run_at_every_budget_on_the_same_questions() -> None:
    rows = loaded("leaderboard.json")
    assert {(row["samples"], row["samples_fingerprint"], row["failed"]) for row in rows} == {(4096, "37bee8e771df", 0)}
    keeps: dict[str, set[float]] = {}
    for row in rows:
        keeps.setdefault(row["method"], set()).add(row["keep"])
    assert keeps.pop("full") == {1.0}
    assert len(keeps) == 27 and {len(found) for found in keeps.values()} == {BASELINE_KEEPS}
    assert all(row["tokens_after"] <= 576 * row["keep"] + 2 for row in rows)


def test_the_page_tells_the_same_and_stands_alone() -> None:
    text = (DOCS / "leaderboard.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [attributes["lang"] for attributes in page.all("html")] == ["en"] and len(page.all("h1")) == 1
    assert all("scope" in attributes for attributes in page.all("th"))
    assert page.all("img") and all(attributes["alt"] for attributes in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) == 3
    # No address, no folder of the machine it was made on (base64 has slashes, too), no default told as a setting.
    assert not re.search(r"https?://|(?<![\w.<+/,])/[a-z]+/\w|budget=None", text)
    board = read("leaderboard")
    for row in loaded("leaderboard.json"):
        shown = f"{100 * row['accuracy']:.1f}% ± {100 * row['accuracy_stderr']:.1f}"
        assert shown in board and shown in re.sub(r"<[^>]+>", "", text)


def test_who_is_ahead_is_what_the_numbers_say() -> None:
    """Every run that is ahead of the plain learned map in the data stands in the table, and no other."""
    rows = loaded("leaderboard.json")
    plain = {row["keep"]: row for row in rows if row["method"] == "learned" and not row["variant"]}
    found = set()
    for row in rows:
        if row["method"] in ("full", "learned"):
            continue
        mine = {"all": plain[row["keep"]]["accuracy"]} | plain[row["keep"]]["by_kind"]
        theirs = {"all": row["accuracy"]} | row["by_kind"]
        kinds = [kind for kind, value in theirs.items() if value > mine[kind] + 1e-9]
        found |= {(row["method"], f"{100 * row['keep']:g}%", kind) for kind in kinds}
    told = re.findall(r"^\| (\w+)(?: \*)? \| learned \| (\S+) \| (\w+) \|", read("leaderboard"), re.M)
    assert {one for one in told if one[0] != "learned"} == found


def test_the_ablation_is_drawn_from_its_runs() -> None:
    content = loaded("results/ablation-h200.json")
    assert len(content["runs"]) == 90
    with script("ablation_table") as ablation:
        page = ablation.placed(read("ablation"), "tables", ablation.tables(content))
        assert page == read("ablation"), "run python assets/ablation_table.py"
