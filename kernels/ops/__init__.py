"""The operations on the hot path: a plain reference each, and beside it a kernel of the same name and signature.

`backend` is `auto` (Triton for tensors on a CUDA device, else torch), or the name of one: a backend asked for by name
never falls back.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from vprune.errors import VPruneError
from vprune.kernels import reference

__all__ = [
    "BACKENDS",
    "backend_module",
    "column_mass",
    "compact",
    "compact_batch",
    "compact_kv",
    "modulate",
    "recycle",
    "rotate",
    "select",
]

BACKENDS = ("auto", "torch", "triton")
_TRITON_INSTALLED = find_spec("triton") is not None


def backend_module(backend: str = "auto", operation: str | None = None, *inputs: Tensor) -> ModuleType:
    """Return the module that implements the operations for `backend`.

    Args:
        backend: "auto", "torch" or "triton".
        operation: the one that is to run, to learn whether there is a kernel for such inputs; None = any.
        inputs: its tensors.

    Raises:
        VPruneError: the backend is unknown, not available in this installation, or has no kernel for these inputs.

    Example:
        >>> backend_module("auto", "compact", torch.zeros(1, 2, 3)).__name__
        'vprune.kernels.reference'
    """
    if backend not in BACKENDS:
        raise VPruneError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and not (inputs and inputs[0].is_cuda and _all_on_cuda(inputs))):
        return reference
    if backend == "auto" and not _TRITON_INSTALLED:
        return reference
    if not _TRITON_INSTALLED:
        raise VPruneError("backend='triton': the package triton is not installed; pip install triton, or use 'auto'")
    # On first use: importing Triton takes a second, and whoever has no GPU needs none of it.
    import vprune.kernels.triton_ops as triton_ops

    reason = None if operation is None else triton_ops.why_not(operation, *inputs)
    if reason is None:
        return triton_ops
    if backend == "auto":
        return reference
    raise VPruneError(f"backend='triton': {reason}; use backend='auto' or 'torch'")


def _all_on_cuda(inputs: Sequence[Tensor]) -> bool:
    return all(one.is_cuda for one in inputs)


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
    result: Tensor = backend_module(backend, "column_mass", query, key).column_mass(
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


def compact(tokens: Tensor, index: Tensor, *, padded: bool = True, backend: str = "auto") -> Tensor:
    """Gather rows into a shorter, left-padded batch; see `reference.compact`."""
    result: Tensor = backend_module(backend, "compact", tokens, index).compact(tokens, index, padded=padded)
    return result


def compact_batch(
    tokens: Tensor,
    index: Tensor,
    positions: Tensor,
    masks: Tensor | None = None,
    *,
    padded: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather rows, their position ids and their masks in one pass; see `reference.compact_batch`."""
    module = backend_module(backend, "compact_batch", tokens, index, positions)
    result: tuple[Tensor, Tensor, Tensor | None] = module.compact_batch(tokens, index, positions, masks, padded=padded)
    return result


def compact_kv(
    keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, *, backend: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """Gather rows of the keys and values of many layers in one launch; see `reference.compact_kv`."""
    module = backend_module(backend, "compact_kv", index, *keys, *values)
    result: tuple[list[Tensor], list[Tensor]] = module.compact_kv(keys, values, index)
    return result


def modulate(x: Tensor, gain: Tensor, offset: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """Frames normed, scaled, shifted and through a SiLU; see `reference.modulate`.

    Raises:
        VPruneError: as `backend_module`; or gains and offsets are not those of the frames' channels.
    """
    frames, channels = x.shape[0], x.shape[-1]
    for name, shape in (("gain", gain.shape), ("offset", offset.shape)):
        if shape not in ((1, channels), (frames, channels)):
            raise VPruneError(f"modulate: {name} {tuple(shape)} does not fit {frames} frames of {channels} channels")
    result: Tensor = backend_module(backend, "modulate", x, gain, offset).modulate(x, gain, offset, eps=eps)
    return result


def recycle(tokens: Tensor, source: Tensor, lengths: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Weighted sums of groups of rows; see `reference.recycle`."""
    module = backend_module(backend, "recycle", tokens, source, lengths, weights)
    result: Tensor = module.recycle(tokens, source, lengths, weights)
    return result


def rotate(
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    factor: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projected rows as rotated heads, scaled and shifted before; see `reference.rotate`.

    Raises:
        VPruneError: as `backend_module`; or the rows are no whole heads, or a head has no two halves.
    """
    width, head = rows.shape[-1], cos.shape[-1]
    if not head or head % 2 or width % head:
        raise VPruneError(f"rotate: rows of {width} numbers are no whole heads of {head} numbers, in two halves each")
    module = backend_module(backend, "rotate", rows, cos, sin)
    result: Tensor = module.rotate(rows, cos, sin, factor=factor, bias=bias)
    return result


def select(
    scores: Tensor,
    count: int | Tensor,
    *,
    width: int | None = None,
    ties: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The columns of the highest scores, ascending, left-padded with -1; see `reference.select`."""
    module = backend_module(backend, "select", scores)
    result: Tensor = module.select(scores, count, width=width, ties=ties, valid=valid)
    return result
