"""Rows of a published question file, whose every mistake is told with the file, the row and the field."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError

_CELL_BYTES = 2**30  # a cell may hold an image; the csv module's own limit is 128 KiB
_SHOWN = 60


@dataclass(frozen=True)
class Row:
    """One question as published: its fields, its number (the first row is 1) and the file or repository it is from."""

    values: Mapping[str, Any]
    number: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"

    def has(self, field: str) -> bool:
        """Whether the field is there and filled; tables write nothing as "" or "nan"."""
        value = self.values.get(field)
        if isinstance(value, float):
            return not math.isnan(value)
        return value is not None and not (isinstance(value, str) and value.strip().lower() in ("", "nan"))

    def text(self, *fields: str) -> str:
        """The text (or number, as text) in the first of `fields` that is filled; VPruneError if none is."""
        for field in fields:
            if self.has(field):
                value = self.values[field]
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise self.error(field, f"should be text, got {shown(value)}")
                return str(value).strip()
        raise self.missing(*fields)

    def optional(self, field: str) -> str:
        """The text in `field`, "" where there is none."""
        return self.text(field) if self.has(field) else ""

    def integer(self, field: str) -> int:
        """The integer in `field`; VPruneError if it is none."""
        text = self.text(field)
        try:
            return int(text)
        except ValueError as error:
            raise self.error(field, f"should be an integer, got {shown(self.values[field])}") from error

    def one_of(self, field: str, known: Iterable[str]) -> str:
        """The text in `field`, in the spelling of `known`; VPruneError if it is none of these in any case."""
        spelling = {name.lower(): name for name in known}
        text = self.text(field)
        if text.lower() not in spelling:
            raise self.error(field, f"should be one of {', '.join(spelling.values())}, got {shown(text)}")
        return spelling[text.lower()]

    def texts(self, field: str) -> tuple[str, ...]:
        """The texts in `field`: a list of texts, or of objects with an `answer`; VPruneError for anything else."""
        if not self.has(field):
            raise self.missing(field)
        value = self.values[field]
        if isinstance(value, str) or not isinstance(value, list | tuple):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise self.error(field, f"should be a list of texts, got the {kind} {shown(value)}")
        entries = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in value]
        texts = tuple(entry for entry in entries if isinstance(entry, str))
        if len(texts) < len(entries):
            place = next(i for i, entry in enumerate(entries) if not isinstance(entry, str))
            raise self.error(field, f"should hold texts, entry {place + 1} is {shown(value[place])}")
        if not texts:
            raise self.error(field, "is an empty list")
        return texts

    def missing(self, *fields: str) -> VPruneError:
        """The error for a row that lacks all of `fields`."""
        empty = any(field in self.values for field in fields)
        there = ", ".join(map(str, self.values)) or "nothing"
        return self.error(" or ".join(fields), "is empty" if empty else f"is missing; the row has {there}")

    def error(self, field: str, problem: str) -> VPruneError:
        """The error for a field of this row."""
        return VPruneError(f"{self}: field {field!r} {problem}")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON list, of one JSON object a line (under either suffix), or of a TSV or CSV file with a header.

    Raises VPruneError, with the row, for what cannot be parsed.
    """
    if path.suffix.lower() in (".tsv", ".csv"):
        yield from _table(path, "\t" if path.suffix.lower() == ".tsv" else ",")
        return
    content = read_text(path)
    if content.lstrip().startswith("["):
        yield from list_rows(_parsed(content, str(path)), path)
        return
    for number, line in enumerate(content.split("\n"), start=1):  # not splitlines(): texts may hold a U+2028
        if line.strip():
            yield _row(_parsed(line, f"{path}, row {number}"), number, path)


def list_rows(entries: Any, path: Path) -> Iterator[Row]:
    """A parsed JSON list as rows; VPruneError if it is no list of objects."""
    if not isinstance(entries, list):
        raise VPruneError(f"{path}: expected a list of questions, got {shown(entries)}")
    for number, entry in enumerate(entries, start=1):
        yield _row(entry, number, path)


def keyed_rows(path: Path, key: str) -> Iterator[Row]:
    """The rows of a JSON object whose names are the ids, put into the field `key`.

    Raises VPruneError for an id given twice, which a plain JSON reader would pass over.
    """
    pairs = _parsed(read_text(path), str(path), pairs=True)
    if not isinstance(pairs, _Pairs):
        raise VPruneError(f"{path}: expected an object of questions by their ids, got {shown(pairs)}")
    number_of: dict[str, int] = {}
    for number, (name, entry) in enumerate(pairs.pairs, start=1):
        if name in number_of:
            raise VPruneError(f"{path}, row {number}: id {name!r} was given in row {number_of[name]} already")
        number_of[name] = number
        row = _row(_plain(entry), number, path)
        yield Row({key: name, **row.values}, number, row.source)


def read_json(path: Path) -> Any:
    """A JSON file; VPruneError if it cannot be read or parsed."""
    return _parsed(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A UTF-8 file; VPruneError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VPruneError(f"{path} cannot be read ({error})") from error


def shown(value: object) -> str:
    """A value as an error tells it: in quotes, cut to a length that fits a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class _Pairs:
    pairs: list[tuple[str, Any]]


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(entry) for name, entry in value.pairs}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _parsed(text: str, where: str, pairs: bool = False) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs if pairs else None)
    except ValueError as error:
        raise VPruneError(f"{where}: broken JSON ({error})") from error


def _row(entry: Any, number: int, path: Path) -> Row:
    if not isinstance(entry, dict):
        raise VPruneError(f"{path}, row {number}: expected an object with the question's fields, got {shown(entry)}")
    return Row(entry, number, str(path))


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    before = csv.field_size_limit(_CELL_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [Row(entry, number, str(path)) for number, entry in enumerate(_read(file, delimiter), start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VPruneError(f"{path} cannot be read ({error})") from error
    finally:
        csv.field_size_limit(before)
    for row in rows:
        if None in row.values:
            raise VPruneError(f"{row}: has more cells than the header names")
    yield from rows


def _read(file: Iterable[str], delimiter: str) -> Iterator[dict[str, Any]]:
    yield from csv.DictReader(file, delimiter=delimiter)
