"""What tells a run from the plain one of its method, in a few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

# Told by the section or by the columns of the leaderboard, or without consequence for the answers.
_TOLD = {"model", "benchmark", "limit", "keep", "blank", "fingerprint", "device"}
# Given at the top of a configuration, and placed in its method from there.
_PLACED = {"layer", "recycle", "size_aware", "stages", "cells"}
_NO_SETTING = {"name", "file", "keep", "seed", "_target_"}


def variant(config: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> str:
    """What differs from the method's own YAML, and whatever else of `config` differs from `peers`.

    `peers` are the configurations of all runs of the same method on the same samples.
    """
    mine = method_settings(config)
    plain = _plain(str(_mapping(config.get("method")).get("name")))
    if plain is not None:
        words = [_word(key, value) for key, value in mine.items() if value != plain.get(key)]
    else:
        words = _differing(mine, map(method_settings, peers))
    words += _differing(_surroundings(config), map(_surroundings, peers))
    return ", ".join(dict.fromkeys(words))  # (an option that the method's own file gives is in both)


def method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a run's method ran, by their own names: `layer`, not `scorer.layer`."""
    return {key.rpartition(".")[2]: value for key, value in _settings(_mapping(config.get("method"))).items()}


@cache
def _plain(method: str) -> dict[str, Any] | None:
    """The settings in the method's YAML; None for a method that this version does not have."""
    file = files("vprune.conf") / "method" / f"{method}.yaml"
    return method_settings({"method": yaml.safe_load(file.read_text(encoding="utf-8"))}) if file.is_file() else None


def _settings(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(method).items() if key.rpartition(".")[2] not in _NO_SETTING}


def _surroundings(config: Mapping[str, Any]) -> dict[str, Any]:
    return _flat({key: value for key, value in config.items() if key not in {"method"} | _TOLD | _PLACED})


def _differing(mine: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """What others have otherwise; an option that was not given (None) is the plain case and goes without saying."""
    found = list(others)
    told = [(key, value) for key, value in mine.items() if value is not None]
    return [_word(key, value) for key, value in told if any(other.get(key) != value for other in found)]


def _word(key: str, value: Any) -> str:
    if key == "size_aware":
        return "size-aware" if value else "not size-aware"
    if key == "recycle":
        return "no recycling" if value == "none" else str(value)
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return f"{key} {value}" if plain else f"{key}={value}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
