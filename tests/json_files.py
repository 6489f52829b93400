"""Mistakes put into files of the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def change(file: Path, *path: str | int, to: Any = None) -> None:
    """Set (or, with None, take away) one value of a JSON file."""
    content = json.loads(file.read_text())
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    if to is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = to
    file.write_text(json.dumps(content))
