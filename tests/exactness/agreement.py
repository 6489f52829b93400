"""Comparison with an oracle: it must agree, a control must not; how far apart the two were is noted for
docs/compatibility.md, and so is what was refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune

EXACT = 1e-12
DEVIATIONS: dict[str, float] = {}  # of the running test: the largest difference per precision
REFUSALS: list[str] = []  # of the running test: what was said
_NAMES = {torch.float64: "fp64", torch.float32: "fp32"}


def note(one: Tensor, other: Tensor) -> None:
    """Note how far apart two tensors are, under the precision of the finer one (the oracle's)."""
    finer = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    if finer in _NAMES:
        apart = float((one.detach().to(finer) - other.detach().to(finer)).abs().max()) if one.numel() else 0.0
        DEVIATIONS[_NAMES[finer]] = max(DEVIATIONS.get(_NAMES[finer], 0.0), apart)


def agree(mine: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float = EXACT) -> None:
    """Each of `mine` is the oracle's, up to `tolerance`; compared in the oracle's precision."""
    for one, other in zip(mine, theirs, strict=True):
        note(one, other)
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0, atol=tolerance)


def differ(mine: Any, theirs: Any, rows: set[int]) -> None:
    """The control: were nothing pruned, the comparison with the oracle would pass as well."""
    assert rows and all(float((mine[0] - theirs[0])[row].abs().max()) > 1e-2 for row in rows)


@contextmanager
def refused(words: str) -> Iterator[None]:
    """The block ends in a refusal that says `words` (a pattern)."""
    with pytest.raises(vprune.VPruneError, match=words) as caught:
        yield
    REFUSALS.append(re.sub(r"\s+", " ", str(caught.value)))


def generate(model: Any, **options: Any) -> Any:
    """What `generate` returns, its logits in the model's own precision: the library's are float32."""
    from transformers import GenerationMixin

    speaker = [part for part in model.modules() if isinstance(part, GenerationMixin)][-1]  # whatever wraps it
    seen: list[Tensor] = []
    hook = speaker.register_forward_hook(lambda _, args, out: seen.append(out.logits[:, -1]))
    try:
        out = model.generate(output_logits=True, return_dict_in_generate=True, **options)
    finally:
        hook.remove()
    assert len(seen) == len(out.logits)
    assert all(torch.equal(own.float().to(given.device), given) for own, given in zip(seen, out.logits, strict=True))
    out.logits = tuple(seen)
    return out
