"""Where the seconds of a segmentation go: one stage after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("answer", "maps", "encode", "prompt", "merge")
"""The model's answers, maps of its attention, SAM's image encoder, prompts to masks, masks of all views to a result."""
SAM_STAGES = STAGES[2:]
"""What is left to do once there are maps."""


class Stages:
    """Seconds of each stage, those of the device counted to the stage that asked for them.

    Example:
        >>> stages = Stages(torch.device("cpu"))
        >>> with stages.timed("encode"):
        ...     pass
        >>> list(stages.seconds)
        ['encode']
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count what is done here to a stage, beside what was counted to it before."""
        since = self._now()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - since

    def _now(self) -> float:
        """The time once the device has nothing left to do: a stage waits for the one before it in any case."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
