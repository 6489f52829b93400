"""The page of compatibility says what happened, failures included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compatibility import Matrix, backend_of, family_of, normalised, row_of
from tests.compatibility_rows import ROWS

GREEDY = "tests/exactness/test_families.py::test_pruned_is_the_masked_model[fp64-plain-qwen2_vl-padded]"
EAGER = "tests/exactness/test_families.py::test_keeping_all_is_the_unhooked_model[eager-qwen2_5_vl-several-video]"
FLASH = "tests/exactness/test_backends.py::test_sizes_are_refused_on_flash_attention[llava_next-flash_attention_2]"
ALONE = "tests/exactness/test_masked_oracle.py::test_every_method_equals_the_masked_model[random-plain-single]"


def test_a_test_has_one_family_one_backend_and_one_row() -> None:
    assert [family_of(one) for one in (GREEDY, EAGER, FLASH, ALONE)] == ["qwen2_vl", "qwen2_5_vl", "llava_next", None]
    assert [backend_of(one) for one in (GREEDY, EAGER, FLASH)] == ["sdpa", "eager", "flash (emulated)"]
    rows = [row.scenario for one in (GREEDY, EAGER, FLASH, ALONE) if (row := row_of(one))]
    assert rows == [
        "a left-padded batch",
        "keep=all is the unhooked model",
        "sizes on another attention",
        "one picture",
    ]
    assert row_of("tests/exactness/test_drawing.py::test_every_report_draws_and_describes[random]") is None
    assert len({row.scenario for row in ROWS}) == len(ROWS)


def reported(matrix: Matrix, nodeid: str, outcome: str, *properties: Any) -> None:
    for when in ("setup", "call", "teardown"):
        of_all = outcome if when == "call" else "passed"
        report = SimpleNamespace(nodeid=nodeid, when=when, outcome=of_all, user_properties=properties)
        matrix.pytest_runtest_logreport(report)


def test_the_page_counts_agreement_refusals_failures_and_deviations(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path / "page.md")
    reported(matrix, GREEDY, "passed", ("deviation", "fp64", 3e-15))
    reported(matrix, GREEDY.replace("fp64", "fp32"), "passed", ("deviation", "fp32", 2e-5))
    reported(matrix, GREEDY.replace("qwen2_vl", "gemma3"), "failed", ("deviation", "fp64", 0.5))
    reported(matrix, FLASH, "passed", ("refused", "size_aware=true with 'flash_attention_2': no mask"))
    reported(matrix, EAGER, "skipped")
    matrix.pytest_sessionfinish()
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "CPU: 2 cases agree, 1 are refused, 1 disagree. Largest difference: 5.0e-01 in float64, 2.0e-05" in page
    padded = next(line for line in page.splitlines() if line.startswith("| a left-padded batch |"))
    cells = [cell.strip() for cell in padded.strip("|").split("|")]
    assert (cells[2], cells[11], cells[12], cells[13]) == ("2", "**1 failed**", "5e-01", "2e-05")
    assert cells[3:11] == ["-"] * 8
    assert "- LLaVA-NeXT: size_aware=true with 'flash_attention_N': no mask" in page
    assert "**Not run:** one picture, several pictures" in page and "| keep=all is the unhooked model" not in page


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Qwen2VLModel reads packed patches (64, 96), whose", "... reads packed patches (...), whose"),
        ("visual tokens per sample [16, 18] are no whole images of 64 tokens (8 x 8)", None),
        ("Adapted is no vision-language model: call .base.model", "... is no vision-language model: call .base.model"),
    ],
)
def test_reasons_are_told_once_whatever_the_numbers(said: str, told: str | None) -> None:
    assert normalised(said) == (told or "visual tokens per sample [...] are no whole images of N tokens (...)")
