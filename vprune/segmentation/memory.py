"""The most memory that something took."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """The highest of the peaks that it was told; None before the first."""

    bytes: int | None = None

    def rise(self, peak: int | None) -> None:
        """Take in another."""
        if peak is not None:
            self.bytes = max(peak, self.bytes or 0)


def begin(device: torch.device) -> None:
    """Forget earlier peaks, of the GPU's tensors or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int | None:
    """The most since `begin`, models included: on a GPU of its tensors, else of the whole process.

    Outside Linux, the most that the process ever took; None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # not on Windows
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
