"""Any folder of questions about images as training material: the answers are the model's own."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch

from vprune.errors import VPruneError
from vprune.eval.batches import draw
from vprune.eval.benchmarks.folder import Folder
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.models import LoadedModel, ModelChoice, load
from vprune.eval.predictor import Predictor, Prepared
from vprune.models.anatomy import dissect
from vprune.training.prompts import Answered, with_answers

ANSWERS = "answers.jsonl"
LONGEST = 64
"""Tokens of an answer, at most."""
_ASKED_AT_ONCE = 32  # questions: training steps take as many as fit, and answering holds a cache for each of them
_HELD_OUT = 0.05  # of the questions, at least one: what progress is measured on


def load_model(name: str, device: str) -> LoadedModel:
    """A model to learn from, its weights fixed, in float32 where it is small and bfloat16 elsewhere.

    Raises:
        VPruneError: it cannot be had.
    """
    loaded = load(ModelChoice(path=name, device=device))
    loaded.model.requires_grad_(False)
    return loaded


def drawn(folder: str, limit: int | None) -> tuple[Folder, list[Sample]]:
    """A folder of questions, and those of them that are asked.

    Raises:
        VPruneError: no such folder, images that are missing, or fewer than two questions.
    """
    try:
        benchmark = Folder(folder)
    except VPruneError as error:
        raise VPruneError(f"questions={folder}: {error}") from error
    samples = draw(list(benchmark.samples), limit, 0)
    if len(samples) < 2:
        raise VPruneError(
            f"questions={folder} limit={limit}: {len(samples)} of {len(benchmark.samples)} questions, and at "
            "least 2 are needed, one to learn from and one to measure on"
        )
    return benchmark, samples


class Questions:
    """Samples of a folder with the answers that a model gives to them, written to `answers.jsonl` on the way.

    `train` are the samples to learn from, `kept` those that training does not see.

    Raises:
        VPruneError: no such folder, images that are missing, or fewer than two questions.
    """

    def __init__(self, loaded: LoadedModel, folder: str, limit: int | None, out: Path) -> None:
        self.loaded = loaded
        self.benchmark, samples = drawn(folder, limit)
        held = max(1, int(_HELD_OUT * len(samples)))
        self.train, self.kept = samples[:-held], samples[-held:]
        self.predictor = Predictor(loaded, self.benchmark, max_new_tokens=LONGEST)
        self.file = out / ANSWERS
        self._answers = _read(self.file)

    def batches(self, size: int, seed: int, skip: int) -> Iterator[Answered]:
        """Batches for ever, the same ones in the same order round after round, from the `skip`-th on."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [[self.train[index] for index in order[first : first + size]] for first in range(0, len(order), size)]
        return self._answered(parts[number % len(parts)] for number in count(skip))

    def held_out(self, size: int) -> Iterator[Answered]:
        """The questions that training does not see."""
        return self._answered(self.kept[first : first + size] for first in range(0, len(self.kept), size))

    def _answered(self, parts: Iterable[Sequence[Sample]]) -> Iterator[Answered]:
        tokenizer = self.loaded.processor.tokenizer
        for prepared in self._prepared(parts):
            samples = prepared.samples
            silent = [sample for sample in samples if sample.id not in self._answers]
            for first in range(0, len(silent), _ASKED_AT_ONCE):
                self._ask(silent[first : first + _ASKED_AT_ONCE])
            inputs: Any = prepared.inputs.to(self.loaded.device, dtype=self.loaded.model.dtype)
            yield with_answers(dict(inputs), [self._answers[one.id] for one in samples], int(tokenizer.pad_token_id))

    def _prepared(self, parts: Iterable[Sequence[Sample]]) -> Iterator[Prepared]:
        """Batches as the model takes them: threads load and resize pictures while the model is busy with others."""
        threads = 1 if self.loaded.device.type == "cpu" else 2
        coming, waiting, ahead = iter(parts), deque[Future[Prepared]](), 1
        pool = ThreadPoolExecutor(threads, thread_name_prefix="vprune-prepare")
        try:
            while True:
                while len(waiting) < ahead and (samples := next(coming, None)) is not None:
                    waiting.append(pool.submit(self.predictor.prepare, samples))
                if not waiting:
                    return
                yield waiting.popleft().result()
                ahead = threads + 1  # (not before: whoever wants one batch alone need not wait for others)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _ask(self, samples: Sequence[Sample]) -> None:
        """Have the model answer, greedily, up to and with the token that ends it."""
        model, tokenizer = self.loaded.model, self.loaded.processor.tokenizer
        inputs: Any = self.predictor.prepare(samples).inputs.to(self.loaded.device, dtype=model.dtype)
        said = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        anatomy = dissect(model)
        placeholders = set(anatomy.token_ids)  # said by a model, they stand for no picture
        silence = next((end for end in (*anatomy.ends, tokenizer.eos_token_id) if end is not None), None)
        with self.file.open("a", encoding="utf-8") as file:
            for sample, row in zip(samples, said.tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(row) if token in anatomy.ends), len(row))
                said_before = next((place for place, token in enumerate(row) if token in placeholders), end)
                words = row[: min(end, said_before)] or [tokenizer.pad_token_id if silence is None else silence]
                self._answers[sample.id] = words
                file.write(json.dumps({"id": sample.id, "tokens": words}) + "\n")


def _read(file: Path) -> dict[str, list[int]]:
    """Answers given before, by the ids of their samples; a last line that was cut short is one not given."""
    answers: dict[str, list[int]] = {}
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            file.write_text("".join(whole), encoding="utf-8")  # or the next one would go on in the middle of it
        answers = {row["id"]: row["tokens"] for row in map(json.loads, whole)}
    return answers
