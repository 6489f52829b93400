"""`pytest --compatibility FILE` writes which families and scenarios a run has compared with the masked oracle."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

_TESTS = {
    "test_pruned_is_the_masked_model": "pruned = masked model",
    "test_keeping_all_is_the_unhooked_model": "keep=1 bit-equal",
    "test_beams_score_as_the_masked_model_does": "beams = masked model",
    "test_keeping_all_in_other_ways_of_decoding": "keep=1, beams and samples",
    "test_other_methods_equal_the_masked_model": "other methods = masked model",
    "test_leaving_restores": "restored",
}
_FAMILY = re.compile(r"qwen2_5_vl|qwen2_vl|qwen3_vl|internvl|idefics3|smolvlm|llava_next|llava_onevision|gemma3")
_SCENARIO = re.compile(r"(single|padded|several|mixed)(-video)?")
_SCENARIOS = {"single": "one", "padded": "padded batch", "several": "several", "mixed": "0, 1 and 2 of unequal sizes"}


class Matrix:
    """Counts outcomes per family, test and scenario."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = next((test for test in _TESTS if f"::{test}[" in report.nodeid), None)
        family = _FAMILY.search(report.nodeid)
        if report.when != "call" or report.skipped or test is None or family is None:
            return
        scenario = _SCENARIO.search(report.nodeid)
        name = f"{_SCENARIOS[scenario[1]]}{' video' if scenario[2] else ''}" if scenario else _TESTS[test]
        self.counts[_TESTS[test], name][family[0]][report.failed] += 1

    def pytest_sessionfinish(self) -> None:
        import torch
        import transformers

        families = sorted({family for row in self.counts.values() for family in row})
        passed, failed = (sum(cell[i] for row in self.counts.values() for cell in row.values()) for i in (0, 1))
        lines = [
            "# Compatibility",
            "",
            "Written by `pytest tests/exactness/test_families.py --compatibility docs/compatibility.md`. Every figure "
            "is a number of cases in which tiny random models of the true class agreed with the masked oracle "
            "(float64 to 1e-12, float32 to 1e-4, 8 decoding steps) or with the unhooked model (bit-equal); `-` is not "
            "covered by a test.",
            "",
            f"transformers {transformers.__version__}, torch {torch.__version__}: "
            f"{passed} cases passed, {failed} failed.",
            "",
            f"| what | pictures or videos | {' | '.join(families)} |",
            f"|---|---|{'---:|' * len(families)}",
        ]
        for (test, scenario), row in sorted(self.counts.items()):
            cells = [
                (
                    "-"
                    if not sum(row[family])
                    else f"{row[family][0]}" + f" ({row[family][1]} failed)" * bool(row[family][1])
                )
                for family in families
            ]
            lines.append(f"| {test} | {scenario if scenario != test else ''} | {' | '.join(cells)} |")
        lines += [
            "",
            "LLaVA-1.5 has a suite of its own (`tests/exactness/test_masked_oracle.py`), every method and a second "
            "turn on the cache included.",
            "",
            "Refused with a reason: static caches, chunked prefill, custom 4-D masks; `size_aware` on flash and flex "
            "attention and on decoders with sliding-window layers (Gemma 3); a later turn with a picture on Gemma 3's "
            "cache; `method=vision` on Qwen-VL, LLaVA-NeXT and LLaVA-OneVision; `method=resize` on all but "
            "LLaVA-1.5; `layer` above 0 where features are added between layers (Qwen3-VL) or layers rotate "
            "differently (Gemma 3).",
            "",
            "Tiles, overviews and finer grids each count as an image of their own: a `keep` that is a token count "
            "applies to each of them.",
            "",
        ]
        self.path.write_text("\n".join(lines), encoding="utf-8")


def configure(config: pytest.Config) -> None:
    """Count on the controller, once, whatever the number of workers."""
    path = config.getoption("--compatibility")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(Path(path)), "compatibility")
