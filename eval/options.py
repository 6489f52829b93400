"""What a command can be told, read from its YAML: the one source of its help and of the lists in its errors."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from textwrap import wrap
from typing import NamedTuple

import yaml

GENERIC = {"model": "hf", "benchmark": "folder"}
"""The entry that a folder (or hub id) given in place of an entry's name stands for."""
_BESIDES = {
    "model": "a local folder, a hub id owner/name",
    "method": "a .yaml file",
    "benchmark": "a folder with samples.jsonl and its images",
}
_WIDTH = 120


class Option(NamedTuple):
    """A key of a command's YAML, `prompting.rounds` for one within another, and what stands beside it."""

    name: str
    default: str
    meaning: str


def entries(group: str) -> list[str]:
    """The names of a config group: its YAML files."""
    folder = files("vprune.conf") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def groups_of(primary: str) -> list[str]:
    """The groups that conf/PRIMARY.yaml chooses entries of."""
    return [next(iter(one)) for one in yaml.safe_load(_text(primary))["defaults"] if isinstance(one, dict)]


def options_of(primary: str) -> list[Option]:
    """The keys of conf/PRIMARY.yaml with their defaults and comments."""
    found, above = [], ""
    for line in _text(primary).partition("_self_\n")[2].splitlines():
        key, colon, rest = line.partition(":")
        if not colon or line.startswith("#") or key.strip() == "_target_":
            continue
        value, _, meaning = rest.partition(" # ")
        if not line.startswith(" "):
            above = "" if rest else f"{key}."
        if rest:
            found.append(Option(above + key.strip(), value.strip(), meaning))
    return found


def names_of(primary: str) -> list[str]:
    """All that stands before a `=`: groups first, then options."""
    return [*groups_of(primary), *(option.name for option in options_of(primary))]


def listed(group: str) -> str:
    """What `group=` may be, in words."""
    return ", ".join([*entries(group), *([_BESIDES[group]] if group in _BESIDES else [])])


def help_text(primary: str, last: Sequence[str]) -> str:
    """The groups with their entries, every option with its default and meaning, and the `last` lines."""
    lines = ["groups (group=entry):"]
    for group in groups_of(primary):
        lines += wrap(listed(group), _WIDTH, initial_indent=f"  {group:<10} ", subsequent_indent=" " * 13)
    lines += ["", "options (key=value), with their defaults:"]
    lines += [f"  {f'{name}={default}':<26} {meaning}".rstrip() for name, default, meaning in options_of(primary)]
    return "\n".join([*lines, "", *last])


def _text(primary: str) -> str:
    return (files("vprune.conf") / f"{primary}.yaml").read_text(encoding="utf-8")
