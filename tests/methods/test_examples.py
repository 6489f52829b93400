"""The examples in the docstrings of the published methods run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import vprune
import vprune.baselines


@pytest.mark.parametrize("name", [module.name for module in iter_modules(vprune.baselines.__path__)])
def test_examples_run(name: str) -> None:
    module = import_module(f"vprune.baselines.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch, "vprune": vprune})
    assert result.failed == 0 and (result.attempted or name == "features")
