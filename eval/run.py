"""One run: every question of a benchmark put to a model, pruned by a method, and its answers written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from rich.console import Console

from vprune.errors import VPruneError
from vprune.eval import batches as batching
from vprune.eval import models
from vprune.eval.benchmarks.sample import Benchmark, Sample
from vprune.eval.console import progress
from vprune.eval.engines.engine import Engine, Task, make_engine
from vprune.eval.engines.local import load_model as load_model  # the gallery answers with the same one
from vprune.eval.metrics import summarise
from vprune.eval.predictor import Answer
from vprune.eval.results import Run, siblings, with_retention
from vprune.eval.run_folder import RunFolder
from vprune.eval.settings import PRUNING_OPTIONS, Job
from vprune.models.foreseen import foresee

_MANY = 1000  # questions that are worth a warning where they take their time


@dataclass(frozen=True)
class Plan:
    """A job with everything about it that can be wrong checked, before any model is loaded."""

    job: Job
    benchmark: Benchmark
    batches: list[list[Sample]]
    folder: RunFolder
    method: Any
    engine: Engine


def plan(job: Job) -> Plan:
    """Read the benchmark, make the method, look into the output folder.

    Raises VPruneError for whatever of it is a mistake; nothing has been written by then, except a freshly drawn split.
    """
    engine = make_engine(job.config["engine"])
    method = load_method_of(job)
    path = job.config["model"]["path"]
    models.resolve(path)
    benchmark = load_benchmark(json.dumps(job.config["benchmark"]), str(job.shared))
    if method is not None and method.needs_evidence and not benchmark.has_evidence:
        raise VPruneError(
            f"method={job.method} needs to know which objects each answer rests on, and benchmark={benchmark.name} has "
            "no objects.json that says so; use benchmark=scenes, or another method"
        )
    fingerprints = {"model": models.fingerprint(path), "benchmark": benchmark.fingerprint}
    folder = RunFolder(job.folder, {**job.config, "fingerprint": fingerprints}, job.overwrite)
    folder.check()
    samples = batching.draw(benchmark.samples, job.config["limit"], job.config["seed"])
    return Plan(job, benchmark, batching.form(samples, job.config["batch_size"]), folder, method, engine)


def carry_out(plan: Plan, console: Console, place: str = "") -> Run:
    """Do what is left of a planned run, and return it whole; a finished one is only read.

    `place` says where the run stands in a sweep, for the progress bar.

    Raises VPruneError for mistakes that show only at the model, such as a keep larger than an image has tokens.
    """
    run = plan.folder.finished(plan.batches)
    if run is not None:
        console.print(f"{plan.job.folder} is finished; overwrite=true would run it again", soft_wrap=True)
    else:
        run = _continue(plan, console, f"{place} {plan.job.method} {plan.job.config['keep']}".lstrip())
    filled = with_retention(run, siblings(plan.job.folder))
    return plan.folder.finish(filled.metrics) if filled is not run else run


def forget() -> None:
    """Let go of the model and the benchmarks kept for a sweep: their files may change before the next one."""
    load_model.cache_clear()
    load_benchmark.cache_clear()


def load_method_of(job: Job) -> Any:
    """The `Pruner` that a job asks for; None for method=full."""
    if job.method == "full":
        return None
    from vprune.pruner import load_method

    return load_method(job.method_source, **job.method_options)


@lru_cache(maxsize=4)
def load_benchmark(config: str, shared: str) -> Benchmark:
    """The benchmark that a JSON `config` describes; splits drawn anew go below the folder `shared`."""
    settings = json.loads(config)
    if "cache" in settings:
        settings["cache"] = settings["cache"] or shared
    try:
        benchmark: Benchmark = instantiate(settings)
    except HydraException as error:
        if isinstance(error.__cause__, VPruneError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise VPruneError(f"the benchmark cannot be made from {config}: {reason}") from error
    return benchmark


def _continue(plan: Plan, console: Console, label: str) -> Run:
    config = plan.job.config
    done, rows, size = plan.folder.batches_done(plan.batches)
    left = plan.batches[done:]
    if not left:  # killed between its last batch and its metrics
        with plan.folder.writing(size, {}) as writer:
            return plan.folder.finish(_metrics(plan, rows, writer.seconds))
    if plan.method is not None and not plan.benchmark.has_video:
        foresee(models.resolve(config["model"]["path"]), config["model"]["revision"]).refuse(plan.method)
    total = sum(map(len, plan.batches))
    with ExitStack() as stack:
        with console.status(f"loading {config['model']['name']}"):
            session = stack.enter_context(plan.engine.open(Task(plan.job, plan.benchmark, plan.method, left)))
        if done:
            plan.folder.check_surroundings(session.facts)
        writer = stack.enter_context(plan.folder.writing(size, session.facts))
        # (Of several workers, or of a GPU's first batch, no time can be told ahead.)
        patient = session.facts["device"] == "cpu" and "workers" not in session.facts
        if patient and config["limit"] is None and total - len(rows) > _MANY:
            console.print(
                f"{total:,} questions on a CPU; for a first look, limit=256 asks a draw of them", soft_wrap=True
            )
        right = sum(row["correct"] for row in rows)
        meter = stack.enter_context(progress(console, label, total, len(rows), right))
        for batch, answered in zip(left, session.answered, strict=True):
            fresh = [
                _row(plan.benchmark, sample, answer) for sample, answer in zip(batch, answered.answers, strict=True)
            ]
            writer.append(fresh, answered.seconds)
            rows += fresh
            meter.advance(len(fresh), sum(row["correct"] for row in fresh))
            minutes = answered.seconds.get("total", 0.0) / len(fresh) * (total - len(rows)) / 60
            if patient and batch is left[0] and minutes > 1:
                console.print(f"{label}: about {minutes:.0f} minutes to go", soft_wrap=True)
        seconds = writer.seconds
    return plan.folder.finish(_metrics(plan, rows, seconds))


def _row(benchmark: Benchmark, sample: Sample, answer: Answer) -> dict[str, Any]:
    row = {
        "id": sample.id,
        "kind": sample.kind,
        "question": sample.question,
        "answer": sample.answer,
        "prediction": answer.text,
        "correct": 0.0 if answer.error else benchmark.score(sample, answer.text),
        "tokens_before": answer.tokens_before,
        "tokens_after": answer.tokens_after,
    }
    return row | ({"error": answer.error} if answer.error else {})


def _metrics(plan: Plan, rows: Sequence[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    config = plan.job.config
    return {
        **summarise(rows),
        **plan.benchmark.metrics(rows),
        "retention": None,
        "method": plan.job.method,
        "keep": config["keep"],
        "options": {key: config[key] for key in PRUNING_OPTIONS if config[key] is not None},
        "model": config["model"]["name"],
        "benchmark": plan.benchmark.name,
        "seed": config["seed"],
        "blank": config["blank"],
        "seconds": seconds.pop("total", 0.0),
        "seconds_split": seconds,
    }
