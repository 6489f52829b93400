"""Visual-token pruning inside plain `generate`: score, select, recycle, and the model reads less.

Names are resolved on first use, so that `import vprune` imports neither torch nor transformers and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vprune.attach import Pruning, prune
    from vprune.errors import VPruneError
    from vprune.method_files import method_names
    from vprune.pruner import Pruner, load_method
    from vprune.records import ImageReport, PruneReport
    from vprune.segmentation.masks import Masks
    from vprune.segmentation.segment import segment

__version__ = "0.1.0"

_HOMES = {
    "prune": "vprune.attach",
    "Pruning": "vprune.attach",
    "VPruneError": "vprune.errors",
    "Pruner": "vprune.pruner",
    "load_method": "vprune.pruner",
    "method_names": "vprune.method_files",
    "ImageReport": "vprune.records",
    "PruneReport": "vprune.records",
    "Masks": "vprune.segmentation.masks",
    "segment": "vprune.segmentation.segment",
}

__all__ = [
    "ImageReport",
    "Masks",
    "PruneReport",
    "Pruner",
    "Pruning",
    "VPruneError",
    "__version__",
    "load_method",
    "method_names",
    "prune",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vprune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
