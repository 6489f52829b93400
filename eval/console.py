"""What a person at the terminal sees: progress while runs go on, and their table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vprune.eval.results import Run

SECONDS_BETWEEN_LINES = 15.0
_PLAIN_WIDTH = 120


def make_console() -> Console:
    """A console on standard output that does not fold tables when that is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


class Meter(Protocol):
    """Counts the samples answered so far."""

    def advance(self, samples: int, right: float) -> None:
        """`samples` more are answered, `right` of them rightly."""


@contextmanager
def progress(console: Console, label: str, total: int, done: int, right: float) -> Iterator[Meter]:
    """A bar on a terminal, elsewhere a line now and then; `done` samples are there already, `right` of them right."""
    if not console.is_terminal:
        yield _Lines(console, label, total, done, right)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, label, total, done, right)


class _Bar:
    def __init__(self, bar: Progress, label: str, total: int, done: int, right: float) -> None:
        self._bar, self._done, self._right = bar, done, right
        self._task = bar.add_task(label, total=total, completed=done, accuracy=_share(right, done))

    def advance(self, samples: int, right: float) -> None:
        self._done += samples
        self._right += right
        self._bar.update(self._task, advance=samples, accuracy=_share(self._right, self._done))


class _Lines:
    def __init__(self, console: Console, label: str, total: int, done: int, right: float) -> None:
        self._console, self._label, self._total, self._done, self._right = console, label, total, done, right
        self._last = time.monotonic()
        if done:
            console.print(f"{label}: {done} of {total} samples are there already", soft_wrap=True)

    def advance(self, samples: int, right: float) -> None:
        self._done += samples
        self._right += right
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last = now
            accuracy = _share(self._right, self._done)
            self._console.print(f"{self._label}: {self._done}/{self._total}, accuracy {accuracy}", soft_wrap=True)


def _share(right: float, done: int) -> str:
    return f"{right / done:.3f}" if done else "  -  "


def table(runs: Sequence[Run]) -> Table:
    """The runs' table: method, keep, tokens after / before, accuracy and its standard error, retention, seconds."""
    first = runs[0].metrics
    asked = f"{first['samples']} samples" + (f", seed {first['seed']}" if first["seed"] else "")
    view = Table(title=f"{first['model']} on {first['benchmark']} ({asked})", title_justify="left")
    view.add_column("method", no_wrap=True)
    for name in ("keep", "tokens", "accuracy", "retention", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        m = run.metrics
        view.add_row(
            method_label(m),
            str(m["keep"]),
            f"{m['tokens_after']:.4g} of {m['tokens_before']:.4g}",
            f"{m['accuracy']:.3f} ± {m['accuracy_stderr']:.3f}",
            "-" if m["retention"] is None else f"{m['retention']:.1%}",
            f"{m['seconds']:.1f}",
        )
    return view


def method_label(metrics: dict[str, object]) -> str:
    """The method's name with the options that were given, and whether the images were blank."""
    options = metrics.get("options") or {}
    assert isinstance(options, dict)
    told = [f"{key}={str(value).lower()}" for key, value in options.items()] + (
        ["blank"] if metrics.get("blank") else []
    )
    return " ".join([str(metrics["method"]), *told])


def failures(run: Run, shown: int = 5) -> list[str]:
    """Which samples of a run failed, and why, the first few of them in words."""
    failed = [row for row in run.predictions if "error" in row]
    lines = [f"sample {row['id']!r} failed: {' '.join(str(row['error']).split())}" for row in failed[:shown]]
    rest = f"{', '.join(row['id'] for row in failed[shown:])}; " if len(failed) > shown else ""
    return [
        *lines,
        f"{rest}{len(failed)} of {len(run.predictions)} samples failed in {run.folder}; overwrite=true asks again",
    ]


def complain(message: str) -> None:
    """One plain line on standard error."""
    print(f"error: {message}", file=sys.stderr)
