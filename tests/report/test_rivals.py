"""Who is ahead of the learned map, whose seconds compare, and which options go without saying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.report.runs import KINDS, write_run
from vprune.eval.report import report
from vprune.eval.reporting.gather import gather
from vprune.eval.reporting.rivals import leads, table, verdict

AS_SHIPPED: dict[str, Any] = {"recycle": "anchors", "size_aware": True}
RIGHT = {"learned": {"exists": 10, "colour": 10, "count": 2, "where": 10}, "random": {"exists": 9, "count": 6}}


def write_answers(folder: Path, method: str, right: dict[str, int], **config: Any) -> None:
    """A run at 10% in which the first `right[kind]` of the ten questions of a kind are answered."""
    run = write_run(folder, method, 0.1, **config)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["correct"] = float(number // len(KINDS) < right.get(row["kind"], 0))
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["accuracy"] = sum(row["correct"] for row in rows) / len(rows)
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_a_kind_in_which_another_method_is_ahead_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "full", accuracy=1.0)
    for method, right in RIGHT.items():
        write_answers(tmp_path / method, method, right, **(AS_SHIPPED if method == "learned" else {}))
    (section,) = gather(tmp_path).sections
    (lead,) = leads(section)
    assert (lead.ahead.method, lead.behind.method, lead.kind) == ("random", "learned", "count")
    assert abs(lead.points - 0.4) < 1e-9 and lead.beyond  # four of ten: 0.4, standard error sqrt(0.24 / 9)
    assert abs(lead.error - (0.24 / 9) ** 0.5) < 1e-9
    assert table(section)[1] == [["random", "learned", "10%", "count", "40.0 ± 16.3", "yes"]]
    told = verdict(section)
    assert "none is ahead of learned over all questions; in a kind of question, random at 10% (count, 40.0" in told
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert told in text and "Where another run is ahead of learned" in text
    assert "| random | learned | 10% | count | 40.0 ± 16.3 | yes |" in (tmp_path / "leaderboard.md").read_text()


def test_the_annotation_is_no_rival_in_words(tmp_path: Path) -> None:
    write_answers(tmp_path / "learned", "learned", {}, **AS_SHIPPED)
    write_answers(tmp_path / "oracle", "oracle", dict.fromkeys(KINDS, 10))
    (section,) = gather(tmp_path).sections
    assert len(leads(section)) == 1 + len(KINDS)
    assert "none is ahead of learned over all questions; in a kind of question, none is." in verdict(section)


def test_without_the_learned_map_nothing_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "random", "random", 0.1)
    (section,) = gather(tmp_path).sections
    assert leads(section) == [] and verdict(section) == ""


def test_seconds_of_runs_that_went_on_at_once_are_not_compared(tmp_path: Path) -> None:
    starts = ("10:00:00", "10:00:05", "10:00:20")
    for number, start in enumerate(starts):
        file = write_run(tmp_path / str(number), "random", 0.1, seed=number) / "environment.json"
        sessions = [{"started": f"2026-11-27T{start}+0000", "seconds": {"total": 12.5}}, {"started": None}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sessions": sessions}))
    (section,) = gather(tmp_path).sections
    assert section.at_once == 2
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "Accuracy over time is not drawn. Up to 2 of these runs went on at the same time" in text
    assert "seconds do not compare" in (tmp_path / "leaderboard.md").read_text()


def test_runs_one_after_the_other_are_drawn_over_time(tmp_path: Path) -> None:
    for number, seconds in enumerate((3.0, 12.0)):
        run = write_run(tmp_path / str(number), "random", (0.1, 0.5)[number], metrics={"seconds": seconds})
        file = run / "environment.json"
        sessions = [{"started": f"2026-11-27T10:0{number}:00+0000", "seconds": {"total": seconds}}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sessions": sessions}))
    text = report(tmp_path, gallery=0).read_text(encoding="utf-8")
    assert "Accuracy over time" in text and "% right in 3 s" in text and "% right in 12 s" in text


def test_an_option_that_was_not_given_goes_without_saying(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", "learned", 0.1, budget=None, **AS_SHIPPED)
    write_run(tmp_path / "question", "learned", 0.1, budget="question", **AS_SHIPPED)
    (section,) = gather(tmp_path).sections
    assert {entry.label for entry in section.entries} == {"learned", "learned (budget question)"}
