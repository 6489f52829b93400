"""What every bench shares: options read from words, and a table written beside what it was measured on."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError

DEVICES = {"device": ("cuda", "cpu"), "size": ("full", "tiny"), "dtype": ("bfloat16", "float16", "float32")}
"""What every bench lets choose of."""


def read_words(
    subject: str,
    words: Sequence[str],
    meanings: Mapping[str, str],
    choices: Mapping[str, Sequence[str]],
    counts: Sequence[str] = (),
) -> dict[str, Any]:
    """The values of key=value words: one of its `choices` where a key has some, an int >= 1 for the keys in `counts`.

    Raises:
        VPruneError: a word is no key=value, a key is unknown, or a value is none of those allowed.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or key not in meanings:
            close = get_close_matches(key, meanings, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise VPruneError(f"vprune bench {subject} takes no {word!r}{hint}; its options are {', '.join(meanings)}")
        values[key] = value
    for key, allowed in choices.items():
        if key in values and values[key] not in allowed:
            raise VPruneError(f"{key}={values[key]}: choose one of {', '.join(allowed)}")
    for key in counts:
        if key in values:
            if not values[key].isdecimal() or int(values[key]) < 1:
                raise VPruneError(f"{key}={values[key]}: give a number, at least 1")
            values[key] = int(values[key])
    return values


def options_text(options: type[Any], meanings: Mapping[str, str], choices: Mapping[str, Sequence[str]]) -> str:
    """A line an option: its default, what it may be, and what it means."""
    lines = []
    for field in fields(options):
        default = "" if field.default is None else field.default
        told = [*([" | ".join(choices[field.name])] if field.name in choices else []), meanings[field.name]]
        lines.append(f"  {f'{field.name}={default}':<24} {': '.join(told)}")
    return "\n".join(lines)


def write(folder: Path, kind: type[Any], rows: Sequence[Any], environment: Mapping[str, Any]) -> None:
    """bench.csv with a line for every row, instances of the dataclass `kind`; bench.json with the same and the machine.

    Each file is replaced as a whole, so that a run that is cut off leaves the last whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [asdict(row) for row in rows]
    new = folder / "bench.csv.new"
    with new.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(kind)])
        table.writeheader()
        table.writerows(lines)
    new.replace(folder / "bench.csv")
    new = folder / "bench.json.new"
    new.write_text(json.dumps({"environment": environment, "rows": lines}, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / "bench.json")
