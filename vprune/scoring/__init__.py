"""Who matters: one small file per family of scorers, each a dataclass called with a `Prefill`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vprune.records import Prefill


class Scorer(Protocol):
    """Gives every image of a prefill an importance map, float32 [N], raster order; on any device."""

    @property
    def needs_evidence(self) -> bool:
        """True if it reads `Prefill.evidence`."""
        ...

    @property
    def tower_layer(self) -> int | None:
        """The layer of the vision tower to be watched, None = none."""
        ...

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """One map per image of `prefill.images`."""
        ...
