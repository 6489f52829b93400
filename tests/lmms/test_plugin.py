"""What of the plugin can be told without lmms-eval."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from vprune.lmms.generation import cut, generation_of, without_effect

ROOT = Path(__file__).resolve().parents[2]


class Model:
    generation_config = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.9, max_length=99)


def test_the_entry_point_is_there_and_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["vprune"].partition(":")
    assert callable(getattr(import_module(module), name))
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'hydra', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"


def test_the_extra_keeps_the_parser_that_hydra_reads_overrides_with() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lmms"]
    assert "latex2sympy2==1.5.4" in extra  # 1.5.5 and later want antlr 4.7
    assert any(need.startswith("antlr4-python3-runtime==4.9") for need in extra)
    assert "filelock<4.3" in extra  # lmms-eval imports filelock._api


@pytest.mark.parametrize(
    ("wishes", "sample", "temperature", "beams", "new"),
    [
        ({}, False, None, 1, 1024),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            False,
            None,
            1,
            16,
        ),
        ({"temperature": 0.7, "top_p": 0.8}, True, 0.7, 1, 1024),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 3, "max_gen_toks": 5}, False, None, 3, 5),
    ],
)
def test_wishes_become_generation(
    wishes: dict[str, Any], sample: bool, temperature: float | None, beams: int, new: int
) -> None:
    made = generation_of(Model(), wishes, 7)
    assert (made.do_sample, made.temperature, made.num_beams, made.max_new_tokens) == (sample, temperature, beams, new)
    assert (made.pad_token_id, made.max_length) == (7, None)
    assert Model.generation_config.max_length == 99


def test_a_wish_that_means_nothing_is_named() -> None:
    assert without_effect({"image_aspect_ratio": "pad", "until": ["\n"], "seed": None}) == ["image_aspect_ratio"]


@pytest.mark.parametrize(
    ("until", "expected"), [(None, "yes. no"), ("no", "yes."), (["x", "."], "yes"), ([""], "yes. no")]
)
def test_answers_end_at_a_stopping_text(until: Any, expected: str) -> None:
    assert cut(" yes. no ", {"until": until}) == expected
