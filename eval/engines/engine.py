"""The nouns of an engine: what is left of a run to answer, and the answers as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from hydra.errors import HydraException
from hydra.utils import instantiate

from vprune.errors import VPruneError
from vprune.eval.benchmarks.sample import Benchmark, Sample
from vprune.eval.predictor import Answer
from vprune.eval.settings import Job


@dataclass(frozen=True)
class Task:
    """What is left of a run: the batches still to be answered; `method` is its `Pruner`, None for method=full."""

    job: Job
    benchmark: Benchmark
    method: Any
    batches: Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Answered:
    """The answers to one batch, and the seconds they took, by part; "total" is what the run as a whole took longer."""

    answers: list[Answer]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Session:
    """An engine at work: `facts` for `environment.json`, and one `Answered` a batch, in the order of the batches."""

    facts: Mapping[str, Any]
    answered: Iterator[Answered]


class Engine(Protocol):
    """Somewhere to answer questions. The answers must not depend on which engine gave them."""

    def open(self, task: Task) -> AbstractContextManager[Session]:
        """Load the model wherever it is to run, and answer; VPruneError for mistakes that show only there."""


def make_engine(config: Mapping[str, Any]) -> Engine:
    """The engine that a run's `engine` configuration describes.

    Raises VPruneError for a value out of range or an engine whose package is not installed.
    """
    try:
        engine: Engine = instantiate(dict(config))
    except HydraException as error:
        if isinstance(error.__cause__, VPruneError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise VPruneError(f"the engine cannot be made from {dict(config)}: {reason}") from error
    return engine
