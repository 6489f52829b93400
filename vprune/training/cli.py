"""`vprune train WHAT`: dispatches to a recipe with its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vprune.errors import VPruneError
from vprune.training.named_values import values

_ABSENT = object()
_WHOLE = ("batch_size", "evaluate_every", "label_batch", "limit", "log_every", "questions_per_image", "rounds", "steps")
_POSITIVE = ("keeps", "lr", "minutes", "temperature")
_SHARES = ("average", "keeps", "levels", "mask_top", "share")
_REAL = ("checkpoint_minutes", "widest", *_POSITIVE, *_SHARES)  # even where a recipe happens to give an integer
_OPTIONAL = ("limit", "minutes", "steps")
_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number"}


def main(arguments: list[str]) -> int:
    """Runs `vprune train WHAT key=value ...`; that WHAT is a recipe `vprune.cli` has seen to.

    Raises:
        VPruneError: an override does not fit the recipe's configuration.
    """
    recipes = {"vlm": _train_vlm, "scorer": _train_scorer, "clip": _train_clip, "sam": _train_sam}
    name, *overrides = arguments
    recipe: Callable[[DictConfig], Path] = recipes[name]
    print(recipe(configured(name, overrides)))
    return 0


def configured(name: str, overrides: list[str]) -> DictConfig:
    """The recipe of conf/train/NAME.yaml with some of its values exchanged, `key=value` each.

    (Its `model` is a name or a folder, and not an entry of the group of that name, which Hydra would take it for.)

    Raises:
        VPruneError: a word that is no `key=value`, a key that the recipe does not have, a value of another kind than
            the recipe's, or one out of range.
    """
    text = (files("vprune.conf") / "train" / f"{name}.yaml").read_text(encoding="utf-8")
    config = OmegaConf.create(text)
    OmegaConf.set_struct(config, True)
    for word in overrides:
        key, equals, _ = word.partition("=")
        try:
            if not equals or OmegaConf.select(config, key, throw_on_missing=True, default=_ABSENT) is _ABSENT:
                known = [str(one) for one in config]
                inner = [name for name, _ in values(OmegaConf.to_container(config))]
                close = [one for one in inner if one.endswith(f".{key}")] or get_close_matches(key, known + inner, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise VPruneError(
                    f"vprune train {name} {word}: there is no such value{hint}; there is {', '.join(known)}"
                )
            own = _plain(OmegaConf.select(config, key))
            config.merge_with_dotlist([word])
            _check(f"vprune train {name} {word}", key, own, _plain(OmegaConf.select(config, key)))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise VPruneError(f"vprune train {name} {word}: {' '.join(str(error).split())}") from error
    assert isinstance(config, DictConfig)
    return config


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _check(said: str, key: str, own: Any, given: Any) -> None:
    """Refuse a value that is of another kind than the recipe's `own`, or out of range.

    Raises:
        VPruneError: it is.
    """
    last = key.rpartition(".")[2]
    if isinstance(own, dict):
        raise VPruneError(f"{said}: {key} is a group; give one of {', '.join(f'{key}.{one}' for one in own)}")
    if isinstance(own, list):
        if not isinstance(given, list) or not given:
            raise VPruneError(f"{said}: expected a list, as {key}=[{','.join(map(str, own))}]")
        for one in given:
            _check(said, key, own[0], one)
        return
    if given is None and (own is None or last in _OPTIONAL):
        return
    kind = int if last in _WHOLE else float if last in _REAL else type(own)
    numbers = (int, float) if kind is float else kind
    if kind in _KINDS and (not isinstance(given, numbers) or isinstance(given, bool) != (kind is bool)):
        raise VPruneError(f"{said}: expected {_KINDS[kind]}, and not {given!r}; the recipe has {key}={own}")
    if last == "compile" and not (isinstance(given, bool) or given == "auto"):
        raise VPruneError(f"{said}: expected auto, true or false, and not {given!r}")
    if given is None or (kind not in (int, float) and isinstance(given, dict | list)):
        raise VPruneError(f"{said}: expected one value, as {key}={own}")
    if kind in (int, float):
        least = 1 if last in _WHOLE else 0
        if not least <= given < math.inf or (last in _POSITIVE and not given) or (last in _SHARES and given > 1):
            bounds = f"{'above' if last in _POSITIVE else 'at least'} {least}{', at most 1' if last in _SHARES else ''}"
            raise VPruneError(f"{said}: expected {_KINDS[kind]} {bounds}")


def _train_vlm(config: DictConfig) -> Path:
    from vprune.training.vlm import train

    return train(config)


def _train_scorer(config: DictConfig) -> Path:
    from vprune.training.scorer import train

    budgets, shares = len(config.effect.keeps), len(config.effect.how_often)
    if budgets != shares or not sum(config.effect.how_often):
        raise VPruneError(
            f"effect.keeps={list(config.effect.keeps)} has {budgets} budgets and "
            f"effect.how_often={list(config.effect.how_often)} {shares} shares of the steps: give one for each, not "
            "all of them 0"
        )
    if len(config.effect.temperature) != 2:
        raise VPruneError(
            f"effect.temperature={list(config.effect.temperature)}: give two, of the first step and of the last"
        )
    return train(config)


def _train_clip(config: DictConfig) -> Path:
    from vprune.training.clip import train

    return train(config)


def _train_sam(config: DictConfig) -> Path:
    from vprune.training.sam import train

    return train(config)
