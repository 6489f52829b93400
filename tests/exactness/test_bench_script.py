"""The scripts that measure on a GPU run on a CPU too, and what they say of pruning is true there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen2vl"])
def test_the_hooks_are_measured(family: str, tmp_path: Path) -> None:
    script = [sys.executable, "kernels/bench/hooks.py", "--tiny", "--repeats", "1", "--family", family]
    subprocess.run(
        [*script, "--out", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        check=True,
        stdout=subprocess.PIPE,
    )
    (measured,) = json.loads((tmp_path / "hooks.json").read_text(encoding="utf-8"))["families"]
    cases = {row["name"]: row for row in measured["cases"]}
    assert all(row["cache_as_by_hand"] for row in cases.values())
    as_unhooked = {name for name, row in cases.items() if row["logits_as_unhooked"]}
    assert as_unhooked == {"unhooked", "uniform keep=1", "attention keep=1"}
    assert cases["uniform keep=0.1"]["cache_bytes"] < cases["unhooked"]["cache_bytes"]


def test_the_embedded_model_is_timed(tmp_path: Path) -> None:
    words = ["--repeats", "1", "--batch", "2", "--threads", "1", "--methods", "learned", "--device", "cpu"]
    script = [sys.executable, "kernels/bench/embedded.py", *words, "--out", tmp_path / "embedded.json"]
    subprocess.run(script, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, check=True, stdout=subprocess.PIPE)
    (row,) = json.loads((tmp_path / "embedded.json").read_text(encoding="utf-8"))["rows"]
    assert (row["method"], row["batch"], row["threads"]) == ("learned", 2, 1)
    assert 0 < row["plan"] < row["prefill"] < row["unpruned"] < row["unpruned_answer"]
    assert row["prefill"] < row["answer"]
