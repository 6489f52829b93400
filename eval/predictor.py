"""Questions in, answers out: batches prepared on threads ahead of the model, samples that fail answered one by one."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.eval.benchmarks.sample import Benchmark, Sample
from vprune.eval.models import LoadedModel, visual_token_ids

_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Answer:
    """A model's answer to one sample, and the visual tokens it read; or the error that came instead."""

    text: str
    tokens_before: int | None
    tokens_after: int | None
    error: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A batch ready for the model: tensors on the CPU, left-padded."""

    samples: Sequence[Sample]
    inputs: Any
    evidence: list[NDArray[np.bool_] | None] | None


def _no_seconds() -> dict[str, float]:
    return {"wait": 0.0, "generate": 0.0, "prune": 0.0}


@dataclass
class Predictor:
    """Answers batches of samples with one model, greedily.

    `pruning` is an attached `vprune.Pruning`, or None for the model as it is; `blank` replaces each image by grey;
    `one_of_many` says that other predictors answer the same run, so that this one's first batch is not the run's.
    """

    loaded: LoadedModel
    benchmark: Benchmark
    max_new_tokens: int
    pruning: Any = None
    wants_evidence: bool = False
    blank: bool = False
    one_of_many: bool = False
    seconds: dict[str, float] = field(default_factory=_no_seconds)

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        self._answered = self.one_of_many
        self._thread = threading.local()
        self._visual_tokens = torch.tensor(visual_token_ids(self.loaded.model))
        self._generation = copy.deepcopy(self.loaded.model.generation_config)
        self._generation.update(
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_length=None,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.loaded.processor.tokenizer.pad_token_id,
        )

    def run(self, batches: Sequence[Sequence[Sample]], workers: int | None = None) -> Iterator[list[Answer]]:
        """The answers to each batch in turn, while `workers` threads (1 on a CPU, else 4) prepare the next."""
        on_cpu = self.loaded.device.type == "cpu"
        workers = workers or (1 if on_cpu else 4)
        waiting: deque[Future[Prepared | Exception]] = deque()
        ahead = iter(batches)
        with (
            _torch_threads(torch.get_num_threads() if on_cpu else 1),
            ThreadPoolExecutor(workers, thread_name_prefix="vprune-prepare") as pool,
        ):
            try:
                for samples in batches:
                    while len(waiting) < workers + 1 and (coming := next(ahead, None)) is not None:
                        waiting.append(pool.submit(self._try_prepare, coming))
                    started = time.perf_counter()
                    prepared = waiting.popleft().result()
                    self.seconds["wait"] += time.perf_counter() - started
                    yield self._answers(samples, prepared)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call: in all, waiting for prepared batches, generating, and of that pruning."""
        now = time.perf_counter()
        taken = {"total": now - self._since, **self.seconds}
        self._since, self.seconds = now, _no_seconds()
        return taken

    def prepare(self, samples: Sequence[Sample]) -> Prepared:
        """Load the images, write the prompts, process both; safe to call from several threads."""
        if not hasattr(self._thread, "processor"):  # a fast tokenizer cannot pad in two threads at once
            self._thread.processor = copy.deepcopy(self.loaded.processor)
        processor = self._thread.processor
        medium = "video" if self.benchmark.has_video else "image"
        pictures = [self._video(sample) if medium == "video" else self._image(sample) for sample in samples]
        prompts = [
            processor.apply_chat_template(
                _message(self.benchmark.prompt(sample), medium), add_generation_prompt=True, tokenize=False
            )
            for sample in samples
        ]
        given: dict[str, Any] = {f"{medium}s": pictures}
        given |= {"do_sample_frames": False} if medium == "video" else {}  # the benchmark has chosen them
        inputs = processor(**given, text=prompts, padding=True, return_tensors="pt")
        evidence = [self.benchmark.evidence_mask(sample) for sample in samples] if self.wants_evidence else None
        return Prepared(samples, inputs, evidence)

    @torch.no_grad()
    def answer(self, prepared: Prepared) -> list[Answer]:
        """Generate the answers to one batch."""
        model = self.loaded.model
        inputs = prepared.inputs.to(self.loaded.device, dtype=model.dtype)
        started = time.perf_counter()
        if self.pruning is not None and prepared.evidence is not None:
            self.pruning.evidence = prepared.evidence
        output = model.generate(**inputs, generation_config=self._generation)
        texts = self.loaded.processor.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        self.seconds["generate"] += time.perf_counter() - started
        before, after = self._count(prepared)
        return [Answer(text.strip(), b, a) for text, b, a in zip(texts, before, after, strict=True)]

    def _count(self, prepared: Prepared) -> tuple[list[int], list[int]]:
        """Visual tokens of each sample before and after pruning."""
        if self.pruning is None:
            ids = prepared.inputs["input_ids"]
            counts = torch.isin(ids, self._visual_tokens.to(ids.device)).sum(-1).tolist()
            return counts, counts
        before, after = [0] * len(prepared.samples), [0.0] * len(prepared.samples)
        for report in self.pruning.last:
            before[report.sample] += report.tokens_before
            after[report.sample] += report.mean_tokens  # methods that prune in stages: the mean over the layers
        self.seconds["prune"] += self.pruning.last.seconds
        return before, [round(tokens) for tokens in after]

    def _answers(self, samples: Sequence[Sample], prepared: Prepared | Exception) -> list[Answer]:
        """The answers to a batch, or if that fails those to each of its samples alone.

        When nothing has been answered yet and every sample of a batch fails, the fault is no sample's: it is raised.
        """
        try:
            if isinstance(prepared, Exception):
                raise prepared
            answers = self.answer(prepared)
        except VPruneError:
            raise
        except Exception as error:  # whatever a model's own code raises must not end the run
            if len(samples) == 1:
                return [Answer("", None, None, error=f"{type(error).__name__}: {error}")]
            if self.loaded.device.type == "cuda":
                torch.cuda.empty_cache()
            answers = [self._answers([sample], self._try_prepare([sample]))[0] for sample in samples]
            if not self._answered and all(answer.error for answer in answers):
                raise
        self._answered = True
        return answers

    def _try_prepare(self, samples: Sequence[Sample]) -> Prepared | Exception:
        try:
            return self.prepare(samples)
        except Exception as error:  # noqa: BLE001 - judged by the thread that waits for this batch
            return error

    def _image(self, sample: Sample) -> Image.Image:
        image = self.benchmark.load_image(sample)
        return Image.new("RGB", image.size, _GREY) if self.blank else image

    def _video(self, sample: Sample) -> NDArray[np.uint8]:
        frames = self.benchmark.load_video(sample)
        return np.full_like(frames, _GREY) if self.blank else frames


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Have torch use `count` threads for each caller: beside a GPU, the callers themselves are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _message(question: str, medium: str) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": [{"type": medium}, {"type": "text", "text": question}]}]
