"""A mistake in a command is refused before torch and transformers are imported, which alone takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT, python

REFUSED = """
import contextlib, io, json, sys
from vprune.cli import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main({words!r})
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({{"code": code, "heavy": heavy, "said": said.getvalue()}}))
"""

MISTAKES = {
    "eval method=lerned": "did you mean learned?",
    "eval metod=learned": "did you mean method?",
    "eval method=nowhere.yaml": "cannot be read",
    "eval method.kep=0.1": "method.keep",
    "eval benchmark=scens": "did you mean scenes?",
    "eval model=./nowhere": "model",
    "eval keep=2.5": "keep=2.5 is outside (0, 1]",
    "eval keep=0": "keep=0 is below 1",
    "eval keep=0.1,0.2": "add -m",
    "eval -m keep=0.1,1.2": "keep=1.2 is outside (0, 1]",
    "eval recycle=gird": "recycle='gird': choose one of none, grid",
    "eval method.recycle=gird": "recycle='gird': choose one of none, grid",
    "eval budget=picture": "budget='picture': choose one of image",
    "eval stages=[3,2]": "layer 2 comes after layer 3",
    "eval layer=first": "layer='first'",
    "eval size_aware=perhaps": "size_aware='perhaps'",
    "eval minimum=0": "minimum=0",
    "eval limit=0": "limit=0",
    "eval dtype=float31": "did you mean float32?",
    "train scorer optimizer.minuts=3": "did you mean optimizer.minutes?",
    "train scorer optimizer.minutes=soon": "expected a number",
    "train scorr": "did you mean scorer?",
    "segment nofile.jpg": "nofile.jpg does not exist",
    "segment README.md keep=1.5": "keep=1.5 is outside (0, 1]",
    "segment README.md phrse=circle": "did you mean phrase?",
    "tune kep=0.1": "did you mean keep?",
    "tune keep=7.5": "keep=7.5 is outside (0, 1]",
    "bench modl": "there is kernels, model",
    "bench kernels opps=select": "did you mean ops?",
    "bench model kep=0.1": "did you mean keep?",
    "report nowhere": "nowhere is not a folder",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_refused_before_torch_is_imported(command: str) -> None:
    found = json.loads(python(REFUSED.format(words=command.split()), ROOT))
    assert MISTAKES[command] in found["said"]
    assert (found["code"], found["heavy"]) == (2, [])
    assert not (Path(ROOT) / "runs" / "segment" / "README").exists()
