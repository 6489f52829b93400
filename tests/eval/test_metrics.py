from __future__ import annotations

import math

import pytest

from vprune.eval.metrics import exact_match, list_f1, point_in_box, standard_error, summarise


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Top  left.", "top left", 1.0),
        (" YES ! ", "yes", 1.0),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("3", "3", 1.0),
        ("13", "3", 0.0),
    ],
)
def test_exact_match_ignores_case_blanks_and_final_punctuation(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("red circle, blue star, red circle", 1.0),
        ("Blue star , red circle , red circle .", 1.0),
        ("red circle, blue star", 0.8),
        ("red circle, red circle, red circle, red circle, blue star", 0.75),
        ("green box", 0.0),
        ("", 0.0),
        (",,", 0.0),
    ],
)
def test_list_f1_counts_names_as_often_as_they_occur(prediction: str, score: float) -> None:
    assert list_f1(prediction, "red circle, blue star, red circle") == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("x01 y02", 1.0), ("X 1 , Y 2", 1.0), ("x02 y02", 0.0), ("x01", 0.0), ("", 0.0), ("left", 0.0)],
)
def test_a_point_counts_when_its_cell_centre_lies_in_the_box(prediction: str, score: float) -> None:
    assert point_in_box(prediction, (16, 32, 32, 48)) == score


def test_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1, 0, 1, 1]) == pytest.approx(0.5 / math.sqrt(4))
    assert standard_error([1.0]) == 0.0


def test_summary_counts_failures_as_wrong_and_leaves_them_out_of_the_tokens() -> None:
    row = {"kind": "list", "correct": 0.5, "tokens_before": 10, "tokens_after": 4}
    failed = {"kind": "exists", "correct": 0.0, "tokens_before": None, "tokens_after": None, "error": "boom"}
    summary = summarise([row, {**row, "tokens_after": 2}, failed])
    assert summary["samples"] == 3
    assert summary["failed"] == 1
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["accuracy_by_kind"] == {"list": 0.5, "exists": 0.0}
    assert summary["list_f1"] == 0.5
    assert (summary["tokens_before"], summary["tokens_after"]) == (10, 3)
