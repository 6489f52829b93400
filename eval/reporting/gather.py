"""Runs on disk -> sections in which everything may be compared, and a list of what could not be read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vprune.errors import VPruneError
from vprune.eval.reporting.sections import FULL, Entry, Gathered, Section
from vprune.eval.reporting.variants import variant
from vprune.eval.results import CONFIG_FILE, METRICS_FILE, PREDICTIONS_FILE, Run, load_run, score

_PREDICTION = {"id", "kind", "question", "answer", "prediction", "correct"}


def gather(folder: Path) -> Gathered:
    """Read every run in `folder` and below.

    Raises VPruneError if `folder` does not exist or holds no finished run; broken runs beside sound ones are collected.
    """
    if not folder.is_dir():
        raise VPruneError(f"{folder} is not a folder; name the one that `vprune eval` wrote to (out=DIR)")
    runs: list[Run] = []
    unfinished: dict[str, str] = {}
    broken: dict[str, str] = {}
    files = (path for name in (CONFIG_FILE, METRICS_FILE, PREDICTIONS_FILE) for path in folder.rglob(name))
    for path in sorted({file.parent for file in files}):
        name = path.relative_to(folder).as_posix()
        if not (path / METRICS_FILE).is_file():
            if (path / PREDICTIONS_FILE).is_file():
                answered = (path / PREDICTIONS_FILE).read_bytes().count(b"\n")
                unfinished[name] = f"{answered} questions answered so far; the same command goes on from there"
            continue
        try:
            runs.append(_checked(load_run(path)))
        except VPruneError as error:
            broken[name] = str(error)
    if not runs:
        reasons = [f"{name}: {why}" for name, why in (unfinished | broken).items()]
        why = ": " + "; ".join(reasons) if reasons else "; run `vprune eval` first"
        raise VPruneError(f"{folder} holds no finished run{why}")
    return Gathered(folder, tuple(_sections(runs, folder)), unfinished, broken)


def _checked(run: Run) -> Run:
    where, remedy = run.folder / METRICS_FILE, "rerun with overwrite=true"
    for key in ("accuracy", "tokens_before", "tokens_after", "samples"):
        value = run.metrics.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise VPruneError(f"{where}: {key} should be a number, got {value!r}; {remedy}")
    for key in ("method", "model", "benchmark"):
        if not isinstance(run.metrics.get(key), str):
            raise VPruneError(f"{where}: {key} should be a name, got {run.metrics.get(key)!r}; {remedy}")
    keep = run.metrics.get("keep")
    if not isinstance(keep, int | float) or isinstance(keep, bool):
        raise VPruneError(f"{where}: keep should be a number, got {keep!r}; {remedy}")
    said, held = run.metrics["samples"], len(run.predictions)
    if said != held or not held:
        raise VPruneError(f"{where} speaks of {said} samples, {PREDICTIONS_FILE} holds {held}; {remedy}")
    for number, row in enumerate(run.predictions, start=1):
        if not isinstance(row, dict) or not row.keys() >= _PREDICTION:
            raise VPruneError(f"{run.folder / PREDICTIONS_FILE}, line {number}: not a prediction; {remedy}")
    return run


class _Task(NamedTuple):
    """What runs must share to be compared; `weights` and `questions` are checksums."""

    model: str
    weights: str
    benchmark: str
    blank: bool
    questions: str
    samples: int

    @classmethod
    def of(cls, run: Run) -> _Task:
        weights = str(_mapping(run.config.get("fingerprint")).get("model"))
        blank = bool(run.config.get("blank"))
        return cls(_model(run), weights, run.metrics["benchmark"], blank, _fingerprint(run), len(run.predictions))

    def differences(self, other: _Task) -> list[str]:
        """In what another task differs, in words."""
        found = [f"of {other.model}"] if other.model != self.model else []
        if other.weights != self.weights and not found:
            checksums = f"{other.weights[:8]}, not {self.weights[:8]}"
            found.append(f"of other files of the model ({checksums}; a card that was edited counts)")
        found += [f"on {other.benchmark}"] if other.benchmark != self.benchmark else []
        found += [f"with images{'' if other.blank else ' not'} blanked"] if other.blank != self.blank else []
        if other.questions != self.questions:
            numbers = (other.samples, self.samples)
            theirs, own = numbers if numbers[0] != numbers[1] else (other.questions[:8], self.questions[:8])
            found.append(f"of other questions ({theirs}, not {own})")
        return found


def _sections(runs: Iterable[Run], folder: Path) -> list[Section]:
    groups: dict[_Task, list[Run]] = {}
    for run in runs:
        groups.setdefault(_Task.of(run), []).append(run)
    baselines = {
        task: next(run for run in members if run.metrics["method"] == FULL)
        for task, members in groups.items()
        if any(run.metrics["method"] == FULL for run in members)
    }
    sections = []
    for task, members in groups.items():
        full = baselines.get(task)
        entries = [_entry(run, members, full, folder) for run in members]
        # Runs of one budget stay together, though one spends a token less than another.
        most = {entry.budget: max(one.share for one in entries if one.budget == entry.budget) for entry in entries}
        entries.sort(key=lambda entry: (not entry.is_full, -most[entry.budget], -entry.accuracy, entry.label))
        told = (task.model, task.benchmark, task.blank, task.samples, task.questions, tuple(entries))
        nearest = "" if full else _nearest(task, baselines, folder)
        sections.append(Section(*told, _apart(task, groups), nearest, task.weights))
    # The richest comparison first; blanked images, a control, last.
    return sorted(sections, key=lambda section: (section.blank, -len(section.entries), section.title, section.detail))


def _apart(task: _Task, tasks: Iterable[_Task]) -> str:
    """What tells a task from the others of the same title and as many questions."""
    same = [one for one in tasks if one._replace(weights=task.weights, questions=task.questions) == task]
    weights, questions = ({getattr(one, name) for one in same} for name in ("weights", "questions"))
    words = [f"model files {task.weights[:8]}"] if len(weights) > 1 else []
    return ", ".join([*words, *([f"set {task.questions[:8]}"] if len(questions) > 1 else [])])


def _nearest(task: _Task, baselines: Mapping[_Task, Run], folder: Path) -> str:
    """Why the full run that is most like those of a task is not their baseline; empty if there is no full run."""
    if not baselines:
        return ""
    other = min(baselines, key=lambda one: len(task.differences(one)))
    name = baselines[other].folder.relative_to(folder).as_posix()
    return f"the nearest full run, {name}, is {' and '.join(task.differences(other))}"


def _entry(run: Run, members: Sequence[Run], full: Run | None, folder: Path) -> Entry:
    metrics = run.metrics
    retention = metrics.get("retention")
    if full is not None and score(full.metrics):
        retention = score(metrics) / score(full.metrics)
    return Entry(
        run=run,
        name=run.folder.relative_to(folder).as_posix(),
        method=metrics["method"],
        variant=variant(run.config, [one.config for one in members if one.metrics["method"] == metrics["method"]]),
        keep=metrics["keep"],
        accuracy=metrics["accuracy"],
        stderr=metrics.get("accuracy_stderr") or 0.0,
        retention=retention,
        tokens_before=metrics["tokens_before"],
        tokens_after=metrics["tokens_after"],
        seconds=metrics.get("seconds"),
        by_kind=dict(metrics.get("accuracy_by_kind") or {}),
        needs_annotation=_needs_annotation(metrics["method"]),
        kind_errors=dict(metrics.get("accuracy_stderr_by_kind") or {}),
        overhead=_mapping(metrics.get("seconds_split")).get("prune"),
    )


@cache
def _needs_annotation(method: str) -> bool:
    from vprune.pruner import load_method

    try:
        return load_method(method).needs_evidence
    except VPruneError:  # a method of another version or of the user's own: nothing is known about it
        return False


def _model(run: Run) -> str:
    revision = _mapping(run.config.get("model")).get("revision")
    return f"{run.metrics['model']} @ {revision}" if revision else str(run.metrics["model"])


def _fingerprint(run: Run) -> str:
    """Hash of the questions asked and the answers expected."""
    asked = sorted((str(row["id"]), str(row["question"]), str(row["answer"])) for row in run.predictions)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
