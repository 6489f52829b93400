"""Work beside the decoder's: what is only told of a prefill need not hold up the prefill itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
