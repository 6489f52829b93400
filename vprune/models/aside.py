"""Work beside the decoder's: what is sent to a GPU, timed and told of a prefill need not hold the prefill up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def moment_of(tensor: Tensor) -> torch.cuda.Event | None:
    """The point that a GPU's queue has reached, None on a CPU."""
    if not tensor.is_cuda:
        return None
    moment = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    moment.record(torch.cuda.current_stream(tensor.device))
    return moment


@contextmanager
def aside(device: torch.device, moment: torch.cuda.Event | None) -> Iterator[None]:
    """Run the block in a queue of its own, behind `moment` only; it is done when the block is left."""
    if moment is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the same
    stream.wait_event(moment)
    with torch.cuda.stream(stream):
        yield
    # Nothing that the block read or made may be given to other work before this queue is through with it.
    stream.synchronize()


def beside(work: Callable[[], _T], device: torch.device) -> Callable[[], _T]:
    """Do `work` in a queue beside the current one, where a CUDA graph is recorded; what is returned hands it over.

    (Elsewhere it is done then: the host is slower than a GPU, and two queues do not fill sooner than one.)
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return work
    here, stream = torch.cuda.current_stream(device), _second_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        made = work()

    # It holds on to the work, and with it to what that reads, which would be given to others otherwise.
    def handed_over(_: Any = work) -> _T:
        here.wait_stream(stream)
        return made

    return handed_over


@lru_cache(maxsize=64)
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # the same; one for all, as it keeps a workspace


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on another device; on its way from the CPU to a GPU, nobody waits for what the GPU has still to do."""
    if tensor.device == device or device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("numbers of the host would be those of the first prompt for ever")
    # From pinned memory, which torch does not hand out again before the copy is through.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def fetched(tensors: Sequence[Tensor | None]) -> Callable[[], Sequence[Tensor | None]]:
    """Copies on the CPU, on their way from now on; what is returned hands them over, and waits for them if it must.

    (For them alone: not for what is sent to a GPU after them.)
    """
    copies = [None if one is None else one.to("cpu", non_blocking=one.is_cuda, copy=True) for one in tensors]
    moments = [moment_of(one) for one in {one.device: one for one in tensors if one is not None}.values()]

    def handed_over() -> Sequence[Tensor | None]:
        for moment in moments:
            if moment is not None:
                moment.synchronize()
        return copies

    return handed_over


@lru_cache(maxsize=256)
def numbers_on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """The numbers as a LongTensor [N], on a device once and for all."""
    with torch.inference_mode(False):  # else a model that learns could not use them later
        return sent(torch.tensor(numbers), device)


class Stopwatch:
    """The time that blocks of work take, as the device counts it; a GPU's is read when it is asked for, not before."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, tensor: Tensor) -> Iterator[None]:
        """Count the block, which works on the device of `tensor`."""
        if not tensor.is_cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start
            return
        stream = torch.cuda.current_stream(tensor.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        yield
        end.record(stream)
        self._marks.append((begin, end))

    def seconds(self) -> float:
        """All blocks so far; waits for the last of them (and for nothing that came after)."""
        for _, end in self._marks:
            end.synchronize()
        milliseconds: float = sum(begin.elapsed_time(end) for begin, end in self._marks)
        return self._seconds + milliseconds / 1e3
