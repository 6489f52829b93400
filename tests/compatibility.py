"""`pytest --compatibility FILE` writes which families, scenarios and backends a run has compared, or seen refused."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility_rows import BACKENDS, FAMILIES, MORE, ROWS, Row


@dataclass
class Cell:
    """Outcomes of the cases of one family, scenario and backend."""

    tested: int = 0
    refused: int = 0
    failed: int = 0

    def __str__(self) -> str:
        parts = [str(self.tested)] if self.tested else []
        parts += ["refused"] if self.refused else []
        parts += [f"**{self.failed} failed**"] if self.failed else []
        return ", ".join(parts) or "-"


@dataclass
class Line:
    """One row of the page: cells by family, and the largest deviation by precision."""

    cells: dict[str, Cell] = field(default_factory=lambda: defaultdict(Cell))
    apart: dict[str, float] = field(default_factory=dict)


def family_of(nodeid: str) -> str | None:
    """The family in a test's parameters; LLaVA-1.5 in files that have one model only."""
    parameters = nodeid.partition("[")[2]
    names = [name for name in (*FAMILIES, *MORE) if re.search(rf"(?<![a-z_]){name}(?![a-z0-9_])", parameters)]
    return names[0] if names else None


def row_of(nodeid: str) -> Row | None:
    """The first row that a test belongs to."""
    return next((row for row in ROWS if re.search(row.pattern, nodeid)), None)


def backend_of(nodeid: str) -> str:
    """The attention that a test runs on: said by its name or parameters, else the default."""
    return next((name for name, pattern in BACKENDS.items() if re.search(pattern, nodeid)), "sdpa")


class Matrix:
    """Counts outcomes per family, scenario and backend."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[int, str], Line] = defaultdict(Line)
        self.outcomes: dict[str, Any] = {}
        self.reasons: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The outcome comes with the call, what was measured with the end of the test."""
        row = row_of(report.nodeid)
        if row is None:
            return
        if report.when == "call":
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown" and self.outcomes.get(report.nodeid) in ("passed", "failed"):
            self._count(row, report.nodeid, report.user_properties)

    def _count(self, row: Row, nodeid: str, properties: list[tuple[Any, ...]]) -> None:
        family = family_of(nodeid) or row.family
        told = [words[0] for kind, *words in properties if kind == "refused"]
        for words in told:
            self.reasons[normalised(words)].add(family)
        if row.everywhere:
            return
        line = self.lines[ROWS.index(row), backend_of(nodeid)]
        cell = line.cells[family]
        if self.outcomes[nodeid] == "failed":
            cell.failed += 1
        elif told:
            cell.refused += 1
        else:
            cell.tested += 1
        for kind, *what in properties:
            if kind == "deviation":
                name, apart = what
                line.apart[name] = max(line.apart.get(name, 0.0), apart)

    def pytest_sessionfinish(self) -> None:
        """Write the page."""
        self.path.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The whole page."""
        import torch
        import transformers

        cells = [cell for line in self.lines.values() for cell in line.cells.values()]
        tested, refused, failed = (
            sum(getattr(cell, name) for cell in cells) for name in ("tested", "refused", "failed")
        )
        most = {
            name: max((line.apart.get(name, 0.0) for line in self.lines.values()), default=0.0)
            for name in ("fp64", "fp32")
        }
        return "\n".join(
            [
                "# Compatibility",
                "",
                "Written by `make compatibility`. A figure is the number of "
                "cases in which a tiny random model of the true class did what the oracle of that row says: the masked "
                "model (the unpruned model in full, dropped tokens masked out of every layer, merged rows put in; the "
                "prefill and up to 8 decoding steps), the unhooked model (to the bit), or another way of running that "
                "has been compared with one of them. `refused`: a `VPruneError` says why, below. `-`: the family has "
                "no such thing, or no test covers it. The last columns are the largest differences of any logit, "
                "in models of float64 and of float32; the bounds are 1e-12 (1e-11 for quantised and adapted layers) "
                "and 1e-4.",
                "",
                f"transformers {transformers.__version__}, torch {torch.__version__}, CPU: {tested} cases agree, "
                f"{refused} are refused, {failed} disagree. Largest difference: {most['fp64']:.1e} in float64, "
                f"{most['fp32']:.1e} in float32.",
                "",
                *self._table(FAMILIES),
                "",
                "`flash (emulated)`: the library's own unpadding and packing around a kernel in plain PyTorch, and "
                "`flex (uncompiled)`: PyTorch's flex attention as it is defined. The true kernels need a GPU.",
                "",
                "## Families that came for free",
                "",
                *self._table(MORE),
                "",
                "## Refused, with these reasons",
                "",
                *(f"- {named(families)}: {words}" for words, families in sorted(self.reasons.items())),
                "",
                *self._unmet(),
                "Tiles, overviews and finer grids are reported as an image each. A `keep` that is a token count is of "
                "the whole picture, and shared out among them.",
                "",
            ]
        )

    def _unmet(self) -> list[str]:
        """A note on rows for which no test ran, so that a renamed test is missed."""
        met = {number for number, _ in self.lines}
        unmet = [row.scenario for number, row in enumerate(ROWS) if number not in met and not row.everywhere]
        return [f"**Not run:** {', '.join(unmet)}.", ""] if unmet else []

    def _table(self, families: dict[str, str]) -> list[str]:
        """The rows in which any of these families has a case."""
        lines = [
            f"| scenario | attention | {' | '.join(families.values())} | fp64 | fp32 |",
            f"|---|---|{'---:|' * (len(families) + 2)}",
        ]
        for number, row in enumerate(ROWS):
            for backend in ("sdpa", *BACKENDS):
                line = self.lines.get((number, backend))
                if line is not None and set(line.cells) & set(families):
                    cells = [str(line.cells.get(family, Cell())) for family in families]
                    apart = [f"{line.apart[name]:.0e}" if name in line.apart else "" for name in ("fp64", "fp32")]
                    lines.append(f"| {row.scenario} | {backend} | {' | '.join([*cells, *apart])} |")
        return lines


def normalised(words: str) -> str:
    """A reason without what differs between cases: names of classes, shapes and numbers."""
    words = re.sub(r"^[A-Za-z]\w*(?= (is no|was compiled|cannot|cuts|merges|reads)\b)", "...", words)
    words = re.sub(r"^[A-Z]\w*(?=: found no)", "...", words)
    words = re.sub(r" as \.[\w.]+ \(\w+\)", " as ...", words)
    words = re.sub(r"flash_attention_\d", "flash_attention_N", words)
    words = re.sub(r"\[[\d, ]+\]", "[...]", words)
    words = re.sub(r"\((\d+[, x]*)+\)", "(...)", words)
    return re.sub(r"\b\d+(?= (tokens|pictures|visual|stored|rows|layers|hold|of))", "N", words)


def named(families: set[str]) -> str:
    """The families as readers know them, all of them where a reason does not depend on the family."""
    names = [name for family, name in {**FAMILIES, **MORE}.items() if family in families]
    return "any family" if "" in families or not names else ", ".join(names)


def configure(config: pytest.Config) -> None:
    """Count on the controller, once, whatever the number of workers."""
    path = config.getoption("--compatibility")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(Path(path)), "compatibility")
