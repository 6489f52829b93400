"""Runs as `vprune eval` leaves them, written without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

KINDS = ("exists", "colour", "count", "where")
TOKENS = 576


def write_run(
    folder: Path,
    method: str = "full",
    keep: float | int = 1.0,
    accuracy: float = 0.9,
    samples: int = 40,
    first: int = 0,
    kinds: Sequence[str] = KINDS,
    metrics: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """One finished run with the files of the contract; which answers are right is drawn from `accuracy`."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{method}{keep}{sorted(config.items())}")
    after = TOKENS if method == "full" else int(keep * TOKENS) if isinstance(keep, float) else keep
    rows = []
    for number in range(first, first + samples):
        right = draw.random() < accuracy
        row = {
            "id": f"{number:04d}",
            "kind": kinds[number % len(kinds)],
            "question": f"what is number {number}?",
            "answer": "red",
            "prediction": "red" if right else "blue",
            "correct": float(right),
            "tokens_before": TOKENS,
            "tokens_after": after,
        }
        rows.append(row)
    values = [row["correct"] for row in rows]
    mean = sum(values) / len(values)
    by_kind = {kind: [row["correct"] for row in rows if row["kind"] == kind] for kind in kinds}
    summary = {
        "samples": samples,
        "failed": 0,
        "accuracy": mean,
        "accuracy_stderr": (mean * (1 - mean) / samples) ** 0.5,
        "accuracy_by_kind": {kind: sum(part) / len(part) for kind, part in by_kind.items() if part},
        "samples_by_kind": {kind: len(part) for kind, part in by_kind.items() if part},
        "tokens_before": float(TOKENS),
        "tokens_after": float(after),
        "retention": None,
        "method": method,
        "keep": keep,
        "model": "embedded",
        "benchmark": "scenes",
        "seed": 0,
        "seconds": 12.5,
    }
    plain = {} if method == "full" else {"recycle": "none", "size_aware": False}
    settings = {
        "model": {"name": "embedded", "path": "embedded", "revision": None},
        "method": {"name": method, **plain, **{key: value for key, value in config.items() if key in plain}},
        "benchmark": {"name": "scenes", "path": None},
        "keep": keep,
        "blank": False,
        "seed": 0,
        **dict.fromkeys(("layer", "recycle", "size_aware", "stages", "backend", "limit")),
        **config,
    }
    environment = {
        "command": f"vprune eval method={method} keep={keep}",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "vprune": "0.1.0"},
        "hardware": {"processor": "A Processor", "cores": 2},
        "dtype": "float32",
        "git_commit": "0123456789abcdef",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps({**summary, **(metrics or {})}))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def write_sweep(folder: Path, samples: int = 40) -> Path:
    """Full, random and attention at three budgets, and attention with recycling at two."""
    write_run(folder / "full", accuracy=0.95, samples=samples)
    for keep, floor, score in ((0.5, 0.6, 0.55), (0.1, 0.4, 0.45), (0.05, 0.35, 0.4)):
        write_run(folder / f"random-{keep}", "random", keep, floor, samples)
        write_run(folder / f"attention-{keep}", "attention", keep, score, samples)
    for keep, score in ((0.5, 0.93), (0.1, 0.86)):
        options = {"recycle": "grid", "size_aware": True}
        write_run(folder / f"attention-{keep}-grid", "attention", keep, score, samples, **options)
    return folder
