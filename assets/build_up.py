"""What each part of the segmentation method brings: `python assets/build_up.py out=runs/build_up limit=200`.

One sweep of `vprune eval` over the recipes below (conf/recipe/NAME.yaml), the same samples for each, and a table of it,
OUT/build_up.md; all other words go to `vprune eval`. A sweep that was broken off goes on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from vprune.cli import main as vprune

STEPS = {
    "naive": "naive",
    "head_weights": "+ head weights",
    "flow": "+ flow",
    "negative_points": "+ negative points",
    "iteration": "+ iteration",
    "crops": "+ crops",
    "ensemble": "+ ensemble",
    "localisation_heads": "localisation heads in place of the flow",
    "decaf": "DecAF: rollout and contrast in place of the flow",
    "default": "the shipped defaults",
    "default_negative_points": "the shipped defaults + negative points",
    "default_iteration": "the shipped defaults + iteration",
    "default_crops": "the shipped defaults + crops",
    "default_ensemble": "the shipped defaults + crops + ensemble",
}
FIGURES = ("open_ar100", "open_ap50", "open_ap", "referring_miou", "referring_oiou")


def main(words: list[str]) -> int:
    """Run the sweep and write the table; the exit code of `vprune eval`."""
    out = next((word.partition("=")[2] for word in words if word.startswith("out=")), "runs/build_up")
    rest = [word for word in words if not word.startswith("out=")]
    sweep = f"benchmark.recipe={','.join(STEPS)}"
    code = vprune(["eval", "-m", "benchmark=scenes_segment", "method=full", sweep, f"out={out}", *rest])
    if code < 2:
        Path(out, "build_up.md").write_text(table(Path(out)), encoding="utf-8")
        print(f"the table is in {Path(out, 'build_up.md')}")
    return code


def table(folder: Path) -> str:
    """The runs in a folder as Markdown, in the order of the steps."""
    measured = {}
    for file in folder.glob("*/metrics.json"):
        config = yaml.safe_load((file.parent / "config.yaml").read_text(encoding="utf-8"))
        measured[config["benchmark"]["recipe"]] = json.loads(file.read_text(encoding="utf-8"))
    lines = ["| step | " + " | ".join(FIGURES) + " | seconds a sample | peak MiB |", "|---" * (len(FIGURES) + 3) + "|"]
    for name, step in STEPS.items():
        one = measured[name]
        cells = ["-" if one[key] is None else f"{one[key]:.3f}" for key in FIGURES]
        cells.append(f"{one['seconds'] / one['samples']:.2f}")
        peak = one["peak_memory_bytes"]
        cells.append("-" if peak is None else f"{peak / 2**20:.0f}")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    first = next(iter(measured.values()))
    return f"{first['model']} on {first['benchmark']}, {first['samples']} samples\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
