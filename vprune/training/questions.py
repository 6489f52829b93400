"""Any folder of questions about images as training material: the answers are the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vprune.errors import VPruneError
from vprune.eval.batches import draw
from vprune.eval.benchmarks.folder import Folder
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.models import LoadedModel, ModelChoice, load
from vprune.eval.predictor import Predictor
from vprune.models.anatomy import dissect
from vprune.training.prompts import Answered, with_answers

_HELD_OUT = 0.05  # of the questions, at least one batch: what progress is measured on
_LONGEST = 64  # tokens of an answer


def load_model(name: str, device: str) -> LoadedModel:
    """A model to learn from, its weights fixed, in float32 where it is small and bfloat16 elsewhere.

    Raises:
        VPruneError: it cannot be had.
    """
    loaded = load(ModelChoice(path=name, device=device))
    loaded.model.requires_grad_(False)
    return loaded


class Questions:
    """Samples of a folder with the answers that a model gives to them, written to `answers.jsonl` on the way.

    Raises:
        VPruneError: no such folder, or fewer than two batches of questions.
    """

    def __init__(self, loaded: LoadedModel, folder: str, limit: int | None, out: Path) -> None:
        self.loaded = loaded
        self.benchmark = Folder(folder)
        self.samples = draw(list(self.benchmark.samples), limit, 0)
        self.file = out / "answers.jsonl"
        self.predictor = Predictor(loaded, self.benchmark, max_new_tokens=_LONGEST)
        self._answers: dict[str, list[int]] = {}
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            self._answers = {row["id"]: row["tokens"] for row in map(json.loads, lines)}
        if len(self.samples) < 2:
            raise VPruneError(f"questions={folder} holds {len(self.samples)} questions: at least 2 are needed")

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int, seed: int, skip: int) -> Iterator[Answered]:
        """Batches for ever, the same ones in the same order, from the `skip`-th on."""
        train = self.samples[: -self._held()]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        number = skip
        while True:
            yield self._batch([train[index] for index in parts[number % len(parts)]])
            number += 1

    def held_out(self, size: int) -> Iterator[Answered]:
        """The questions that training does not see."""
        kept = self.samples[-self._held() :]
        for first in range(0, len(kept), size):
            yield self._batch(kept[first : first + size])

    def _held(self) -> int:
        return max(1, int(_HELD_OUT * len(self.samples)))

    def _batch(self, samples: Sequence[Sample]) -> Answered:
        inputs = self.predictor.prepare(samples).inputs
        moved: Any = inputs.to(self.loaded.device, dtype=self.loaded.model.dtype)
        if any(sample.id not in self._answers for sample in samples):
            self._ask(samples, moved)
        pad = int(self.loaded.processor.tokenizer.pad_token_id)
        return with_answers(dict(moved), [self._answers[sample.id] for sample in samples], pad)

    @torch.no_grad()
    def _ask(self, samples: Sequence[Sample], inputs: Any) -> None:
        """Have the model answer, greedily, up to and with the token that ends it."""
        model = self.loaded.model
        said = model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        placeholders = set(dissect(model).token_ids)  # said by a model, they stand for no picture
        with self.file.open("a", encoding="utf-8") as file:
            for sample, row in zip(samples, said.tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
                said_before = next((place for place, token in enumerate(row) if token in placeholders), end)
                words = row[: min(end, said_before)] or [self.loaded.processor.tokenizer.eos_token_id]
                self._answers[sample.id] = words
                file.write(json.dumps({"id": sample.id, "tokens": words}) + "\n")
