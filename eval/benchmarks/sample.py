"""The nouns of a benchmark: one question about one image, and the collection it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vprune.eval.benchmarks.images import ImageSource


@dataclass(frozen=True)
class Sample:
    """One question about one image, with the answer it is scored against.

    `image` is a file, an image already in memory, or one inside another file. `evidence` holds the annotation ids (in
    the benchmark's `objects.json`) of the objects the answer rests on. `box` is `(x0, y0, x1, y1)` in pixels, for
    answers that are a point. `answers` are those of several annotators, `options` the choices lettered from A.
    """

    id: str
    image: Path | Image.Image | ImageSource
    kind: str
    question: str
    answer: str
    evidence: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Benchmark(Protocol):
    """What a run needs to know of a benchmark."""

    @property
    def name(self) -> str:
        """The name that `metrics.json` states."""

    @property
    def samples(self) -> Sequence[Sample]:
        """Every sample, in the order of the file."""

    @property
    def has_evidence(self) -> bool:
        """Whether the objects behind the answers are annotated with masks."""

    @property
    def has_video(self) -> bool:
        """Whether samples are videos, given by `load_video`; their `load_image` is one frame."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the samples do."""

    def prompt(self, sample: Sample) -> str:
        """The text the model is asked."""

    def load_image(self, sample: Sample) -> Image.Image:
        """The sample's image, RGB and upright."""

    def load_video(self, sample: Sample) -> NDArray[np.uint8]:
        """The sample's frames, uint8 `[T, H, W, 3]`; only asked for where `has_video`."""

    def evidence_mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """Where the objects behind the answer are: bool `[H, W]` in pixels; None where nothing is annotated."""

    def score(self, sample: Sample, prediction: str) -> float:
        """How right a prediction is, in [0, 1]."""

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The benchmark's own figures from the rows of `predictions.jsonl`, for `metrics.json`.

        `score` among them is the one its published tables state (named by `score_name`); empty: the accuracy says all.
        """
