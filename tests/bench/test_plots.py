"""Figures and tables from measurements: drawn from the CSVs, put between the README's marks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from vprune.bench.app import main

ROOT = Path(__file__).parents[2]


def test_figures_and_tables_are_drawn(measured_folder: Path, tmp_path: Path) -> None:
    results = measured_folder.parent
    assert main(["kernels", "device=cpu", "repeats=1", "ops=select,compact", f"out={results / 'kernels-tiny'}"]) == 0
    tiny = ["model=onevision-7b", "size=tiny", "device=cpu", "dtype=float32", "repeats=1"]
    assert main(["segment", *tiny, f"out={results / 'segment-tiny'}"]) == 0
    assert main(["automatic", "limit=1", "points=2", "device=cpu", f"out={results / 'automatic-tiny'}"]) == 0
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench-tables -->\nold\n<!-- /bench-tables -->\nafter\n", encoding="utf-8")
    script = [sys.executable, ROOT / "kernels/bench/plots.py", "--results", results, "--readme", readme]
    subprocess.run(script, check=True, stdout=subprocess.PIPE)
    for name in ("kernels.svg", "models.svg"):
        assert ElementTree.parse(results / name).getroot().tag.endswith("svg")
    text, everything = (one.read_text(encoding="utf-8") for one in (readme, results / "tables.md"))
    assert "| `compact` 2 x 576 x 64 -> 57 |" in text and "| kv visual | 2 x 640 | 10% |" in everything
    assert "| kv visual |" not in text  # a table of nothing but what is the same in every cell
    assert "| with crops | 40 | " in text and "2 x 2 points" in text and "| automatic | " in text
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "kernels/bench/plots.py", "--results", tmp_path]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "holds no measurements" in done.stderr
