"""Makes `docs/leaderboard.*` and `docs/results/methods-h200.json` from a folder of runs.

python assets/leaderboard.py RUNS
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from vprune.eval.report import report

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "methods-h200.json"
GALLERY = 4
KEEPS = (0.5, 0.25, 0.1, 0.05)
ASKED = {0.5: 0.995, 0.25: 0.99, 0.1: 0.97, 0.05: 0.9}  # retention; of every kind, at 10%:
ASKED_OF_KINDS = 0.9
ABOUT = {
    "command": "vprune eval -m hydra/launcher=joblib hydra.launcher.n_jobs=10 method=NAME,... keep=0.5,0.25,0.1,0.05 "
    "batch_size=128; of learned two variations among them, assets/methods/*.yaml",
    "hardware": "two NVIDIA H200 of one host, several runs at once on each: seconds are not comparable",
    "versions": "torch 2.11.0, transformers 5.17.0, triton 3.6.0",
    "git_commit": "2d09531",
    "complete": "yes: 27 methods at four budgets, full, learned with budget=question and without recycling at four",
}
QUESTION = "budget question"  # the variant in which every question has a budget of its own
Row = dict[str, Any]


def recorded(rows: list[Row]) -> dict[str, Any]:
    """What `docs/results` keeps of the leaderboard."""
    same = ("method", "variant", "keep", "accuracy", "accuracy_stderr", "retention", "tokens_after", "samples")
    runs = [
        {key: row[key] for key in (*same, "seconds")}
        | {"by_kind": {kind: round(value, 4) for kind, value in row["by_kind"].items()}}
        for row in rows
    ]
    return ABOUT | {"runs": sorted(runs, key=lambda run: (run["method"], run["variant"], -run["keep"]))}


def goals(rows: list[Row]) -> str:
    """Retention of the learned map by budget beside what was asked for, then by kind of question at 10%."""
    (full,) = (row for row in rows if row["method"] == "full")
    lines = ["| retention, % | 50% | 25% | 10% | 5% |", "|---|---:|---:|---:|---:|"]
    lines.append("| asked for, at least | " + " | ".join(f"{100 * ASKED[keep]:g}" for keep in KEEPS) + " |")
    kinds = ["", "| retention at 10%, % | " + " | ".join(full["by_kind"]) + " |"]
    kinds.append("|---|" + "---:|" * len(full["by_kind"]))
    for label, wanted in (("`learned`", ""), ("`learned`, `budget=question`", QUESTION)):
        runs = {row["keep"]: row for row in rows if (row["method"], row["variant"]) == ("learned", wanted)}
        cells = [_cell(runs[keep]["retention"], ASKED[keep]) if keep in runs else "not run" for keep in KEEPS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        by_kind = [_cell(value / full["by_kind"][kind], ASKED_OF_KINDS) for kind, value in runs[0.1]["by_kind"].items()]
        kinds.append(f"| {label} | {' | '.join(by_kind)} |")
    return "\n".join([*lines, *kinds])


def _cell(value: float, asked: float) -> str:
    return f"{100 * value:.1f}" + ("" if value >= asked else " ✗")


def placed(page: str, name: str, text: str) -> str:
    """The page with the text between its marks of this name."""
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    assert found.search(page), f"no marks <!-- {name} --> on the page"
    return found.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page)


def main(folder: Path) -> None:
    """Report the runs, and copy what the documentation shows."""
    index = report(folder, gallery=GALLERY)
    shutil.copyfile(index, DOCS / "leaderboard.html")
    shutil.copyfile(folder / "leaderboard.json", DOCS / "leaderboard.json")
    rows = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps(recorded(rows), indent=1) + "\n", encoding="utf-8")
    board = (folder / "leaderboard.md").read_text(encoding="utf-8").removeprefix("# Leaderboard\n\n").rstrip()
    path = DOCS / "leaderboard.md"
    page = placed(path.read_text(encoding="utf-8"), "goals", goals(rows))
    path.write_text(placed(page, "report", board), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
