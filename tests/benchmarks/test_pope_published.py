"""POPE's own file of 3,000 questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.made import write_lines
from vprune.eval.benchmarks.answers import score_file
from vprune.eval.benchmarks.pope import Pope

FILE = Path(__file__).parents[3] / "shared/data/coco_pope_random.json"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/coco_pope_random.json")


@pytest.fixture(scope="module")
def benchmark() -> Pope:
    return Pope(path=FILE, check_images=False)


def test_it_loads_as_published(benchmark: Pope) -> None:
    assert len(benchmark.samples) == 3000
    assert len({sample.image for sample in benchmark.samples}) == 500
    assert [sample.answer for sample in benchmark.samples].count("yes") == 1500
    assert {sample.kind for sample in benchmark.samples} == {"random"}


def test_constant_yes(benchmark: Pope, tmp_path: Path) -> None:
    rows = [{"question_id": number, "answer": "yes"} for number in range(1, 3001)]
    metrics = score_file(benchmark, write_lines(tmp_path / "yes.jsonl", rows))
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(0.667, abs=5e-4)
    assert (metrics["precision"], metrics["recall"], metrics["yes_ratio"]) == (0.5, 1.0, 1.0)
