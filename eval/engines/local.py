"""`engine=local`: the model in this process, batches prepared on threads ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vprune.eval import environment, models
from vprune.eval.engines.engine import Answered, Session, Task
from vprune.eval.predictor import Predictor
from vprune.eval.settings import Job

load_model = lru_cache(maxsize=1)(models.load)  # a sweep keeps its model; two large ones would not fit side by side


@dataclass(frozen=True)
class Local:
    """Hugging Face generate in this process; see conf/engine/local.yaml for the fields."""

    attention: str = "sdpa"
    workers: int | None = None

    @contextmanager
    def open(self, task: Task) -> Iterator[Session]:
        """Load the model (once for all runs of a sweep) and prune it while the session lasts."""
        loaded = load_model(task.job.model_choice)
        facts = environment.describe(loaded.device, loaded.dtype, loaded.revision)
        own = getattr(task.benchmark, "predictor", None)  # of benchmarks whose answers are masks
        if own is not None:
            yield Session(facts, self._answers(own(loaded, task.method), task))
            return
        with attached(task.job, task.method, loaded.model) as pruning:
            yield Session(facts, self._answers(make_predictor(task, loaded, pruning), task))

    def _answers(self, predictor: Predictor, task: Task) -> Iterator[Answered]:
        for answers in predictor.run(task.batches, self.workers):
            yield Answered(answers, predictor.take_seconds())


def attached(job: Job, method: Any, model: Any) -> AbstractContextManager[Any]:
    """The pruning of `model` by `method` (None: as it is) while the block lasts."""
    if method is None:
        return nullcontext()
    from vprune.attach import prune

    return prune(model, method=method, keep=job.config["keep"])


def make_predictor(task: Task, loaded: models.LoadedModel, pruning: Any, one_of_many: bool = False) -> Predictor:
    """What answers the task's batches; `one_of_many`: so do others, and its own first batch is not the run's."""
    return Predictor(
        loaded,
        task.benchmark,
        task.job.config["max_new_tokens"],
        pruning=pruning,
        wants_evidence=task.method is not None and task.method.needs_evidence,
        blank=task.job.config["blank"],
        one_of_many=one_of_many,
    )
