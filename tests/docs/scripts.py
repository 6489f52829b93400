"""Scripts of `assets/`, loaded as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.docs.pages import ROOT


@contextmanager
def script(name: str) -> Iterator[Any]:
    """The module `assets/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "assets" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
