"""The values of a recipe by name; without torch, so that a mistake in a name is told at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def values(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration, each with its name, as in `optimizer.lr`."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from values(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
