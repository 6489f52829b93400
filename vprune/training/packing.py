"""Packs many questions about one image into one training sequence, none of them seeing another.

A sequence is `<|user|>`, the 576 visual tokens, then segments `question <|assistant|> answer <|end|>`. Every segment
starts at the same position and attends to the image and to itself only, so that each one is exactly what `generate`
will see: the first and only question about an image.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vprune.eval.scenes import layout, questions
from vprune.eval.scenes.render import Batch, pack
from vprune.eval.scenes.world import COLOURS, KINDS, SHAPES, Question, Scene
from vprune.training.architecture import ASSISTANT, END, SPECIAL

PREFIX = 577
"""Tokens before the first segment: `<|user|>` and the image."""
IGNORE = -100
DESCRIBE = len(KINDS)
"""Kind index of the dense description, after those of KINDS."""


@dataclass
class Packed:
    """Segments of a batch: all tensors are [B, S]; labels[t] is the token to predict at t."""

    scenes: Batch
    tokens: Tensor
    labels: Tensor
    segments: Tensor
    positions: Tensor
    kinds: Tensor
    grounding: Tensor
    """Index of the object that the words up to this token name, or -1."""


class Vocabulary:
    """Words to ids without the tokenizer's overhead; a test holds the two equal."""

    def __init__(self) -> None:
        self.ids = {word: i + len(SPECIAL) for i, word in enumerate(questions.words())}
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in words of the world."""
        ids: list[int] = []
        for word in text.split():
            found = self.cache.get(word)
            if found is None:
                found = self.cache.setdefault(word, self._word(word))
            ids += found
        return ids

    def names(self, scene: Scene) -> dict[tuple[int, int], int]:
        """Pairs of adjacent tokens that name one object without doubt: `red circle`, `number 4`, `4 ##7`."""
        found: dict[tuple[int, int], int] = {}
        seen = Counter((o.colour, o.shape) for o in scene.objects)
        for i, o in enumerate(scene.objects):
            if seen[o.colour, o.shape] == 1:
                found[self.ids[COLOURS[o.colour]], self.ids[SHAPES[o.shape]]] = i
            if o.number is not None:
                digits = self.encode(str(o.number))
                found[(self.ids["number"], digits[0]) if len(digits) == 1 else (digits[0], digits[1])] = i
        return found

    def _word(self, word: str) -> list[int]:
        stem, end = (word[:-1], word[-1]) if word[-1] in "?.," else (word, "")
        parts = [stem] if stem in self.ids else [stem[0], *(f"##{c}" for c in stem[1:])]
        return [self.ids[p] for p in (*parts, *end)]


class PackedScenes(IterableDataset[Packed]):
    """An endless stream of packed batches; workers take turns over the scene indices.

    Args:
        seed: seed of the world.
        batch_size: images a batch.
        length: segment tokens a sequence.
        photographs: number of photographs that backgrounds are cut from.
        weights: how often each kind is asked, in the order of KINDS.
        describe: chance that a sequence holds the dense description of the whole scene.
        first: index of the first scene.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        length: int,
        photographs: int,
        weights: list[float],
        describe: float = 1.0,
        first: int = 0,
    ) -> None:
        self.seed, self.batch_size, self.length, self.photographs = seed, batch_size, length, photographs
        self.weights, self.describe, self.first = weights, describe, first

    def __iter__(self) -> Iterator[Packed]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        vocabulary = Vocabulary()
        batch = self.first // self.batch_size + turn
        while True:
            yield self._pack(range(batch * self.batch_size, (batch + 1) * self.batch_size), vocabulary)
            batch += workers

    def _pack(self, indices: range, vocabulary: Vocabulary) -> Packed:
        shape = (len(indices), self.length)
        arrays = {name: np.zeros(shape, dtype=np.int16) for name in ("tokens", "segments", "positions", "kinds")}
        labels = np.full(shape, IGNORE, dtype=np.int16)
        grounding = np.full(shape, -1, dtype=np.int16)
        scenes = []
        for row, index in enumerate(indices):
            rng = layout.stream(self.seed, index)
            scene = layout.sample_scene(rng, self.photographs)
            scenes.append(scene)
            names = vocabulary.names(scene)
            at, segment, misses = 0, 1, 0
            while misses < 4:
                if segment == 1 and rng.random() < self.describe:
                    kind, question = DESCRIBE, questions.describe(scene)
                else:
                    kind, asked = self._ask(scene, rng)
                    if asked is None:
                        continue
                    question = asked
                ids, answer_from = _segment(question, vocabulary)
                end = at + len(ids)
                if end > self.length:
                    misses += 1
                    continue
                arrays["tokens"][row, at:end] = ids
                labels[row, at + answer_from - 1 : end - 1] = ids[answer_from:]
                arrays["segments"][row, at:end] = segment
                arrays["positions"][row, at:end] = range(PREFIX, PREFIX + len(ids))
                arrays["kinds"][row, at:end] = kind
                for t in range(1, answer_from - 1):
                    grounding[row, at + t] = names.get((ids[t - 1], ids[t]), -1)
                at, segment = end, segment + 1
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Packed(
            scenes=pack(scenes), labels=torch.from_numpy(labels), grounding=torch.from_numpy(grounding), **tensors
        )

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[int, Question | None]:
        kind = rng.choices(range(len(KINDS)), self.weights)[0]
        return kind, questions.ask(KINDS[kind], scene, rng)


def _segment(question: Question, vocabulary: Vocabulary) -> tuple[list[int], int]:
    """Token ids of a segment and the index at which the answer starts."""
    asked = [*vocabulary.encode(question.question), ASSISTANT]
    return [*asked, *vocabulary.encode(question.answer), END], len(asked)
