"""`index.html`: one page that needs nothing beside it, neither network nor files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import vprune
from vprune.eval.reporting import rivals
from vprune.eval.reporting.curves import colours, curves
from vprune.eval.reporting.gallery import Gallery
from vprune.eval.reporting.leaderboard import COUNTED, summary
from vprune.eval.reporting.means import comparisons
from vprune.eval.reporting.sections import Entry, Gathered, Section

_SOFTWARE = ("torch", "transformers", "vprune")


def page(gathered: Gathered, galleries: Sequence[Gallery]) -> str:
    """The page's HTML; `galleries` go with the sections."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vprune.eval.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colour = colours(_by_strength([entry for section in gathered.sections for entry in section.entries]))
    sections = [
        _section(f"task-{number}", section, gallery, colour, _blank_accuracy(section, gathered.sections))
        for number, (section, gallery) in enumerate(zip(gathered.sections, galleries, strict=True), start=1)
    ]
    return environment.get_template("page.html.jinja").render(
        sections=sections,
        comparisons=comparisons(gathered),
        counted=COUNTED,
        colour=colour,
        unfinished=gathered.unfinished,
        broken=gathered.broken,
        version=vprune.__version__,
        written=time.strftime("%d %B %Y, %H:%M"),
    )


def _by_strength(entries: Sequence[Entry]) -> list[str]:
    """The methods, that of the best mean accuracy first."""
    accuracies: dict[str, list[float]] = {}
    for entry in entries:
        accuracies.setdefault(entry.method, []).append(entry.accuracy)
    return sorted(accuracies, key=lambda method: (-fmean(accuracies[method]), method))


def _section(
    anchor: str, section: Section, gallery: Gallery, colour: dict[str, str], blank: float | None
) -> dict[str, Any]:
    counts = section.entries[0].run.metrics.get("samples_by_kind") or {}
    sentences = summary(section)
    if blank is not None:
        sentences.append(f"With every image blanked, the full model still gets {100 * blank:.1f}%.")
    return {
        "anchor": anchor,
        "title": section.title,
        "detail": section.detail,
        "samples": section.samples,
        "entries": section.entries,
        "summary": sentences,
        "tiles": _tiles(section),
        "curves": curves(section, colour, blank),
        "times": None if section.timing else curves(section, colour, blank, over="seconds"),
        "timing": section.timing,
        "rivals": rivals.leads(section),
        "default": rivals.DEFAULT,
        "kind_error": _kind_error(section, counts),
        "annotated": ", ".join(sorted({entry.method for entry in section.entries if entry.needs_annotation})),
        "board": [
            _row(section, entry, colour) | {"opens_budget": before.budget != entry.budget}
            for before, entry in pairwise([section.entries[0], *section.entries])
        ],
        "kinds": [(kind, counts.get(kind)) for kind in section.kinds],
        "gallery": gallery,
        "facts": _facts(section),
        "commands": list(dict.fromkeys(filter(None, (entry.environment.get("command") for entry in section.entries)))),
    }


def _kind_error(section: Section, counts: dict[str, int]) -> float | None:
    """The largest standard error in a kind; None where a kind has a single sample, whose error nobody knows."""
    if min(counts.values(), default=2) < 2:
        return None
    return max((error for entry in section.entries for error in entry.kind_errors.values()), default=None)


def _row(section: Section, entry: Entry, colour: dict[str, str]) -> dict[str, Any]:
    return {
        "label": entry.label,
        "method": entry.method,
        "variant": entry.variant,
        "colour": colour.get(entry.method, "ink"),
        "annotated": entry.needs_annotation,
        "best": not entry.is_full and section.stands_out(entry),
        "failed": entry.run.metrics.get("failed", 0),
        "budget": "all" if entry.is_full else entry.budget,
        "share": entry.share,
        "tokens": entry.tokens_after,
        "accuracy": entry.accuracy,
        "stderr": entry.stderr,
        "retention": entry.retention,
        "caveat": section.caveat(entry),
        "seconds": entry.seconds,
        "overhead": entry.overhead,
        "cells": [entry.accuracy, *(entry.by_kind.get(kind) for kind in section.kinds)],
    }


def _tiles(section: Section) -> list[dict[str, str]]:
    """The full model, and the best method at every budget."""
    tiles = []
    if section.full is not None:
        full = section.full
        unit = f"right with {full.tokens_before:.0f} tokens"
        tiles.append(
            {"budget": "All tokens", "value": f"{100 * full.accuracy:.1f}%", "unit": unit, "method": "full model"}
        )
    for budget in section.budgets:
        best = section.best(budget)
        if best is None:
            continue
        value, of = (best.accuracy, "right") if best.retention is None else (best.retention, "of that accuracy")
        tiles.append(
            {
                "budget": f"{budget} kept",
                "value": f"{100 * value:.1f}%",
                "unit": f"{of}, {best.tokens_after:.0f} tokens",
                "method": best.label,
            }
        )
    return tiles


def _blank_accuracy(section: Section, sections: Sequence[Section]) -> float | None:
    """The full model's accuracy on the same samples with every image blanked, where such a run is there."""
    if section.blank:
        return None
    for other in sections:
        same = (other.model, other.benchmark, other.fingerprint) == (
            section.model,
            section.benchmark,
            section.fingerprint,
        )
        if other.blank and same and other.full is not None:
            return other.full.accuracy
    return None


def _facts(section: Section) -> list[tuple[str, str]]:
    """Hardware, versions and the like, each distinct value of the section's runs."""
    found: dict[str, dict[str, None]] = {}
    for entry in section.entries:
        environment = entry.environment
        hardware, versions = environment.get("hardware") or {}, environment.get("versions") or {}
        processor = [hardware.get("processor"), f"{hardware['cores']} cores" if "cores" in hardware else None]
        facts = {
            "Hardware": hardware.get("gpu") or ", ".join(filter(None, processor)),
            "Precision": environment.get("dtype"),
            "Software": ", ".join(f"{name} {versions[name]}" for name in _SOFTWARE if name in versions),
            "Source": entry.commit,
        }
        for name, value in facts.items():
            if value:
                found.setdefault(name, {})[str(value)] = None
    return [(name, "; ".join(values)) for name, values in found.items()]
