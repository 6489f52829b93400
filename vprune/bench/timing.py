"""Times of calls on a device: the work alone, as a CUDA graph plays it, and with what the host adds to it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

WARM_UP = 3
_OVERFLOWING = 2**28  # bytes: several times the largest cache, so that what was read is gone when its turn comes again


@dataclass(frozen=True)
class Timing:
    """Seconds a call, by rank among the repeats; `how`: "graph" (replayed), "events" (launched), "clock" (CPU)."""

    p20: float
    p50: float
    p80: float
    how: str

    @classmethod
    def of(cls, seconds: Sequence[float], how: str) -> Timing:
        """The quantiles of some repeats."""
        ranked = sorted(seconds)

        def at(share: float) -> float:
            return ranked[min(len(ranked) - 1, int(share * len(ranked)))]

        return cls(at(0.2), statistics.median(ranked), at(0.8), how)


def measure(calls: Sequence[Call], device: torch.device, repeats: int) -> Timing:
    """Time calls that do the same on different inputs, one after the other, so that no cache flatters the numbers."""
    for call in calls:
        for _ in range(WARM_UP):
            call()
    if device.type != "cuda":
        return Timing.of([_seconds(call) for _ in range(repeats) for call in calls], "clock")
    torch.cuda.synchronize(device)
    graph = _captured(calls)
    how = "events" if graph is None else "graph"

    def once() -> float:
        event: Any = torch.cuda.Event  # its constructor is not annotated
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        if graph is None:
            for call in calls:
                call()
        else:
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(calls)

    once()
    return Timing.of([once() for _ in range(repeats)], how)


def measure_launched(calls: Sequence[Call], device: torch.device, repeats: int) -> Timing:
    """Time single calls from the outside, the host's share included, the device idle before each."""

    def once(call: Call) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if device.type != "cuda":
        return measure(calls, device, repeats)
    return Timing.of([once(call) for _ in range(repeats) for call in calls], "events")


def copy_time(size: int, device: torch.device, repeats: int) -> Timing:
    """Time copies that move `size` bytes in all: half of them read, half of them written."""
    half = max(1, size // 2)
    count = max(2, min(64, _OVERFLOWING // half)) if device.type == "cuda" else 2
    pairs = [torch.randint(0, 99, (2, half), dtype=torch.int8, device=device) for _ in range(count)]
    return measure([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs], device, repeats)  # type: ignore[misc]


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """The calls as one graph; None where one of them asks the device for something, which a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


class Clock:
    """Points of time of a device's queue (CUDA events), or of the host where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Let the device finish."""
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Now, as the queue counts it."""
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event  # its constructor is not annotated
        now = event(enable_timing=True)
        now.record()
        return now

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from one point to another, after `wait`."""
        return float(start.elapsed_time(end)) if self.cuda else float(end - start) * 1e3

    def start_peak(self) -> int:
        """Begin to watch the device's memory; how many bytes are taken now, 0 where there is no GPU."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes that were taken since then."""
        return torch.cuda.max_memory_allocated() if self.cuda else 0
