"""Makes the tables of `docs/ablation.md` from `docs/results/ablation-h200.json`, and that from a folder of runs.

python assets/ablation_table.py [RUNS]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from vprune.assets.leaderboard import placed
from vprune.eval.metrics import standard_error

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "ablation-h200.json"
MAPS = ("random", "attention", "relevance", "learned", "oracle")
RECYCLINGS = ("none", "grid", "nearest", "weighted", "anchors")
KEEPS = (0.1, 0.05)
ABOUT = {
    "command": "vprune eval -m method=MAP recycle=KIND size_aware=false,true keep=0.1,0.05 limit=1024 batch_size=128",
    "hardware": "NVIDIA H200",
    "versions": "torch 2.11.0, transformers 5.17.0, triton 3.6.0",
    "git_commit": "2d09531",
    "lead": "mean difference of the answers to the same questions, and its standard error",
}
Row = dict[str, Any]
Key = tuple[float, str, str, bool]  # keep, map, recycling, size term


def gathered(folder: Path) -> dict[str, Any]:
    """The runs of a folder; over the same questions, the lead of each over no recycling and over attention alike."""
    metrics: dict[Key, Row] = {}
    answers: dict[Key, dict[str, float]] = {}
    for path in sorted(folder.glob("*/metrics.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        options = run["options"]
        key = (run["keep"], run["method"], options["recycle"], options["size_aware"])
        lines = (path.parent / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        metrics[key], answers[key] = run, {row["id"]: row["correct"] for row in map(json.loads, lines)}
    runs = []
    for key in sorted(metrics, key=lambda one: (-one[0], MAPS.index(one[1]), RECYCLINGS.index(one[2]), one[3])):
        keep, method, recycle, size_aware = key
        row = {"method": method, "keep": keep, "recycle": recycle, "size_aware": size_aware}
        row |= {name: metrics[key][name] for name in ("accuracy", "accuracy_stderr", "tokens_after", "samples")}
        over = {"none": (keep, method, "none", False), "attention": (keep, "attention", recycle, size_aware)}
        row |= {f"lead_over_{name}": _lead(answers[key], answers[other]) for name, other in over.items()}
        runs.append(row)
    return ABOUT | {"runs": runs}


def _lead(mine: dict[str, float], other: dict[str, float]) -> list[float]:
    differences = [value - other[sample] for sample, value in mine.items()]
    return [round(fmean(differences), 6), round(standard_error(differences), 6)]


def tables(content: dict[str, Any]) -> str:
    """Accuracy by map and recycling, a table for each budget; the best way to recycle a map is bold."""
    runs = {(run["keep"], run["method"], run["recycle"], run["size_aware"]): run for run in content["runs"]}
    ways = [(recycle, size) for recycle in RECYCLINGS for size in (False, True) if (recycle, size) != ("none", True)]
    parts = []
    for keep in KEEPS:
        titles = [f"`{recycle}`" + (" + size" if size else "") for recycle, size in ways]
        parts += [f"| accuracy at {keep:.0%} | {' | '.join(titles)} |", "|---|" + "---:|" * len(ways)]
        for method in MAPS:
            found = [runs[keep, method, *way]["accuracy"] for way in ways]
            cells = [f"**{100 * one:.1f}**" if one == max(found) else f"{100 * one:.1f}" for one in found]
            parts.append(f"| `{method}` | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n\n" + _gains(runs, ways)


def _gains(runs: dict[Any, Row], ways: list[tuple[str, bool]]) -> str:
    """What the best recycling of every map brings, and how far it stands above attention treated alike."""
    titles = ["map, in points", "best recycling", "over `none`", "the size term there", "over `attention` alike"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|"]
    for keep in KEEPS:
        for method in MAPS:
            way = max(ways, key=lambda one: runs[keep, method, *one]["accuracy"])
            best = runs[keep, method, *way]
            plain = runs[keep, method, way[0], False]["accuracy"]
            size = f"{100 * (best['accuracy'] - plain):+.1f}" if way[1] else ""
            name = f"`{way[0]}`" + (" + size" if way[1] else "")
            over = [_points(best[f"lead_over_{other}"]) for other in ("none", "attention")]
            lines.append(f"| `{method}`, {keep:.0%} | {name} | {over[0]} | {size} | {over[1]} |")
    return "\n".join(lines)


def _points(lead: list[float]) -> str:
    return f"{100 * lead[0]:+.1f} ± {100 * lead[1]:.1f}" if lead[1] else ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        RESULTS.write_text(json.dumps(gathered(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    path = DOCS / "ablation.md"
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    path.write_text(placed(path.read_text(encoding="utf-8"), "tables", tables(recorded)), encoding="utf-8")
    print(tables(recorded))
