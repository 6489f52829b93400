"""What `vprune report` prints: accuracy by method and budget, what is missing, and where the page is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from vprune.eval.console import complain, make_console
from vprune.eval.reporting.leaderboard import caveats, pivot
from vprune.eval.reporting.means import comparisons, table
from vprune.eval.reporting.sections import Gathered


def show(gathered: Gathered, index: Path) -> None:
    """Print one table a section, the retention over several benchmarks, then the paths."""
    console = make_console()
    for section in gathered.sections:
        console.print(escape(f"{section.title}: accuracy on {section.detail}"), soft_wrap=True)
        console.print(_view(*pivot(section)))
        if any(entry.needs_annotation for entry in section.pruned):
            console.print("* reads the annotation: a ceiling, no method")
        for sentence in caveats(section):
            console.print(escape(sentence), soft_wrap=True)
    for comparison in comparisons(gathered):
        console.print(escape(comparison.title), soft_wrap=True)
        console.print(_view(*table(comparison)))
        console.print(escape(comparison.told), soft_wrap=True)
    for name, why in gathered.unfinished.items():
        console.print(escape(f"unfinished: {name} ({why})"), soft_wrap=True)
    for name, why in gathered.broken.items():
        complain(f"{name}: {why}")
    console.print(escape(f"page with curves and pictures: {index.resolve()}"), soft_wrap=True)


def _view(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    view = Table()
    for number, title in enumerate(titles):
        view.add_column(escape(title), justify="right" if number else "left", no_wrap=True)
    for line in lines:
        view.add_row(*map(escape, line))
    return view
