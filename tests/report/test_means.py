"""Retention over several benchmarks: the mean of score / the full model's, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.runs import write_run, write_sweep
from tests.report.test_page import Page
from vprune.cli import main
from vprune.eval.report import report
from vprune.eval.reporting.gather import gather
from vprune.eval.reporting.means import comparisons, data, table

BUDGET = 0.1


def write(folder: Path, benchmark: str, scores: dict[str, float], full: float | None = 0.8, **more: object) -> None:
    """A run of every method on a benchmark; `score` is what the benchmark's own rule gives."""
    if full is not None:
        write_run(folder / benchmark / "full", metrics={"benchmark": benchmark, "score": full}, **more)
    for method, score in scores.items():
        told = {"benchmark": benchmark, "score": score}
        write_run(folder / benchmark / method, method, BUDGET, metrics=told, **more)


def test_the_mean_is_that_of_the_quotients_and_not_of_the_scores(tmp_path: Path) -> None:
    write(tmp_path, "gqa", {"random": 0.4, "uniform": 0.6}, full=0.8)
    write(tmp_path, "mme", {"random": 1500.0, "uniform": 1200.0}, full=2000.0)
    (found,) = comparisons(gather(tmp_path))
    assert found.title == "embedded: retention over 2 benchmarks"
    assert table(found) == (
        ["method", "keep", "gqa", "mme", "mean"],
        [["uniform", "10%", "75.0%", "60.0%", "67.5%"], ["random", "10%", "50.0%", "75.0%", "62.5%"]],
    )


def test_a_method_that_was_not_run_everywhere_has_no_mean(tmp_path: Path) -> None:
    write(tmp_path, "gqa", {"random": 0.4, "uniform": 0.6})
    write(tmp_path, "pope", {"random": 0.2})
    rows = {row["method"]: row for row in data(comparisons(gather(tmp_path)))}
    assert rows["random"]["retention"] == pytest.approx(0.375) and rows["random"]["missing"] == []
    assert rows["uniform"]["retention"] is None and rows["uniform"]["missing"] == ["pope"]
    assert rows["uniform"]["retention_by_benchmark"] == {"gqa": pytest.approx(0.75), "pope": None}


def test_what_does_not_count_is_told(tmp_path: Path) -> None:
    """A benchmark without a full run, other questions of one that counts, images blanked, another model."""
    write(tmp_path, "gqa", {"random": 0.4, "uniform": 0.5})
    write(tmp_path, "pope", {"random": 0.2})
    write(tmp_path, "vqav2", {"random": 0.2}, full=None)
    write(tmp_path / "more", "gqa", {"random": 0.8}, first=100)
    write(tmp_path / "blank", "mme", {"random": 0.8}, blank=True)
    write_run(tmp_path / "other" / "full", metrics={"model": "other", "benchmark": "gqa"})
    write_run(tmp_path / "other" / "random", "random", BUDGET, metrics={"model": "other", "benchmark": "gqa"})
    (found,) = comparisons(gather(tmp_path))
    assert list(found.asked) == ["gqa", "pope"]
    assert len(found.passed_over) == 2
    assert "vqav2 (40 questions), without a full run to compare with" in found.told
    assert "other questions of a benchmark that is counted already" in found.told
    assert found.rows[0].retention == pytest.approx((0.5 + 0.25) / 2)


def test_one_benchmark_has_no_mean(tmp_path: Path) -> None:
    report(write_sweep(tmp_path), gallery=0)
    assert comparisons(gather(tmp_path)) == []
    assert not (tmp_path / "retention.json").exists()
    assert "retention over" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_page_terminal_and_files_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "gqa", {"random": 0.4, "oracle": 0.6})
    write(tmp_path, "pope", {"random": 0.2, "oracle": 0.8})
    assert main(["report", str(tmp_path), "gallery=0"]) == 0
    said = capsys.readouterr().out
    text, board = ((tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "leaderboard.md"))
    for told in (said, text, board):
        assert "embedded: retention over 2 benchmarks" in told
        assert "37.5%" in told and "87.5%" in told
    page = Page(text)
    assert len(page.all("caption")) == len(page.all("table")) == 5
    assert all("scope" in attributes for attributes in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    rows = json.loads((tmp_path / "retention.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == ["oracle", "random"]
    assert [row["needs_annotation"] for row in rows] == [True, False]
    assert len(json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))) == 6  # runs, as ever
