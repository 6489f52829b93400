"""`vprune train WHAT`: dispatches to a recipe with its configuration."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vprune.errors import VPruneError

_ABSENT = object()


def main(arguments: list[str]) -> int:
    """Runs `vprune train WHAT key=value ...`.

    Raises:
        VPruneError: WHAT is no recipe, or an override does not fit its configuration.
    """
    recipes = {"vlm": _train_vlm, "scorer": _train_scorer}
    if not arguments or arguments[0] not in recipes:
        given = arguments[0] if arguments else "nothing"
        raise VPruneError(f"vprune train {given}: recipes are {', '.join(recipes)}; for example `vprune train vlm`.")
    name, *overrides = arguments
    recipe: Callable[[DictConfig], Path] = recipes[name]
    print(recipe(configured(name, overrides)))
    return 0


def configured(name: str, overrides: list[str]) -> DictConfig:
    """The recipe of conf/train/NAME.yaml with some of its values exchanged, `key=value` each.

    (Its `model` is a name or a folder, and not an entry of the group of that name, which Hydra would take it for.)

    Raises:
        VPruneError: a word that is no `key=value`, or a key that the recipe does not have.
    """
    text = (files("vprune.conf") / "train" / f"{name}.yaml").read_text(encoding="utf-8")
    config = OmegaConf.create(text)
    OmegaConf.set_struct(config, True)
    for word in overrides:
        key, equals, _ = word.partition("=")
        try:
            if not equals or OmegaConf.select(config, key, throw_on_missing=True, default=_ABSENT) is _ABSENT:
                known = [str(one) for one in config]
                close = get_close_matches(key, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise VPruneError(
                    f"vprune train {name} {word}: there is no such value{hint}; there is {', '.join(known)}"
                )
            config.merge_with_dotlist([word])
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise VPruneError(f"vprune train {name} {word}: {' '.join(str(error).split())}") from error
    assert isinstance(config, DictConfig)
    return config


def _train_vlm(config: DictConfig) -> Path:
    from vprune.training.vlm import train

    return train(config)


def _train_scorer(config: DictConfig) -> Path:
    from vprune.training.scorer import train

    return train(config)
