from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import TOKENS, write_run, write_sweep
from vprune.eval.report import report
from vprune.eval.reporting.cases import choose
from vprune.eval.reporting.curves import LABEL_HEIGHT, _spread, colours, curves
from vprune.eval.reporting.gather import gather

VOID = {"meta", "link", "img", "br", "line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes, and whether every one that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return report(write_sweep(tmp_path), gallery=0).read_text(encoding="utf-8")


def test_the_page_stands_alone(text: str) -> None:
    page = Page(text)
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert {address for address in addresses if not address.startswith(("#", "data:"))} == {
        "leaderboard.json",
        "leaderboard.md",
    }
    assert not re.search(r"https?://|@import|url\((?!data:)", text)


def test_the_page_can_be_read_without_eyes_and_mouse(text: str) -> None:
    page = Page(text)
    assert [attributes["lang"] for attributes in page.all("html")] == ["en"]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all("scope" in attributes for attributes in page.all("th"))
    assert all(attributes.get("alt") for attributes in page.all("img"))
    series = [attributes for attributes in page.all("g") if attributes.get("class", "").startswith("series")]
    assert len(series) == 3 + 3  # over budget and over time
    assert all(attributes["tabindex"] == "0" and "% right" in attributes["aria-label"] for attributes in series)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(named) <= set(ids)


def test_headings_of_two_sections_are_never_the_same(tmp_path: Path) -> None:
    """Sections of one title: other weights, other questions as many, and other questions fewer."""
    for name, more in {
        "a": {"fingerprint": {"model": "0123456789abcdef"}},
        "b": {"fingerprint": {"model": "fedcba9876543210"}},
        "c": {"fingerprint": {"model": "0123456789abcdef"}, "first": 100},
        "d": {"fingerprint": {"model": "0123456789abcdef"}, "samples": 30},
    }.items():
        write_sweep_of_two(tmp_path / name, more)
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    headings = [re.sub(r"<[^>]+>", "", one) for one in re.findall(r"<h[23][^>]*>(.*?)</h[23]>", text)]
    assert len(headings) == len(set(headings)) == 4 * 6
    assert "embedded on scenes 40 questions, model files fedcba98, set " in " ".join(headings)
    titles = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) == 4
    Page(text)


def write_sweep_of_two(folder: Path, more: dict[str, Any]) -> None:
    write_run(folder / "full", **more)
    for keep in (0.5, 0.1):
        write_run(folder / str(keep), "random", keep, 0.5, **more)


def test_the_page_says_why_there_is_no_gallery(text: str) -> None:
    assert "The gallery was left out. It was switched off (gallery=0)." in text


def test_the_summary_is_in_words(text: str) -> None:
    assert re.search(r"Reading all 576 visual tokens, the model answers [\d.]+% of 40 questions right\.", text)
    assert re.search(
        r"At 50% and 10% of the tokens, attention \(grid, size-aware\) does best, keeping [\d.]+% and [\d.]+%", text
    )


@pytest.mark.parametrize(("samples", "told"), [(8, True), (7, False)])
def test_the_error_of_a_kind_with_one_sample_is_not_told(tmp_path: Path, samples: int, told: bool) -> None:
    write_run(tmp_path / "full", samples=samples, metrics={"accuracy_stderr_by_kind": {"exists": 0.25, "where": 0.0}})
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert ("Standard errors are at most 25.0 points." in text) == told


def test_a_lead_within_the_error_is_not_called_best(tmp_path: Path) -> None:
    write_run(tmp_path / "full")
    write_run(tmp_path / "a", "random", 0.1, 0.5)
    write_run(tmp_path / "b", "uniform", 0.1, 0.5)
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "leads, but not by two standard errors of the difference" in text
    assert "best at 10%" not in text


def test_questions_and_names_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path / "full", metrics={"model": "<script>alert(1)</script>", "benchmark": 'a"b'})
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_blank_run_is_a_line_of_reference(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep")
    write_run(tmp_path / "blank", accuracy=0.3, blank=True)
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "full model, image blanked: " in text
    assert "With every image blanked, the full model still gets" in text
    assert "embedded on scenes, every image blanked" in text


def test_runs_without_a_full_one_still_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "random", 0.1, 0.5)
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "no run of the full model stands beside them" in text
    assert "At 10% of the tokens, random is measured alone, with" in text
    assert "no full run" in text


def test_curves_stay_in_the_picture_and_labels_apart(tmp_path: Path) -> None:
    for number in range(24):
        for keep in (0.5, 0.1):
            write_run(tmp_path / f"{number}-{keep}", f"method{number:02d}", keep, 0.5 + number % 3 / 100)
    (section,) = gather(tmp_path).sections
    drawn = curves(section, colours([entry.method for entry in section.entries]))
    assert drawn is not None
    assert len(drawn.series) == 24
    assert len({(series.colour, series.marker, series.dash) for series in drawn.series}) == 24
    heights = sorted(series.label_y for series in drawn.series)
    assert all(later - earlier >= LABEL_HEIGHT - 1e-6 for earlier, later in pairwise(heights))
    assert heights[-1] <= drawn.height
    for series in drawn.series:
        assert all(drawn.left <= point.x <= drawn.right for point in series.points)
        assert all(drawn.top - 1 <= point.high <= point.y <= point.low <= drawn.bottom + 1 for point in series.points)


@pytest.mark.parametrize("wanted", [[], [5.0], [50.0] * 6, [0.0, 1.0, 99.0, 100.0], list(map(float, range(20)))])
def test_labels_keep_their_order_and_distance(wanted: list[float]) -> None:
    heights = _spread(wanted, 0.0, 20 * LABEL_HEIGHT)
    ordered = [heights[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])]
    assert all(later - earlier >= LABEL_HEIGHT - 1e-6 for earlier, later in pairwise(ordered))
    assert all(-1e-6 <= height <= 20 * LABEL_HEIGHT + 1e-6 for height in heights)


def test_a_single_budget_and_equal_accuracies_can_be_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "random", 1.0, 1.0)
    (section,) = gather(tmp_path).sections
    assert curves(section, {}) is not None


def test_cases_cover_reasons_kinds_and_runs(tmp_path: Path) -> None:
    (section,) = gather(write_sweep(tmp_path, samples=200)).sections
    cases = choose(section, 12, lambda entry: entry.method == "attention")
    assert len(cases) == len({case.sample_id for case in cases}) == 12
    assert {case.reason for case in cases} == {"disagree", "lost", "gained", "held"}
    assert {case.entry.method for case in cases} == {"attention"}
    assert len({case.entry.answers[case.sample_id]["kind"] for case in cases}) == 4
    full = section.full
    assert full is not None
    for case in cases:
        right, full_right = (entry.answers[case.sample_id]["correct"] for entry in (case.entry, full))
        assert (full_right, right) == {"gained": (0.0, 1.0), "held": (1.0, 1.0)}.get(case.reason, (1.0, 0.0))
        assert all(other.budget == case.entry.budget for other in case.others)


def test_tokens_in_the_tables_are_the_measured_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "random", 0.1, metrics={"tokens_after": 49.0})
    (section,) = gather(tmp_path).sections
    assert section.entries[0].share == 49 / TOKENS
