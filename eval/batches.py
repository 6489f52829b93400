"""Which samples are asked, in which batches: fixed by the configuration, so that a run can be taken up again."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vprune.eval.benchmarks.sample import Sample


def draw(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """`limit` samples drawn from `seed`, each kind with its share of the whole (rounded), in their original order.

    Shuffled within each kind and laid end to end, the samples are taken at even distances.
    """
    if limit is None or limit >= len(samples):
        return list(samples)
    shuffled = list(range(len(samples)))
    random.Random(seed).shuffle(shuffled)
    by_kind = sorted(shuffled, key=lambda index: samples[index].kind)
    chosen = [by_kind[(2 * i + 1) * len(samples) // (2 * limit)] for i in range(limit)]
    return [samples[index] for index in sorted(chosen)]


def form(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of up to `size` samples of one kind each: answers of similar length decode together."""
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    return [group[start : start + size] for group in by_kind.values() for start in range(0, len(group), size)]
