"""Watching what stays of a model's answers under pruning, so that a scorer learns how many tokens a question needs."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vprune.errors import VPruneError
from vprune.records import Grid, Prefill, VisualTokens
from vprune.scoring.learned import Features
from vprune.scoring.network import ScorerConfig, ScorerNetwork, same_grid, summary
from vprune.training.demand import HELD_OUT, LEAST, learn, observe
from vprune.training.effect import Budgeting, answer_logits, gate, gated_states
from vprune.training.prompts import Answered, Painted
from vprune.training.questions import Questions

EVALUATION_SEED = 1_000_003
DEMAND_SEED = 2_000_003  # added to the run's: other scenes than those that it learnt from

_EVALUATED = 4  # batches
_AT_ONCE_ON_A_CPU = 16  # questions measured on: more would take longer than the training between two measurements


@dataclass(frozen=True)
class Summarised:
    """A batch of prompts: the images of each grid with their rows [I, N, D] and scores [I, N]; summaries [B, S]."""

    prefill: Prefill
    scored: list[tuple[list[VisualTokens], Tensor, Grid, Tensor]]
    summaries: Tensor


class Watching(ABC):
    """The part of a training run that comes after the scores are learnt."""

    config: DictConfig
    model: Any
    network: ScorerNetwork
    average: dict[str, Tensor]
    questions: Questions | None
    painted: bool
    compiled: bool
    device: torch.device
    batch_size: int

    @abstractmethod
    def batches(
        self, skip: int, size: int | None = None, seed: int | None = None, kinds: Sequence[float] | None = None
    ) -> Iterator[Answered]:
        """Questions with their answers, from the `skip`-th batch on."""

    @abstractmethod
    def read(self, batch: Answered) -> tuple[Prefill, Features]:
        """What the decoder and the network read of a batch."""

    @abstractmethod
    def hard(self, keep: float) -> Budgeting:
        """A budget as pruning spends it."""

    @abstractmethod
    def autocast(self) -> Any:
        """Half precision on a GPU."""

    @abstractmethod
    def log(self, **row: Any) -> None:
        """Add a line to log.jsonl."""

    @property
    def workers(self) -> int:
        """Processes that draw scenes."""
        return 0 if self.device.type == "cpu" else max(0, (os.cpu_count() or 1) // 2)

    def held_out(self) -> list[Answered]:
        """What progress is measured on."""
        if not hasattr(self, "_kept"):
            source: Iterator[Answered]
            size = min(self.batch_size, _AT_ONCE_ON_A_CPU) if self.device.type == "cpu" else self.batch_size
            if self.questions is not None:
                source = self.questions.held_out(size)
            else:
                source = iter(Painted(EVALUATION_SEED, size, "test", self.device, 1))
            self._kept = [batch for batch, _ in zip(source, range(_EVALUATED), strict=False)]
        return self._kept

    @property
    def learns_demand(self) -> bool:
        """True where answers are watched under pruning; models that are taught by relevance alone cannot be."""
        enough = self.questions is None or len(self.questions.train) >= LEAST
        return bool(self.config.demand.count) and self.config.objective != "relevance" and enough

    def learn_demand(self) -> None:
        """With the averaged weights, watch what stays of answers at some budgets, and teach a head to foretell it.

        The questions are others than those that the scores were learnt from, where they are painted.
        """
        from vprune.training.vlm import progress_bar

        if not self.learns_demand:
            if self.config.objective == "demand":
                assert self.questions is not None
                count = len(self.questions.train)
                raise VPruneError(f"objective=demand: {count} questions to learn from, and at least {LEAST} are needed")
            return
        wanted, started = self.config.demand, time.perf_counter()
        own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        count = int(wanted.count) if self.questions is None else len(self.questions.train)
        with progress_bar() as bar:
            task = bar.add_task("watch answers", total=count, note="")
            coming = self._watched()

            def in_time() -> Iterator[tuple[Tensor, Tensor]]:
                while wanted.minutes is None or time.perf_counter() - started < 60 * wanted.minutes:
                    yield next(coming)

            observed = observe(in_time(), count, lambda seen: bar.update(task, completed=seen))
        watched, shares = len(observed.stays), observed.stays.float().mean(0).tolist()
        self.log(
            stays_at={str(level): round(share, 4) for level, share in zip(wanted.levels, shares, strict=True)},
            watched=watched,
        )
        if watched < LEAST:
            print(
                f"{watched} answers were watched, and {LEAST} are needed to learn how many tokens a question needs: "
                "budget=question will be refused (give more demand.minutes, or demand.count=0)"
            )
            return
        observed, unseen = (observed, self._unseen(watched)) if self.painted else observed.split()
        learn(self.network, observed, unseen, int(wanted.rounds), float(wanted.lr), self.config.seed)
        head = {key: value for key, value in self.network.state_dict().items() if key.startswith("demand.")}
        self.average.update({key: value.clone() for key, value in head.items()})
        self.network.load_state_dict({**own, **head})

    @torch.no_grad()
    def _unseen(self, watched: int) -> Tensor:
        """Summaries [Q, S] of questions about photographs that no training sees."""
        seed, size = EVALUATION_SEED + DEMAND_SEED, self.batch_size
        each = min(int(self.config.optimizer.questions_per_image), size)
        weights = list(self.config.demand.kinds)
        batches = iter(Painted(seed, size, "test", self.device, each, self.workers, 0, weights))
        summaries: list[Tensor] = []
        while len(summaries) * size < HELD_OUT * watched:
            summaries.append(self._summarised(next(batches)).summaries.cpu())
        return torch.cat(summaries)

    def _summarised(self, batch: Answered) -> Summarised:
        """A batch as the network sees it."""
        prefill, features = self.read(batch)
        seen: dict[int, Tensor] = {}  # by sample; a question about several pictures is told by the last of them
        scored = []
        with self.autocast():
            for grid, numbers in same_grid([image.grid for image in prefill.images]).items():
                images = [prefill.images[number] for number in numbers]
                rows = features.rows(images)
                scores, channels, asked = self.network.seen(features.maps(images), grid, self.network.read(*rows))
                scored.append((images, rows[0], grid, scores.float()))
                told = summary(scores.float(), channels.float(), None if asked is None else asked.float())
                seen |= {image.sample: one for image, one in zip(images, told, strict=True)}
        return Summarised(prefill, scored, torch.stack([seen[sample] for sample in range(len(batch))]))

    @torch.no_grad()
    def _watched(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Summaries [B, S] of question after question, and [B, J]: what share of its answer stays at each level."""
        for batch in self.batches(0, seed=self.config.seed + DEMAND_SEED, kinds=self.config.demand.kinds):
            seen = self._summarised(batch)
            said, lengths = batch.inputs["input_ids"][batch.answer], batch.answer.sum(-1)
            owner = torch.arange(len(batch), device=self.device).repeat_interleave(lengths)
            stays = []
            with self.autocast():
                for level in self.network.config.levels:
                    how = self.hard(level)
                    gated = [(images, gate(scores, rows, grid, how)) for images, rows, grid, scores in seen.scored]
                    logits = answer_logits(self.model, gated_states(seen.prefill, gated, self.compiled), batch)
                    right = (logits.argmax(-1) == said).float()
                    stays.append(torch.zeros(len(batch), device=self.device).index_add(0, owner, right) / lengths)
            yield seen.summaries, torch.stack(stays, -1)


def start_from(network: ScorerNetwork, folder: str) -> ScorerConfig:
    """Give a network the weights of a finished scorer of the same shape, but for those that foretell demand.

    Returns what that scorer was built of.

    Raises:
        VPruneError: no scorer lies there, or its network is another.
    """
    before, own = ScorerNetwork.load(folder), network.state_dict()
    given = {key: value for key, value in before.state_dict().items() if not key.startswith("demand.")}
    differing = [key for key in given if key not in own or own[key].shape != given[key].shape]
    if differing or before.config.layer != network.config.layer:
        raise VPruneError(
            f"start_from={folder}: its network is another ({', '.join(differing) or 'it reads another layer'}); give "
            "the values of network.* that it was trained with"
        )
    network.load_state_dict({**own, **given})
    return before.config
