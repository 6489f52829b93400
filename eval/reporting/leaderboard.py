"""The leaderboard as data, as Markdown and as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from vprune.eval.reporting import rivals
from vprune.eval.reporting.means import comparisons, table
from vprune.eval.reporting.sections import Entry, Gathered, Section

_NAMED = 3  # runs that a sentence names; more of them it counts

# What the columns mean; said on the page and in Markdown.
COUNTED = (
    "Tokens are those that a layer of the decoder reads, in the mean over layers and questions, merged ones included. "
    "Seconds are those of a whole run, pruning included, which also stands alone. Retention is the score divided by "
    "the full model's on the same questions; over several benchmarks the field gives the mean of these quotients. "
    "Errors are one standard error of the mean."
)


def rows(gathered: Gathered) -> list[dict[str, Any]]:
    """`leaderboard.json`: one object a run, sections one after the other."""
    return [_row(section, entry) for section in gathered.sections for entry in section.entries]


def _row(section: Section, entry: Entry) -> dict[str, Any]:
    return {
        "method": entry.method,
        "keep": entry.keep,
        "accuracy": entry.accuracy,
        "accuracy_stderr": entry.stderr,
        "retention": entry.retention,
        "retention_caveat": section.caveat(entry) or None,
        "tokens_after": entry.tokens_after,
        "seconds": entry.seconds,
        "seconds_pruning": entry.overhead,
        "by_kind": entry.by_kind,
        "by_kind_stderr": entry.kind_errors,
        "variant": entry.variant,
        "recycle": entry.option("recycle"),
        "size_aware": entry.option("size_aware"),
        "layer": entry.option("layer"),
        "needs_annotation": entry.needs_annotation,
        "tokens_before": entry.tokens_before,
        "model": section.model,
        "benchmark": section.benchmark,
        "blank": section.blank,
        "samples": section.samples,
        "samples_fingerprint": section.fingerprint,
        "seed": entry.run.metrics.get("seed"),
        "failed": entry.run.metrics.get("failed", 0),
        "run": entry.name,
    }


def summary(section: Section) -> list[str]:
    """The section in a few sentences: the full model, then who does best at which budget."""
    full = section.full
    if full is not None:
        right = f"the model answers {_percent(full.accuracy)} of {section.asked} right"
        sentences = [f"Reading all {full.tokens_before:.0f} visual tokens, {right}."]
    else:
        sentences = [f"These runs asked {section.asked}; no run of the full model stands beside them."]
    bests = [best for best in map(section.best, section.budgets) if best is not None]
    for (label, verb), group in groupby(bests, lambda best: (best.label, _verb(section, best))):
        sentences.append(_sentence(label, verb, list(group)))
    annotated = sorted({entry.method for entry in section.pruned if entry.needs_annotation})
    if annotated:
        verb = "reads" if len(annotated) == 1 else "read"
        sentences.append(f"{_listed(annotated)} {verb} the annotation: the ceiling, left out of this comparison.")
    sentences += filter(None, [rivals.verdict(section)])
    return sentences + caveats(section)


def caveats(section: Section) -> list[str]:
    """What to know about the column of retentions, a sentence each: which runs have none and why, and the like."""
    said: dict[str, list[str]] = {}
    for entry in section.entries:
        said.setdefault(section.caveat(entry), []).append(f"{entry.label} {entry.budget}")
    return [
        f"Retention of {_listed(whom) if len(whom) <= _NAMED else f'{len(whom)} runs'}: {why}."
        for why, whom in said.items()
        if why
    ]


def _verb(section: Section, best: Entry) -> str:
    """How a run at the top of its budget stands to the others there."""
    if len(section.at(best.budget)) == 1:
        return "is measured alone"
    return "does best" if section.stands_out(best) else "leads, but not by two standard errors of the difference"


def _sentence(label: str, verb: str, bests: Sequence[Entry]) -> str:
    where = _listed([best.budget for best in bests])
    where += " of the tokens" if all(isinstance(best.keep, float) for best in bests) else ""
    kept = [best.retention for best in bests if best.retention is not None]
    if len(kept) == len(bests):
        what = f"keeping {_listed([_percent(value) for value in kept])} of the full model's accuracy"
    else:
        what = f"with {_listed([_percent(best.accuracy) for best in bests])} right"
    return f"At {where}, {label} {verb}, {what}."


def _listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def markdown(gathered: Gathered) -> str:
    """`leaderboard.md`: retention over benchmarks; per section the sentences, accuracy by budget, and every run."""
    parts = ["# Leaderboard", ""]
    for comparison in comparisons(gathered):
        parts += [f"## {comparison.title}", "", comparison.told.replace("*", "\\*"), ""]
        parts += [*_markdown_table(*table(comparison)), ""]
    for section in gathered.sections:
        parts += [f"## {section.title}, {section.detail}", "", " ".join(summary(section)), ""]
        parts += [
            *_pivot(section),
            "",
            *_rivals(section),
            " ".join(filter(None, [COUNTED, section.timing])),
            "",
            "<details><summary>Every run</summary>",
            "",
            *_every_run(section),
            "",
            "</details>",
            "",
        ]
    for title, listed in (("Unfinished", gathered.unfinished), ("Could not be read", gathered.broken)):
        if listed:
            parts += [f"## {title}", "", *(f"- `{name}`: {why}" for name, why in listed.items()), ""]
    return "\n".join(parts)


def pivot(section: Section) -> tuple[list[str], list[list[str]]]:
    """Accuracy by method and budget: the column titles, and rows of text with the method first."""
    budgets = section.budgets
    titles = ["method", *(["all tokens"] if section.full else []), *budgets]
    lines = [["full model", _percent(section.full.accuracy), *[""] * len(budgets)]] if section.full else []
    for label in dict.fromkeys(entry.label for entry in _by_strength(section)):
        at = {entry.budget: entry for entry in section.pruned if entry.label == label}
        mark = " *" if next(iter(at.values())).needs_annotation else ""
        cells = [_percent(at[budget].accuracy) if budget in at else "" for budget in budgets]
        lines.append([label + mark, *([""] if section.full else []), *cells])
    return titles, lines


def _by_strength(section: Section) -> list[Entry]:
    """Pruned runs, the method with the best mean accuracy first."""
    by_label: dict[str, list[float]] = {}
    for entry in section.pruned:
        by_label.setdefault(entry.label, []).append(entry.accuracy)
    return sorted(section.pruned, key=lambda entry: (-fmean(by_label[entry.label]), entry.label))


def _pivot(section: Section) -> list[str]:
    titles, lines = pivot(section)
    table = _markdown_table(titles, lines)
    if any(entry.needs_annotation for entry in section.pruned):
        table += ["", "\\* reads the annotation: a ceiling, no method."]
    return table


def _rivals(section: Section) -> list[str]:
    titles, lines = rivals.table(section)
    if not lines:
        return []
    return [f"Where another run is ahead of `{rivals.DEFAULT}`:", "", *_markdown_table(titles, lines), ""]


def _every_run(section: Section) -> list[str]:
    titles = ["method", "keep", "tokens", "accuracy", "retention", "seconds", "of it pruning", *section.kinds]
    lines = [
        [
            entry.label,
            entry.budget,
            f"{entry.tokens_after:.1f}",
            f"{_percent(entry.accuracy)} ± {100 * entry.stderr:.1f}",
            _percent(entry.retention) or "none",
            *("" if seconds is None else f"{seconds:.1f}" for seconds in (entry.seconds, entry.overhead)),
            *(_percent(entry.by_kind.get(kind)) for kind in section.kinds),
        ]
        for entry in section.entries
    ]
    return _markdown_table(titles, lines)


def _markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [row(titles), "|---|" + "---:|" * (len(titles) - 1), *map(row, lines)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
