"""`vprune train WHAT`: dispatches to a recipe with its Hydra configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from vprune.errors import VPruneError


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
    with initialize_config_module("vprune.conf", version_base="1.3"):
        config = compose("train/" + name, overrides=overrides)
    print(recipe(config))
    return 0


def _train_vlm(config: DictConfig) -> Path:
    from vprune.training.vlm import train

    return train(config)


def _train_scorer(config: DictConfig) -> Path:
    from vprune.training.scorer import train

    return train(config)
