"""Answers written by any model, scored by a benchmark: one JSON object a line with the id and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import Row, read_rows
from vprune.eval.benchmarks.sample import Benchmark
from vprune.eval.metrics import summarise


def score_file(benchmark: Benchmark, path: str | Path) -> dict[str, Any]:
    """The metrics of the answers in a JSON or JSONL file: accuracy and the benchmark's own figures.

    Each row has the sample's `id` (or `question_id`) and its `prediction`, `answer` or `text`. Files without ids, as
    POPE's own, answer the questions in their order.

    Raises VPruneError for a row that lacks its answer, names no sample, or names one twice, and for samples left out.

    Example:
        >>> score_file(Pope(path="coco_pope_random.json", check_images=False), "answers.jsonl")  # doctest: +SKIP
        {'samples': 3000, 'accuracy': 0.5, 'f1': 0.667, 'yes_ratio': 1.0, ...}
    """
    rows = list(read_rows(Path(path)))
    ordered = not any(row.has("id") or row.has("question_id") for row in rows)
    if ordered and len(rows) != len(benchmark.samples):
        raise VPruneError(
            f"{path} answers {len(rows)} questions in order, {benchmark.name} has {len(benchmark.samples)}"
        )
    ids = [sample.id for sample in benchmark.samples]
    short = _short_ids(ids)
    said: dict[str, str] = {}
    for row, in_order in zip(rows, ids if ordered else [""] * len(rows), strict=True):
        name = in_order or _id(row, short)
        if name in said:
            raise VPruneError(f"{row}: sample {name!r} was answered already")
        said[name] = row.text("prediction", "answer", "text") if _filled(row) else ""
    left = [name for name in ids if name not in said]
    if left:
        raise VPruneError(f"{path} leaves {len(left)} of {len(ids)} samples out, {left[0]!r} the first of them")
    return score_answers(benchmark, said)


def score_answers(benchmark: Benchmark, said: Mapping[str, str]) -> dict[str, Any]:
    """The metrics of answers by sample id, over the samples that have one."""
    rows = [
        {
            "id": sample.id,
            "kind": sample.kind,
            "answer": sample.answer,
            "prediction": said[sample.id],
            "correct": benchmark.score(sample, said[sample.id]),
            "tokens_before": None,
            "tokens_after": None,
        }
        for sample in benchmark.samples
        if sample.id in said
    ]
    summary = {key: value for key, value in summarise(rows).items() if not key.startswith("tokens_")}
    return summary | benchmark.metrics(rows)


def _short_ids(ids: list[str]) -> dict[str, str]:
    """Sample ids by themselves, and by what follows the subset's name where that is clear ("random-17": "17")."""
    short: dict[str, str] = {}
    doubtful = set()
    for name in ids:
        end = name.rpartition("-")[2]
        if end in short:
            doubtful.add(end)
        short[end] = name
    return {end: name for end, name in short.items() if end not in doubtful} | {name: name for name in ids}


def _id(row: Row, known: Mapping[str, str]) -> str:
    name = row.text("id", "question_id")
    if name not in known:
        raise row.error(
            "id" if row.has("id") else "question_id", f"names {name!r}, which is no sample of the benchmark"
        )
    return known[name]


def _filled(row: Row) -> bool:
    fields = ("prediction", "answer", "text")
    if not any(field in row.values for field in fields):
        raise row.missing(*fields)
    return any(row.has(field) for field in fields)  # an empty answer is an answer
