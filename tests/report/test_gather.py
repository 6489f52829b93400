from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import write_run, write_sweep
from vprune.errors import VPruneError
from vprune.eval.report import main, report
from vprune.eval.reporting.gather import gather


def leaderboard(folder: Path) -> list[dict[str, Any]]:
    content = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))
    assert isinstance(content, list)
    return content


def test_leaderboard_json_keeps_the_contract(tmp_path: Path) -> None:
    index = report(write_sweep(tmp_path / "runs"), gallery=0)
    rows = leaderboard(index.parent)
    assert len(rows) == 9
    wanted = {"method", "keep", "accuracy", "accuracy_stderr", "retention", "tokens_after", "seconds", "by_kind"}
    assert all(wanted <= row.keys() for row in rows)
    assert rows[0]["method"] == "full"
    assert rows[0]["retention"] == 1.0
    assert [row["keep"] for row in rows] == [1.0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.05, 0.05]


def test_retention_is_measured_against_the_full_run_of_the_same_samples(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    report(tmp_path, gallery=0)
    rows = leaderboard(tmp_path)
    full = rows[0]["accuracy"]
    assert all(row["retention"] == pytest.approx(row["accuracy"] / full) for row in rows)


def test_a_stated_retention_stays_where_the_full_run_is_elsewhere(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "random", 0.5, 0.5, metrics={"retention": 0.75})
    write_run(tmp_path / "b", "attention", 0.5, 0.5)
    report(tmp_path, gallery=0)
    assert {row["method"]: row["retention"] for row in leaderboard(tmp_path)} == {"random": 0.75, "attention": None}


def test_variants_tell_runs_of_one_method_apart(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (section,) = gather(tmp_path).sections
    at = {entry.variant for entry in section.entries if entry.method == "attention" and entry.keep == 0.1}
    assert at == {"", "grid, size-aware"}
    row = next(row for row in leaderboard(report(tmp_path, gallery=0).parent) if row["variant"])
    assert (row["recycle"], row["size_aware"]) == ("grid", True)


def test_seeds_tell_runs_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", "random", 0.5, seed=seed)
    (section,) = gather(tmp_path).sections
    assert {entry.label for entry in section.entries} == {"random (seed 0)", "random (seed 1)"}


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"first": 100}, r"is of other questions \([0-9a-f]{8}, not [0-9a-f]{8}\)"),
        ({"samples": 30}, r"is of other questions \(40, not 30\)"),
        ({"metrics": {"model": "other"}}, "is of embedded"),
        ({"metrics": {"benchmark": "folder"}}, "is on scenes"),
        ({"blank": True}, "is with images not blanked"),
        (
            {"fingerprint": {"model": "fedcba9876543210", "benchmark": "same"}},
            r"is of other files of the model \(01234567, not fedcba98; a card",
        ),
    ],
)
def test_what_cannot_be_compared_is_never_ranked_together(
    tmp_path: Path, other: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "full", fingerprint={"model": "0123456789abcdef"})
    other = {"fingerprint": {"model": "0123456789abcdef"}, **other}
    write_run(tmp_path / "other", "random", 0.5, 0.5, **other)
    sections = gather(tmp_path).sections
    assert sorted(len(section.entries) for section in sections) == [1, 1]
    assert next(entry.retention for s in sections for entry in s.entries if entry.method == "random") is None
    assert main([str(tmp_path), "gallery=0"]) == 0
    told = re.compile(f"Retention of random 50%: the nearest full run, full, {why}")
    written = [(tmp_path / name).read_text() for name in ("leaderboard.md", "index.html")]
    assert all(told.search(text) for text in (*written, capsys.readouterr().out))
    assert [bool(row["retention_caveat"]) for row in leaderboard(tmp_path)].count(True) == 1


def test_runs_of_other_commits_are_compared_and_the_commits_told(tmp_path: Path) -> None:
    write_run(tmp_path / "full")
    for number in range(5):
        environment = write_run(tmp_path / f"{number}", "random", 0.5, seed=number) / "environment.json"
        facts = json.loads(environment.read_text())
        environment.write_text(json.dumps(facts | {"git_commit": "fedcba9876543210" if number else None}))
    report(tmp_path, gallery=0)
    why = "the full run is of commit 0123456789ab, not of fedcba987654"
    assert f"Retention of 4 runs: {why}." in (tmp_path / "leaderboard.md").read_text()
    rows = leaderboard(tmp_path)
    assert all(row["retention"] for row in rows)
    assert [row["retention_caveat"] for row in rows].count(why) == 4


def test_a_full_model_that_is_never_right_leaves_nothing_to_retain(tmp_path: Path) -> None:
    write_run(tmp_path / "full", accuracy=0.0)
    write_run(tmp_path / "a", "random", 0.5, 0.0)
    report(tmp_path, gallery=0)
    assert {row["retention_caveat"] for row in leaderboard(tmp_path)} == {
        "the full model is never right on these questions, so there is nothing to retain"
    }


def test_one_token_is_not_all_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "one", "random", 1, 0.2)
    write_run(tmp_path / "all", "random", 1.0, 0.9)
    (section,) = gather(tmp_path).sections
    assert section.budgets == ["100%", "1 token"]


def test_a_method_of_another_version_is_told_apart_by_what_differs(tmp_path: Path) -> None:
    for recycle in ("none", "grid"):
        write_run(tmp_path / recycle, "from_the_future", 0.1, 0.4, recycle=recycle)
    (section,) = gather(tmp_path).sections
    assert {entry.variant for entry in section.entries} == {"no recycling", "grid"}
    assert not any(entry.needs_annotation for entry in section.entries)


def test_the_oracle_is_never_the_best_method(tmp_path: Path) -> None:
    write_run(tmp_path / "oracle", "oracle", 0.1, 1.0)
    write_run(tmp_path / "random", "random", 0.1, 0.4)
    (section,) = gather(tmp_path).sections
    best = section.best("10%")
    assert best is not None
    assert best.method == "random"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no finished run; run `vprune eval` first"),
        ({"run/predictions.jsonl": "{}\n{}\n", "run/config.yaml": "{}"}, "run: 2 questions answered so far"),
        ({"run/metrics.json": "{", "run/config.yaml": "a: 1"}, "metrics.json is not JSON"),
    ],
)
def test_nothing_to_report_is_a_mistake(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(VPruneError, match=message):
        report(tmp_path, gallery=0)
    assert not (tmp_path / "index.html").exists()


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match="is not a folder; name the one"):
        report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accuracy": None}, "accuracy should be a number, got None"),
        ({"tokens_after": "57"}, "tokens_after should be a number, got '57'"),
        ({"keep": True}, "keep should be a number, got True"),
        ({"method": 3}, "method should be a name, got 3"),
        ({"samples": 41}, "speaks of 41 samples, predictions.jsonl holds 40"),
    ],
)
def test_broken_runs_are_named_and_the_others_reported(
    tmp_path: Path, metrics: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "sound")
    write_run(tmp_path / "broken", "random", 0.5, metrics=metrics)
    assert main([str(tmp_path), "gallery=0"]) == 1
    assert f"error: broken: {tmp_path / 'broken' / 'metrics.json'}" in capsys.readouterr().err
    assert [row["method"] for row in leaderboard(tmp_path)] == ["full"]
    for name in ("index.html", "leaderboard.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Could not be read" in text
        assert message.partition(", got")[0] in text


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "sound")
    broken = write_run(tmp_path / "broken", "random", 0.5)
    lines = (broken / "predictions.jsonl").read_text().splitlines()
    (broken / "predictions.jsonl").write_text("\n".join([*lines[:3], '{"id": "x"}', *lines[4:]]))
    assert "line 4: not a prediction" in gather(tmp_path).broken["broken"]


def test_unfinished_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "sound")
    (write_run(tmp_path / "late", "random", 0.5, samples=20) / "metrics.json").unlink()
    assert main([str(tmp_path), "gallery=0"]) == 0
    assert "unfinished: late (20 questions answered so far" in capsys.readouterr().out
    assert "Unfinished" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["gallery=-1", "gallery=many", "gallery", "pictures=3", "gallery=1001"])
def test_a_wrong_option_is_a_mistake(tmp_path: Path, option: str) -> None:
    write_run(tmp_path / "sound")
    with pytest.raises(VPruneError, match="gallery"):
        main([str(tmp_path), option])


def test_reporting_twice_changes_nothing(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    report(tmp_path, gallery=0)
    before = (tmp_path / "leaderboard.json").read_bytes(), (tmp_path / "leaderboard.md").read_bytes()
    report(tmp_path, gallery=0)
    assert before == ((tmp_path / "leaderboard.json").read_bytes(), (tmp_path / "leaderboard.md").read_bytes())
