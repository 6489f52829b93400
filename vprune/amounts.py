"""How much stays, as it is asked for: `keep`, stages, budgets and ways to recycle, checked without importing torch."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from vprune.errors import VPruneError

BUDGETS = ("image", "sample", "frame", "question")
RECYCLERS = ("none", "grid", "nearest", "weighted", "anchors")
OWN_ROWS = ("grid", "weighted", "anchors")
"""Those that merge the rest into rows of its own, paid from the budget, and leave what was selected as it is."""
Stage = tuple[int, float | int]
"""A decoder layer, and what of every image is left when it is entered."""


def checked_keep(keep: Any) -> float | int:
    """A fraction in (0, 1] as a float or a token count as an int, from any kind of number.

    Raises:
        VPruneError: it is neither.
    """
    remedy = "give a fraction in (0, 1] or a token count per image (int >= 1)"
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise VPruneError(f"keep={keep!r}: {remedy}")
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise VPruneError(f"keep={keep} is below 1: {remedy}")
        return int(keep)
    if not 0 < float(keep) <= 1:
        raise VPruneError(f"keep={keep} is outside (0, 1]: {remedy}")
    return float(keep)


def checked_stages(stages: Any, keep: float | int) -> tuple[Stage, ...]:
    """The stages that `stages` asks for: layers, or [layer, keep] pairs; a layer alone keeps `keep`; None = layer 0.

    Raises:
        VPruneError: it is none of these, or the layers do not rise.
    """
    if stages is None:
        return ((0, keep),)
    remedy = "give decoder layers, each alone or as [layer, keep], rising: stages=[2] or stages=[[0,0.5],[8,0.1]]"
    if isinstance(stages, (str, bytes)) or not isinstance(stages, Sequence) or not stages:
        raise VPruneError(f"stages={stages!r}: {remedy}")
    read: list[Stage] = []
    for stage in stages:
        alone = not isinstance(stage, Sequence) or isinstance(stage, (str, bytes))
        layer, share = (stage, keep) if alone else (*stage, None)[:2]
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 or (not alone and len(stage) != 2):
            raise VPruneError(f"stages={list(stages)!r}: {stage!r} is no stage; {remedy}")
        if read and layer <= read[-1][0]:
            raise VPruneError(f"stages={list(stages)!r}: layer {layer} comes after layer {read[-1][0]}; {remedy}")
        read.append((layer, checked_keep(keep if share is None else share)))
    return tuple(read)


def checked_options(
    keep: Any = None,
    recycle: Any = None,
    size_aware: Any = None,
    stages: Any = None,
    budget: Any = None,
    minimum: Any = None,
    layer: Any = None,
) -> None:
    """Check the options that every method has; None is not checked.

    Raises:
        VPruneError: one is out of its range.
    """
    if recycle is not None and recycle not in RECYCLERS:
        raise VPruneError(f"recycle={recycle!r}: choose one of {', '.join(RECYCLERS)}")
    if size_aware is not None and not isinstance(size_aware, bool):
        raise VPruneError(f"size_aware={size_aware!r}: give true or false")
    if budget is not None and budget not in BUDGETS:
        raise VPruneError(f"budget={budget!r}: choose one of {', '.join(BUDGETS)}")
    if minimum is not None and (isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 1):
        raise VPruneError(f"minimum={minimum!r}: give a number of tokens, at least 1")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
        raise VPruneError(f"layer={layer!r}: give the number of a decoder layer")
    if keep is not None:
        checked_keep(keep)
    checked_stages(stages, 1.0 if keep is None else keep)
