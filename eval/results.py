"""Runs read back from their folders, and what is left of the unpruned model's accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vprune.errors import VPruneError

CONFIG_FILE = "config.yaml"
PREDICTIONS_FILE = "predictions.jsonl"
METRICS_FILE = "metrics.json"
ENVIRONMENT_FILE = "environment.json"

# A full run speaks for another run if these agree, and the ids of the samples.
_SAME_TASK = ("model", "benchmark", "seed", "blank", "max_new_tokens", "fingerprint")
# Where and how fast a run is answered; the answers do not depend on it.
_NO_MATTER = {f"engine.{key}" for key in ("_target_", "workers", "gpus", "cpus", "threads", "retries", "address")}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what it was told (`config.yaml`), what came out and every answer."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def load_run(folder: str | Path) -> Run:
    """The finished run in `folder`; VPruneError if a file of it is missing or broken."""
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE)
    metrics = _json(folder / METRICS_FILE)
    if not isinstance(metrics, dict):
        raise VPruneError(f"{folder / METRICS_FILE} should hold a JSON object")
    lines = _text(folder / PREDICTIONS_FILE).split("\n")  # splitlines() would also cut at a U+2028 in an answer
    try:
        predictions = [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise VPruneError(f"{folder / PREDICTIONS_FILE} is broken ({error}); rerun with overwrite=true") from error
    return Run(folder, config, metrics, predictions)


def load_runs(folder: str | Path) -> list[Run]:
    """Every finished run in `folder` and below, in the order of their paths, with retention filled in where it can be.

    Folders without `metrics.json` (unfinished, or no runs at all) are passed over. Raises VPruneError if `folder` does
    not exist or a run's file is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VPruneError(f"{folder} is not a folder")
    found = sorted(path.parent for path in folder.rglob(METRICS_FILE) if (path.parent / CONFIG_FILE).is_file())
    runs = [load_run(path) for path in found]
    return [with_retention(run, runs) for run in runs]


def siblings(folder: Path) -> list[Run]:
    """The finished `full` runs beside `folder`; what is no readable run is passed over."""
    found = []
    for path in sorted(folder.parent.glob(f"*/{METRICS_FILE}")):
        try:
            if path.parent != folder and _json(path).get("method") == "full":
                found.append(load_run(path.parent))
        except (VPruneError, AttributeError):
            continue
    return found


def with_retention(run: Run, others: Iterable[Run]) -> Run:
    """`run` with its retention, if `others` has a `full` run of the same samples; else unchanged."""
    if run.metrics.get("retention") is not None:
        return run
    value = retention(run, [run, *others])
    return run if value is None else replace(run, metrics={**run.metrics, "retention": value})


def score(metrics: Mapping[str, Any]) -> float:
    """What the benchmark's published tables state (MME's sum, say): its own `score`, else the accuracy."""
    own = metrics.get("score")
    return float(metrics["accuracy"] if own is None else own)


def retention(run: Run, others: Sequence[Run]) -> float | None:
    """Score / score of the `full` run of the same model, benchmark, seed and samples; None without one.

    Of several, the one told most alike (engine, dtype, batch size) counts; one that is never right gives no ratio.
    """
    ids = [row["id"] for row in run.predictions]
    alike = [
        other
        for other in others
        if other.metrics.get("method") == "full"
        and all(other.config.get(key) == run.config.get(key) for key in _SAME_TASK)
        and [row["id"] for row in other.predictions] == ids
    ]
    nearest = min(alike, key=lambda other: len(differences(other.config, run.config)), default=None)
    if nearest is None or not score(nearest.metrics):
        return None
    return score(run.metrics) / score(nearest.metrics)


def read_config(path: Path) -> dict[str, Any]:
    """A run's `config.yaml`; VPruneError if it is missing or broken."""
    try:
        config = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise VPruneError(f"{path} is not YAML ({error})") from error
    if not isinstance(config, dict):
        raise VPruneError(f"{path} is not the configuration of a run")
    return config


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two configurations disagree about, one "key: A there, B here" each; mere matters of speed left out."""
    found = []
    for key in dict.fromkeys([*there, *here]):
        if f"{prefix}{key}" in _NO_MATTER:
            continue
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise VPruneError(f"{path} is not JSON ({error})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VPruneError(f"{path} cannot be read ({error})") from error
