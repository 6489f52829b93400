"""`engine=ray`: the same batches on Ray Data's actor pool, a model in every worker, written in the same order."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError
from vprune.eval import environment, models
from vprune.eval.engines.engine import Answered, Session, Task
from vprune.eval.engines.local import attached, load_model, make_predictor
from vprune.eval.engines.pool import Pool, spread
from vprune.eval.predictor import Answer, Predictor
from vprune.eval.settings import Job


@dataclass(frozen=True)
class RayData(Pool):
    """Workers of a `Pool`, each with the model; see conf/engine/ray.yaml for the fields."""

    attention: str = "sdpa"

    @contextmanager
    def open(self, task: Task) -> Iterator[Session]:
        """Start the workers, and wait for the first answer: only then is it known what they run on."""
        pool = Pool(**{one.name: getattr(self, one.name) for one in fields(Pool)})
        orders = [[sample.id for sample in batch] for batch in task.batches]
        coming = spread(pool, partial(Desk, _portable(task.job, self.gpus), task.benchmark.fingerprint), orders)
        first = next(coming)
        started = time.perf_counter() - first[1].seconds["total"]
        facts = {**first[1].facts, "command": environment.command(), "workers": asdict(pool)}
        try:
            yield Session(facts, _in_order(chain([first], coming), started))
        finally:
            coming.close()


@dataclass(frozen=True)
class Outcome:
    """What a worker returns for a batch: answers, seconds by part, and the surroundings they came about in."""

    answers: list[Answer]
    seconds: dict[str, float]
    facts: dict[str, Any]


class Desk:
    """A worker's model and benchmark, loaded once; called with the ids of a batch.

    Raises VPruneError if its samples are not those of the process that asks, and for every mistake of the run.
    """

    def __init__(self, job: Job, fingerprint: str) -> None:
        from transformers.utils import logging

        from vprune.eval.run import load_benchmark, load_method_of

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        benchmark = load_benchmark(json.dumps(job.config["benchmark"]), str(job.shared))
        if benchmark.fingerprint != fingerprint:
            raise VPruneError(
                f"the worker on {platform.node()} has another version of benchmark={benchmark.name} "
                f"({benchmark.fingerprint}) than this process ({fingerprint}): give all of them the same files"
            )
        self._samples = {sample.id: sample for sample in benchmark.samples}
        loaded = load_model(job.model_choice)
        self._facts = environment.describe(loaded.device, loaded.dtype, loaded.revision)
        task = Task(job, benchmark, load_method_of(job), ())
        # The pruning stays on for the life of the worker: nothing else uses its model.
        pruning = attached(job, task.method, loaded.model).__enter__()
        self._predictor: Predictor = make_predictor(task, loaded, pruning, one_of_many=True)

    def __call__(self, ids: list[str]) -> Outcome:
        """The answers to one batch."""
        self._predictor.take_seconds()
        (answers,) = self._predictor.run([[self._samples[one] for one in ids]], workers=1)
        return Outcome(answers, self._predictor.take_seconds(), self._facts)


def _portable(job: Job, gpus: float | None) -> Job:
    """The job with paths that hold in another working directory, and without a GPU where workers are to have none."""
    model = dict(job.config["model"])
    if model["path"] != models.EMBEDDED:
        model["path"] = models.resolve(model["path"])
    # Not every version of Ray hides the GPUs from a worker that asks for none.
    device = "cpu" if gpus == 0 and job.config["device"] == "auto" else job.config["device"]
    return replace(job, config={**job.config, "model": model, "device": device}, shared=Path(job.shared).resolve())


def _in_order(coming: Iterator[tuple[int, Outcome]], started: float) -> Iterator[Answered]:
    """Outcomes as `Answered` in the order of the batches; one that is ready too early waits here.

    The seconds of parts are added up over the workers; the total is the time that passed here.
    """
    early: dict[int, Outcome] = {}
    kinds: set[tuple[str, str]] = set()
    due = 0
    for place, outcome in coming:
        early[place] = outcome
        kinds.add((str(outcome.facts["device"]).partition(":")[0], str(outcome.facts["dtype"])))
        if len(kinds) > 1:
            told = " and ".join(f"{device} in {dtype}" for device, dtype in sorted(kinds))
            raise VPruneError(f"the workers do not run alike ({told}): say device= and dtype=")
        while due in early:
            ready = early.pop(due)
            if due == 0 and len(ready.answers) > 1 and all(answer.error for answer in ready.answers):
                # As engine=local does: a first batch that fails as a whole is no sample's fault.
                raise RuntimeError(f"every sample of the first batch failed: {ready.answers[0].error}")
            now = time.perf_counter()
            yield Answered(ready.answers, {**ready.seconds, "total": now - started})
            started = now
            due += 1
