"""Command-line overrides -> plain configurations: Hydra composes, its complaints become VPruneErrors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vprune.errors import VPruneError
from vprune.eval.models import HUB_ID
from vprune.eval.options import GENERIC, entries, groups_of, listed, names_of
from vprune.method_files import METHOD_FILE, method_label, read_method

_PATHS = ("out", "model", "method", "benchmark", "model.path", "benchmark.path")


@dataclass(frozen=True)
class Composed:
    """A resolved configuration, and the overrides (key, value as written) that led to it."""

    config: dict[str, Any]
    overrides: tuple[tuple[str, str], ...]


def compose_all(overrides: Sequence[str], sweep: bool = False, primary: str = "eval") -> list[Composed]:
    """The configuration that `overrides` ask for, or with `sweep` those of every combination of comma lists.

    `model=` and `benchmark=` also take a folder (or a hub id) in place of an entry's name, `method=` a YAML file.
    `primary` is the YAML that composes them.
    Raises VPruneError for anything that does not compose.
    """
    with initialize_config_module("vprune.conf", version_base="1.3", job_name="vprune"):
        return [_composed(combination, primary) for combination in _combinations(overrides, sweep)]


def unknown(key: str, value: object, known: Sequence[str], words: str = "") -> VPruneError:
    """The error for a value that is none of those known (listed in other `words`), with the nearest one suggested."""
    there_is = words or ", ".join(known)
    return VPruneError(f"{key}={value} is unknown{_nearest(str(value), known)}; there is {there_is}")


def _combinations(overrides: Sequence[str], sweep: bool) -> list[list[Override]]:
    parsed = _parse(overrides)
    for override in parsed:
        if override.is_delete():
            raise VPruneError(f"{override.input_line}: nothing can be taken out of the configuration; try =null")
        if override.is_sweep_override() and not sweep:
            remedy = "add -m to run one after the other, or write key=[a,b] for a list"
            raise VPruneError(f"{override.input_line} names several values; {remedy}")
    if not sweep:
        return [parsed]
    try:
        (batches,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise VPruneError(f"this sweep is not possible: {error}; list the values, as in keep=0.5,0.25") from error
    return [_parse(batch) for batch in batches]


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = []
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            if key in _PATHS and value:  # a folder's name may hold signs that Hydra's grammar wants quoted
                parsed += parser.parse_overrides([f"{key}={_quoted(value)}"])
                continue
            remedy = f"did you mean {text}=VALUE?"
            if "=" in text:
                remedy = "put quotes around a value with blanks, commas or signs: key=\"'a, b'\""
            raise VPruneError(f"{text!r} is not an override of the form key=value; {remedy}") from error
    return parsed


def _composed(overrides: Sequence[Override], primary: str) -> Composed:
    file = next((_method_file(override) for override in reversed(overrides) if _method_file(override)), None)
    # What a method's file says is no entry of a group: Hydra composes the rest, and its keys are put in afterwards.
    within = [override for override in overrides if file and override.key_or_group.startswith("method.")]
    _refuse_strangers(overrides, primary)
    lines = [
        line
        for override in overrides
        if override not in within and not (file and override.key_or_group == "method")
        for line in _lines(override, primary)
    ]
    try:
        composed = compose(primary, overrides=lines, return_hydra_config=True)
        method = composed.hydra.runtime.choices.method
        config = OmegaConf.create({key: composed[key] for key in composed if key != "hydra"})
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise VPruneError(f"nothing was given for {', '.join(missing)}: add {missing[0]}=... to the command")
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except HydraException as error:
        raise _complaint(error, lines, primary) from error
    except OmegaConfBaseException as error:
        raise VPruneError(f"the configuration is incomplete or wrong: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    plain["method"] = {"name": method, **plain["method"]} if file is None else _from_file(file, within)
    pairs = (str(override.input_line).partition("=") for override in overrides)
    written = tuple((key.lstrip("+"), value.strip("'\"")) for key, _, value in pairs)
    return Composed({str(key): value for key, value in plain.items()}, written)


def _refuse_strangers(overrides: Sequence[Override], primary: str) -> None:
    """Hydra lets +KEY=VALUE add what nobody reads; below a group it may be an option of a class.

    Raises:
        VPruneError: such a key.
    """
    added = [one.key_or_group for one in overrides if one.is_add() or one.is_force_add()]
    strangers = [key for key in added if "." not in key and key != "hydra"]
    if strangers:
        known = names_of(primary)
        if strangers[0] not in known:
            raise VPruneError(
                f"there is no option {strangers[0]!r}{_nearest(strangers[0], known)}; there is {', '.join(known)}"
            )


def _lines(override: Override, primary: str) -> list[str]:
    """The override itself, or the generic entry of its group and the path that its value names."""
    key, line = override.key_or_group, str(override.input_line)
    if key not in groups_of(primary) or override.package is not None or override.is_add():
        return [line]
    value = override.value()
    name = value.text if isinstance(value, QuotedString) else str(value)
    if name in entries(key):
        return [line]
    folder = Path(name).expanduser()
    if key in GENERIC and name.strip() and folder.is_dir():
        name = str(folder.resolve())
    elif key != "model" or not re.fullmatch(HUB_ID, name):
        raise unknown(key, name, entries(key), listed(key))
    return [f"{key}={GENERIC[key]}", f"{key}.path={_quoted(name)}"]


def _quoted(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def _method_file(override: Override) -> str | None:
    """The path of the YAML file that `method=` names, None if the override does not."""
    if override.key_or_group != "method" or override.package is not None or override.is_add():
        return None
    value = override.value()
    name = value.text if isinstance(value, QuotedString) else str(value)
    return str(Path(name).expanduser().resolve()) if name.endswith(METHOD_FILE) else None


def _from_file(file: str, within: Sequence[Override]) -> dict[str, Any]:
    """A method's configuration from its own file, with the values that overrides of its keys give."""
    config: dict[str, Any] = {"name": method_label(file), "file": file, **read_method(file)}
    for override in within:
        *path, last = override.key_or_group.split(".")[1:]
        owner: Any = config
        for part in path:
            owner = owner.get(part) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or last not in owner:
            known = [name for name in _flat(OmegaConf.create(config)) if not name.endswith("_target_")]
            raise unknown("method." + ".".join([*path, last]), override.value(), known)
        owner[last] = override.value()
    return config


def _complaint(error: HydraException, lines: Sequence[str], primary: str) -> VPruneError:
    found = re.search(r"Could not override '([^']+)'", str(error))
    if found is None:
        return VPruneError(" ".join(str(error).split()))
    key = found.group(1)
    groups = [line for line in lines if line.partition("=")[0] in groups_of(primary)]
    within = f"{key.partition('.')[0]}."
    shown = (
        [name for name in _flat(compose(primary, overrides=groups)) if name.startswith(within)] if "." in key else []
    )
    shown = [name for name in shown if not name.endswith("_target_")] or names_of(primary)
    return VPruneError(f"there is no option {key!r}{_nearest(key, shown)}; there is {', '.join(shown)}")


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in map(str, config):
        opaque = OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key)
        value = None if opaque else config[key]
        names += _flat(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [f"{prefix}{key}"]
    return names


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
