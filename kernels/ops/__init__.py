"""The operations on the hot path: a plain reference each, and where it pays a kernel of the same name and signature.

`backend` is `auto` (the fastest that runs here), or the name of one: a backend asked for by name never falls back.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from vprune.errors import VPruneError
from vprune.kernels import reference

__all__ = ["BACKENDS", "backend_module", "column_mass", "compact", "recycle"]

BACKENDS = ("auto", "torch")


def backend_module(backend: str = "auto") -> ModuleType:
    """Return the module that implements the operations for `backend`.

    Raises:
        VPruneError: the backend is unknown or not available in this installation.
    """
    if backend == "triton":
        raise VPruneError("backend='triton': this version has no Triton kernels; use backend='auto' or 'torch'")
    if backend not in BACKENDS:
        raise VPruneError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    return reference


def column_mass(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    row_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    key_bias: Tensor | None = None,
    window: int | None = None,
    pool: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Attention that every key receives from some query rows; see `reference.column_mass`."""
    result: Tensor = backend_module(backend).column_mass(
        query,
        key,
        scale=scale,
        rows=rows,
        row_valid=row_valid,
        key_valid=key_valid,
        key_bias=key_bias,
        window=window,
        pool=pool,
    )
    return result


def compact(tokens: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Gather rows into a shorter, left-padded batch; see `reference.compact`."""
    result: Tensor = backend_module(backend).compact(tokens, index)
    return result


def recycle(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Weighted sums of groups of rows; see `reference.recycle`."""
    result: Tensor = backend_module(backend).recycle(tokens, source, lengths, weights)
    return result
