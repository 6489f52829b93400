from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval.made import sample_rows, write_benchmark, write_samples
from vprune.cli import main


@pytest.fixture(scope="session")
def evaluated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A true sweep on the tiny model: four methods, two budgets; the full model is right in a quarter of them."""
    above = tmp_path_factory.mktemp("evaluated")
    rows = sample_rows(16)
    benchmark = write_benchmark(above / "made", rows)
    common = [f"model={tiny_folder}", f"benchmark={benchmark}", "max_new_tokens=4", "batch_size=8"]
    assert main(["eval", *common, "method=full", f"out={above / 'first'}"]) == 0
    lines = (above / "first" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    for number, row in enumerate(rows):
        if row["kind"] in ("exists", "colour") and number % 8 < 4:
            row["answer"] = answers[row["id"]]
    write_samples(benchmark, rows)
    out = above / "sweep"
    assert main(["eval", "-m", *common, "method=full,random,attention,oracle", "keep=0.25,4", f"out={out}"]) == 0
    return out
