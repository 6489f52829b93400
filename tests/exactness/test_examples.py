"""The examples in the docstrings of public entry points run, on the tiny model."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

import vprune
import vprune.attach
import vprune.pruner
from tests.conftest import picture
from tests.exactness.prompts import chat


@pytest.mark.parametrize("module", [vprune.attach, vprune.pruner], ids=lambda module: module.__name__)
def test_examples_run(tiny_vlm: Any, tiny_processor: Any, module: Any) -> None:
    names = {
        "vprune": vprune,
        "model": tiny_vlm(),
        "processor": tiny_processor,
        "image": picture(),
        "prompt": chat(tiny_processor, "where ?"),
    }
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
